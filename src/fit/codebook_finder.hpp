// A codebook made ready once for many searches of few rows.
#pragma once

#include <vector>

#include "fit/nearest_search.hpp"

namespace quantloom::fit {

class CodebookFinder {
 public:
  // centroids [1..65536, d], finite, d in 1..16; they must outlive the finder. `largest`: at least |value| of
  // all centroids and of the rows to be found.
  CodebookFinder(MatrixView<const float> centroids, float largest);

  // codes[i]: as nearest_neighbour() chooses it, for rows [first, last) of x [rows, d], of values within
  // `largest`.
  void find(MatrixView<const float> x, int64_t first, int64_t last, int32_t* codes) const;

 private:
  SearchJob job_;
  std::vector<float> table_;
};

}  // namespace quantloom::fit
