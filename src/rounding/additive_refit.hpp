// Least squares of tables and scales for codes that stay.
#pragma once

#include "quantloom/rounding/beam_search.hpp"
#include "rounding/additive_problem.hpp"

namespace quantloom {

// Of options that are valid; damping and threads are those of the problem.
void refit_parts(const AdditiveProblem& problem, AdditiveParts& parts, const RefitOptions& options);

}  // namespace quantloom
