// What every rounding returns: the packed matrix and a report of what was really done.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "quantloom/packed_tensor.hpp"

namespace quantloom {

struct RoundingReport {
  std::string method;  // "nearest", "gptq": the method that made the codes
  bool scale_search = false;
  bool act_order = false;
  bool static_groups = true;
  double damping = 0;                 // relative to mean(diag H), as used in the end
  std::vector<double> damping_tried;  // the ladder up to and including `damping`
  int64_t dead_columns = 0;           // inputs that were zero in all calibration tokens
  int64_t tokens = 0;                 // calibration tokens behind the Hessian
  double mean_squared_error = 0;      // of the weights
  int64_t outliers = 0;               // that an OutlierSearch found
  // The threshold that it found them by; infinite for none, NaN without a search.
  double outlier_threshold = std::numeric_limits<double>::quiet_NaN();
  // tr(E H E^T), see proxy_loss(); NaN where no Hessian was given.
  double proxy_loss = std::numeric_limits<double>::quiet_NaN();
  double proxy_loss_nearest = std::numeric_limits<double>::quiet_NaN();
  double held_out_loss = std::numeric_limits<double>::quiet_NaN();
  double held_out_loss_nearest = std::numeric_limits<double>::quiet_NaN();
  // tr(H_out E H E^T), see there, of error feedback with a Hessian of the outputs, and of nearest rounding.
  double two_sided_loss = std::numeric_limits<double>::quiet_NaN();
  double two_sided_loss_nearest = std::numeric_limits<double>::quiet_NaN();
  // Of error feedback in a trellis's rotated basis: the standard deviation of the weights over the codebook's
  // RMS, as used; NaN for others.
  double trellis_ratio = std::numeric_limits<double>::quiet_NaN();
};

struct Rounded {
  PackedTensor tensor;
  RoundingReport report;
};

// Searches, for each row and group, the factor by which to shrink the grid's range so that the weighted
// error of nearest rounding is least: sum over the group's columns of weight * |error|^norm.
struct ScaleSearch {
  int steps = 40;         // factors tried, evenly spaced from 1 down to `smallest`
  double smallest = 0.4;  // in (0, 1)
  double norm = 2.0;      // > 0
  // Measure e^T H e instead, for a group's errors e and its block of the Hessian: the group's share of the
  // squared output error, correlations between inputs included. Needs a Hessian, and norm 2; on CUDA devices
  // not for one scale for the matrix.
  bool output_error = false;
};

// Which weights error feedback keeps as outliers beside a dense format (SpQR: Dettmers et al., 2023): those
// whose rounding error, squared and divided by their entry on the diagonal of the inverse of what is left of
// H, exceeds threshold * mean over columns of (mean w^2 / that entry). Before a group is fitted, those are
// left out without which the others round so much better that the difference, counted likewise, exceeds it;
// on the walk each weight is decided anew, by the error that it has then. Just one of the three is given. For
// the others a threshold is searched, by walks over some rows, then over all: the one found keeps to the
// budget, and spends all of it but 1% or less, where counts allow.
struct OutlierSearch {
  std::optional<double> percent = std::nullopt;    // of the weights, at most; from 0 to below 100
  std::optional<double> bits = std::nullopt;       // stored bits per weight, at most, of all planes
  std::optional<double> threshold = std::nullopt;  // > 0
};

}  // namespace quantloom
