// Least squares of tables and scales for codes that stay, on the device.
#pragma once

#include "additive/additive_problem.hpp"
#include "quantloom/rounding/beam_search.hpp"

namespace quantloom::cuda {

// Of options that are valid; damping and threads do not count, that of the problem does. Waits for the
// stream.
void refit_arrays(const AdditiveProblem& problem, AdditiveArrays& arrays, const RefitOptions& options);

}  // namespace quantloom::cuda
