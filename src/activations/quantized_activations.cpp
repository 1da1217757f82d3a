#include "quantloom/activations/quantized_activations.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <vector>

#include "activations/activation_checks.hpp"
#include "activations/activation_rows.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/error.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {
namespace {

using activations::kActivationPadding;

// Tokens in one piece of work.
constexpr int64_t kPieceTokens = 8;
// Below this many values, another thread costs more than it brings.
constexpr int64_t kValuesPerThread = int64_t{1} << 15;

int team_for(const FloatMatrix& x, int threads) {
  const int64_t values = checked_mul(x.rows(), x.cols());
  return static_cast<int>(std::clamp<int64_t>(values / kValuesPerThread, 1, resolve_threads(threads)));
}

[[noreturn]] void refuse_value(const float* x, int64_t count, int64_t token) {
  const float* bad = std::find_if(x, x + count, [](float v) { return !(std::abs(v) < kLargestActivation); });
  throw NumericError(text_of("x: got ", *bad, " for token ", token, ", input ", bad - x,
                             ", expected finite values below 2^127"));
}

// One token's parameters and codes, as views of the planes or of a thread's memory.
struct TokenCodes {
  int8_t* codes = nullptr;
  float* scales = nullptr;
  int8_t* zeros = nullptr;  // only if asymmetric
  uint8_t* shifts = nullptr;
};

activations::RowGrid row_grid(const ActivationFormat& format, const FixedGrid& grid) {
  const int half = 1 << (format.bits - 1);
  if (format.symmetric) {
    return {grid.scale, static_cast<float>(1 - half), static_cast<float>(half - 1), 0};
  }
  return {grid.scale, static_cast<float>(-half - grid.zero), static_cast<float>(half - 1 - grid.zero),
          grid.zero};
}

// x and the codes are padded.
void encode_token(const ActivationFormat& format, const float* x, int64_t k, const FixedGrid& grid,
                  std::vector<int32_t>& integers, const TokenCodes& out) {
  if (format.has_shifts()) {
    integers.resize(static_cast<size_t>(k + kActivationPadding));
    activations::round_row(x, k, grid.scale, symmetric_levels(format), integers.data());
    activations::cut_row(integers.data(), k, format.bits, format.group_size, out.codes, out.shifts);
  } else if (format.scope != ActivationScope::group) {
    activations::encode_row(x, k, row_grid(format, grid), out.codes);
  }
  if (format.scope != ActivationScope::group) {
    *out.scales = grid.scale;
    if (!format.symmetric) *out.zeros = static_cast<int8_t>(grid.zero);
    return;
  }
  std::vector<float> run(static_cast<size_t>(std::min(format.group_size, k) + kActivationPadding));
  std::vector<int8_t> codes(run.size());
  for (int64_t begin = 0, g = 0; begin < k; ++g) {
    const int64_t count = std::min(format.group_size, k - begin);
    std::copy_n(x + begin, count, run.begin());
    std::fill(run.begin() + count, run.end(), 0.0F);
    ActivationRange range;
    static_cast<void>(activations::range_of_row(run.data(), count, range));
    const FixedGrid own = grid_of(format, range);
    activations::encode_row(run.data(), count, row_grid(format, own), codes.data());
    std::copy_n(codes.begin(), count, out.codes + begin);
    out.scales[g] = own.scale;
    if (!format.symmetric) out.zeros[g] = static_cast<int8_t>(own.zero);
    begin += count;
  }
}

void decode_run(const int8_t* codes, int64_t count, float scale, int zero, int shift, float* out) {
  const int unit = 1 << shift;
  for (int64_t i = 0; i < count; ++i) out[i] = scale * static_cast<float>((codes[i] - zero) * unit);
}

void decode_token(const ActivationFormat& format, int64_t k, const int8_t* codes, const float* scales,
                  const int8_t* zeros, const uint8_t* shifts, float* out) {
  const int64_t size = format.group_size > 0 ? format.group_size : std::max<int64_t>(k, 1);
  const bool own_scales = format.scope == ActivationScope::group;
  for (int64_t begin = 0, g = 0; begin < k; ++g) {
    const int64_t count = std::min(size, k - begin);
    const int64_t at = own_scales ? g : 0;
    decode_run(codes + begin, count, scales[at], format.symmetric ? 0 : zeros[at],
               format.has_shifts() ? shifts[g] : 0, out + begin);
    begin += count;
  }
}

// The columns that are kept as they are, rising.
std::vector<int32_t> outliers_of(const FloatMatrix& x, const ActivationFormat& format, int team) {
  const int64_t k = x.cols();
  if (format.outlier_columns) return *format.outlier_columns;
  std::vector<int32_t> columns;
  if (!format.has_outliers()) return columns;
  const int64_t pieces = ceil_div(x.rows(), kPieceTokens);
  std::vector<std::vector<uint8_t>> seen(static_cast<size_t>(pieces));
  parallel_for(pieces, team, [&](int64_t piece) {
    std::vector<uint8_t>& flags = seen[static_cast<size_t>(piece)];
    flags.resize(static_cast<size_t>(k));
    std::vector<float> row(static_cast<size_t>(k));
    for (int64_t t = piece * kPieceTokens; t < std::min((piece + 1) * kPieceTokens, x.rows()); ++t) {
      x.read(t, 0, k, row.data());
      for (size_t c = 0; c < row.size(); ++c) {
        if (std::abs(row[c]) >= format.outlier_threshold) flags[c] = 1;
      }
    }
  });
  for (int64_t c = 0; c < k; ++c) {
    const auto at = static_cast<size_t>(c);
    if (std::any_of(seen.begin(), seen.end(), [&](const auto& flags) { return flags[at] != 0; })) {
      columns.push_back(static_cast<int32_t>(c));
    }
  }
  return columns;
}

// Replaces the outliers of a token by 0, after copying them to `values` if that is not null.
void take_outliers(std::span<const int32_t> columns, float* row, float* values) {
  for (size_t i = 0; i < columns.size(); ++i) {
    if (values != nullptr) values[i] = row[columns[i]];
    row[columns[i]] = 0.0F;
  }
}

// The grids of all tokens (one for scope tensor, none for scope group), and the check of all values.
std::vector<FixedGrid> grids_of(const FloatMatrix& x, const ActivationFormat& format,
                                std::span<const int32_t> columns, int team) {
  const int64_t k = x.cols();
  std::vector<ActivationRange> ranges(static_cast<size_t>(x.rows()));
  parallel_for(ceil_div(x.rows(), kPieceTokens), team, [&](int64_t piece) {
    std::vector<float> row(static_cast<size_t>(k + kActivationPadding));
    for (int64_t t = piece * kPieceTokens; t < std::min((piece + 1) * kPieceTokens, x.rows()); ++t) {
      x.read(t, 0, k, row.data());
      if (!activations::range_of_row(row.data(), k, ranges[static_cast<size_t>(t)])) {
        refuse_value(row.data(), k, t);
      }
      if (columns.empty()) continue;
      take_outliers(columns, row.data(), nullptr);
      static_cast<void>(activations::range_of_row(row.data(), k, ranges[static_cast<size_t>(t)]));
    }
  });
  if (format.grid) return {*format.grid};
  if (format.scope == ActivationScope::group) return {};
  std::vector<FixedGrid> grids;
  if (format.scope == ActivationScope::tensor) {
    ActivationRange all;
    for (const ActivationRange& range : ranges) {
      all.low = std::min(all.low, range.low);
      all.high = std::max(all.high, range.high);
    }
    return {grid_of(format, all)};
  }
  grids.reserve(ranges.size());
  for (const ActivationRange& range : ranges) grids.push_back(grid_of(format, range));
  return grids;
}

FixedGrid grid_for(const std::vector<FixedGrid>& grids, int64_t token) {
  if (grids.empty()) return {};
  return grids.size() == 1 ? grids[0] : grids[static_cast<size_t>(token)];
}

QuantizedActivations empty_planes(int64_t m, int64_t k, const ActivationFormat& format,
                                  std::span<const int32_t> columns) {
  QuantizedActivations result{format, m, k, {}};
  const bool shared = format.scope == ActivationScope::tensor;
  for (const PlaneSpec& plane : activation_planes(format, m, k, std::ssize(columns))) {
    result.planes.emplace(plane.name, Tensor(plane.dtype, plane.shape));
  }
  if (shared && result.m == 0) result.planes.at("scales").values<float>()[0] = 1.0F;
  if (format.has_outliers()) {
    std::ranges::copy(columns, result.planes.at("outlier_columns").values<int32_t>().begin());
  }
  return result;
}

// The pointers of one token in the planes.
template <class Planes, class Visit>
void with_token(const ActivationFormat& format, Planes& planes, int64_t k, int64_t token,
                const Visit& visit) {
  const int64_t row = format.scope == ActivationScope::tensor ? 0 : token * scales_per_token(format, k);
  const auto find = [&](const char* name) {
    const auto found = planes.find(name);
    return found == planes.end() ? nullptr : &found->second;
  };
  auto* zeros = find("zeros");
  auto* shifts = find("shifts");
  visit(planes.at("codes").template values<int8_t>().data() + token * k,
        planes.at("scales").template values<float>().data() + row,
        zeros == nullptr ? nullptr : zeros->template values<int8_t>().data() + row,
        shifts == nullptr ? nullptr
                          : shifts->template values<uint8_t>().data() + token * format.group_count(k));
}

void require_planes(const QuantizedActivations& x) {
  require_valid(x.format);
  std::vector<int32_t> columns;
  if (const auto found = x.planes.find("outlier_columns"); found != x.planes.end() &&
                                                           found->second.dtype() == DType::i32 &&
                                                           found->second.device() == Device::cpu) {
    const auto values = found->second.values<int32_t>();
    columns.assign(values.begin(), values.end());
  }
  for (const int32_t column : columns) {
    if (column < 0 || column >= x.k) {
      throw InvalidArgument("plane outlier_columns", text_of(column), text_of("numbers from 0 to ", x.k - 1));
    }
  }
  const QuantizedActivations expected = empty_planes(x.m, x.k, x.format, columns);
  for (const auto& [name, plane] : expected.planes) {
    const auto found = x.planes.find(name);
    const bool fits = found != x.planes.end() && found->second.dtype() == plane.dtype() &&
                      found->second.shape() == plane.shape() && found->second.device() == Device::cpu;
    if (!fits || x.planes.size() != expected.planes.size()) {
      throw InvalidArgument(text_of("plane ", name), "another dtype, shape or device, or none",
                            text_of("that of ", x.format.spec(), " for [", x.m, ", ", x.k, "]"));
    }
  }
  if (!x.format.has_shifts()) return;
  const int most = x.format.base_bits - x.format.bits;
  for (const uint8_t shift : x.planes.at("shifts").values<uint8_t>()) {
    if (shift > most) throw InvalidArgument("plane shifts", text_of(int{shift}), text_of("at most ", most));
  }
}

}  // namespace

