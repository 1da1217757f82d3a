// Rounding by error feedback: walks the columns in blocks, lets the format encode each step, and pushes
// the Hessian-weighted error onto the columns to come. With a uniform format this is GPTQ (Frantar et
// al., 2022); any format with a ColumnEncoder takes part.
#pragma once

#include "quantloom/calibration/hessian.hpp"
#include "quantloom/formats/format.hpp"
#include "quantloom/rounding/rounding.hpp"

namespace quantloom {

struct ErrorFeedbackOptions {
  // Added to the diagonal of H: damping * mean(diag H), the mean over columns that are not dead. If the
  // factorization fails, each of the ladder's next values is tried in turn; the report records them. None
  // left: NumericError.
  double damping = 0.01;                                       // >= 0
  std::vector<double> damping_ladder = {0.03, 0.1, 0.3, 1.0};  // only those above `damping` count
  bool act_order = true;                                       // columns in order of falling diag(H)
  // true: every group is fitted up front on the original weights, groups are of consecutive columns.
  // false: groups are fitted on the working copy when their first column comes; with act_order they are
  // of permuted columns, which adds plane "group_index".
  bool static_groups = true;
  int64_t block = 128;  // columns between updates of the whole remainder
  // Weighted by diag(H); with `outliers` and groups fitted on the walk by what they weigh errors with.
  std::optional<ScaleSearch> scale_search = std::nullopt;
  // The result's format is then Outliers around `format`, which has scalar codes: uniform, codebook or spqr.
  std::optional<OutlierSearch> outliers = std::nullopt;
  const Hessian* held_out = nullptr;
  // Of the outputs [n], such as the mean of g g^T for the gradients g of a loss with respect to them:
  // feedback then runs along rows as well, and what it minimises is tr(H_out E H E^T). For a trellis with its
  // rotation; InvalidArgument for other formats.
  const Hessian* output_hessian = nullptr;
  bool measure_losses = true;  // false: the report's losses are NaN, nearest rounding is not run
  int threads = 0;
};

// w [n, k] finite; hessian of k inputs with tokens > 0. Dead columns (diag H = 0) are set to zero.
//
// A format that encodes s columns per step takes k % s == 0; with act_order whole steps change places.
// Errors: InvalidArgument for sizes and options; NumericError for a Hessian with NaN or Inf, a negative or
// all-zero diagonal, a zero diagonal entry in a row that is not zero, or no factor on the whole ladder.
//
// Memory beyond the inputs and the result: 8 k^2 bytes for the factor (freed before losses are taken), for
// each thread 4 * 256 * (k + block) bytes, then 4 * 1024 * k bytes for the losses; a format whose
// parameters span all rows takes 4 n k bytes to fit; outliers 16 bytes each.
Rounded round_error_feedback(const FloatMatrix& w, std::shared_ptr<const Format> format,
                             const Hessian& hessian, const ErrorFeedbackOptions& options = {});

}  // namespace quantloom
