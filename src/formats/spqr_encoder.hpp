// The column encoder of the format "spqr".
#pragma once

#include "quantloom/formats/spqr.hpp"

namespace quantloom {

// `self` owns `format`. Throws InvalidArgument for a bad group_of_column.
std::unique_ptr<ColumnEncoder> make_spqr_encoder(std::shared_ptr<const Format> self, const Spqr& format,
                                                 int64_t n, int64_t k,
                                                 std::span<const int32_t> group_of_column);

}  // namespace quantloom
