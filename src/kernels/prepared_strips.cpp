#include "kernels/prepared_strips.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "quantloom/formats/bit_packing.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom::kernels {
namespace {

constexpr int64_t kVectorBytes = kStripRows * 4;
constexpr int64_t kHugePage = int64_t{2} << 20;
// Below this many bytes, another thread costs more than it brings.
constexpr int64_t kBytesPerThread = int64_t{1} << 14;

// Calls visit(byte offset in the step, bits to shift by, bits, code's bit they start at) for the pieces of
// the code of column q of a step, row r of a strip.
template <class Visit>
void visit_code_bits(int container_bits, int64_t r, int64_t q, const Visit& visit) {
  const int64_t byte = r * 4 + q % 4;
  switch (container_bits) {
    case 8:
      visit((q / 4) * kVectorBytes + byte, 0, 8, 0);
      break;
    case 4:
      visit((q / 8) * kVectorBytes + byte, static_cast<int>(q % 8 / 4) * 4, 4, 0);
      break;
    case 2:
      visit(byte, static_cast<int>(q / 4) * 2, 2, 0);
      break;
    default:
      visit((q / 16) * kVectorBytes + byte, static_cast<int>(q % 16 / 4) * 2, 2, 0);
      visit(2 * kVectorBytes + byte, static_cast<int>(q / 4), 1, 2);
      break;
  }
}

void put_code(std::byte* step, int container_bits, int64_t r, int64_t q, uint8_t code) {
  visit_code_bits(container_bits, r, q, [&](int64_t offset, int shift, int bits, int from) {
    const auto part = static_cast<unsigned>(code >> from) & ((1U << bits) - 1U);
    step[offset] |= static_cast<std::byte>(part << shift);
  });
}

uint8_t get_code(const std::byte* step, int container_bits, int64_t r, int64_t q) {
  unsigned code = 0;
  visit_code_bits(container_bits, r, q, [&](int64_t offset, int shift, int bits, int from) {
    const auto part = (static_cast<unsigned>(step[offset]) >> shift) & ((1U << bits) - 1U);
    code |= part << from;
  });
  return static_cast<uint8_t>(code);
}

// The layout of one strip: prepared columns and byte offsets of each group.
struct GroupPlace {
  int64_t first_column = 0;  // prepared column
  int64_t columns = 0;       // without padding
  int64_t offset = 0;        // of its header in the strip
  int64_t codes_offset = 0;
};

int64_t header_bytes(const PreparedStrips& p) {
  return kStripRows * size_of(p.format->scale_dtype) + zero_bytes(p.has_zeros, p.real_zeros);
}

std::vector<GroupPlace> places_of(const PreparedStrips& p, std::span<const int64_t> sizes) {
  std::vector<GroupPlace> places;
  places.reserve(sizes.size());
  int64_t column = 0;
  int64_t offset = 0;
  for (const int64_t size : sizes) {
    GroupPlace place{column, size, offset, checked_add(offset, header_bytes(p))};
    const int64_t padded = checked_pad(size, p.step_columns);
    column = checked_add(column, padded);
    offset = checked_add(place.codes_offset, checked_mul(padded, 2 * p.container_bits));
    places.push_back(place);
  }
  return places;
}

// Columns in each group, from the plan and the source columns.
std::vector<int64_t> group_sizes(const PreparedStrips& p) {
  std::vector<int64_t> sizes;
  sizes.reserve(p.groups.size());
  int64_t column = 0;
  for (const GroupPlan& plan : p.groups) {
    const int64_t padded = plan.full_blocks * kBlockColumns + plan.tail_steps * p.step_columns;
    int64_t size = padded;
    if (!p.source.empty()) {
      size = std::count_if(p.source.begin() + column, p.source.begin() + column + padded,
                           [](int32_t c) { return c >= 0; });
    }
    sizes.push_back(size);
    column += padded;
  }
  return sizes;
}

int64_t source_column(const PreparedStrips& p, int64_t prepared_column) {
  return p.source.empty() ? prepared_column : p.source[static_cast<size_t>(prepared_column)];
}

// `real_zeros` [rows, groups]: those of p.real_zeros.
void write_strip(PreparedStrips& p, const PackedTensor& packed, std::span<const float> real_zeros,
                 std::span<const GroupPlace> places, int64_t strip) {
  const GroupedFormat& format = *p.format;
  const bool per_tensor = format.group_size == Uniform::kPerTensor;
  const auto group_count = static_cast<int64_t>(places.size());
  const int64_t scale_size = size_of(format.scale_dtype);
  const int64_t row_words = packed_words(p.columns, format.bits);
  const auto words = packed.plane("codes").values<uint32_t>();
  const std::byte* scales = packed.plane("scales").bytes();
  const int code_shift = p.code_unit == 1.0F ? 0 : 1;
  std::vector<uint8_t> codes(static_cast<size_t>(p.columns));
  std::byte* out = p.stream.data() + strip * p.strip_bytes;
  const int64_t first_row = strip * kStripRows;
  const int64_t row_count = std::min(kStripRows, p.rows - first_row);

  for (int64_t r = 0; r < row_count; ++r) {
    const int64_t row = first_row + r;
    unpack_bits(words.subspan(static_cast<size_t>(row * row_words), static_cast<size_t>(row_words)),
                format.bits, 0, codes);
    for (int64_t g = 0; g < group_count; ++g) {
      const GroupPlace& place = places[static_cast<size_t>(g)];
      const int64_t parameter = per_tensor ? 0 : row * group_count + g;
      std::memcpy(out + place.offset + r * scale_size, scales + parameter * scale_size,
                  static_cast<size_t>(scale_size));
      if (p.real_zeros) {
        std::memcpy(out + place.offset + kStripRows * scale_size + r * 4, &real_zeros[row * group_count + g],
                    4);
      }
      std::byte* step = out + place.codes_offset;
      for (int64_t c = 0; c < place.columns; ++c) {
        const int64_t column = source_column(p, place.first_column + c);
        const auto code = static_cast<uint8_t>(codes[static_cast<size_t>(column)] << code_shift);
        put_code(step + c / p.step_columns * (2 * p.container_bits * p.step_columns), p.container_bits, r,
                 c % p.step_columns, code);
      }
    }
  }
  if (!p.has_zeros || p.real_zeros) return;
  const auto zero_words = packed.plane("zeros").values<uint32_t>();
  const int64_t zero_row_words = packed_words(p.rows, format.bits);
  std::vector<uint8_t> zeros(static_cast<size_t>(row_count));
  for (int64_t g = 0; g < group_count; ++g) {
    if (per_tensor) {
      std::fill(zeros.begin(), zeros.end(), p.tensor_zero);
    } else {
      unpack_bits(
          zero_words.subspan(static_cast<size_t>(g * zero_row_words), static_cast<size_t>(zero_row_words)),
          format.bits, first_row, zeros);
    }
    std::memcpy(out + places[static_cast<size_t>(g)].offset + kStripRows * scale_size, zeros.data(),
                zeros.size());
  }
}

void read_strip(const PreparedStrips& p, std::span<const GroupPlace> places, int64_t strip,
                PackedTensor& packed) {
  const GroupedFormat& format = *p.format;
  const auto group_count = static_cast<int64_t>(places.size());
  const int64_t scale_size = size_of(format.scale_dtype);
  const int64_t row_words = packed_words(p.columns, format.bits);
  const auto words = packed.planes.at("codes").values<uint32_t>();
  std::byte* scales = packed.planes.at("scales").bytes();
  const int code_shift = p.code_unit == 1.0F ? 0 : 1;
  std::vector<uint8_t> codes(static_cast<size_t>(p.columns));
  const std::byte* in = p.stream.data() + strip * p.strip_bytes;
  const int64_t first_row = strip * kStripRows;
  const int64_t row_count = std::min(kStripRows, p.rows - first_row);
  for (int64_t r = 0; r < row_count; ++r) {
    const int64_t row = first_row + r;
    for (int64_t g = 0; g < group_count; ++g) {
      const GroupPlace& place = places[static_cast<size_t>(g)];
      if (format.group_size != Uniform::kPerTensor) {
        std::memcpy(scales + (row * group_count + g) * scale_size, in + place.offset + r * scale_size,
                    static_cast<size_t>(scale_size));
      }
      const std::byte* step = in + place.codes_offset;
      for (int64_t c = 0; c < place.columns; ++c) {
        const int64_t column = source_column(p, place.first_column + c);
        const uint8_t code = get_code(step + c / p.step_columns * (2 * p.container_bits * p.step_columns),
                                      p.container_bits, r, c % p.step_columns);
        codes[static_cast<size_t>(column)] = static_cast<uint8_t>(code >> code_shift);
      }
    }
    pack_bits(codes, format.bits,
              words.subspan(static_cast<size_t>(row * row_words), static_cast<size_t>(row_words)));
  }
}

}  // namespace

