// Which weights error feedback keeps as outliers: leave-one-out within a group, and the threshold for a
// budget.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "quantloom/formats/format.hpp"
#include "quantloom/rounding/rounding.hpp"

namespace quantloom {

// Throws InvalidArgument naming the field that is out of range.
void require_valid(const OutlierSearch& search);

// Bits of a dense format's scalar codes. Throws InvalidArgument for formats that a search does not take.
int scalar_bits(const Format& dense);

// The outliers that a search may spend beside the dense planes of [n, k]: all with a threshold. Throws
// InvalidArgument if the dense planes (and the plane group_index, if there is one) take more than its bits.
int64_t outlier_budget(const OutlierSearch& search, const Format& dense, int64_t n, int64_t k,
                       bool with_group_index);

// Replaces the outliers of each row of a group by the mean of its other values.
//   columns    [c, rows]: the group's columns
//   weights    [c], >= 0: what a squared error in each column counts
//   threshold  an outlier's leave-one-out gain is above it: the group's weighted squared error on the grid of
//              2^bits values from its least to its largest, less that of the others on their own grid
// `copy` holds the result unless it is `columns` itself.
MatrixView<const float> without_outliers(MatrixView<const float> columns, std::span<const float> weights,
                                         int bits, double threshold, std::vector<float>& copy);

// The threshold, close to the least, with which `count(threshold, false)` is at most `budget`.
//   count   outliers at a threshold: count(t, true) of a sample of rows, `sample_share` of all, 1 for no
//   sample
// Deterministic if `count` is. The last call of `count` was with the result; infinite for a budget of 0.
double find_threshold(int64_t budget, double sample_share,
                      const std::function<int64_t(double threshold, bool sample)>& count);

}  // namespace quantloom
