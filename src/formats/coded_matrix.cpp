#include "quantloom/formats/coded_matrix.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "formats/coded_stream.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/error.hpp"
#include "quantloom/formats/entropy.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {
namespace {

void check_options(const CodedOptions& options) {
  if (options.table_bits != 0 &&
      (options.table_bits < kCodedSmallestTable || options.table_bits > kCodedLargestTable)) {
    throw InvalidArgument("table_bits", text_of(options.table_bits),
                          text_of("0 (automatic) or ", kCodedSmallestTable, " to ", kCodedLargestTable));
  }
  if (options.splits < 0 || options.splits > kCodedSplits) {
    throw InvalidArgument("splits", text_of(options.splits), text_of("0 (automatic) or 1 to ", kCodedSplits));
  }
  if (!(options.overhead >= 0)) throw InvalidArgument("overhead", text_of(options.overhead), "at least 0");
  if (options.warps < 1) throw InvalidArgument("warps", text_of(options.warps), "at least 1");
}

int64_t blocks_of_rows(int64_t n) {
  return ceil_div(n, kCodedRows);
}
int64_t blocks_of_columns(int64_t k) {
  return ceil_div(k, kCodedColumns);
}

int most_splits(int64_t k) {
  return static_cast<int>(std::clamp<int64_t>(blocks_of_columns(k), 1, kCodedSplits));
}

int pick_splits(const CodedOptions& options, int64_t n, int64_t k, int table_bits, double entropy) {
  if (options.splits != 0) return std::min(options.splits, most_splits(k));
  // States, less what the last pairs save; lengths; where the stream begins, and what its words leave free.
  const double bits = 64.0 * (table_bits - 2 * std::min(entropy, 0.5 * table_bits)) + 32 * 8 + 96;
  const double rows = static_cast<double>(std::max<int64_t>(1, blocks_of_rows(n)));
  const double budget = options.overhead * static_cast<double>(n) * static_cast<double>(k) / (bits * rows);
  const double useful = static_cast<double>(options.warps) / rows;
  return static_cast<int>(std::clamp(std::floor(std::min(budget, useful)), 1.0, double(most_splits(k))));
}

void check_size(int64_t n, int64_t k) {
  if (n < 0 || k < 0) throw InvalidArgument("codes", text_of("[", n, ", ", k, "]"), "sizes >= 0");
  checked_mul(checked_pad(n, kCodedRows), checked_pad(k, kCodedColumns));
}

}  // namespace

CodedMatrix::CodedMatrix(std::span<const uint8_t> codes, int64_t n, int64_t k, const CodedOptions& options)
    : n_(n), k_(k) {
  check_options(options);
  check_size(n, k);
  if (std::ssize(codes) != n * k) {
    throw InvalidArgument("codes", text_of(codes.size(), " codes"), text_of(n, " x ", k));
  }
  const std::vector<uint64_t> counts = count_codes(codes, kCodedAlphabet, options.threads);
  begins_.push_back(0);
  if (n == 0 || k == 0) {
    splits_ = options.splits != 0 ? std::min(options.splits, most_splits(k)) : 1;
    table_bits_ = options.table_bits != 0 ? options.table_bits : kCodedSmallestTable;
    symbols_.assign(size_t{1} << table_bits_, 0);
    table_ = coded::table_of(symbols_);
    begins_.resize(static_cast<size_t>(streams()) + 1);  // of streams without words
    return;
  }
  coded::PairStates states = coded::fit_pair_states(counts, options.table_bits);
  table_bits_ = states.bits;
  table_loss_ = states.loss;
  symbols_ = std::move(states.symbols);
  table_ = coded::table_of(symbols_);
  const coded::PairEncoder encoder(symbols_);
  splits_ = pick_splits(options, n, k, table_bits_, entropy_of(counts));

  // Rows and columns beyond the matrix hold its most frequent code.
  const auto filler = static_cast<uint8_t>(std::max_element(counts.begin(), counts.end()) - counts.begin());
  std::vector<std::vector<uint32_t>> parts(static_cast<size_t>(streams()));
  parallel_for(row_blocks(), options.threads, [&](int64_t r) {
    const int64_t stride = column_blocks() * kCodedColumns;
    std::vector<uint8_t> rows(static_cast<size_t>(kCodedRows * stride), filler);
    for (int64_t row = 0; row < std::min(kCodedRows, n - r * kCodedRows); ++row) {
      const uint8_t* from = codes.data() + (r * kCodedRows + row) * k;
      std::copy(from, from + k, rows.begin() + row * stride);
    }
    for (int split = 0; split < splits_; ++split) {
      const int64_t first = first_column_block(split);
      parts[static_cast<size_t>(r * splits_ + split)] =
          coded::encode_stream(rows.data() + first * kCodedColumns, stride,
                               first_column_block(split + 1) - first, encoder, table_bits_);
    }
  });
  uint64_t total = 0;
  for (const auto& part : parts) {
    total += part.size();
    if (total > std::numeric_limits<uint32_t>::max()) {
      throw InvalidArgument("codes", text_of(codes.size(), " codes"),
                            "codes of less than 16 GiB; split them");
    }
    begins_.push_back(static_cast<uint32_t>(total));
  }
  words_.reserve(total);
  for (const auto& part : parts) words_.insert(words_.end(), part.begin(), part.end());
}

