#include "kernels/prepared_lookups.hpp"

#include <algorithm>
#include <array>

#include "algebra/dense_tiles.hpp"
#include "formats/additive_encoder.hpp"
#include "formats/grouped.hpp"
#include "quantloom/formats/bit_packing.hpp"
#include "quantloom/formats/vector_codebook.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom::kernels {
namespace {

constexpr int64_t kPieceRows = kLookupPieceStrips * kLookupStripRows;
constexpr int64_t kFewTokens = 8;      // whose tables are held at once
constexpr int64_t kBatchTokens = 512;  // that are read as float32 at once

struct Parts {
  AdditiveParts additive;
  int64_t entries = 0;        // of a table
  int64_t scale_columns = 0;  // of one scale
  int64_t scale_count = 0;    // of a group of rows
};

Parts parts_of(const PackedTensor& packed, PreparedLookups& w) {
  const int64_t k = packed.k;
  if (const auto* additive = dynamic_cast<const Additive*>(packed.format.get())) {
    w.out_group = additive->out_group;
    w.in_group = additive->in_group;
    w.codebooks = additive->codebooks;
    w.bits = additive->bits;
    return {unpack_additive(*additive, packed), additive->entries(), additive->scale_columns(k),
            k > 0 ? additive->scale_count(k) : 0};
  }
  const auto& vectors = dynamic_cast<const VectorCodebook&>(*packed.format);
  w.in_group = vectors.dim;
  w.codebooks = static_cast<int>(vectors.codebooks);
  w.bits = vectors.bits;
  const bool per_tensor = vectors.group_size == ScaledFormat::kPerTensor;
  Parts parts;
  parts.entries = vectors.entries;
  parts.scale_columns = vectors.columns_per_group(k);
  parts.scale_count = per_tensor ? 1 : vectors.group_count(k);
  const auto stored = packed.plane("codebook").values<uint16_t>();
  parts.additive.tables.resize(stored.size());
  std::ranges::transform(stored, parts.additive.tables.begin(), float_from_f16);
  const int64_t row_codes = vectors.code_count(k);
  parts.additive.codes.resize(static_cast<size_t>(k > 0 ? checked_mul(packed.n, row_codes) : 0));
  for (int64_t row = 0; row < packed.n && k > 0; ++row) {
    unpack_wide_bits(packed_row(packed.plane("codes"), row), vectors.bits, 0,
                     {parts.additive.codes.data() + row * row_codes, static_cast<size_t>(row_codes)});
  }
  const Tensor& scales = packed.plane("scales");
  for (int64_t i = 0; i < (k > 0 ? packed.n * parts.scale_count : 0); ++i) {
    parts.additive.scales.push_back(scale_at(scales, per_tensor ? 0 : i));
  }
  return parts;
}

void plan_chunks(PreparedLookups& w, int64_t scale_columns) {
  const int64_t most = std::max<int64_t>(kLookupChunkFields / w.fields, 1);
  int64_t offset = 0;
  for (int64_t block = 0; block < w.blocks;) {
    LookupChunk chunk;
    chunk.first_block = block;
    chunk.scale = block * w.in_group / scale_columns;
    chunk.offset = offset;
    while (block < w.blocks && block - chunk.first_block < most &&
           block * w.in_group / scale_columns == chunk.scale) {
      ++block;
    }
    chunk.last_block = block;
    offset += (block - chunk.first_block) * w.fields * kLookupStripRows;
    w.chunks.push_back(chunk);
  }
}

int64_t strip_bytes(const PreparedLookups& w) {
  return w.blocks * w.fields * kLookupStripRows;
}

// Where the bytes of a chunk of a strip begin.
int64_t place(const PreparedLookups& w, int64_t strip, const LookupChunk& chunk) {
  const int64_t piece = strip / kLookupPieceStrips * kLookupPieceStrips;
  const int64_t of_piece = std::min(kLookupPieceStrips, w.strips() - piece);
  const int64_t bytes = (chunk.last_block - chunk.first_block) * w.fields * kLookupStripRows;
  return piece * strip_bytes(w) + of_piece * chunk.offset + (strip - piece) * bytes;
}

// Tables of the fields of one chunk for one token and one row of the blocks: [fields][256].
void make_tables(const PreparedLookups& w, const float* x, int64_t row, const LookupChunk& chunk,
                 std::vector<float>& products, float* tables) {
  const int64_t size = int64_t{1} << w.bits;
  products.resize(static_cast<size_t>(w.tables_of_field * w.stride));
  for (int64_t block = chunk.first_block; block < chunk.last_block; ++block) {
    const int64_t first = block * w.in_group;
    for (int64_t field = 0; field < w.fields; ++field) {
      float* const to = tables + ((block - chunk.first_block) * w.fields + field) * kLookupEntries;
      const int64_t book = field * w.tables_of_field;
      const int64_t count = std::min<int64_t>(w.tables_of_field, w.codebooks - book);
      for (int64_t t = 0; t < count; ++t) {
        multiply_entries(
            {.x = x + first,
             .dim = std::min(w.in_group, w.columns - first),
             .table = w.tables.data() + ((book + t) * w.out_group + row) * w.in_group * w.stride,
             .stride = w.stride,
             .products = count == 1 && w.stride <= kLookupEntries ? to : products.data() + t * w.stride});
      }
      if (count == 1) continue;
      // Codes of later tables are in higher bits.
      int64_t filled = size;
      std::copy_n(products.data(), size, to);
      for (int64_t t = 1; t < count; ++t) {
        for (int64_t high = size - 1; high >= 0; --high) {
          const float added = products[static_cast<size_t>(t * w.stride + high)];
          for (int64_t low = 0; low < filled; ++low) to[high * filled + low] = to[low] + added;
        }
        filled *= size;
      }
    }
  }
}

void multiply_few(const float* x, int64_t tokens, const PreparedLookups& w, MatrixView<float> y,
                  int threads) {
  const int64_t lanes = tokens * w.out_group;  // lane: token * out_group + row of a block
  std::vector<int64_t> begins;                 // of the tables of each chunk
  int64_t fields = 0;
  for (const LookupChunk& chunk : w.chunks) {
    begins.push_back(fields * kLookupEntries);
    fields += (chunk.last_block - chunk.first_block) * w.fields;
  }
  const int64_t lane_size = fields * kLookupEntries;
  std::vector<float> tables(static_cast<size_t>(checked_mul(lanes, lane_size)));
  const auto chunks = std::ssize(w.chunks);
  parallel_for(lanes * chunks, threads, [&](int64_t i) {
    const int64_t lane = i / chunks;
    std::vector<float> products;
    make_tables(w, x + lane / w.out_group * w.columns, lane % w.out_group,
                w.chunks[static_cast<size_t>(i % chunks)], products,
                tables.data() + lane * lane_size + begins[static_cast<size_t>(i % chunks)]);
  });
  parallel_for(ceil_div(w.strips(), kLookupPieceStrips), threads, [&](int64_t piece) {
    const int64_t first = piece * kLookupPieceStrips;
    const int64_t strips = std::min(kLookupPieceStrips, w.strips() - first);
    std::vector<float> sums(static_cast<size_t>(kLookupLanes * kPieceRows));
    for (int64_t lane = 0; lane < lanes;) {
      const int64_t left = lanes - lane;
      const int at_once = left >= 4 ? 4 : (left >= 2 ? 2 : 1);
      std::ranges::fill(sums, 0.0F);
      for (size_t c = 0; c < w.chunks.size(); ++c) {
        const LookupChunk& chunk = w.chunks[c];
        add_lookups({.codes = w.codes.data() + place(w, first, chunk),
                     .strips = strips,
                     .fields = (chunk.last_block - chunk.first_block) * w.fields,
                     .scales = w.scales.data() + (chunk.scale * w.strips() + first) * kLookupStripRows,
                     .lanes = at_once,
                     .tables = tables.data() + lane * lane_size + begins[c],
                     .table_stride = lane_size,
                     .sums = sums.data()});
      }
      for (int64_t l = lane; l < lane + at_once; ++l) {
        const float* const from = sums.data() + (l - lane) * kPieceRows;
        float* const to = y.row(l / w.out_group);
        for (int64_t r = 0; r < strips * kLookupStripRows; ++r) {
          const int64_t row = (first * kLookupStripRows + r) * w.out_group + l % w.out_group;
          if (row < w.rows) to[row] = from[r];
        }
      }
      lane += at_once;
    }
  });
}

// Writes the weights of one row of a block: a compiler unrolls the loops for a width that it knows.
template <int kWidth>
void decode_block(const float* const* entries, int64_t books, int64_t width, float scale, float* to) {
  const int64_t count = kWidth > 0 ? kWidth : width;
  std::array<float, Additive::kMostWeights> sum;
  for (int64_t i = 0; i < count; ++i) sum[static_cast<size_t>(i)] = entries[0][i];
  for (int64_t book = 1; book < books; ++book) {
    for (int64_t i = 0; i < count; ++i) sum[static_cast<size_t>(i)] += entries[book][i];
  }
  for (int64_t i = 0; i < count; ++i) to[i] = sum[static_cast<size_t>(i)] * scale;
}

// The rows of one strip, [16 * out_group, columns].
void decode_strip(const PreparedLookups& w, int64_t strip, float* out) {
  const int64_t mask = (int64_t{1} << w.bits) - 1;
  const int64_t dim = w.out_group * w.in_group;
  const int64_t table = dim << w.bits;
  std::array<const float*, Additive::kMostCodebooks> entries{};
  for (const LookupChunk& chunk : w.chunks) {
    const uint8_t* codes = w.codes.data() + place(w, strip, chunk);
    const float* const scales = w.scales.data() + (chunk.scale * w.strips() + strip) * kLookupStripRows;
    for (int64_t block = chunk.first_block; block < chunk.last_block; ++block) {
      const int64_t first = block * w.in_group;
      const int64_t width = std::min(w.in_group, w.columns - first);
      for (int64_t r = 0; r < kLookupStripRows; ++r) {
        for (int64_t book = 0; book < w.codebooks; ++book) {
          const int64_t code =
              codes[book / w.tables_of_field * kLookupStripRows + r] >> (book % w.tables_of_field * w.bits) &
              mask;
          entries[static_cast<size_t>(book)] = w.entries.data() + book * table + code * dim;
        }
        for (int64_t a = 0; a < w.out_group; ++a) {
          float* const to = out + (r * w.out_group + a) * w.columns + first;
          if (width == 8) {
            decode_block<8>(entries.data(), w.codebooks, width, scales[r], to);
          } else if (width == 4) {
            decode_block<4>(entries.data(), w.codebooks, width, scales[r], to);
          } else {
            decode_block<0>(entries.data(), w.codebooks, width, scales[r], to);
          }
          for (int64_t book = 0; book < w.codebooks; ++book) entries[static_cast<size_t>(book)] += w.in_group;
        }
      }
      codes += w.fields * kLookupStripRows;
    }
  }
}

void multiply_many(const float* x, int64_t tokens, const PreparedLookups& w, MatrixView<float> y,
                   int threads) {
  const int64_t strip_rows = kLookupStripRows * w.out_group;
  const auto& tiles = algebra::tiles();
  parallel_for(w.strips(), threads, [&](int64_t strip) {
    std::vector<float> decoded(static_cast<size_t>(strip_rows * w.columns));
    decode_strip(w, strip, decoded.data());
    const int64_t first = strip * strip_rows;
    const int64_t rows = std::min(strip_rows, w.rows - first);
    for (int64_t token = 0; token < tokens; ++token) std::fill_n(y.row(token) + first, rows, 0.0F);
    tiles.gemm_nt_f32(tokens, rows, w.columns, 1.0F, x, w.columns, decoded.data(), w.columns,
                      y.data() + first, y.stride());
  });
}

}  // namespace

