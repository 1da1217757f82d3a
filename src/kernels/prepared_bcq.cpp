#include "kernels/prepared_bcq.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "algebra/dense_tiles.hpp"
#include "formats/grouped.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom::kernels {
namespace {

constexpr int64_t kSlabRows = kSlabStrips * kStripRows;
constexpr int64_t kVectorBytes = kStripRows * 4;
constexpr int64_t kTablesPerPiece = 256;
// Below this many bytes, another thread costs more than it brings.
constexpr int64_t kBytesPerThread = int64_t{1} << 16;
// Inputs below it have sums over a block within float32's range.
constexpr float kMostMagnitude = 0x1p118F;

// The tile that the first of `tokens` tokens go in.
int tile_of(int64_t tokens) {
  return tokens >= 3 ? kTableTokens : 1;
}

// Signs of 4 columns, bit c 1 where column c is added, as they are stored. The same function leads back.
constexpr std::array<uint8_t, 16> kTurned = [] {
  std::array<uint8_t, 16> turned{};
  for (unsigned signs = 0; signs < 16; ++signs) {
    const bool last = (signs & 8U) != 0;
    turned[signs] = static_cast<uint8_t>(last ? signs & 7U : (~signs & 7U) | 8U);
  }
  return turned;
}();
constexpr std::array<uint8_t, 16> kSigns = [] {
  std::array<uint8_t, 16> signs{};
  for (uint8_t s = 0; s < 16; ++s) signs[kTurned[s]] = s;
  return signs;
}();

// Calls visit(group, prepared column, nibbles, offset of the header in the slab, offset of the dwords) for
// each block of a strip.
template <class Visit>
void visit_blocks(const PreparedBcq& w, int64_t strip, const Visit& visit) {
  const int64_t in_slab = strip % kSlabStrips;
  const int64_t strips = std::min(kSlabStrips, ceil_div(w.rows, kStripRows) - (strip - in_slab));
  const int64_t header =
      (w.format->bits + (w.format->offset ? 1 : 0)) * kStripRows * size_of(w.format->scale_dtype);
  int64_t offset = 0;
  int64_t column = 0;
  for (int64_t g = 0; g < std::ssize(w.groups); ++g) {
    const GroupPlan plan = w.groups[static_cast<size_t>(g)];
    const int64_t own_header = offset + in_slab * header;
    offset += strips * header;
    for (int32_t b = 0; b <= plan.full_blocks; ++b) {
      const int64_t nibbles = b < plan.full_blocks ? kBlockColumns / kNibbleColumns : plan.tail_steps;
      if (nibbles == 0) break;
      const int64_t bytes = dwords_of(nibbles, w.format->bits) * kVectorBytes;
      visit(g, column, nibbles, own_header, offset + in_slab * bytes);
      offset += strips * bytes;
      column += nibbles * kNibbleColumns;
    }
  }
}

void write_strip(PreparedBcq& w, const PackedTensor& packed, int64_t strip) {
  const Bcq& format = *w.format;
  const int64_t groups = std::ssize(w.groups);
  const int64_t scale_size = size_of(format.scale_dtype);
  const Tensor& signs = packed.plane("signs");
  const int64_t words = signs.shape()[2];
  const std::byte* const scales = packed.plane("scales").bytes();
  const std::byte* const offsets = format.offset ? packed.plane("offsets").bytes() : nullptr;
  std::byte* const slab = w.stream.data() + strip / kSlabStrips * w.slab_bytes;
  const int64_t first_row = strip * kStripRows;
  const int64_t rows = std::min(kStripRows, w.rows - first_row);
  visit_blocks(w, strip, [&](int64_t g, int64_t column, int64_t nibbles, int64_t header, int64_t at) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = first_row + r;
      std::byte* place = slab + header + r * scale_size;
      for (int64_t p = 0; p < format.bits; ++p, place += kStripRows * scale_size) {
        std::memcpy(place, scales + ((p * w.rows + row) * groups + g) * scale_size,
                    static_cast<size_t>(scale_size));
        const uint32_t* const bits = signs.values<uint32_t>().data() + (p * w.rows + row) * words;
        for (int64_t i = 0; i < nibbles; ++i) {
          unsigned four = 0;
          const int64_t first = column + i * kNibbleColumns;
          if (w.source.empty()) {
            four = bits[first / 32] >> (first % 32) & 15U;
          } else {
            for (int64_t c = 0; c < kNibbleColumns; ++c) {
              const int32_t from = w.source[static_cast<size_t>(first + c)];
              if (from >= 0) four |= (bits[from / 32] >> (from % 32) & 1U) << c;
            }
          }
          const int64_t n = p * nibbles + i;
          std::byte* const dword = slab + at + n / kNibblesPerDword * kVectorBytes + r * 4;
          dword[n % kNibblesPerDword / 2] |= static_cast<std::byte>(kTurned[four] << n % 2 * 4);
        }
      }
      if (offsets != nullptr) {
        std::memcpy(place, offsets + (row * groups + g) * scale_size, static_cast<size_t>(scale_size));
      }
    }
  });
}