CodedMatrix CodedMatrix::from_parts(int64_t n, int64_t k, int splits, std::vector<uint32_t> symbols,
                                    std::vector<uint32_t> begins, std::vector<uint32_t> words, int threads) {
  const auto refuse = [](const std::string& why) { throw FileFormatError("coded matrix: " + why); };
  check_size(n, k);
  CodedMatrix matrix;
  matrix.n_ = n;
  matrix.k_ = k;
  if (splits < 1 || splits > most_splits(k)) {
    refuse(text_of(splits, " splits, expected 1 to ", most_splits(k)));
  }
  matrix.splits_ = splits;
  int bits = kCodedSmallestTable;
  while (bits < kCodedLargestTable && (size_t{1} << bits) < symbols.size()) ++bits;
  if (symbols.size() != size_t{1} << bits) {
    refuse(
        text_of(symbols.size(), " states, expected 2^", kCodedSmallestTable, " to 2^", kCodedLargestTable));
  }
  for (const uint32_t s : symbols) {
    if (s > 0xffff && s != coded::kEscape) refuse(text_of("the symbol ", s, ", which is no pair of codes"));
  }
  matrix.table_bits_ = bits;
  matrix.table_ = coded::table_of(symbols);
  matrix.symbols_ = std::move(symbols);
  if (std::ssize(begins) != matrix.streams() + 1) {
    refuse(text_of(begins.size(), " offsets, expected ", matrix.streams() + 1));
  }
  if (begins.front() != 0 || begins.back() != words.size() || !std::is_sorted(begins.begin(), begins.end())) {
    refuse("offsets that do not ascend from 0 to the number of words");
  }
  matrix.begins_ = std::move(begins);
  matrix.words_ = std::move(words);
  constexpr int64_t kPiece = 16 * kCodedRows;
  std::vector<uint8_t> codes;
  for (int64_t row = 0; row < n; row += kPiece) {
    const int64_t rows = std::min(kPiece, n - row);
    codes.resize(static_cast<size_t>(rows * k));
    matrix.decode(row, rows, codes, threads);
  }
  return matrix;
}

int64_t CodedMatrix::row_blocks() const {
  return blocks_of_rows(n_);
}
int64_t CodedMatrix::column_blocks() const {
  return blocks_of_columns(k_);
}

int64_t CodedMatrix::byte_count() const {
  return 4 * static_cast<int64_t>(table_.size() + begins_.size() + words_.size());
}

void CodedMatrix::decode(int64_t first_row, int64_t rows, std::span<uint8_t> codes, int threads) const {
  if (first_row < 0 || rows < 0 || first_row > n_ || rows > n_ - first_row) {
    throw InvalidArgument("rows", text_of("rows ", first_row, " to ", first_row, " + ", rows),
                          text_of("a range within ", n_, " rows"));
  }
  if (std::ssize(codes) != rows * k_) {
    throw InvalidArgument("codes", text_of("room for ", codes.size(), " codes"), text_of(rows, " x ", k_));
  }
  if (codes.empty()) return;
  const int64_t first_block = first_row / kCodedRows;
  const int64_t stride = column_blocks() * kCodedColumns;
  parallel_for(blocks_of_rows(first_row + rows) - first_block, threads, [&](int64_t b) {
    const int64_t r = first_block + b;
    std::vector<uint8_t> whole(static_cast<size_t>(kCodedRows * stride));
    for (int split = 0; split < splits_; ++split) {
      const auto stream = static_cast<size_t>(r * splits_ + split);
      const int64_t first = first_column_block(split);
      const char* problem = coded::decode_stream(
          std::span(words_).subspan(begins_[stream], begins_[stream + 1] - begins_[stream]), table_,
          table_bits_, first_column_block(split + 1) - first, whole.data() + first * kCodedColumns, stride);
      if (problem != nullptr) throw FileFormatError(text_of("coded matrix: stream ", stream, " ", problem));
    }
    for (int64_t row = std::max(first_row, r * kCodedRows);
         row < std::min(first_row + rows, (r + 1) * kCodedRows); ++row) {
      const uint8_t* from = whole.data() + (row - r * kCodedRows) * stride;
      std::copy(from, from + k_, codes.begin() + (row - first_row) * k_);
    }
  });
}

}  // namespace quantloom
