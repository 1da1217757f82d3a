// Nearest neighbours and k-means for short vectors, the fit of vector codebooks (Lloyd, 1982).
//
// The nearest centroid is the one with the least sum over d of (x - c)^2, each operation in float64 in the
// order of the dimensions; among equal ones the lowest index. Fast loops look through float32 scores
// |c|^2 - 2 x.c and go back to float64 wherever their rounding could matter, so that every instruction set
// and every device gives the same codes.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "quantloom/matrix_view.hpp"

namespace quantloom {

constexpr int64_t kMaxCodebookDims = 16;
constexpr int64_t kMaxCodebookEntries = 65536;

// codes[i] = the index of the centroid nearest to row i of x.
//   x          [n, d], finite, d in 1..16
//   centroids  [K, d], finite, K in 1..65536
//   codes      n of them
// Throws InvalidArgument for other shapes and NumericError for NaN or infinity.
void nearest_neighbour(MatrixView<const float> x, MatrixView<const float> centroids, std::span<int32_t> codes,
                       int threads = 0);

enum class CodebookStart : uint8_t {
  given,             // KMeansOptions::centroids
  kmeans_plus_plus,  // rows drawn with probability proportional to their weighted squared distance to those
                     // drawn before, in growing batches, from an even subset of max(2^17, 16 K) rows
  random             // rows drawn without repetition
};

// "given", "kmeans++", "random".
std::string_view name_of(CodebookStart start);
CodebookStart codebook_start_from_name(std::string_view name);  // throws InvalidArgument

struct KMeansOptions {
  CodebookStart start = CodebookStart::kmeans_plus_plus;
  MatrixView<const float> centroids;  // of the start `given`: [K, d], finite
  double threshold = 1e-3;    // in [0, 1]: ends once at most this fraction of the rows changes its code
  int64_t max_sweeps = 1000;  // >= 0
  // Before each update, a centroid without rows of weight > 0 moves to the row with the largest weighted
  // error that no other centroid was moved to. Otherwise it stays where it is.
  bool reseed_empty = false;
  uint64_t seed = 0;
  int threads = 0;
};

struct KMeansResult {
  std::vector<float> centroids;  // [K, d]
  std::vector<int32_t> codes;    // of the nearest of these centroids, for each row
  int64_t sweeps = 0;            // updates of all centroids
  double changed = 1;            // fraction of the rows that changed their code in the last sweep
  bool converged = false;        // changed <= threshold
  double squared_error = 0;      // sum of weight * |x - centroid|^2
};

// Fits `count` centroids to the rows of x. weights: empty, or one for each row, finite and >= 0. A centroid
// is the mean of its rows, summed in fixed point of 2^-61 of the largest value (times the largest weight), so
// that the result depends neither on the order of the sum nor on the number of threads.
// Throws InvalidArgument naming the argument or option, NumericError for NaN or infinity.
KMeansResult kmeans(MatrixView<const float> x, int64_t count, const KMeansOptions& options,
                    std::span<const float> weights = {});

// The start alone: [count, d] values.
std::vector<float> start_codebook(MatrixView<const float> x, int64_t count, const KMeansOptions& options,
                                  std::span<const float> weights = {});

}  // namespace quantloom
