// The column encoder of the format "trellis".
#pragma once

#include "quantloom/formats/trellis.hpp"

namespace quantloom {

// unit_scales: values are coded as they come, in the codebook's own units; fit() then does nothing.
std::unique_ptr<ColumnEncoder> make_trellis_encoder(std::shared_ptr<const Format> self, const Trellis& format,
                                                    int64_t n, int64_t k, bool unit_scales);

}  // namespace quantloom
