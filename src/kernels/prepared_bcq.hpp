// Products with binary coding by look-up tables (LUT-GEMM: Park et al., 2024): for each 4 columns of a token
// a table of the 16 sums of +-x, so that 4 signs of a plane cost one look-up and one addition. A table is one
// register of floats, in which a permutation looks up for as many rows as it has lanes: nothing is rounded.
//
// Kernel order: rows in strips of kStripRows, missing rows of the last one with scales 0, strips in slabs of
// kSlabStrips. Groups are padded to whole nibbles of 4 columns and cut into blocks of kBlockColumns. A slab
// is one linear stream:
//   for each group:  for each strip: for each plane 16 scales, then 16 offsets if there are any
//     for each block: for each strip: vectors of 16 dwords, dword r of row r of the strip
// The dwords of a row in a block hold the nibbles of plane 0, lowest bits first, then those of plane 1, ...
// A nibble has its highest bit set where column 3 is taken off; the bits of the other columns say whether
// they have the sign of column 3. So tables have their upper half with all signs turned.
#pragma once

#include "kernels/prepared_strips.hpp"
#include "quantloom/formats/bcq.hpp"

namespace quantloom::kernels {

inline constexpr int64_t kSlabStrips = 4;
inline constexpr int64_t kNibbleColumns = 4;
inline constexpr int64_t kNibblesPerDword = 8;
inline constexpr int64_t kTableEntries = 16;
// Tokens of a tile, if it is not one token alone: tiles of 2 and 8 were slower (Zen 5).
inline constexpr int kTableTokens = 4;

// What the loops see of a matrix.
struct BcqMatrix {
  const uint8_t* stream = nullptr;
  int64_t slab_bytes = 0;  // of a slab with all strips
  int64_t rows = 0;
  const GroupPlan* groups = nullptr;  // tail_steps are nibbles
  int64_t group_count = 0;
  int bits = 0;
  bool offset = false;
  DType scale_dtype = DType::f16;
};

// Tokens in a tile of 1 or kTableTokens (the missing ones are 0): values of token t for item i at i * tile +
// t.
struct BcqTile {
  int tile = 1;
  int tokens = 1;
  const float* tables = nullptr;     // items: nibbles; kTableEntries floats each, on whole cache lines
  const float* group_sum = nullptr;  // items: groups; read only if there are offsets
  float* y = nullptr;
  int64_t y_stride = 0;
};

struct PreparedBcq final : PreparedTensor {
  int64_t n() const override { return rows; }
  int64_t k() const override { return columns; }
  int64_t byte_count() const override { return stream.size(); }

  BcqMatrix matrix() const;

  std::shared_ptr<const Bcq> format;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t padded_columns = 0;
  std::vector<GroupPlan> groups;
  // The input column of each prepared column, -1 for padding; empty if prepared column c is column c.
  std::vector<int32_t> source;
  int64_t slab_bytes = 0;
  AlignedBytes stream;
};

// Dwords of the nibbles of `bits` planes, of a row.
inline int64_t dwords_of(int64_t nibbles, int bits) {
  return ceil_div(nibbles * bits, kNibblesPerDword);
}

// `packed` is valid and on the CPU.
std::shared_ptr<const PreparedBcq> prepare_bcq(const PackedTensor& packed, int threads);

// y [m, n] = x [m, k] W^T; shapes are checked.
void multiply_bcq(const FloatMatrix& x, const PreparedBcq& w, MatrixView<float> y, int threads);

// Writes the tables of nibbles [first, last) for a tile of x [padded columns, tile].
void fill_sum_tables(const float* x, int tile, int64_t first, int64_t last, float* tables);
// Writes y for the rows of slab `slab`.
void multiply_slab(const BcqMatrix& w, const BcqTile& tile, int64_t slab);

}  // namespace quantloom::kernels