QuantizedActivations quantize_activations(const FloatMatrix& x, const ActivationFormat& format, int threads) {
  require_calibrated(format, x.cols());
  const int team = team_for(x, threads);
  const int64_t k = x.cols();
  const std::vector<int32_t> columns = outliers_of(x, format, team);
  const std::vector<FixedGrid> grids = grids_of(x, format, columns, team);
  QuantizedActivations result = empty_planes(x.rows(), k, format, columns);
  float* outliers = columns.empty() ? nullptr : result.planes.at("outlier_values").values<float>().data();
  parallel_for(ceil_div(x.rows(), kPieceTokens), team, [&](int64_t piece) {
    std::vector<float> row(static_cast<size_t>(k + kActivationPadding));
    std::vector<int8_t> codes(row.size());
    std::vector<int32_t> integers;
    // Of the tensor's own scale there is one, which every token would write.
    float scale = 0;
    int8_t zero = 0;
    const bool shared = format.scope == ActivationScope::tensor;
    for (int64_t t = piece * kPieceTokens; t < std::min((piece + 1) * kPieceTokens, x.rows()); ++t) {
      x.read(t, 0, k, row.data());
      if (!columns.empty()) take_outliers(columns, row.data(), outliers + t * std::ssize(columns));
      with_token(format, result.planes, k, t, [&](int8_t* to, float* scales, int8_t* zeros, uint8_t* shifts) {
        const TokenCodes out{codes.data(), shared ? &scale : scales, shared ? &zero : zeros, shifts};
        encode_token(format, row.data(), k, grid_for(grids, t), integers, out);
        std::copy_n(codes.begin(), k, to);
      });
    }
  });
  if (format.scope == ActivationScope::tensor && x.rows() > 0) {
    result.planes.at("scales").values<float>()[0] = grids[0].scale;
    if (!format.symmetric) {
      result.planes.at("zeros").values<int8_t>()[0] = static_cast<int8_t>(grids[0].zero);
    }
  }
  return result;
}