int64_t PreparedLookups::strips() const {
  return ceil_div(row_groups, kLookupStripRows);
}

int64_t PreparedLookups::byte_count() const {
  return std::ssize(codes) + 4 * (std::ssize(tables) + std::ssize(entries) + std::ssize(scales));
}

bool takes_lookups(const Format& format) {
  if (const auto* additive = dynamic_cast<const Additive*>(&format)) return additive->bits <= 8;
  const auto* vectors = dynamic_cast<const VectorCodebook*>(&format);
  return vectors != nullptr && vectors->bits <= 8;
}

std::shared_ptr<const PreparedLookups> prepare_lookups(const PackedTensor& packed, int threads) {
  auto w = std::make_shared<PreparedLookups>();
  const Parts parts = parts_of(packed, *w);
  w->format = packed.format;
  w->rows = packed.n;
  w->columns = packed.k;
  w->row_groups = packed.k > 0 ? ceil_div(packed.n, w->out_group) : 0;
  w->blocks = ceil_div(packed.k, w->in_group);
  w->tables_of_field = std::min(8 / w->bits, w->codebooks);
  w->fields = ceil_div(int64_t{w->codebooks}, int64_t{w->tables_of_field});
  w->stride = checked_pad(int64_t{1} << w->bits, 16);
  const int64_t dim = w->out_group * w->in_group;
  w->tables.assign(static_cast<size_t>(w->codebooks * dim * w->stride), 0.0F);
  w->entries.assign(static_cast<size_t>(w->codebooks * dim << w->bits), 0.0F);
  for (int64_t book = 0; book < w->codebooks; ++book) {
    for (int64_t entry = 0; entry < parts.entries; ++entry) {
      for (int64_t i = 0; i < dim; ++i) {
        const float value =
            parts.additive.tables[static_cast<size_t>((book * parts.entries + entry) * dim + i)];
        w->tables[static_cast<size_t>((book * dim + i) * w->stride + entry)] = value;
        w->entries[static_cast<size_t>(((book << w->bits) + entry) * dim + i)] = value;
      }
    }
  }
  plan_chunks(*w, parts.scale_columns);
  const int64_t strips = w->strips();
  w->scales.assign(static_cast<size_t>(checked_mul(parts.scale_count, strips * kLookupStripRows)), 0.0F);
  for (int64_t r = 0; r < w->row_groups; ++r) {
    for (int64_t s = 0; s < parts.scale_count; ++s) {
      w->scales[static_cast<size_t>(s * strips * kLookupStripRows + r)] =
          parts.additive.scales[static_cast<size_t>(r * parts.scale_count + s)];
    }
  }
  w->codes.assign(static_cast<size_t>(checked_mul(strips, strip_bytes(*w))), 0);
  parallel_for(strips, threads, [&](int64_t strip) {
    for (const LookupChunk& chunk : w->chunks) {
      uint8_t* to = w->codes.data() + place(*w, strip, chunk);
      for (int64_t block = chunk.first_block; block < chunk.last_block; ++block) {
        for (int64_t r = 0; r < std::min(kLookupStripRows, w->row_groups - strip * kLookupStripRows); ++r) {
          const uint16_t* const code = parts.additive.codes.data() +
                                       ((strip * kLookupStripRows + r) * w->blocks + block) * w->codebooks;
          for (int64_t book = 0; book < w->codebooks; ++book) {
            to[book / w->tables_of_field * kLookupStripRows + r] |=
                static_cast<uint8_t>(code[book] << (book % w->tables_of_field * w->bits));
          }
        }
        to += w->fields * kLookupStripRows;
      }
    }
  });
  return w;
}

