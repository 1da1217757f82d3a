// The column encoder of the format "sdr".
#pragma once

#include "quantloom/formats/sdr.hpp"

namespace quantloom {

// `self` owns `format`, whose row_scales are set. Throws InvalidArgument for a bad group_of_column.
std::unique_ptr<ColumnEncoder> make_sdr_encoder(std::shared_ptr<const Format> self, const Sdr& format,
                                                int64_t n, int64_t k,
                                                std::span<const int32_t> group_of_column);

}  // namespace quantloom
