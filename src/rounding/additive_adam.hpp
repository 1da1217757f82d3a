// The published refit of tables and scales.
#pragma once

#include "quantloom/rounding/beam_search.hpp"
#include "rounding/additive_problem.hpp"

namespace quantloom {

// Of options that are valid, with steps, and a matrix that is not empty.
void refit_by_adam(const AdditiveProblem& problem, AdditiveParts& parts, const RefitOptions& options);

}  // namespace quantloom
