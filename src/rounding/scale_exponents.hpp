// The search of channel scales, whatever measures the losses.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "quantloom/rounding/channel_scales.hpp"

namespace quantloom {

// Throw InvalidArgument naming what is out of range.
void require_valid(const ChannelScaleOptions& options);
void require_magnitudes(std::span<const double> magnitudes, int64_t k);

// The scales of least loss_at(codes); inputs with 0 on the Hessian's diagonal keep scale 1.
ChannelScales best_scales(std::span<const double> magnitudes, const std::vector<double>& diagonal,
                          const ChannelScaleOptions& options,
                          const std::function<double(std::span<const int8_t>)>& loss_at);

}  // namespace quantloom
