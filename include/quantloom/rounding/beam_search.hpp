// Rounding "beam_search" for the format "additive": codes, tables and scales that together make tr(E H E^T),
// the squared error of the outputs, small (AQLM: Egiazarian et al., 2024). Codes are searched block by block
// with several hypotheses for each group of rows; tables and scales follow by weighted least squares; both in
// turns.
//
// A group of rows must be whole: n a multiple of out_group. k may be any; H is taken as zero beyond it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "quantloom/calibration/hessian.hpp"
#include "quantloom/formats/additive.hpp"
#include "quantloom/rounding/rounding.hpp"

namespace quantloom {

struct CodeSearchOptions {
  int beam = 1;  // hypotheses kept for each group of rows: 1 to 8, at most 2^bits
  // false: blocks from the first column to the last, and of a block the codes of one table after the other.
  // true: blocks in a random order, and of each its tables in a random order.
  bool shuffled = false;
  uint64_t seed = 0;
  // Products and scores in float64: the codes of the search by its definition, but where two losses agree to
  // about 1e-12. Else in float32, several times as fast.
  bool float64 = false;
  double damping = 0;  // >= 0: times mean(diag H) is added to the diagonal of H
  // Empty, or [codebooks, 2^bits] numbers that each use of a code adds to the loss of its group of rows.
  std::span<const float> code_penalties = {};
  int threads = 0;
};

// One sweep over all blocks, from the codes of `start`, whose scales and tables stay. Each group of rows
// begins with one hypothesis. For each block and table every hypothesis tries all codes; of all these the
// `beam` with the least loss stay: of equal ones those of the earlier hypothesis, then those of the lower
// code. The loss of the best never rises from one block and table to the next, up to the rounding of sums.
//
// The product of errors and H is kept up to date, by blocks of columns: a sweep costs about beam * 2 n k^2
// operations, and beam * 2 n k * codebooks * 2^bits to score candidates, which are never stored.
//
// `row_groups`: empty for all, else those whose codes are searched, without repetition. Throws
// InvalidArgument naming the argument, NumericError for a Hessian that is none.
PackedTensor search_codes(const FloatMatrix& w, const PackedTensor& start, const Hessian& hessian,
                          const CodeSearchOptions& options = {}, std::span<const int64_t> row_groups = {});

enum class RefitSolver : uint8_t {
  conjugate_gradients,
  adam  // the published one, which takes many more steps
};

// Kingma and Ba, 2015, with the published defaults. Steps and losses are those of the publication: a scale
// counts as the norm of what it scales, tables accordingly, and the loss is tr(E H E^T) / n.
struct AdamOptions {
  double learning_rate = 1e-4;  // > 0
  double beta1 = 0;             // in [0, 1)
  double beta2 = 0.95;          // in [0, 1)
  double epsilon = 1e-8;        // > 0
  bool amsgrad = true;          // Reddi et al., 2018
};

struct RefitOptions {
  int steps = 10;  // at most
  bool tables = true;
  bool scales = true;
  double damping = 0;  // as in CodeSearchOptions
  int threads = 0;
  RefitSolver solver = RefitSolver::conjugate_gradients;
  AdamOptions adam = {};
};

// The least squares of tables for codes and scales as they are, then of scales: conjugate gradients
// preconditioned by blocks, which err least after few steps. Results are rounded to their stored types;
// tables are kept only if the loss falls, scales for each group of rows likewise. Where numbers are stored as
// codes into levels, the least squares of free numbers are followed by k-means, and by the least squares of
// the levels for codes that stay.
//
// Adam moves tables and scales together; where they are codes into levels, gradients are taken at the levels
// nearest to them and go straight through. All are kept only if the loss falls.
PackedTensor refit_tables(const FloatMatrix& w, const PackedTensor& start, const Hessian& hessian,
                          const RefitOptions& options = {});

enum class CodeStart : uint8_t {
  nearest,        // one table after the other, by the nearest entry
  error_feedback  // the same, with feedback of errors (round_error_feedback()); needs k % in_group == 0
};

struct BeamSearchOptions {
  // Its `threads` counts for everything; its seed rises by 1 with each sweep.
  CodeSearchOptions search = {.shuffled = true, .code_penalties = {}};
  int refit_steps = 10;  // 0: tables and scales stay as they were fitted
  bool refit_scales = true;
  CodeStart start = CodeStart::nearest;
  // Rounds of refit and sweep, at most; they end once one lowers the loss by less than `tolerance` of it.
  int max_rounds = 100;
  double tolerance = 0.01;  // in [0, 1)
  AdditiveFitOptions
      fit;  // of the first tables; its weights, unless given, are diag(H); its threads do not count
  const Hessian* held_out = nullptr;
  bool measure_losses = true;  // false: the report's losses are NaN, nearest rounding is not run
  RefitSolver refit_solver = RefitSolver::conjugate_gradients;
  AdamOptions adam = {};
};

struct BeamSearched : Rounded {
  // tr(E H E^T) with the damping that was asked for: of the start, after each sweep, and after a last refit.
  // They fall.
  std::vector<double> losses;
};

// w [n, k] finite. A format with tables starts from them, one without fits them to w first.
BeamSearched round_beam_search(const FloatMatrix& w, std::shared_ptr<const Additive> format,
                               const Hessian& hessian, const BeamSearchOptions& options = {});

}  // namespace quantloom