AlignedBytes::AlignedBytes(int64_t size) : size_(size) {
  // From two pages on: a smaller matrix would waste up to half of what it gets.
  const int64_t alignment = size >= 2 * kHugePage ? kHugePage : 64;
  const int64_t padded = checked_pad(std::max<int64_t>(size, 1), alignment);
  auto* p = static_cast<std::byte*>(
      std::aligned_alloc(static_cast<size_t>(alignment), static_cast<size_t>(padded)));
  if (p == nullptr) throw std::bad_alloc();
  data_.reset(p);
#ifdef __linux__
  // A refusal only costs speed.
  if (alignment == kHugePage) (void)madvise(p, static_cast<size_t>(padded), MADV_HUGEPAGE);
#endif
  std::memset(p, 0, static_cast<size_t>(size));
}

void AlignedBytes::Free::operator()(std::byte* p) const {
  std::free(p);  // NOLINT(cppcoreguidelines-no-malloc): from std::aligned_alloc
}

int container_bits_for(int bits) {
  if (bits == 1) return 2;
  return bits >= 5 ? 8 : bits;
}

int64_t PreparedStrips::block_count() const {
  int64_t count = 0;
  for (const GroupPlan& plan : groups) count += plan.full_blocks + (plan.tail_steps > 0 ? 1 : 0);
  return count;
}

