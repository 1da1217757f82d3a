// The scalar reference of fragment order, and the layout's sizes.
#include "formats/fragment_order.hpp"

#include <algorithm>
#include <limits>
#include <span>
#include <utility>

#include "formats/bilevel_order.hpp"
#include "formats/half_order.hpp"
#include "formats/sum_order.hpp"
#include "kernels/additive_layout.hpp"
#include "kernels/bit_plane_layout.hpp"
#include "kernels/fragment_layout.hpp"
#include "kernels/prepared_planes.hpp"
#include "kernels/spqr_fragments.hpp"
#include "kernels/trellis_layout.hpp"
#include "kernels/vector_fragments.hpp"
#include "quantloom/formats/bit_packing.hpp"
#include "quantloom/formats/codebook.hpp"
#include "quantloom/formats/outliers.hpp"
#include "quantloom/formats/spqr.hpp"
#include "quantloom/formats/uniform.hpp"
#include "quantloom/formats/vector_codebook.hpp"

namespace quantloom {
namespace {

using fragments::kBlockColumns;
using fragments::kBlockRows;
using fragments::kLanes;
using fragments::kUnitCodes;
using fragments::kUnits;

// Calls visit(row_block, column_block, unit, lane) for all units.
template <class Visit>
void for_each_unit(const FragmentLayout& layout, const Visit& visit) {
  for (int64_t rb = 0; rb < layout.row_blocks; ++rb) {
    for (int64_t cb = 0; cb < layout.column_blocks; ++cb) {
      for (int unit = 0; unit < kUnits; ++unit) {
        for (int lane = 0; lane < kLanes; ++lane) visit(rb, cb, unit, lane);
      }
    }
  }
}

int64_t block_word(const FragmentLayout& layout, int64_t row_block, int64_t column_block) {
  return (row_block * layout.column_blocks + column_block) * layout.bits * 128;
}

int64_t parameter_at(const FragmentLayout& layout, int64_t row, int64_t group) {
  return (row / kBlockRows * layout.group_count + group) * kBlockRows +
         fragments::parameter_in_block(static_cast<int>(row % kBlockRows));
}

bool is_outlier_plane(std::string_view name) {
  return name.starts_with("outlier_");
}

// Outliers are the same in both orders.
void copy_outliers(const std::map<std::string, Tensor>& from, std::map<std::string, Tensor>& to) {
  for (const auto& [name, plane] : from) {
    if (is_outlier_plane(name)) copy_plane(plane, to.at(name));
  }
}

void require_on_cpu(const std::map<std::string, Tensor>& planes, const char* what) {
  for (const auto& [name, plane] : planes) {
    if (plane.device() != Device::cpu) {
      throw Unsupported(text_of(what, ": plane ", name, " is on a CUDA device, expected planes on the CPU"));
    }
  }
}

std::vector<PlaneSpec> specs_of(const FragmentLayout& layout, bool with_group_index) {
  const std::vector<int64_t> parameters = {layout.row_blocks, layout.group_count, 8, 8};
  std::vector<PlaneSpec> specs = {
      {"codes", DType::i32, {layout.row_blocks, layout.column_blocks, layout.bits, kLanes, 4}, false}};
  if (layout.bilevel()) {
    specs.push_back(
        {"parameters", DType::u8, {layout.row_blocks, layout.group_count, 8, layout.parameter_bytes}, false});
    specs.push_back({"grids", DType::f16, {layout.grid_count, layout.group_count, 4}, false});
  } else {
    specs.push_back({"scales", layout.scale_dtype, parameters, false});
  }
  if (layout.asymmetric) specs.push_back({"zeros", DType::u8, parameters, false});
  if (layout.dim > 1) {
    specs.push_back({"codebook", DType::f16, {layout.tables, layout.table_entries, layout.dim}, false});
  } else if (layout.table_entries > 0) {
    specs.push_back({"codebook", DType::f16, {layout.table_entries}, false});
  }
  if (layout.gathered) specs.push_back({"source", DType::i32, {layout.padded_k()}, false});
  if (layout.placed()) specs.push_back({"place", DType::i32, {layout.k}, false});
  if (with_group_index) specs.push_back({"group_index", DType::i32, {layout.k}, false});
  return specs;
}

void prepare_scalar_codes(const FragmentLayout& layout, std::span<const uint32_t> codes,
                          std::span<const int32_t> source, std::span<uint32_t> words) {
  const int64_t row_words = packed_words(layout.k, layout.bits);
  for_each_unit(layout, [&](int64_t rb, int64_t cb, int unit, int lane) {
    uint8_t values[kUnitCodes] = {};
    for (int i = 0; i < kUnitCodes; ++i) {
      const int64_t row = rb * kBlockRows + unit * 16 + fragments::row_of(lane, i / 2);
      int64_t column = cb * kBlockColumns + fragments::column_of(lane, i / 2, i % 2);
      if (layout.gathered) column = source[static_cast<size_t>(column)];
      if (row >= layout.n || column < 0 || column >= layout.k) continue;
      unpack_bits(codes.subspan(static_cast<size_t>(row * row_words), static_cast<size_t>(row_words)),
                  layout.bits, column, {values + i, 1});
    }
    uint32_t unit_words[8];
    if (layout.bilevel()) {
      fragments::pack_halves(layout.bits, values, unit_words);
    } else {
      fragments::pack_unit(layout.code_order, layout.bits, values, unit_words);
    }
    for (int w = 0; w < layout.bits; ++w) {
      words[static_cast<size_t>(block_word(layout, rb, cb) +
                                fragments::word_in_block(layout.bits, unit, w, lane))] = unit_words[w];
    }
  });
}

void unprepare_scalar_codes(const FragmentLayout& layout, std::span<const uint32_t> words,
                            std::span<const int32_t> source, std::span<uint32_t> out) {
  std::vector<uint8_t> codes(static_cast<size_t>(checked_mul(layout.n, layout.k)));
  for_each_unit(layout, [&](int64_t rb, int64_t cb, int unit, int lane) {
    uint32_t unit_words[8];
    for (int w = 0; w < layout.bits; ++w) {
      unit_words[w] = words[static_cast<size_t>(block_word(layout, rb, cb) +
                                                fragments::word_in_block(layout.bits, unit, w, lane))];
    }
    uint8_t values[kUnitCodes];
    if (layout.bilevel()) {
      fragments::unpack_halves(layout.bits, unit_words, values);
    } else {
      fragments::unpack_unit(layout.code_order, layout.bits, unit_words, values);
    }
    for (int i = 0; i < kUnitCodes; ++i) {
      const int64_t row = rb * kBlockRows + unit * 16 + fragments::row_of(lane, i / 2);
      int64_t column = cb * kBlockColumns + fragments::column_of(lane, i / 2, i % 2);
      if (layout.gathered) column = source[static_cast<size_t>(column)];
      if (row >= layout.n || column < 0 || column >= layout.k) continue;
      codes[static_cast<size_t>(row * layout.k + column)] = values[i];
    }
  });
  const int64_t row_words = packed_words(layout.k, layout.bits);
  for (int64_t row = 0; row < layout.n; ++row) {
    pack_bits(std::span(codes).subspan(static_cast<size_t>(row * layout.k), static_cast<size_t>(layout.k)),
              layout.bits, out.subspan(static_cast<size_t>(row * row_words), static_cast<size_t>(row_words)));
  }
}

void set_vectors(const VectorCodebook& format, FragmentLayout& layout) {
  layout.dim = static_cast<int>(format.dim);
  layout.tables = static_cast<int>(format.codebooks);
  layout.code_bits = layout.tables * format.bits;
  layout.table_entries = format.entries;
  if (!fragments::is_vector_dim(format.dim)) {
    throw Unsupported(
        text_of("no CUDA kernel takes format ", format.spec(), ": expected vectors of 2, 4 or 8 weights"));
  }
  if (layout.tables > 1) {
    layout.bits = fragments::sum_bits(layout.dim, layout.code_bits);
    if (layout.bits > 0) return;
    throw Unsupported(text_of("no CUDA kernel takes format ", format.spec(), ": the codes of a vector have ",
                              layout.code_bits, " bits together, expected at most ", 4 * layout.dim));
  }
  layout.bits = fragments::vector_bits(layout.dim, format.bits);
  if (layout.dim == 2 && layout.bits > 6) {
    throw Unsupported(text_of("no CUDA kernel takes format ", format.spec(),
                              ": expected a table of up to 4096 vectors of 2 weights"));
  }
}

// Blocks of one row are vectors.
void set_additive(const Additive& format, int64_t k, FragmentLayout& layout) {
  if (!is_in_fragment_order(format)) {
    throw Unsupported(
        text_of("no CUDA kernel takes format ", format.spec(),
                " in fragment order: expected blocks of 2, 4 or 8 columns of a row and short codes"));
  }
  layout.dim = static_cast<int>(format.in_group);
  layout.tables = format.codebooks;
  layout.code_bits = format.codebooks * format.bits;
  layout.table_entries = format.entries();
  layout.bits = layout.tables > 1 ? fragments::sum_bits(layout.dim, layout.code_bits)
                                  : fragments::vector_bits(layout.dim, format.bits);
  layout.scale_dtype = format.scale_dtype;
  layout.group_count = std::max<int64_t>(k > 0 ? format.scale_count(k) : 1, 1);
  layout.format_columns = format.scale_columns(k);
}

void set_spqr(const Spqr& format, int64_t n, int64_t k, FragmentLayout& layout) {
  layout.bits = format.bits;
  layout.code_bits = format.bits;
  layout.group_count = std::max<int64_t>(format.group_count(k), 1);
  layout.format_columns = format.columns_per_group(k);
  layout.parameter_bytes = fragments::bilevel_bytes(format.scale_bits, format.zero_bits);
  layout.grid_rows = format.block;
  layout.grid_count = n < 0 ? 0 : format.block_count(n);
}

// The input of each column where groups are padded or not consecutive; -1 for padding.
template <class Layout>
std::vector<int32_t> source_of_groups(const Layout& layout, std::span<const int32_t> group_index) {
  if (!layout.gathered) return {};
  std::vector<int32_t> source(static_cast<size_t>(layout.padded_k()), -1);
  std::vector<int64_t> used(static_cast<size_t>(layout.group_count), 0);
  for (int64_t column = 0; column < layout.k; ++column) {
    const int64_t group = group_index.empty() ? column / layout.format_columns
                                              : int64_t{group_index[static_cast<size_t>(column)]};
    if (group < 0 || group >= layout.group_count) {
      throw InvalidArgument("group_index", text_of(group, " for column ", column),
                            text_of("a group below ", layout.group_count));
    }
    const int64_t place = used[static_cast<size_t>(group)]++;
    if (place >= layout.group_columns) {
      throw InvalidArgument("group_index",
                            text_of("more than ", layout.group_columns, " columns of group ", group),
                            text_of("at most ", layout.format_columns));
    }
    source[static_cast<size_t>(group * layout.group_columns + place)] = static_cast<int32_t>(column);
  }
  return source;
}

}  // namespace

int64_t FragmentLayout::code_words() const {
  return checked_mul(checked_mul(row_blocks, column_blocks), int64_t{128} * bits);
}

FragmentLayout fragment_layout(const Format& format, int64_t n, int64_t k, bool with_group_index) {
  FragmentLayout layout;
  if (const auto* outliers = dynamic_cast<const Outliers*>(&format)) {
    const auto* additive = dynamic_cast<const Additive*>(outliers->dense.get());
    if (additive != nullptr && additive->levels != AdditiveLevels()) {
      throw Unsupported(text_of("no CUDA kernel takes format ", format.spec(),
                                ": expected scales and tables that are stored as they are"));
    }
    layout = fragment_layout(*outliers->dense, n, k, with_group_index);
    layout.outliers = true;
    return layout;
  }
  const auto* scaled = dynamic_cast<const ScaledFormat*>(&format);
  if (const auto* grouped = dynamic_cast<const GroupedFormat*>(&format)) {
    layout.bits = grouped->bits;
    layout.code_bits = grouped->bits;
  }
  if (const auto* vectors = dynamic_cast<const VectorCodebook*>(&format)) {
    set_vectors(*vectors, layout);
  } else if (const auto* additive = dynamic_cast<const Additive*>(&format)) {
    set_additive(*additive, k, layout);
  } else if (const auto* uniform = dynamic_cast<const Uniform*>(&format)) {
    layout.asymmetric = !uniform->symmetric;
  } else if (const auto* codebook = dynamic_cast<const Codebook*>(&format)) {
    layout.code_order = fragments::CodeOrder::dense;
    layout.table_entries = static_cast<int64_t>(codebook->table.size());
  } else if (const auto* spqr = dynamic_cast<const Spqr*>(&format)) {
    set_spqr(*spqr, n, k, layout);
  } else {
    throw Unsupported(text_of("no CUDA kernel takes format ", format.spec(),
                              "; kernel_table() lists what the kernels take"));
  }
  if (scaled != nullptr) {
    layout.scale_dtype = scaled->scale_dtype;
    layout.per_tensor = scaled->group_size == ScaledFormat::kPerTensor;
    layout.group_count = std::max<int64_t>(scaled->group_count(k), 1);
    layout.format_columns = scaled->columns_per_group(k);
  }
  if (n < 0 || k < 0) throw InvalidArgument("shape", text_of("[", n, ", ", k, "]"), "sizes of 0 or more");
  if (k > std::numeric_limits<int32_t>::max() / 64 || n > std::numeric_limits<int32_t>::max()) {
    throw Unsupported(
        text_of("no CUDA kernel takes a matrix [", n, ", ", k, "]: expected n < 2^31, k < 2^25"));
  }
  layout.n = n;
  layout.k = k;
  const bool many = layout.group_count > 1;
  layout.gathered = many && (with_group_index || layout.format_columns % 16 != 0);
  const int64_t padded_group = checked_pad(layout.format_columns, 16);
  const int64_t columns = layout.gathered ? checked_mul(layout.group_count, padded_group) : k;
  layout.row_blocks = std::max<int64_t>(ceil_div(n, kBlockRows), 1);
  layout.column_blocks = ceil_div(columns, kBlockColumns);
  if (layout.bilevel()) layout.column_blocks = checked_pad(layout.column_blocks, 2);
  layout.group_columns = many ? padded_group : std::max<int64_t>(layout.padded_k(), 16);
  static_cast<void>(checked_mul(layout.code_words(), 4));
  return layout;
}

const Tensor& PreparedPlanes::plane(std::string_view name) const {
  const auto found = planes.find(std::string(name));
  if (found == planes.end()) throw InvalidArgument("prepared", "no plane " + std::string(name), "that plane");
  return found->second;
}

std::vector<PlaneSpec> prepared_planes(const Format& format, int64_t n, int64_t k, bool with_group_index) {
  if (const Trellis* trellis = as_trellis(format)) {
    return trellis_planes(trellis_layout(*trellis, n, k), *trellis);
  }
  if (const Bcq* bcq = as_bcq(format)) {
    return bit_plane_planes(bit_plane_layout(*bcq, n, k, with_group_index), with_group_index);
  }
  const Additive* additive = as_additive(format);
  std::vector<PlaneSpec> specs =
      additive != nullptr ? additive_planes(additive_layout(*additive, n, k))
                          : specs_of(fragment_layout(format, n, k, with_group_index), with_group_index);
  for (PlaneSpec& spec : level_planes(format, n, k)) specs.push_back(std::move(spec));
  if (dynamic_cast<const Outliers*>(&format) == nullptr) return specs;
  for (PlaneSpec& spec : format.planes(n, k)) {
    if (is_outlier_plane(spec.name)) specs.push_back(std::move(spec));
  }
  return specs;
}

void require_prepared_planes(const PreparedPlanes& prepared, const std::vector<PlaneSpec>& specs) {
  for (const PlaneSpec& spec : specs) {
    const Tensor& plane = prepared.plane(spec.name);
    const std::string argument = "prepared." + spec.name;
    if (plane.dtype() != spec.dtype) {
      throw TypeMismatch(argument, name_of(plane.dtype()), std::string(name_of(spec.dtype)));
    }
    if (plane.shape() != spec.shape) {
      throw InvalidArgument(argument, text_of("a plane of ", plane.element_count(), " elements"),
                            text_of("the shape of its order, of ", checked_product(spec.shape), " elements"));
    }
  }
  if (prepared.planes.size() != specs.size()) {
    throw InvalidArgument("prepared", text_of(prepared.planes.size(), " planes"),
                          text_of(specs.size(), " planes"));
  }
}

void validate(const PreparedPlanes& prepared) {
  if (prepared.format == nullptr) throw InvalidArgument("prepared", "no format", "prepared planes");
  require_prepared_planes(
      prepared, prepared_planes(*prepared.format, prepared.n, prepared.k, prepared.has("group_index")));
}

std::vector<int32_t> fragment_source(const Format& format, int64_t k, std::span<const int32_t> group_index) {
  if (as_trellis(format) != nullptr || as_additive(format) != nullptr) return {};
  if (const Bcq* bcq = as_bcq(format)) {
    return source_of_groups(bit_plane_layout(*bcq, 1, k, !group_index.empty()), group_index);
  }
  return source_of_groups(fragment_layout(format, 1, k, !group_index.empty()), group_index);
}

namespace {

// Numbers that are codes into levels are expanded; codes and levels stay beside them.
PreparedPlanes prepare_levels(const PackedTensor& packed) {
  PreparedPlanes prepared = prepare_fragments(with_levels(packed, {}));
  prepared.format = packed.format;
  for (const PlaneSpec& spec : level_planes(*packed.format, packed.n, packed.k)) {
    Tensor plane(spec.dtype, spec.shape);
    copy_plane(packed.plane(spec.name), plane);
    prepared.planes.emplace(spec.name, std::move(plane));
  }
  return prepared;
}

PackedTensor unprepare_levels(const PreparedPlanes& prepared) {
  PackedTensor packed = unprepare_fragments(without_levels(prepared));
  packed.format = prepared.format;
  const std::map<std::string, Tensor> plain = std::exchange(packed.planes, {});
  for (const PlaneSpec& spec : packed.format->planes(packed.n, packed.k)) {
    Tensor plane(spec.dtype, spec.shape);
    copy_plane(plain.contains(spec.name) ? plain.at(spec.name) : prepared.plane(spec.name), plane);
    packed.planes.emplace(spec.name, std::move(plane));
  }
  return packed;
}

}  // namespace

PreparedPlanes prepare_fragments(const PackedTensor& packed) {
  validate(packed);
  require_on_cpu(packed.planes, "prepare_fragments");
  if (!level_planes(*packed.format, packed.n, packed.k).empty()) return prepare_levels(packed);
  if (as_trellis(*packed.format) != nullptr) return prepare_trellis(packed);
  if (as_bcq(*packed.format) != nullptr) return prepare_bit_planes(packed);
  if (as_additive(*packed.format) != nullptr) return prepare_additive(packed);
  const bool indexed = packed.planes.contains("group_index");
  const FragmentLayout layout = fragment_layout(*packed.format, packed.n, packed.k, indexed);
  PreparedPlanes prepared{packed.format, packed.n, packed.k, {}};
  for (const PlaneSpec& spec : prepared_planes(*packed.format, packed.n, packed.k, indexed)) {
    prepared.planes.emplace(spec.name, Tensor(spec.dtype, spec.shape));
  }
  copy_outliers(packed.planes, prepared.planes);
  const auto source = fragment_source(*packed.format, packed.k, group_index_of(packed.planes));
  if (layout.gathered) std::ranges::copy(source, prepared.planes.at("source").values<int32_t>().begin());
  if (layout.placed()) {
    const auto places = prepared.planes.at("place").values<int32_t>();
    for (size_t place = 0; place < source.size(); ++place) {
      if (source[place] >= 0) places[static_cast<size_t>(source[place])] = static_cast<int32_t>(place);
    }
  }
  if (indexed) copy_plane(packed.plane("group_index"), prepared.planes.at("group_index"));
  if (layout.table_entries > 0) copy_plane(packed.plane("codebook"), prepared.planes.at("codebook"));

  const auto codes = packed.plane("codes").values<uint32_t>();
  const auto words = prepared.planes.at("codes").values<uint32_t>();
  if (layout.dim > 1) {
    prepare_vector_codes(layout, codes, source, words);
  } else {
    prepare_scalar_codes(layout, codes, source, words);
  }
  if (layout.bilevel()) {
    prepare_spqr_parameters(layout, packed, prepared);
    return prepared;
  }

  const int64_t zero_words =
      layout.asymmetric ? packed_words(layout.per_tensor ? 1 : layout.n, layout.bits) : 0;
  // Without columns there are no groups, but a scale of the whole tensor stays.
  if (packed.k == 0 && !layout.per_tensor) return prepared;
  for (int64_t row = 0; row < (layout.per_tensor ? std::max<int64_t>(layout.n, 1) : layout.n); ++row) {
    const int64_t parameter_row = layout.per_tensor ? 0 : row;
    for (int64_t g = 0; g < layout.group_count; ++g) {
      const int64_t at = parameter_at(layout, row, g);
      copy_element(packed.plane("scales"), parameter_row * layout.group_count + g,
                   prepared.planes.at("scales"), at);
      if (!layout.asymmetric) continue;
      const auto zeros = packed.plane("zeros").values<uint32_t>();
      unpack_bits(zeros.subspan(static_cast<size_t>(g * zero_words), static_cast<size_t>(zero_words)),
                  layout.bits, parameter_row, {prepared.planes.at("zeros").values<uint8_t>().data() + at, 1});
    }
  }
  return prepared;
}

PackedTensor unprepare_fragments(const PreparedPlanes& prepared) {
  validate(prepared);
  require_on_cpu(prepared.planes, "unprepare_fragments");
  if (!level_planes(*prepared.format, prepared.n, prepared.k).empty()) return unprepare_levels(prepared);
  if (as_trellis(*prepared.format) != nullptr) return unprepare_trellis(prepared);
  if (as_bcq(*prepared.format) != nullptr) return unprepare_bit_planes(prepared);
  if (as_additive(*prepared.format) != nullptr) return unprepare_additive(prepared);
  const bool indexed = prepared.has("group_index");
  const FragmentLayout layout = fragment_layout(*prepared.format, prepared.n, prepared.k, indexed);
  PackedTensor packed{prepared.format, prepared.n, prepared.k, {}};
  for (const PlaneSpec& spec : prepared.format->planes(prepared.n, prepared.k)) {
    if (!spec.optional || prepared.has(spec.name)) {
      packed.planes.emplace(spec.name, Tensor(spec.dtype, spec.shape));
    }
  }
  copy_outliers(prepared.planes, packed.planes);
  if (indexed) copy_plane(prepared.plane("group_index"), packed.planes.at("group_index"));
  if (layout.table_entries > 0) copy_plane(prepared.plane("codebook"), packed.planes.at("codebook"));
  if (packed.k == 0 && !layout.per_tensor) return packed;

  const auto words = prepared.plane("codes").values<uint32_t>();
  const auto source =
      layout.gathered ? prepared.plane("source").values<int32_t>() : std::span<const int32_t>{};
  const auto out = packed.planes.at("codes").values<uint32_t>();
  if (layout.dim > 1) {
    unprepare_vector_codes(layout, words, source, out);
  } else {
    unprepare_scalar_codes(layout, words, source, out);
  }
  if (layout.bilevel()) {
    unprepare_spqr_parameters(layout, prepared, packed);
    return packed;
  }

  const int64_t parameter_rows = layout.per_tensor ? 1 : layout.n;
  std::vector<uint8_t> zeros(static_cast<size_t>(parameter_rows));
  const int64_t zero_words = layout.asymmetric ? packed_words(parameter_rows, layout.bits) : 0;
  for (int64_t g = 0; g < layout.group_count; ++g) {
    for (int64_t row = 0; row < parameter_rows; ++row) {
      const int64_t at = parameter_at(layout, row, g);
      copy_element(prepared.plane("scales"), at, packed.planes.at("scales"), row * layout.group_count + g);
      if (layout.asymmetric)
        zeros[static_cast<size_t>(row)] = prepared.plane("zeros").values<uint8_t>()[static_cast<size_t>(at)];
    }
    if (layout.asymmetric) {
      pack_bits(zeros, layout.bits,
                packed.planes.at("zeros").values<uint32_t>().subspan(static_cast<size_t>(g * zero_words),
                                                                     static_cast<size_t>(zero_words)));
    }
  }
  return packed;
}

}  // namespace quantloom
