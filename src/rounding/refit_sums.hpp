// The sums over places that the refits of tables and scales are made of.
#pragma once

#include <span>
#include <vector>

#include "rounding/additive_problem.hpp"

namespace quantloom {

class RefitSums {
 public:
  using Numbers = std::vector<double>;

  // Both must outlive it; of `parts` the codes count.
  RefitSums(const AdditiveProblem& problem, const AdditiveParts& parts);

  // values = scale * the sums of entries of tables.
  void expand(const Numbers& tables, const Numbers& scales);
  // products = values * H
  void multiply();
  // Sets values to the errors, products to theirs with H; e^T H e for each group of rows.
  Numbers row_losses(const Numbers& tables, const Numbers& scales);

  // products, times scales, by number of the tables.
  Numbers gather(const Numbers& scales) const;
  // products, times what one unit of a scale makes, by scale.
  Numbers project(const Numbers& tables) const;

  // For each entry, the block of the normal equations of tables that is its own, [g, g] for blocks of g
  // columns: the lower half. It is the same for all rows of a block.
  Numbers entry_blocks(const Numbers& scales) const;

 private:
  const uint16_t* codes(int64_t row_group) const {
    return parts_.codes.data() + row_group * problem_.blocks * books_;
  }
  size_t entry(int64_t book, int64_t code) const {
    return static_cast<size_t>((book * format_.entries() + code) * dim_);
  }
  template <class Body>
  void each_row_group(const Body& body) const;
  template <class Body>
  Numbers sum_by_entry(int64_t size, const Body& body) const;

  const AdditiveProblem& problem_;
  const Additive& format_;
  const AdditiveParts& parts_;
  int64_t g_;
  int64_t og_;
  int64_t dim_;
  int64_t books_;
  int64_t columns_;
  std::vector<float> h_;         // [columns, columns]
  std::vector<float> values_;    // [n, columns]
  std::vector<float> products_;  // [n, columns]
};

}  // namespace quantloom
