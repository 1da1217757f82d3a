// The column encoder of binary coding.
#pragma once

#include <memory>
#include <span>

#include "quantloom/formats/bcq.hpp"

namespace quantloom {

// `self` owns `format`.
std::unique_ptr<ColumnEncoder> make_bcq_encoder(std::shared_ptr<const Format> self, const Bcq& format,
                                                int64_t n, int64_t k,
                                                std::span<const int32_t> group_of_column);

}  // namespace quantloom
