// A matrix and a Hessian as the search and the refit of additive codes see them: in units that keep float32
// far from its ends, padded to whole blocks.
#pragma once

#include <cstdint>
#include <vector>

#include "formats/additive_encoder.hpp"
#include "quantloom/calibration/hessian.hpp"

namespace quantloom {

class AdditiveProblem {
 public:
  // Throws InvalidArgument or NumericError for what round_beam_search() refuses. `hessian` must outlive it.
  AdditiveProblem(const FloatMatrix& w, const Additive& format, const Hessian& hessian, double damping,
                  int threads);

  const Additive& format;
  int64_t n;
  int64_t k;
  int64_t row_groups;
  int64_t blocks;       // of a group of rows
  int64_t columns;      // blocks * in_group >= k
  int64_t scale_count;  // of a group of rows
  int threads;

  // W / weight_unit, [n, columns], zeros beyond k.
  MatrixView<const float> weights() const { return {weights_.data(), n, columns}; }
  // H / hessian_unit, damped, with blocks of columns in the order given: [columns, columns], zeros beyond k.
  template <class Real>
  std::vector<Real> hessian(std::span<const int32_t> order) const;

  // Scales in units of the weights.
  template <class Real>
  std::vector<Real> scales(const AdditiveParts& parts) const;
  int64_t scale_of_block(int64_t row_group, int64_t block) const {
    return row_group * scale_count + block * format.in_group / scale_columns_;
  }
  double weight_unit() const { return weight_unit_; }
  // What a loss in these units is worth.
  double loss_unit() const { return weight_unit_ * weight_unit_ * hessian_unit_; }
  // What is added to the diagonal of H, in its own units.
  double shift() const { return shift_ * hessian_unit_; }

 private:
  const Hessian& hessian_;
  int64_t scale_columns_;
  double weight_unit_ = 1;   // a power of two
  double hessian_unit_ = 1;  // the mean of diag(H)
  double shift_ = 0;
  std::vector<float> weights_;
};

// Blocks in the order of a sweep, and the order of the tables of each: [blocks] and [blocks, codebooks], the
// latter by position in the former.
struct VisitOrder {
  std::vector<int32_t> blocks;
  std::vector<int32_t> tables;
};
VisitOrder visit_order(int64_t blocks, int codebooks, bool shuffled, uint64_t seed);

}  // namespace quantloom
