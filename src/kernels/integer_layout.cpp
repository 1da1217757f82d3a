#include "kernels/integer_layout.hpp"

#include <bit>
#include <limits>

#include "formats/grouped.hpp"
#include "kernels/prepared_planes.hpp"
#include "quantloom/activations/cuda_activations.hpp"
#include "quantloom/dtype.hpp"
#include "quantloom/formats/bit_packing.hpp"
#include "quantloom/formats/outliers.hpp"
#include "quantloom/formats/sdr.hpp"
#include "quantloom/formats/uniform.hpp"

namespace quantloom {
namespace {

using integers::place_of;

// The format of the codes themselves.
const Format& dense_format(const Format& format) {
  const auto* outliers = dynamic_cast<const Outliers*>(&format);
  return outliers == nullptr ? format : *outliers->dense;
}

// Shifts of a row's columns; empty without.
std::vector<uint8_t> shifts_of_row(const IntegerLayout& layout, const std::map<std::string, Tensor>& planes,
                                   int64_t row) {
  if (!layout.has_shifts()) return {};
  std::vector<uint8_t> groups(static_cast<size_t>(ceil_div(layout.k, layout.group_columns)));
  unpack_bits(packed_row(planes.at("shifts"), row), layout.shift_bits, 0, groups);
  const auto index = group_index_of(planes);
  std::vector<uint8_t> shifts(static_cast<size_t>(layout.k));
  for (size_t c = 0; c < shifts.size(); ++c) {
    shifts[c] =
        groups[index.empty() ? c / static_cast<size_t>(layout.group_columns) : static_cast<size_t>(index[c])];
  }
  return shifts;
}

int zero_of_row(const IntegerLayout& layout, const PackedTensor& packed, int64_t row) {
  if (!layout.asymmetric) return 0;
  uint8_t zero = 0;
  unpack_bits(packed_row(packed.plane("zeros"), 0), layout.bits, layout.per_tensor ? 0 : row, {&zero, 1});
  return zero - layout.center();
}

void require_planes_on_cpu(const std::map<std::string, Tensor>& planes, const char* function) {
  for (const auto& [name, plane] : planes) {
    if (plane.device() != Device::cpu) {
      throw InvalidArgument(name, "a plane on a CUDA device",
                            text_of("one on the CPU, as ", function, " reads"));
    }
  }
}

[[noreturn]] void refuse_outliers() {
  throw Unsupported(
      "integer products take weights whose outliers lie in the columns of the activations' static"
      " outliers, in each row, not others");
}

}  // namespace

std::optional<std::string> why_not_integers(const Format& format) {
  const Format& dense = dense_format(format);
  if (dynamic_cast<const Sdr*>(&dense) != nullptr) return std::nullopt;
  const auto* uniform = dynamic_cast<const Uniform*>(&dense);
  if (uniform == nullptr) {
    return text_of("integer products take weights of the formats uniform and sdr, not ", format.spec());
  }
  if (uniform->group_size > 0 && &dense != &format) {
    return text_of("integer products take outliers of weights with one scale for each output, not ",
                   format.spec());
  }
  if (uniform->group_size > 0 && uniform->group_size % 32 != 0) {
    return text_of("integer products take groups of a multiple of 32 columns, not ", format.spec());
  }
  if (uniform->bits < 2) return text_of("integer products take weights of 2 to 8 bits, not ", format.spec());
  return std::nullopt;
}

IntegerLayout integer_layout(const Format& format, int64_t n, int64_t k, int64_t outlier_columns) {
  if (const auto reason = why_not_integers(format)) throw Unsupported(*reason);
  if (n < 0 || k < 0) throw InvalidArgument("shape", text_of("[", n, ", ", k, "]"), "sizes of 0 or more");
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 128;
  if (n > kMost || k > kMost) {
    throw Unsupported(text_of("no CUDA kernel takes a matrix [", n, ", ", k, "]: expected sizes below 2^24"));
  }
  IntegerLayout layout;
  layout.n = n;
  layout.k = k;
  layout.row_tiles = ceil_div(n, int64_t{128});
  layout.blocks = ceil_div(k, int64_t{integers::kBlockBytes});
  static_cast<void>(checked_mul(checked_mul(layout.row_tiles, layout.blocks), 2 * integers::kSlabBytes));
  const Format& dense = dense_format(format);
  if (const auto* sdr = dynamic_cast<const Sdr*>(&dense)) {
    layout.bits = sdr->bits;
    layout.scale_dtype = sdr->scale_dtype;
    layout.shift_bits = sdr->shift_bits();
    layout.group_columns = sdr->columns_per_group(k);
  } else {
    const auto& uniform = dynamic_cast<const Uniform&>(dense);
    layout.bits = uniform.bits;
    layout.scale_dtype = uniform.scale_dtype;
    layout.asymmetric = !uniform.symmetric;
    layout.per_tensor = uniform.group_size == Uniform::kPerTensor;
    if (uniform.group_size > 0) {
      if (outlier_columns > 0) {
        throw Unsupported(
            text_of("integer products take outliers with one scale for each output, not ", format.spec()));
      }
      layout.group_columns = uniform.group_size;
      layout.step_columns = uniform.group_size % 128 == 0 ? 128 : uniform.group_size % 64 == 0 ? 64 : 32;
    }
    layout.in_registers =
        layout.grouped() || (uniform.bits <= 4 && outlier_columns == 0 && &dense == &format);
  }
  layout.outliers = outlier_columns;
  if (const auto* outliers = dynamic_cast<const Outliers*>(&format)) {
    layout.own_outliers = true;
    if (n > 0 && outliers->entry_count(n, k) != checked_mul(n, outlier_columns)) refuse_outliers();
  }
  return layout;
}

bool is_integer_plane(std::string_view name) {
  return name == "integers" || name == "rows" || name == "outlier_index" || name == "outlier_weights";
}

std::vector<PlaneSpec> integer_planes(const Format& format, int64_t n, int64_t k, int64_t outlier_columns,
                                      bool with_group_index) {
  const IntegerLayout layout = integer_layout(format, n, k, outlier_columns);
  std::vector<PlaneSpec> specs;
  for (const PlaneSpec& spec : format.planes(n, k)) {
    if (spec.name == "codes" || (spec.name == "group_index" && !with_group_index)) continue;
    specs.push_back({spec.name, spec.dtype, spec.shape});
  }
  if (layout.in_registers) {
    static_cast<void>(checked_mul(checked_mul(2 * layout.row_tiles, layout.blocks), layout.record_bytes()));
    specs.push_back({"integers", DType::i8, {2 * layout.row_tiles, layout.blocks, layout.record_bytes()}});
  } else {
    specs.push_back({"integers", DType::i8, {2 * layout.row_tiles, layout.blocks, 64, 128}});
  }
  specs.push_back({"rows", DType::i32, {128 * layout.row_tiles, 4}});
  if (layout.outliers > 0) {
    specs.push_back({"outlier_index", DType::i32, {outlier_index_words(k, layout.outliers)}});
    specs.push_back({"outlier_weights", DType::f16, {2 * layout.row_tiles, layout.outlier_blocks(), 64, 64}});
  }
  return specs;
}

void validate_integers(const IntegerPlanes& prepared) {
  if (prepared.format == nullptr) throw InvalidArgument("prepared", "no format", "planes in integer order");
  int64_t before = -1;
  for (const int32_t column : prepared.outlier_columns) {
    if (column <= before || column >= prepared.k) {
      throw InvalidArgument("outlier_columns", text_of(column, " after ", before),
                            text_of("rising numbers from 0 to ", prepared.k - 1));
    }
    before = column;
  }
  require_prepared_planes(
      prepared, integer_planes(*prepared.format, prepared.n, prepared.k, std::ssize(prepared.outlier_columns),
                               prepared.has("group_index")));
}

void require_outliers_at(const std::vector<int32_t>& wanted, const Tensor& offsets, const Tensor& columns,
                         int64_t n) {
  const int64_t count = std::ssize(wanted);
  const auto column_at = [&](int64_t i) {
    const auto at = static_cast<size_t>(i);
    return columns.dtype() == DType::i32 ? columns.values<int32_t>()[at]
                                         : static_cast<int32_t>(columns.values<uint16_t>()[at]);
  };
  for (int64_t row = 0; row < n; ++row) {
    if (offsets.values<int32_t>()[static_cast<size_t>(row)] != row * count) refuse_outliers();
    for (int64_t i = 0; i < count; ++i) {
      if (column_at(row * count + i) != wanted[static_cast<size_t>(i)]) refuse_outliers();
    }
  }
}

IntegerPlanes prepare_integers(const PackedTensor& packed, std::vector<int32_t> outlier_columns) {
  validate(packed);
  require_planes_on_cpu(packed.planes, "prepare_integers");
  const int64_t outliers = std::ssize(outlier_columns);
  const IntegerLayout layout = integer_layout(*packed.format, packed.n, packed.k, outliers);
  require_consecutive(layout, packed.planes);
  IntegerPlanes prepared{{packed.format, packed.n, packed.k, {}}, std::move(outlier_columns)};
  const std::vector<int32_t>& columns = prepared.outlier_columns;
  for (const PlaneSpec& spec :
       integer_planes(*packed.format, packed.n, packed.k, outliers, packed.planes.contains("group_index"))) {
    Tensor plane(spec.dtype, spec.shape);
    if (!is_integer_plane(spec.name)) copy_plane(packed.plane(spec.name), plane);
    prepared.planes.emplace(spec.name, std::move(plane));
  }
  if (layout.in_registers) {
    fill_records(layout, packed, prepared);
    validate_integers(prepared);
    return prepared;
  }
  const auto bytes = prepared.planes.at("integers").values<int8_t>();
  const auto rows = prepared.planes.at("rows").values<int32_t>();
  std::vector<uint8_t> codes(static_cast<size_t>(packed.k));
  for (int64_t row = 0; row < packed.n; ++row) {
    unpack_bits(packed_row(packed.plane("codes"), row), layout.bits, 0, codes);
    const std::vector<uint8_t> shifts = shifts_of_row(layout, packed.planes, row);
    int32_t sum = 0;
    for (int64_t c = 0; c < packed.k; ++c) {
      const auto at = static_cast<size_t>(c);
      const int half = 1 << (layout.bits - 1);
      // Codes of sdr are in two's complement.
      const int value =
          layout.has_shifts() ? ((codes[at] ^ half) - half) * (1 << shifts[at]) : codes[at] - layout.center();
      bytes[static_cast<size_t>(place_of(row, c, layout.blocks))] = static_cast<int8_t>(value);
      sum += value;
    }
    const bool scaled = packed.k > 0 || layout.per_tensor;
    const float scale = scaled ? scale_at(packed.plane("scales"), layout.per_tensor ? 0 : row) : 0.0F;
    rows[static_cast<size_t>(4 * row)] = std::bit_cast<int32_t>(scale);
    rows[static_cast<size_t>(4 * row + 1)] = sum;
    rows[static_cast<size_t>(4 * row + 2)] = packed.k > 0 ? zero_of_row(layout, packed, row) : 0;
  }
  validate_integers(prepared);
  if (layout.own_outliers) {
    require_outliers_at(columns, packed.plane("outlier_offsets"), packed.plane("outlier_columns"), packed.n);
  }
  if (outliers == 0) return prepared;
  std::ranges::copy(outlier_index(columns, packed.k),
                    prepared.planes.at("outlier_index").values<int32_t>().begin());
  const auto weights = prepared.planes.at("outlier_weights").values<uint16_t>();
  const auto values =
      layout.own_outliers ? packed.plane("outlier_values").values<uint16_t>() : std::span<const uint16_t>();
  for (int64_t row = 0; row < packed.n; ++row) {
    const float scale = std::bit_cast<float>(rows[static_cast<size_t>(4 * row)]);
    const int zero = rows[static_cast<size_t>(4 * row + 2)];
    for (int64_t i = 0; i < outliers; ++i) {
      const int64_t at = place_of(row, columns[static_cast<size_t>(i)], layout.blocks);
      const float dense = scale * static_cast<float>(bytes[static_cast<size_t>(at)] - zero);
      const float own =
          values.empty() ? 0.0F : float_from_f16(values[static_cast<size_t>(row * outliers + i)]);
      weights[static_cast<size_t>(place_of(row, 2 * i, layout.outlier_blocks()) / 2)] =
          f16_from_float(dense + own);
    }
  }
  return prepared;
}

PackedTensor unprepare_integers(const IntegerPlanes& prepared) {
  validate_integers(prepared);
  require_planes_on_cpu(prepared.planes, "unprepare_integers");
  const IntegerLayout layout =
      integer_layout(*prepared.format, prepared.n, prepared.k, std::ssize(prepared.outlier_columns));
  PackedTensor packed{prepared.format, prepared.n, prepared.k, {}};
  for (const PlaneSpec& spec : prepared.format->planes(prepared.n, prepared.k)) {
    if (spec.optional && !prepared.has(spec.name)) continue;
    Tensor plane(spec.dtype, spec.shape);
    if (spec.name != "codes") copy_plane(prepared.plane(spec.name), plane);
    packed.planes.emplace(spec.name, std::move(plane));
  }
  if (layout.in_registers) {
    codes_of_records(layout, prepared, packed);
    return packed;
  }
  const auto bytes = prepared.plane("integers").values<int8_t>();
  Tensor& plane = packed.planes.at("codes");
  std::vector<uint8_t> codes(static_cast<size_t>(packed.k));
  for (int64_t row = 0; row < packed.n; ++row) {
    const std::vector<uint8_t> shifts = shifts_of_row(layout, prepared.planes, row);
    for (int64_t c = 0; c < packed.k; ++c) {
      const auto at = static_cast<size_t>(c);
      const int value = bytes[static_cast<size_t>(place_of(row, c, layout.blocks))];
      const int code = layout.has_shifts() ? value >> shifts[at] : value + layout.center();
      codes[at] = static_cast<uint8_t>(code & ((1 << layout.bits) - 1));
    }
    const auto words = static_cast<size_t>(plane.shape()[1]);
    pack_bits(codes, layout.bits, plane.values<uint32_t>().subspan(static_cast<size_t>(row) * words, words));
  }
  return packed;
}

}  // namespace quantloom
