// One sweep of the search for additive codes, on the device.
#pragma once

#include "additive/additive_problem.hpp"
#include "quantloom/rounding/beam_search.hpp"

namespace quantloom::cuda {

// Rewrites the codes of `row_groups` (empty: all). Options are valid; their damping and threads do not count,
// that of the problem does. Waits for the stream.
void sweep_codes(const AdditiveProblem& problem, AdditiveArrays& arrays, const CodeSearchOptions& options,
                 std::span<const int64_t> row_groups);

}  // namespace quantloom::cuda
