#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>

#include "formats/element_runs.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/formats/elements.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {
namespace {

constexpr int64_t kBlocks = 4096;    // blocks of a piece of work
constexpr int64_t kSegment = 65536;  // elements of a row that are reduced at a time

// What a statistic needs of a part of a block. Magnitudes are compared as bits, with NaN above all.
struct Partial {
  int32_t positive = 0;
  int32_t negative = 0;
  double squares = 0;

  void add_extremes(const float* x, int64_t count) {
    const element_runs::Extremes here = element_runs::extremes(x, count);
    positive = std::max(positive, here.positive);
    negative = std::max(negative, here.negative);
  }
  void add_squares(const float* x, int64_t count) {
    double sums[8] = {};
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
      for (int lane = 0; lane < 8; ++lane) {
        sums[lane] += static_cast<double>(x[i + lane]) * static_cast<double>(x[i + lane]);
      }
    }
    for (; i < count; ++i) sums[0] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    for (const double sum : sums) squares += sum;
  }
  void add(const Partial& other) {
    positive = std::max(positive, other.positive);
    negative = std::max(negative, other.negative);
    squares += other.squares;
  }
  float absmax() const { return std::bit_cast<float>(std::max(positive, negative)); }
  float signed_extreme() const {
    if (std::isnan(absmax())) return NAN;
    return positive >= negative ? std::bit_cast<float>(positive) : -std::bit_cast<float>(negative);
  }
};

}  // namespace

BlockStatistic block_statistic_from_name(std::string_view name) {
  if (name == "absmax") return BlockStatistic::absmax;
  if (name == "mean_square") return BlockStatistic::mean_square;
  if (name == "signed_extreme") return BlockStatistic::signed_extreme;
  throw InvalidArgument("statistic", name, "absmax, mean_square or signed_extreme");
}

std::vector<float> block_statistics(const FloatMatrix& x, BlockGrid grid, BlockStatistic statistic,
                                    int threads) {
  const int64_t block_rows = grid.rows(x);
  const int64_t block_cols = grid.cols(x);
  const int64_t width = std::min(grid.col_block, std::max<int64_t>(1, x.cols()));
  const int64_t segments = ceil_div(width, kSegment);
  const int64_t per_row = checked_mul(block_cols, segments);
  std::vector<Partial> partials(static_cast<size_t>(checked_mul(x.rows(), per_row)));
  // Small blocks are taken several at a time; the order of sums depends on neither pieces nor threads.
  const int64_t piece = std::max<int64_t>(1, kSegment / std::max<int64_t>(1, std::min(width, kSegment)));
  const auto count = static_cast<int64_t>(partials.size());
  parallel_for(ceil_div(count, piece), threads, [&](int64_t index) {
    std::vector<float> values(static_cast<size_t>(std::min(width, kSegment)));
    for (int64_t i = index * piece; i < std::min(count, (index + 1) * piece); ++i) {
      const int64_t block = i % per_row / segments;
      const int64_t first = block * grid.col_block + i % segments * kSegment;
      const int64_t end = std::min({x.cols(), first + kSegment, (block + 1) * grid.col_block});
      if (first >= end) continue;
      x.read(i / per_row, first, end - first, values.data());
      if (statistic == BlockStatistic::mean_square) {
        partials[static_cast<size_t>(i)].add_squares(values.data(), end - first);
      } else {
        partials[static_cast<size_t>(i)].add_extremes(values.data(), end - first);
      }
    }
  });
  std::vector<float> result(static_cast<size_t>(checked_mul(block_rows, block_cols)));
  const auto combine = [&](int64_t index) {
    const int64_t first_row = index / block_cols * grid.row_block;
    const int64_t last_row = std::min(x.rows(), first_row + grid.row_block);
    const int64_t block = index % block_cols;
    Partial sum;
    for (int64_t row = first_row; row < last_row; ++row) {
      for (int64_t s = 0; s < segments; ++s) {
        sum.add(partials[static_cast<size_t>(row * per_row + block * segments + s)]);
      }
    }
    const int64_t cols = std::min(x.cols(), (block + 1) * grid.col_block) - block * grid.col_block;
    const double mean = sum.squares / static_cast<double>((last_row - first_row) * cols);
    result[static_cast<size_t>(index)] = statistic == BlockStatistic::absmax ? sum.absmax()
                                         : statistic == BlockStatistic::signed_extreme
                                             ? sum.signed_extreme()
                                             : static_cast<float>(mean);
  };
  const auto blocks = static_cast<int64_t>(result.size());
  parallel_for(ceil_div(blocks, kBlocks), threads, [&](int64_t piece) {
    for (int64_t i = piece * kBlocks; i < std::min(blocks, (piece + 1) * kBlocks); ++i) combine(i);
  });
  return result;
}

bool has_nan(const FloatMatrix& x, int threads) {
  constexpr int64_t kPiece = 16384;
  constexpr int64_t kRun = 1024;
  const int64_t cols = x.cols();
  if (cols == 0) return false;
  const int64_t pieces = ceil_div(cols, kPiece);
  const int64_t rows_each = pieces > 1 ? 1 : std::max<int64_t>(1, kPiece / cols);
  std::atomic<bool> found = false;
  parallel_for(ceil_div(x.rows(), rows_each) * pieces, threads, [&](int64_t index) {
    const int64_t row = index / pieces * rows_each;
    const int64_t end = std::min(cols, (index % pieces + 1) * kPiece);
    float values[kRun];
    bool here = false;
    for (int64_t r = row; r < std::min(x.rows(), row + rows_each); ++r) {
      for (int64_t col = index % pieces * kPiece; col < end; col += kRun) {
        const int64_t count = std::min(kRun, end - col);
        x.read(r, col, count, values);
        const element_runs::Extremes sides = element_runs::extremes(values, count);
        here |= std::max(sides.positive, sides.negative) > 0x7f800000;
      }
    }
    if (here) found = true;
  });
  return found;
}

}  // namespace quantloom
