// How activations are stored as integers: which of them share a scale, and how a code is chosen.
//
// Grids of 2 to 8 bits: value = scale * (code - zero), with codes from -2^(bits-1) to 2^(bits-1) - 1.
//   symmetric    zero = 0, scale = max|x| / (2^(bits-1) - 1); the lowest code is not used
//   asymmetric   lo = min(0, x), hi = max(0, x), scale = (hi - lo) / (2^bits - 1),
//                zero = clamp(rne(-lo / scale), 0, 2^bits - 1) - 2^(bits-1)
//   code = clamp(rne(x / scale) + zero), in float32, rne: to the nearest integer, ties to even
// with scale at least 2^-126, and 1 for zeros alone. A scale serves a token, a run of `group_size` inputs of
// a token, or all tokens of a batch; or it is fixed in advance, from the range that calibration saw.
//
// Significant digits (SDR, the codec of QRazor: Lee et al., 2025): x is rounded to a symmetric grid of
// base_bits, and the integers q of each run of group_size inputs are cut to `bits` bits behind one shift:
//   shift = max(0, bit length of max|q| - (bits - 1))
//   code = clamp(rne(q / 2^shift), -2^(bits-1), 2^(bits-1) - 1), value = scale * code * 2^shift
//
// Outlier columns (LLM.int8(): Dettmers et al., 2022), beside a grid: inputs that reach `outlier_threshold`
// in any token of the batch are kept as they are, and count for no scale; or, with static_outliers, a fixed
// set of inputs that calibration found, so that a token's result does not depend on the others. With
// `outlier_percent` these are the inputs of the largest magnitudes, as many as that of all, rounded up.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace quantloom {

enum class ActivationScope : uint8_t { token, tensor, group };

// A grid that does not depend on the batch.
struct FixedGrid {
  float scale = 1.0F;  // > 0, finite
  int zero = 0;        // a code; 0 if symmetric

  friend bool operator==(const FixedGrid&, const FixedGrid&) = default;
};

struct ActivationFormat {
  int bits = 8;                                    // of a code, 2 to 8
  ActivationScope scope = ActivationScope::token;  // what shares a scale
  int64_t group_size = 0;  // > 0 for scope group, or inputs that share a shift; else 0
  bool symmetric = true;
  int base_bits = 0;       // 0: a grid; bits + 1 to 16: significant digits of integers of that many bits
  bool is_static = false;  // scope tensor: scale and zero are fixed in advance
  std::optional<FixedGrid> grid = {};                        // of a static format, once it is calibrated
  float outlier_threshold = 0.0F;                            // > 0: inputs of that magnitude are kept
  float outlier_percent = 0.0F;                              // > 0: that many, with static_outliers
  bool static_outliers = false;                              // those of outlier_columns alone are
  std::optional<std::vector<int32_t>> outlier_columns = {};  // rising; once they are calibrated

  bool has_outliers() const { return outlier_threshold > 0 || outlier_percent > 0; }
  bool has_shifts() const { return base_bits > 0; }
  // Runs of inputs with a scale of their own (or a shift), of which the last may be shorter.
  int64_t group_count(int64_t k) const;
  // "int8:token", "int4:g128:asym", "int8:tensor:static", "int8:tensor:static=0.0123" (asymmetric
  // "...:static=0.0123,-5"), "int8:token:outliers=6",
  // "int8:token:outliers=6:static-outliers", "int8:token:outliers=6:columns=3,17",
  // "int8:token:outliers=1%", "int8:token:outliers=1%:columns=3,17", "sdr4:g16",
  // "sdr4:g16:b16", "sdr4:g16:b16:tensor:static".
  std::string spec() const;
  // A JSON object with sorted keys; activation_format_from_json() reads it back.
  std::string to_json() const;

  friend bool operator==(const ActivationFormat&, const ActivationFormat&) = default;
};

// Throws InvalidArgument naming the first field that is out of range or contradicts another.
void require_valid(const ActivationFormat& format);

// Both throw InvalidArgument naming what was not understood.
ActivationFormat activation_format_from_spec(std::string_view spec);
ActivationFormat activation_format_from_json(std::string_view json);

// A static format with the grid for values from `low` to `high` (finite, below 2^127 in magnitude, low <=
// high).
ActivationFormat with_range(const ActivationFormat& format, float low, float high);
// A format with static outliers and these columns, rising and not negative.
ActivationFormat with_columns(const ActivationFormat& format, std::vector<int32_t> columns);

}  // namespace quantloom