float parameter_at(const std::byte* at, DType dtype) {
  uint16_t half = 0;
  if (dtype == DType::f32) {
    float value = 0;
    std::memcpy(&value, at, sizeof(value));
    return value;
  }
  std::memcpy(&half, at, sizeof(half));
  return dtype == DType::f16 ? float_from_f16(half) : float_from_bf16(half);
}

// The rows of a strip [kStripRows, k], as Bcq::decode() has them.
void decode_strip(const PreparedBcq& w, int64_t strip, float* out) {
  const Bcq& format = *w.format;
  const int64_t vector_bytes = kStripRows * size_of(format.scale_dtype);
  const std::byte* const slab = w.stream.data() + strip / kSlabStrips * w.slab_bytes;
  visit_blocks(w, strip, [&](int64_t, int64_t column, int64_t nibbles, int64_t header, int64_t at) {
    for (int64_t r = 0; r < kStripRows; ++r) {
      const std::byte* const own = slab + header + r * size_of(format.scale_dtype);
      for (int64_t c = 0; c < nibbles * kNibbleColumns; ++c) {
        const int64_t to = w.source.empty() ? column + c : w.source[static_cast<size_t>(column + c)];
        if (to < 0) continue;
        float value = format.offset ? parameter_at(own + format.bits * vector_bytes, format.scale_dtype) : 0;
        for (int64_t p = 0; p < format.bits; ++p) {
          const int64_t n = p * nibbles + c / kNibbleColumns;
          const std::byte* const dword = slab + at + n / kNibblesPerDword * kVectorBytes + r * 4;
          const auto stored = static_cast<unsigned>(dword[n % kNibblesPerDword / 2]) >> n % 2 * 4 & 15U;
          const float scale = parameter_at(own + p * vector_bytes, format.scale_dtype);
          value += (kSigns[stored] >> c % kNibbleColumns & 1U) != 0 ? scale : -scale;
        }
        out[r * w.columns + to] = value;
      }
    }
  });
}

// For inputs whose sums leave float32's range where products with weights need not.
void multiply_decoded(const std::vector<float>& x, int64_t tokens, const PreparedBcq& w, MatrixView<float> y,
                      int64_t first_token, int threads) {
  parallel_for(ceil_div(w.rows, kStripRows), threads, [&](int64_t strip) {
    std::vector<float> decoded(static_cast<size_t>(kStripRows * w.columns));
    decode_strip(w, strip, decoded.data());
    const int64_t row = strip * kStripRows;
    const int64_t rows = std::min(kStripRows, w.rows - row);
    for (int64_t t = 0; t < tokens; ++t) std::fill_n(y.row(first_token + t) + row, rows, 0.0F);
    algebra::tiles().gemm_nt_f32(tokens, rows, w.columns, 1.0F, x.data(), w.columns, decoded.data(),
                                 w.columns, y.row(first_token) + row, y.stride());
  });
}

// Sums of each group of a tile of x [padded columns, tile].
std::vector<float> group_sums(const PreparedBcq& w, const std::vector<float>& x, int tile) {
  std::vector<float> sums(w.groups.size() * static_cast<size_t>(tile));
  for (int t = 0; t < tile; ++t) {
    int64_t column = 0;
    for (size_t g = 0; g < w.groups.size(); ++g) {
      const int64_t end =
          column + w.groups[g].full_blocks * kBlockColumns + w.groups[g].tail_steps * kNibbleColumns;
      double sum = 0.0;
      for (; column < end; ++column) sum += static_cast<double>(x[static_cast<size_t>(column * tile + t)]);
      sums[g * static_cast<size_t>(tile) + static_cast<size_t>(t)] = static_cast<float>(sum);
    }
  }
  return sums;
}

}  // namespace

