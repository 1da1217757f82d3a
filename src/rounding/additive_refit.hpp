// Least squares of tables and scales for codes that stay.
#pragma once

#include "quantloom/rounding/beam_search.hpp"
#include "rounding/additive_problem.hpp"

namespace quantloom {

// Throws InvalidArgument naming the option that is out of range.
void require_valid(const RefitOptions& options);

// Of options that are valid; damping and threads are those of the problem.
void refit_parts(const AdditiveProblem& problem, AdditiveParts& parts, const RefitOptions& options);

}  // namespace quantloom