void multiply_lookups(const FloatMatrix& x, const PreparedLookups& w, MatrixView<float> y, int threads) {
  const int64_t k = w.columns;
  std::vector<float> tokens(static_cast<size_t>(checked_mul(std::min(x.rows(), kBatchTokens), k)));
  for (int64_t first = 0; first < x.rows(); first += kBatchTokens) {
    const int64_t count = std::min(kBatchTokens, x.rows() - first);
    parallel_for(k > 0 ? count : 0, threads,
                 [&](int64_t token) { x.read(first + token, 0, k, tokens.data() + token * k); });
    const MatrixView<float> out = y.block(first, 0, count, y.cols());
    if (k == 0) {
      for (int64_t token = 0; token < count; ++token) std::fill_n(out.row(token), w.rows, 0.0F);
    } else if (count <= 2 * w.in_group / w.fields) {
      // Beyond, decoding a row once and multiplying costs less than look-ups for each token.
      for (int64_t token = 0; token < count; token += kFewTokens) {
        const int64_t few = std::min(kFewTokens, count - token);
        multiply_few(tokens.data() + token * k, few, w, out.block(token, 0, few, out.cols()), threads);
      }
    } else {
      multiply_many(tokens.data(), count, w, out, threads);
    }
  }
}

}  // namespace quantloom::kernels
