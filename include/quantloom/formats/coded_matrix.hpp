// Entropy-coded codes of a matrix in the order of products: what prepare() is to packed codes. Streams of
// entropy_encode() are for files; these are for memory, where a product decodes them as it multiplies.
//
// Pairs of neighbouring codes are the symbols of a tabled asymmetric numeral system (Duda, 2013): a state
// below 2^table_bits names a pair and how many bits to read for the next state, so that one look-up and two
// shifts give two codes. A warp reads one stream, which holds 16 rows of a run of columns: each lane has two
// states (for rows r and r + 8) and a string of bits, which comes in 32-bit words; the lanes share one
// sequence of these words, each taking the next one when it needs it. See FORMATS.md for the order.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace quantloom {

inline constexpr int64_t kCodedAlphabet = 256;  // codes are below it
inline constexpr int64_t kCodedRows = 16;       // of a stream
inline constexpr int64_t kCodedColumns = 32;    // streams hold whole blocks of so many columns
inline constexpr int kCodedLanes = 32;
inline constexpr int kCodedSplits = 16;        // most streams side by side
inline constexpr int kCodedSmallestTable = 8;  // 2^8 states
inline constexpr int kCodedLargestTable = 14;  // 2^14 states

struct CodedOptions {
  // log2 of the states, 8 to 14. 0: as few, from 10 on, as cost next to nothing.
  int table_bits = 0;
  // Streams that the columns are dealt to, 1 to 16. More of them let a device decode more codes at once, and
  // each costs about 700 bits. 0: as many as `overhead` and `warps` allow.
  int splits = 0;
  // Bits per code that streams may cost beyond their codes. One stream for each 16 rows is the least.
  double overhead = 0.01;
  int64_t warps = 132 * 32;  // streams beyond so many do not help
  int threads = 0;           // the result does not depend on it
};

class CodedMatrix {
 public:
  CodedMatrix() = default;
  // `codes` [n, k], row after row. Throws InvalidArgument for another count and options out of range.
  CodedMatrix(std::span<const uint8_t> codes, int64_t n, int64_t k, const CodedOptions& options = {});

  // Of parts that were stored. `symbols` [2^table_bits]: for each state, its first code, the second << 8, and
  // 1 << 16 for the escape (whose codes are 0). Decodes everything once: throws FileFormatError unless the
  // parts are those of an encoder.
  static CodedMatrix from_parts(int64_t n, int64_t k, int splits, std::vector<uint32_t> symbols,
                                std::vector<uint32_t> begins, std::vector<uint32_t> words, int threads = 0);

  int64_t n() const { return n_; }
  int64_t k() const { return k_; }
  int splits() const { return splits_; }
  int table_bits() const { return table_bits_; }
  int64_t row_blocks() const;
  int64_t column_blocks() const;
  int64_t streams() const { return row_blocks() * splits_; }
  // The blocks of columns of streams r * splits + split, for all r.
  int64_t first_column_block(int split) const { return column_blocks() * split / splits_; }

  const std::vector<uint32_t>& symbols() const { return symbols_; }
  // For each state: first code, second code << 8, x << 16, and 1 << 31 for the escape. The next state is
  // x 2^b + (b bits of the string) - 2^table_bits, where b makes x 2^b at least 2^table_bits.
  const std::vector<uint32_t>& table() const { return table_; }
  // Where in words() each stream begins, and the last one ends: [streams() + 1].
  const std::vector<uint32_t>& begins() const { return begins_; }
  const std::vector<uint32_t>& words() const { return words_; }
  // Of words, begins and table.
  int64_t byte_count() const;
  // Expected bits per code beyond the entropy of the codes that the table costs. 0 from parts.
  double table_loss() const { return table_loss_; }

  // Codes of rows [first_row, first_row + rows) to `codes` [rows, k].
  void decode(int64_t first_row, int64_t rows, std::span<uint8_t> codes, int threads = 0) const;

 private:
  int64_t n_ = 0;
  int64_t k_ = 0;
  int splits_ = 1;
  int table_bits_ = kCodedSmallestTable;
  double table_loss_ = 0;
  std::vector<uint32_t> symbols_;
  std::vector<uint32_t> table_;
  std::vector<uint32_t> begins_;
  std::vector<uint32_t> words_;
};

}  // namespace quantloom