namespace {

// The scales of an spqr tensor as a plane; its zero points move to `zeros`.
PackedTensor with_decoded_scales(const PackedTensor& packed, const Spqr& spqr, std::vector<float>& zeros) {
  PackedTensor result{std::make_shared<const Uniform>(spqr.bits, spqr.group_size, false, DType::f32),
                      packed.n, packed.k, packed.planes};
  SpqrParameters parameters = spqr_parameters(packed);
  zeros = std::move(parameters.zeros);
  Tensor scales(DType::f32, {packed.n, spqr.group_count(packed.k)});
  std::ranges::copy(parameters.scales, scales.values<float>().begin());
  result.planes["scales"] = std::move(scales);
  return result;
}

}  // namespace

PreparedColumns prepare_columns(const PackedTensor& packed, const ScaledFormat& format,
                                int64_t step_columns) {
  const int64_t group_count = format.group_count(packed.k);
  const int64_t group_columns = format.columns_per_group(packed.k);
  PreparedColumns result;
  result.sizes.resize(static_cast<size_t>(group_count), 0);
  std::vector<int32_t> order(static_cast<size_t>(packed.k));
  std::iota(order.begin(), order.end(), 0);
  if (packed.planes.contains("group_index")) {
    const auto group_of = packed.plane("group_index").values<int32_t>();
    for (const int32_t g : group_of) ++result.sizes[static_cast<size_t>(g)];
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      return group_of[static_cast<size_t>(a)] < group_of[static_cast<size_t>(b)];
    });
  } else {
    for (int64_t g = 0; g < group_count; ++g) {
      result.sizes[static_cast<size_t>(g)] = std::min(group_columns, packed.k - g * group_columns);
    }
  }
  bool identity = true;
  auto next = order.begin();
  for (const int64_t size : result.sizes) {
    const int64_t padded = checked_pad(size, step_columns);
    result.groups.push_back({static_cast<int32_t>(padded / kBlockColumns),
                             static_cast<int32_t>(padded % kBlockColumns / step_columns)});
    for (int64_t c = 0; c < padded; ++c) {
      const int32_t column = c < size ? *next++ : -1;
      identity = identity && column == static_cast<int64_t>(result.source.size());
      result.source.push_back(column);
    }
  }
  result.padded = static_cast<int64_t>(result.source.size());
  if (identity) result.source.clear();
  return result;
}

