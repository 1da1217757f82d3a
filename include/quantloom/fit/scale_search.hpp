// What nearest rounding to a table does to a sorted sample: its error for any number of scales, and how often
// each code is used. O(K log n) for each table and scale.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "quantloom/fit/sorted_values.hpp"

namespace quantloom {

// ends[i]: the number of values x with code <= i when x / scale (in float32) takes the nearest of the
// ascending `table`. Boundaries are midpoints in float32; a value on one takes the lower code.
std::vector<int64_t> cell_ends(const SortedValues& sample, std::span<const float> table, float scale = 1);

// The number of values with each code. Throws as table_errors().
std::vector<int64_t> table_counts(const SortedValues& sample, std::span<const float> table, float scale = 1);

// [tables.size() * scales.size()], row-major: the sum of weight * (scale * table[code] - x)^2 over the
// sample. Each table holds at least one finite value, ascending (equal ones allowed); each scale is finite
// and > 0. Throws InvalidArgument otherwise.
std::vector<double> table_errors(const SortedValues& sample, std::span<const std::vector<float>> tables,
                                 std::span<const float> scales, int threads = 0);

}  // namespace quantloom