void dequantize_activations(const QuantizedActivations& x, MatrixView<float> out, int threads) {
  require_planes(x);
  if (out.rows() != x.m || out.cols() != x.k) {
    throw InvalidArgument("out", text_of("shape [", out.rows(), ", ", out.cols(), "]"),
                          text_of("[", x.m, ", ", x.k, "]"));
  }
  parallel_for(ceil_div(x.m, kPieceTokens), resolve_threads(threads), [&](int64_t piece) {
    for (int64_t t = piece * kPieceTokens; t < std::min((piece + 1) * kPieceTokens, x.m); ++t) {
      with_token(x.format, x.planes, x.k, t,
                 [&](const int8_t* codes, const float* scales, const int8_t* zeros, const uint8_t* shifts) {
                   decode_token(x.format, x.k, codes, scales, zeros, shifts, out.row(t));
                 });
      if (!x.format.has_outliers()) continue;
      const auto columns = x.planes.at("outlier_columns").values<int32_t>();
      const float* values = x.planes.at("outlier_values").values<float>().data() + t * std::ssize(columns);
      for (size_t i = 0; i < columns.size(); ++i) out(t, columns[i]) = values[i];
    }
  });
}

void round_activations(const FloatMatrix& x, const ActivationFormat& format, MatrixView<float> out,
                       int threads) {
  require_calibrated(format, x.cols());
  const int64_t k = x.cols();
  if (out.rows() != x.rows() || out.cols() != k) {
    throw InvalidArgument("out", text_of("shape [", out.rows(), ", ", out.cols(), "]"),
                          text_of("[", x.rows(), ", ", k, "], as x"));
  }
  const int team = team_for(x, threads);
  const std::vector<int32_t> columns = outliers_of(x, format, team);
  const std::vector<FixedGrid> grids = grids_of(x, format, columns, team);
  parallel_for(ceil_div(x.rows(), kPieceTokens), team, [&](int64_t piece) {
    std::vector<float> row(static_cast<size_t>(k + kActivationPadding));
    std::vector<int8_t> codes(row.size());
    std::vector<int32_t> integers;
    std::vector<float> scales(static_cast<size_t>(std::max<int64_t>(scales_per_token(format, k), 1)));
    std::vector<int8_t> zeros(scales.size());
    std::vector<uint8_t> shifts(static_cast<size_t>(format.group_count(k)));
    std::vector<float> outliers(columns.size());
    for (int64_t t = piece * kPieceTokens; t < std::min((piece + 1) * kPieceTokens, x.rows()); ++t) {
      x.read(t, 0, k, row.data());
      take_outliers(columns, row.data(), outliers.data());
      encode_token(format, row.data(), k, grid_for(grids, t), integers,
                   {codes.data(), scales.data(), zeros.data(), shifts.data()});
      decode_token(format, k, codes.data(), scales.data(), zeros.data(), shifts.data(), out.row(t));
      for (size_t i = 0; i < columns.size(); ++i) out(t, columns[i]) = outliers[i];
    }
  });
}

