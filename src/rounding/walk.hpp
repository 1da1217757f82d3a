// The order in which error feedback takes the columns, and the check of its options.
#pragma once

#include <cstdint>
#include <vector>

#include "quantloom/rounding/error_feedback.hpp"
#include "quantloom/rounding/trellis_feedback.hpp"

namespace quantloom {

// Positions of the walk, falling by diag(H) (by its sum over each step); ties in natural order.
std::vector<int64_t> walk_order(const std::vector<double>& diagonal, int64_t step, bool act_order);

// Throws InvalidArgument naming the option that is out of range.
void require_valid(const ErrorFeedbackOptions& options);
void require_valid(const TrellisFeedbackOptions& options);

// The factors to try for a format.
std::vector<double> ratio_factors(const TrellisFeedbackOptions& options, const Trellis& format);

}  // namespace quantloom