BcqMatrix PreparedBcq::matrix() const {
  BcqMatrix result;
  result.stream = reinterpret_cast<const uint8_t*>(stream.data());
  result.slab_bytes = slab_bytes;
  result.rows = rows;
  result.groups = groups.data();
  result.group_count = std::ssize(groups);
  result.bits = format->bits;
  result.offset = format->offset;
  result.scale_dtype = format->scale_dtype;
  return result;
}

std::shared_ptr<const PreparedBcq> prepare_bcq(const PackedTensor& packed, int threads) {
  const auto w = std::make_shared<PreparedBcq>();
  w->format = std::dynamic_pointer_cast<const Bcq>(packed.format);
  w->rows = packed.n;
  w->columns = packed.k;
  PreparedColumns columns = prepare_columns(packed, *w->format, kNibbleColumns);
  w->groups = std::move(columns.groups);
  w->source = std::move(columns.source);
  w->padded_columns = columns.padded;
  const int bits = w->format->bits;
  int64_t strip_bytes = 0;
  for (const GroupPlan& plan : w->groups) {
    const int64_t dwords =
        checked_add(checked_mul(plan.full_blocks, dwords_of(kBlockColumns / kNibbleColumns, bits)),
                    dwords_of(plan.tail_steps, bits));
    strip_bytes = checked_add(strip_bytes, checked_add(checked_mul(dwords, kVectorBytes),
                                                       (bits + (w->format->offset ? 1 : 0)) * kStripRows *
                                                           size_of(w->format->scale_dtype)));
  }
  w->slab_bytes = checked_mul(strip_bytes, kSlabStrips);
  const int64_t strips = ceil_div(w->rows, kStripRows);
  w->stream = AlignedBytes(checked_mul(strips, strip_bytes));
  const int team =
      static_cast<int>(std::clamp<int64_t>(w->stream.size() / kBytesPerThread, 1, resolve_threads(threads)));
  parallel_for(strips, team, [&](int64_t strip) { write_strip(*w, packed, strip); });
  return w;
}

void multiply_bcq(const FloatMatrix& x, const PreparedBcq& w, MatrixView<float> y, int threads) {
  const BcqMatrix matrix = w.matrix();
  const int64_t nibbles = w.padded_columns / kNibbleColumns;
  const int widest = tile_of(x.rows());
  const AlignedBytes tables(checked_mul(nibbles * kTableEntries * size_of(DType::f32), widest));
  const int team = static_cast<int>(std::clamp<int64_t>(w.stream.size() / kBytesPerThread, 1, threads));
  std::vector<float> row(static_cast<size_t>(w.columns));
  std::vector<float> token(static_cast<size_t>(w.padded_columns));
  std::vector<float> values(static_cast<size_t>(checked_mul(w.padded_columns, widest)));
  for (int64_t first = 0, next = 0; first < x.rows(); first = next) {
    const int tile = tile_of(x.rows() - first);
    next = std::min<int64_t>(first + tile, x.rows());
    const auto tokens = static_cast<int>(next - first);
    if (tokens < tile) std::ranges::fill(values, 0.0F);
    bool moderate = true;
    for (int64_t t = 0; t < tokens; ++t) {
      read_token(x, first + t, w.source, row.data(), token.data());
      for (size_t c = 0; c < token.size(); ++c) {
        moderate = moderate && std::abs(token[c]) < kMostMagnitude;
        values[c * static_cast<size_t>(tile) + static_cast<size_t>(t)] = token[c];
      }
    }
    if (!moderate) {
      std::vector<float> plain(static_cast<size_t>(tokens * w.columns));
      for (int64_t t = 0; t < tokens; ++t) x.read(first + t, 0, w.columns, plain.data() + t * w.columns);
      multiply_decoded(plain, tokens, w, y, first, team);
      continue;
    }
    auto* const sums = reinterpret_cast<float*>(tables.data());
    parallel_for(ceil_div(nibbles, kTablesPerPiece), tile > 1 ? team : 1, [&](int64_t piece) {
      const int64_t begin = piece * kTablesPerPiece;
      fill_sum_tables(values.data(), tile, begin, std::min(nibbles, begin + kTablesPerPiece), sums);
    });
    const std::vector<float> of_groups = matrix.offset ? group_sums(w, values, tile) : std::vector<float>();
    const BcqTile job{tile, tokens, sums, of_groups.data(), y.row(first), y.stride()};
    parallel_for(ceil_div(w.rows, kSlabRows), team, [&](int64_t slab) { multiply_slab(matrix, job, slab); });
  }
}

}  // namespace quantloom::kernels
