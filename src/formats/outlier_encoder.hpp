// The column encoder of the format "outliers": that of the dense format, with values taken out.
#pragma once

#include "quantloom/formats/outliers.hpp"

namespace quantloom {

// `self` owns `format`, whose positions are those of a matrix [n, k].
std::unique_ptr<ColumnEncoder> make_outlier_encoder(std::shared_ptr<const Format> self,
                                                    const Outliers& format, int64_t n, int64_t k);

}  // namespace quantloom