void read_token(const FloatMatrix& x, int64_t token, std::span<const int32_t> source, float* row,
                float* out) {
  if (source.empty()) {
    x.read(token, 0, x.cols(), out);
    return;
  }
  x.read(token, 0, x.cols(), row);
  for (size_t c = 0; c < source.size(); ++c) out[c] = source[c] < 0 ? 0.0F : row[source[c]];
}

std::shared_ptr<const PreparedStrips> prepare_strips(const PackedTensor& given, int threads) {
  auto p = std::make_shared<PreparedStrips>();
  std::vector<float> real_zeros;
  const auto* spqr = dynamic_cast<const Spqr*>(given.format.get());
  const PackedTensor packed = spqr == nullptr ? given : with_decoded_scales(given, *spqr, real_zeros);
  p->real_zeros = spqr != nullptr;
  p->format = std::dynamic_pointer_cast<const GroupedFormat>(packed.format);
  const GroupedFormat& format = *p->format;
  p->rows = packed.n;
  p->columns = packed.k;
  p->container_bits = container_bits_for(format.bits);
  if (p->real_zeros && p->container_bits == 3 && format.columns_per_group(packed.k) % 32 != 0) {
    p->container_bits = 4;
  }
  p->step_columns = p->container_bits == 3 ? 32 : 16;
  if (const auto* codebook = dynamic_cast<const Codebook*>(&format)) {
    p->table = codebook->table;
    p->table.resize(size_t{1} << p->container_bits, 0.0F);
  } else {
    const auto& uniform = dynamic_cast<const Uniform&>(format);
    p->has_zeros = !uniform.symmetric;
    const bool halves = uniform.bits == 1 && uniform.symmetric;
    p->code_unit = halves ? 0.5F : 1.0F;
    p->center = halves ? 1.0F : uniform.symmetric_zero_point();
  }

  p->has_group_index = packed.planes.contains("group_index");
  PreparedColumns columns = prepare_columns(packed, format, p->step_columns);
  const std::vector<GroupPlace> places = places_of(*p, columns.sizes);
  p->groups = std::move(columns.groups);
  p->source = std::move(columns.source);
  p->padded_columns = columns.padded;

  if (!places.empty()) {
    const int64_t padded = checked_pad(places.back().columns, p->step_columns);
    p->strip_bytes = checked_add(places.back().codes_offset, checked_mul(padded, 2 * p->container_bits));
  }
  if (format.group_size == Uniform::kPerTensor) {
    const Tensor& scales = packed.plane("scales");
    std::memcpy(&p->tensor_scale_bits, scales.bytes(), static_cast<size_t>(scales.byte_count()));
    if (p->has_zeros) {
      unpack_bits(packed.plane("zeros").values<uint32_t>(), format.bits, 0, {&p->tensor_zero, 1});
    }
  }
  p->stream = AlignedBytes(checked_mul(p->strip_count(), p->strip_bytes));
  const int team =
      static_cast<int>(std::clamp<int64_t>(p->stream.size() / kBytesPerThread, 1, resolve_threads(threads)));
  parallel_for(p->strip_count(), team,
               [&](int64_t strip) { write_strip(*p, packed, real_zeros, places, strip); });
  return p;
}

