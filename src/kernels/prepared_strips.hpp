// Kernel order of the formats with scalar codes: what matmul's loops read, and the pure functions that bring
// the canonical planes into it and back.
//
// Rows are taken in strips of kStripRows = 16, one strip after the other; missing rows of the last strip
// have scale 0. A strip is one linear stream:
//   for each group:  scales      16 x scale_dtype, row by row
//                    zero points 16 x uint8 (asymmetric only), 16 x float32 for those of spqr
//                    steps of step_columns columns of 16 rows, 2 * container_bits * step_columns bytes each
// A step holds vectors of 16 dwords; dword r belongs to row r of the strip. Byte b of a dword holds codes of
// the columns q = b (mod 4) of the step, lowest bits first:
//   8 bits: 16 columns, 4 vectors; vector v has columns 4v + b
//   4 bits: 16 columns, 2 vectors; field f (0, 1) of vector v has column 8v + 4f + b
//   2 bits: 16 columns, 1 vector;  field f (0 ... 3) has column 4f + b
//   3 bits: 32 columns; vectors 0 and 1 hold the two low bits (column 16v + 4f + b), vector 2 the high bit of
//           all 32 (bit f of byte b: column 4f + b)
// Four codes of consecutive columns thus lie in the four bytes of a dword, as int8 dot products want them.
// A group is padded to whole steps with code 0; its columns are cut into blocks of kBlockColumns, the unit
// of accumulation and of activation scales.
#pragma once

#include <memory>
#include <vector>

#include "quantloom/formats/codebook.hpp"
#include "quantloom/formats/spqr.hpp"
#include "quantloom/formats/uniform.hpp"
#include "quantloom/kernels/matmul.hpp"

namespace quantloom::kernels {

inline constexpr int64_t kStripRows = 16;
inline constexpr int64_t kBlockColumns = 128;

// The blocks of one group, the same in each strip.
struct GroupPlan {
  int32_t full_blocks = 0;  // blocks of kBlockColumns columns
  int32_t tail_steps = 0;   // steps in the block after them; 0 if there is none
};

// Bytes aligned to cache lines, on huge pages where the system grants them.
class AlignedBytes {
 public:
  AlignedBytes() = default;
  explicit AlignedBytes(int64_t size);  // zeroed
  std::byte* data() const { return data_.get(); }
  int64_t size() const { return size_; }

 private:
  struct Free {
    void operator()(std::byte* p) const;
  };
  std::unique_ptr<std::byte, Free> data_;
  int64_t size_ = 0;
};

struct PreparedStrips final : PreparedTensor {
  int64_t n() const override { return rows; }
  int64_t k() const override { return columns; }
  int64_t byte_count() const override { return stream.size(); }

  int64_t strip_count() const { return ceil_div(rows, kStripRows); }
  // Blocks of all groups.
  int64_t block_count() const;

  std::shared_ptr<const GroupedFormat> format;
  int64_t rows = 0;
  int64_t columns = 0;
  int container_bits = 0;    // 2, 3, 4 or 8
  int64_t step_columns = 0;  // 16, or 32 for 3 bits
  int64_t padded_columns = 0;
  int64_t strip_bytes = 0;
  std::vector<GroupPlan> groups;
  // The input column of each prepared column, -1 for padding; empty if prepared column c is column c.
  std::vector<int32_t> source;
  bool has_group_index = false;
  bool has_zeros = false;   // asymmetric grids
  bool real_zeros = false;  // which are no integers, and float32
  // Codebooks: the value of each code of the container, 0 beyond the table. Empty for grids.
  std::vector<float> table;
  // What one code unit of the container is worth: value = code_unit * scale * (code - center) for
  // symmetric grids. 0.5 for symmetric 1-bit grids, whose codes are stored doubled (0 and 2), else 1.
  float code_unit = 1.0F;
  // The symmetric zero point in units of container codes; asymmetric grids use it to centre codes only.
  float center = 0.0F;
  // Per-tensor parameters, kept for the way back from matrices without rows.
  uint32_t tensor_scale_bits = 0;
  uint8_t tensor_zero = 0;
  AlignedBytes stream;
};

// Columns in the order of groups, each padded to whole steps.
struct PreparedColumns {
  std::vector<int64_t> sizes;  // of the groups, without padding
  std::vector<GroupPlan> groups;
  int64_t padded = 0;           // columns in all
  std::vector<int32_t> source;  // as PreparedStrips has it
};
PreparedColumns prepare_columns(const PackedTensor& packed, const ScaledFormat& format, int64_t step_columns);

// Reads one token in the order of the prepared columns: gathered by `source`, which may be empty, padded with
// zeros. row [x.cols()] is for its use.
void read_token(const FloatMatrix& x, int64_t token, std::span<const int32_t> source, float* row, float* out);

// Bytes of the zero points of one group and strip.
inline constexpr int64_t zero_bytes(bool has_zeros, bool real_zeros) {
  return has_zeros ? kStripRows * (real_zeros ? 4 : 1) : 0;
}

// The container that codes of `bits` bits are stored in: 1 -> 2, 5 ... 7 -> 8, others as they are.
int container_bits_for(int bits);

// `packed` is valid and uniform, a codebook or spqr. Of the latter scales are decoded to float32, and codes
// of 3 bits take 4 where a group would be padded to 32 columns.
std::shared_ptr<const PreparedStrips> prepare_strips(const PackedTensor& packed, int threads);
// Columns of the decoded matrix, one after the other [columns, rows]; of codebooks, too.
std::vector<float> decode_columns(const PreparedStrips& prepared, std::span<const int32_t> columns,
                                  int threads);
// The inverse: the canonical planes, bit for bit; Unsupported for spqr.
PackedTensor unprepare_strips(const PreparedStrips& prepared, int threads);

}  // namespace quantloom::kernels
