#include "formats/table_search.hpp"

#include <algorithm>
#include <cmath>

#include "quantloom/dtype.hpp"
#include "quantloom/fit/kmeans.hpp"

namespace quantloom {
namespace {

// Normalized values up to so many times the largest of a table are looked for in prepared tables; feedback
// may push a value further.
constexpr float kReach = 1024;

}  // namespace

float largest_magnitude(std::span<const float> values) {
  float largest = 0;
  for (const float value : values) largest = std::max(largest, std::abs(value));
  return largest;
}

TableSearch::TableSearch(std::span<const float> tables, int64_t books, int64_t entries, int64_t dim)
    : tables_(tables),
      entries_(entries),
      dim_(dim),
      reach_(kReach * std::max(largest_magnitude(tables), 0x1p-24F)) {
  for (int64_t book = 0; book < books; ++book) {
    finders_.emplace_back(table(book), 2 * reach_);
    outermost_ += largest_magnitude(
        tables.subspan(static_cast<size_t>(book * entries * dim), static_cast<size_t>(entries * dim)));
  }
}

void TableSearch::find(int64_t book, MatrixView<const float> x, int32_t* codes) const {
  const float largest = largest_magnitude({x.data(), static_cast<size_t>(x.rows() * x.cols())});
  if (largest <= reach_) {
    finders_[static_cast<size_t>(book)].find(x, 0, x.rows(), codes);
  } else {
    fit::CodebookFinder(table(book), std::max(largest, reach_)).find(x, 0, x.rows(), codes);
  }
}

void TableSearch::encode(MatrixView<float> left, int64_t group, int64_t width, float* sum,
                         uint16_t* codes) const {
  std::vector<int32_t> found(static_cast<size_t>(left.rows()));
  for (int64_t book = 0; book < books(); ++book) {
    find(book, left, found.data());
    for (int64_t r = 0; r < left.rows(); ++r) {
      const int32_t code = found[static_cast<size_t>(r)];
      codes[r * books() + book] = static_cast<uint16_t>(code);
      const float* const entry = table(book).row(code);
      for (int64_t c = 0; c < dim_; ++c) {
        float& total = sum[r * dim_ + c];
        total = book == 0 ? entry[c] : total + entry[c];
        if (c % group < width) left(r, c) -= entry[c];
      }
    }
  }
}

std::vector<float> fit_residual_tables(MatrixView<float> x, std::span<const float> weights, int64_t books,
                                       int64_t entries, int64_t sweeps, uint64_t seed, int threads) {
  const int64_t count = x.rows();
  const int64_t dim = x.cols();
  std::vector<float> tables(static_cast<size_t>(books * entries * dim), 0.0F);
  KMeansOptions options;
  options.max_sweeps = sweeps;
  options.reseed_empty = true;
  options.seed = seed;
  options.threads = threads;
  std::vector<int32_t> codes(static_cast<size_t>(count));
  for (int64_t book = 0; book < books; ++book) {
    float* const table = tables.data() + book * entries * dim;
    if (count <= entries) {
      for (int64_t i = 0; i < count; ++i) std::copy_n(x.row(i), dim, table + i * dim);
    } else {
      std::ranges::copy(kmeans(x, entries, options, weights).centroids, table);
    }
    if (book + 1 == books) break;
    for (int64_t i = 0; i < entries * dim; ++i) table[i] = float_from_f16(f16_from_float(table[i]));
    nearest_neighbour(x, {table, entries, dim}, codes, threads);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = 0; c < dim; ++c) x(i, c) -= table[codes[static_cast<size_t>(i)] * dim + c];
    }
  }
  return tables;
}

}  // namespace quantloom
