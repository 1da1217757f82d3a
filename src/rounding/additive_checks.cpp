#include "rounding/additive_checks.hpp"

#include <algorithm>
#include <cmath>

#include "rounding/code_scores.hpp"

namespace quantloom {

void require_row_groups(std::span<const int64_t> row_groups, int64_t count) {
  std::vector<bool> taken(static_cast<size_t>(count));
  for (const int64_t r : row_groups) {
    if (r < 0 || r >= count || taken[static_cast<size_t>(r)]) {
      throw InvalidArgument("row_groups", text_of(r),
                            text_of("numbers from 0 to below ", count, ", each once"));
    }
    taken[static_cast<size_t>(r)] = true;
  }
}

void require_valid(const AdamOptions& options) {
  const auto positive = [](const char* name, double value) {
    if (value > 0 && std::isfinite(value)) return;
    throw InvalidArgument(name, text_of(value), "a number above 0");
  };
  const auto share = [](const char* name, double value) {
    if (value >= 0 && value < 1) return;
    throw InvalidArgument(name, text_of(value), "a number from 0 to below 1");
  };
  positive("learning_rate", options.learning_rate);
  share("beta1", options.beta1);
  share("beta2", options.beta2);
  positive("epsilon", options.epsilon);
}

void require_valid(const BeamSearchOptions& options) {
  require_valid(options.adam);
  if (options.refit_steps < 0)
    throw InvalidArgument("refit_steps", text_of(options.refit_steps), "0 or more");
  if (options.max_rounds < 0) throw InvalidArgument("max_rounds", text_of(options.max_rounds), "0 or more");
  if (!(options.tolerance >= 0 && options.tolerance < 1)) {
    throw InvalidArgument("tolerance", text_of(options.tolerance), "a number from 0 to below 1");
  }
}

void require_valid(const RefitOptions& options) {
  require_valid(options.adam);
  if (options.steps < 0) throw InvalidArgument("steps", text_of(options.steps), "0 or more");
}

void require_valid(const CodeSearchOptions& options, const Additive& format) {
  const int64_t most = std::min<int64_t>(kMostBeam, format.entries());
  if (options.beam < 1 || options.beam > most) {
    throw InvalidArgument("beam", text_of(options.beam), text_of("1 to ", most));
  }
  const int64_t count = format.codebooks * format.entries();
  if (!options.code_penalties.empty() && std::ssize(options.code_penalties) != count) {
    throw InvalidArgument("code_penalties", text_of(options.code_penalties.size(), " numbers"),
                          text_of("none, or ", count, ": one for each entry of each table"));
  }
  for (size_t i = 0; i < options.code_penalties.size(); ++i) {
    if (std::isfinite(options.code_penalties[i])) continue;
    throw NumericError(text_of("code_penalties: got ", options.code_penalties[i], " at entry ", i,
                               ", expected finite numbers"));
  }
}

void require_damping(double damping) {
  if (damping >= 0 && std::isfinite(damping)) return;
  throw InvalidArgument("damping", text_of(damping), "a number >= 0");
}

void require_whole_row_groups(const Additive& format, int64_t n) {
  if (n % format.out_group == 0) return;
  throw InvalidArgument("w", text_of(n, " rows"),
                        text_of("a multiple of ", format.out_group, ", the rows of a block"));
}

void require_without_levels(const Additive& format) {
  if (format.levels == AdditiveLevels()) return;
  throw Unsupported(text_of("rounding on a CUDA device: got ", format.spec(),
                            ", expected scales and tables that are stored as they are; quantize on the CPU"));
}

void require_conjugate_gradients(RefitSolver solver) {
  if (solver == RefitSolver::conjugate_gradients) return;
  throw Unsupported("refit on a CUDA device: got Adam, expected conjugate gradients; refit on the CPU");
}

}  // namespace quantloom
