// The column encoder of the codebook format.
#pragma once

#include <memory>
#include <span>

#include "quantloom/formats/codebook.hpp"

namespace quantloom {

// `self` owns `format`.
std::unique_ptr<ColumnEncoder> make_codebook_encoder(std::shared_ptr<const Format> self,
                                                     const Codebook& format, int64_t n, int64_t k,
                                                     std::span<const int32_t> group_of_column);

}  // namespace quantloom
