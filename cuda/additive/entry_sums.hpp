// Sums over all places where an entry of a table is used, always in the same order.
#pragma once

#include "additive/additive_problem.hpp"

namespace quantloom::cuda {

class EntrySums {
 public:
  // Of codes as they are now.
  EntrySums(const AdditiveProblem& problem, const AdditiveArrays& arrays);

  // sums [codebooks, entries, dim]: of scale * product of the entry's places. products [n, columns], scales
  // [N, S].
  void gather(const float* products, const double* scales, double* sums) const;
  // sums [codebooks, entries, in_group, in_group]: of scale^2 * the block of h that is a place's own; the
  // lower triangle. h [columns, columns].
  void gather_blocks(const float* h, const double* scales, double* sums) const;

 private:
  template <bool kBlocks>
  void run(const float* values, const double* scales, double* sums, int64_t size) const;

  const AdditiveProblem& problem_;
  int64_t places_;
  int64_t entries_;  // of all tables
  int64_t most_pieces_;
  DeviceBuffer<int32_t> sorted_;  // places by entry, then as they come
  DeviceBuffer<int32_t> begins_;  // [entries + 1]
  DeviceBuffer<int32_t> pieces_;  // [entries + 1]: the first piece of each entry
};

}  // namespace quantloom::cuda
