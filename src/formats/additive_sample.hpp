// Which blocks of a matrix the tables of the format "additive" are fitted to.
#pragma once

#include "quantloom/formats/additive.hpp"

namespace quantloom {

// Throws InvalidArgument / NumericError naming what is out of range, for a matrix of k columns.
void require_valid(const AdditiveFitOptions& options, int64_t k);

struct AdditiveSample {
  int64_t of_row = 1;           // blocks of a group of rows that may be drawn: whole ones, if there are any
  std::vector<int64_t> places;  // of the blocks: group of rows * of_row + block
  std::vector<float> weights;   // what each counts, at most 1
  std::vector<float> scales;    // [N, S], as stored
};

// Draws one block of each of an even number of parts of all. magnitudes [N, S]: the root mean squares of what
// scales scale. n and k are not 0.
AdditiveSample draw_blocks(const Additive& format, int64_t n, int64_t k,
                           const std::vector<double>& magnitudes, const AdditiveFitOptions& options);

}  // namespace quantloom
