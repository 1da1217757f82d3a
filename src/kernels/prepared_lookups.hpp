// Products with sums of table entries by look-up tables (as AQLM's for CPUs): for each block of a token's
// inputs and each table, the products of all entries with these inputs, once; then the codes of a row's block
// cost one look-up and one addition for all its weights. For the formats additive and vector_codebook with
// codes of up to 8 bits.
//
// Kernel order: groups of rows in strips of 16, strips in pieces; the codes of neighbouring tables share a
// byte where they fit (a field), whose table has the sums of theirs. Blocks along a row in chunks, whose
// tables a cache holds; a chunk has one scale a row. For each piece, for each chunk, for each of its strips,
// for each block and field: 16 bytes, one for each group of rows.
#pragma once

#include <vector>

#include "quantloom/kernels/matmul.hpp"

namespace quantloom::kernels {

inline constexpr int64_t kLookupStripRows = 16;
inline constexpr int64_t kLookupPieceStrips = 32;
inline constexpr int64_t kLookupEntries = 256;  // of a field's table
inline constexpr int64_t kLookupChunkFields = 16;
inline constexpr int kLookupLanes =
    4;  // pairs of a token and a row of a block that share the reading of codes

// What the loops see of one chunk of one piece.
struct LookupJob {
  const uint8_t* codes = nullptr;  // [strips][fields][16]
  int64_t strips = 0;
  int64_t fields = 0;             // of the chunk's blocks
  const float* scales = nullptr;  // [strips * 16]
  int lanes = 1;                  // 1, 2 or 4
  const float* tables = nullptr;  // lane l's at l * table_stride: [fields][256]
  int64_t table_stride = 0;
  float* sums = nullptr;  // [lanes][kLookupPieceStrips * 16], which products are added to
};
void add_lookups(const LookupJob& job);

// products[c] = sum over i < dim of x[i] * table[i * stride + c], for c < stride, a multiple of 16.
struct EntryJob {
  const float* x = nullptr;
  int64_t dim = 0;
  const float* table = nullptr;
  int64_t stride = 0;
  float* products = nullptr;
};
void multiply_entries(const EntryJob& job);

struct LookupChunk {
  int64_t first_block = 0;
  int64_t last_block = 0;
  int64_t scale = 0;
  int64_t offset = 0;  // of its bytes in those of a strip
};

struct PreparedLookups final : PreparedTensor {
  int64_t n() const override { return rows; }
  int64_t k() const override { return columns; }
  int64_t byte_count() const override;

  std::shared_ptr<const Format> format;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t out_group = 1;
  int64_t in_group = 1;
  int64_t row_groups = 0;
  int64_t blocks = 0;  // of a group of rows
  int codebooks = 1;
  int bits = 8;                // of a code
  int tables_of_field = 1;     // whose codes share a byte
  int64_t fields = 1;          // of a block
  int64_t stride = 16;         // entries of a table, padded
  std::vector<float> tables;   // [codebooks][out_group][in_group][stride]
  std::vector<float> entries;  // [codebooks][2^bits][out_group][in_group]: the same, to decode with
  std::vector<LookupChunk> chunks;
  std::vector<uint8_t> codes;  // [strip][blocks * fields][16], strips of a piece together for each chunk
  std::vector<float> scales;   // [scales][strips * 16]

  int64_t strips() const;
};

bool takes_lookups(const Format& format);

// `packed` is valid, on the CPU, and of a format that takes_lookups().
std::shared_ptr<const PreparedLookups> prepare_lookups(const PackedTensor& packed, int threads);

// y [m, n] = x [m, k] W^T; shapes are checked.
void multiply_lookups(const FloatMatrix& x, const PreparedLookups& w, MatrixView<float> y, int threads);

}  // namespace quantloom::kernels
