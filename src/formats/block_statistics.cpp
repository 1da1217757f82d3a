#include <algorithm>
#include <cmath>

#include "quantloom/checked_math.hpp"
#include "quantloom/formats/elements.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {
namespace {

constexpr int64_t kSegment = 65536;  // elements of a row that are reduced at a time

// What any of the statistics needs; NaN stays.
struct Partial {
  float highest = 0;  // of x and -x; only one of them can be below zero, so zero is a safe start for absmax
  float lowest = 0;
  double squares = 0;
  bool nan = false;

  void add(const float* x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      highest = x[i] > highest ? x[i] : highest;
      lowest = x[i] < lowest ? x[i] : lowest;
      squares += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    }
    nan = nan || std::isnan(squares);
  }
  void add(const Partial& other) {
    highest = std::max(highest, other.highest);
    lowest = std::min(lowest, other.lowest);
    squares += other.squares;
    nan = nan || other.nan;
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
      partials[static_cast<size_t>(i)].add(values.data(), end - first);
    }
  });
  std::vector<float> result(static_cast<size_t>(checked_mul(block_rows, block_cols)));
  parallel_for(static_cast<int64_t>(result.size()), threads, [&](int64_t index) {
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
    float value = 0;
    if (statistic == BlockStatistic::absmax) {
      value = std::max(sum.highest, -sum.lowest);
    } else if (statistic == BlockStatistic::signed_extreme) {
      value = sum.highest >= -sum.lowest ? sum.highest : sum.lowest;
    } else {
      value = static_cast<float>(sum.squares / static_cast<double>((last_row - first_row) * cols));
    }
    result[static_cast<size_t>(index)] = sum.nan ? NAN : value;
  });
  return result;
}

}  // namespace quantloom
