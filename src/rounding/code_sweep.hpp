// One sweep of the search for additive codes.
#pragma once

#include "quantloom/rounding/beam_search.hpp"
#include "rounding/additive_problem.hpp"

namespace quantloom {

// Rewrites the codes of `row_groups` (empty: all). Options are valid; their damping and threads do not count,
// those of the problem do.
void sweep_codes(const AdditiveProblem& problem, AdditiveParts& parts, const CodeSearchOptions& options,
                 std::span<const int64_t> row_groups);

}  // namespace quantloom