QuantizedActivations quantize_activations_reference(const FloatMatrix& x, const ActivationFormat& format) {
  require_calibrated(format, x.cols());
  require_finite(x, "x", 1);
  const int64_t k = x.cols();
  std::vector<float> values(static_cast<size_t>(checked_mul(x.rows(), k)));
  for (int64_t t = 0; t < x.rows(); ++t) x.read(t, 0, k, values.data() + t * k);
  std::vector<int32_t> columns = format.outlier_columns.value_or(std::vector<int32_t>());
  for (int64_t c = 0; c < k && format.has_outliers() && !format.static_outliers; ++c) {
    bool reached = false;
    for (int64_t t = 0; t < x.rows(); ++t) {
      reached = reached || std::abs(values[static_cast<size_t>(t * k + c)]) >= format.outlier_threshold;
    }
    if (reached) columns.push_back(static_cast<int32_t>(c));
  }
  QuantizedActivations result = empty_planes(x.rows(), k, format, columns);
  for (int64_t t = 0; t < x.rows(); ++t) {
    for (size_t i = 0; i < columns.size(); ++i) {
      float& value = values[static_cast<size_t>(t * k + columns[i])];
      result.planes.at("outlier_values").values<float>()[static_cast<size_t>(t) * columns.size() + i] = value;
      value = 0.0F;
    }
  }
  const auto grid_between = [&](int64_t begin, int64_t end) {
    ActivationRange range;
    for (int64_t i = begin; i < end; ++i) {
      range.low = std::min(range.low, values[static_cast<size_t>(i)]);
      range.high = std::max(range.high, values[static_cast<size_t>(i)]);
    }
    return grid_of(format, range);
  };
  const FixedGrid whole = format.grid.value_or(grid_between(0, x.rows() * k));
  const int half = 1 << (format.bits - 1);
  const double levels = symmetric_levels(format);
  for (int64_t t = 0; t < x.rows(); ++t) {
    const float* row = values.data() + t * k;
    const auto steps = [&](int64_t i, const FixedGrid& grid) {
      return std::nearbyint(static_cast<double>(row[i] / grid.scale));
    };
    with_token(
        format, result.planes, k, t, [&](int8_t* codes, float* scales, int8_t* zeros, uint8_t* shifts) {
          const auto encode = [&](int64_t begin, int64_t end, const FixedGrid& grid, int64_t at) {
            scales[at] = grid.scale;
            if (!format.symmetric) zeros[at] = static_cast<int8_t>(grid.zero);
            for (int64_t i = begin; i < end && !format.has_shifts(); ++i) {
              const double low = format.symmetric ? 1 - half : -half;
              codes[i] = static_cast<int8_t>(std::clamp(steps(i, grid) + grid.zero, low, half - 1.0));
            }
          };
          const FixedGrid own =
              format.scope == ActivationScope::token ? grid_between(t * k, (t + 1) * k) : whole;
          if (format.scope != ActivationScope::group) encode(0, k, own, 0);
          for (int64_t begin = 0, g = 0; begin < k && format.group_size > 0; ++g) {
            const int64_t end = std::min(begin + format.group_size, k);
            if (!format.has_shifts()) {
              encode(begin, end, grid_between(t * k + begin, t * k + end), g);
            } else {
              double largest = 0;
              for (int64_t i = begin; i < end; ++i) {
                largest = std::max(largest, std::abs(std::clamp(steps(i, own), -levels, levels)));
              }
              int length = 0;
              while (std::ldexp(1.0, length) <= largest) ++length;
              const int shift = std::max(0, length - (format.bits - 1));
              shifts[g] = static_cast<uint8_t>(shift);
              for (int64_t i = begin; i < end; ++i) {
                const double cut =
                    std::nearbyint(std::ldexp(std::clamp(steps(i, own), -levels, levels), -shift));
                codes[i] = static_cast<int8_t>(std::clamp(cut, static_cast<double>(-half), half - 1.0));
              }
            }
            begin = end;
          }
        });
  }
  return result;
}

}  // namespace quantloom
