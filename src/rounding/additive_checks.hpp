// Checks of arguments that the search and the refit of additive codes share, on the CPU and CUDA devices.
// Each throws InvalidArgument naming the argument.
#pragma once

#include <span>

#include "quantloom/rounding/beam_search.hpp"

namespace quantloom {

void require_valid(const BeamSearchOptions& options);
void require_valid(const RefitOptions& options);
// Besides NumericError for penalties that are not finite.
void require_valid(const CodeSearchOptions& options, const Additive& format);
// `count` groups of rows there are.
void require_row_groups(std::span<const int64_t> row_groups, int64_t count);
void require_damping(double damping);
void require_whole_row_groups(const Additive& format, int64_t n);
// Unsupported for what CUDA devices leave to the CPU.
void require_without_levels(const Additive& format);
void require_conjugate_gradients(RefitSolver solver);

}  // namespace quantloom