std::vector<float> decode_columns(const PreparedStrips& p, std::span<const int32_t> columns, int threads) {
  const std::vector<int64_t> sizes = group_sizes(p);
  const std::vector<GroupPlace> places = places_of(p, sizes);
  const DType scale_dtype = p.format->scale_dtype;
  const int64_t scale_size = size_of(scale_dtype);
  std::vector<float> out(static_cast<size_t>(checked_mul(std::ssize(columns), p.rows)));
  parallel_for(std::ssize(columns), threads, [&](int64_t i) {
    const int32_t column = columns[static_cast<size_t>(i)];
    int64_t prepared = column;
    if (!p.source.empty()) prepared = std::find(p.source.begin(), p.source.end(), column) - p.source.begin();
    size_t g = 0;
    while (g + 1 < places.size() && places[g + 1].first_column <= prepared) ++g;
    const int64_t c = prepared - places[g].first_column;
    for (int64_t row = 0; row < p.rows; ++row) {
      const std::byte* strip = p.stream.data() + row / kStripRows * p.strip_bytes;
      const int64_t r = row % kStripRows;
      const std::byte* at = strip + places[g].offset + r * scale_size;
      float scale = 0;
      if (scale_dtype == DType::f32) {
        std::memcpy(&scale, at, 4);
      } else {
        uint16_t bits = 0;
        std::memcpy(&bits, at, 2);
        scale = scale_dtype == DType::f16 ? float_from_f16(bits) : float_from_bf16(bits);
      }
      const std::byte* zeros = strip + places[g].offset + kStripRows * scale_size;
      float zero = p.center;
      if (p.real_zeros) {
        std::memcpy(&zero, zeros + 4 * r, 4);
      } else if (p.has_zeros) {
        zero = static_cast<float>(zeros[r]);
      }
      const std::byte* step =
          strip + places[g].codes_offset + c / p.step_columns * (2 * p.container_bits * p.step_columns);
      const uint8_t code = get_code(step, p.container_bits, r, c % p.step_columns);
      out[static_cast<size_t>(i * p.rows + row)] =
          p.table.empty() ? scale * (p.code_unit * (static_cast<float>(code) - zero)) : scale * p.table[code];
    }
  });
  return out;
}

PackedTensor unprepare_strips(const PreparedStrips& prepared, int threads) {
  if (prepared.real_zeros) throw Unsupported("unprepare: no way back to the codes of scales and zero points");
  const GroupedFormat& format = *prepared.format;
  PackedTensor packed;
  packed.format = prepared.format;
  packed.n = prepared.rows;
  packed.k = prepared.columns;
  for (const PlaneSpec& spec : format.planes(packed.n, packed.k)) {
    if (spec.optional && !prepared.has_group_index) continue;
    packed.planes.emplace(spec.name, Tensor(spec.dtype, spec.shape));
  }
  const std::vector<int64_t> sizes = group_sizes(prepared);
  const std::vector<GroupPlace> places = places_of(prepared, sizes);
  parallel_for(prepared.strip_count(), threads,
               [&](int64_t strip) { read_strip(prepared, places, strip, packed); });

  const bool per_tensor = format.group_size == Uniform::kPerTensor;
  if (per_tensor) {
    Tensor& scales = packed.planes.at("scales");
    std::memcpy(scales.bytes(), &prepared.tensor_scale_bits, static_cast<size_t>(scales.byte_count()));
  }
  if (const auto* codebook = dynamic_cast<const Codebook*>(&format)) {
    const auto table = packed.planes.at("codebook").values<uint16_t>();
    std::transform(codebook->table.begin(), codebook->table.end(), table.begin(), f16_from_float);
  }
  if (prepared.has_zeros) {
    const auto words = packed.planes.at("zeros").values<uint32_t>();
    if (per_tensor) {
      pack_bits({&prepared.tensor_zero, 1}, format.bits, words);
    } else {
      const int64_t row_words = packed_words(prepared.rows, format.bits);
      std::vector<uint8_t> zeros(static_cast<size_t>(prepared.rows));
      for (size_t g = 0; g < places.size(); ++g) {
        const int64_t offset = places[g].offset + kStripRows * size_of(format.scale_dtype);
        for (int64_t row = 0; row < prepared.rows; ++row) {
          const int64_t at = row / kStripRows * prepared.strip_bytes + offset + row % kStripRows;
          zeros[static_cast<size_t>(row)] = static_cast<uint8_t>(prepared.stream.data()[at]);
        }
        pack_bits(zeros, format.bits,
                  words.subspan(g * static_cast<size_t>(row_words), static_cast<size_t>(row_words)));
      }
    }
  }
  if (prepared.has_group_index) {
    const auto group_of = packed.planes.at("group_index").values<int32_t>();
    for (size_t g = 0; g < places.size(); ++g) {
      for (int64_t c = 0; c < places[g].columns; ++c) {
        group_of[static_cast<size_t>(source_column(prepared, places[g].first_column + c))] =
            static_cast<int32_t>(g);
      }
    }
  }
  return packed;
}

}  // namespace quantloom::kernels
