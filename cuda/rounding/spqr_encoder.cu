// The bilevel grids of "spqr" on the device: a thread block fits the rows of one block in one group. Warps
// share the factors of a search, and the candidates of a refinement; each error is summed by one lane in the
// order of the columns, as on the CPU.
#include <algorithm>
#include <climits>
#include <cmath>

#include "quantloom/error.hpp"
#include "quantloom/formats/spqr.hpp"
#include "rounding/device_encoder.hpp"
#include "rounding/segment.cuh"

namespace quantloom::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kMaxBlocks = 65536;
constexpr unsigned kAll = 0xffffffffU;
constexpr int64_t kMostRows = 2048;  // of a block: what one warp needs of shared memory

// The constants of the CPU's encoder.
constexpr float kRoundingShift = 0x1.8p23F;
constexpr double kFinestStep = 1.0 / 1024;
constexpr double kFarthestMiddle = 1.5;
constexpr int kSearchedBits = 4;
__device__ constexpr int kSearchedOffsets[15] = {0, -1, 1, -2, 2, -4, 4, -8, 8, -16, 16, -32, 32, -64, 64};

struct Plan {
  int bits;
  int scale_bits;
  int zero_bits;
  int64_t block;   // rows
  int64_t blocks;  // of the matrix
  int64_t groups;
  int warps;  // that search at once
};

struct Stored {
  GroupParameters parameters;  // scales and zero points as they decode, [groups, n]
  uint8_t* scale_codes;        // [groups, n]
  uint8_t* zero_codes;
  __half* scale_grids;  // [groups, blocks, 2]
  __half* zero_grids;
};

// The numbers step * (code - zero).
struct Line {
  float step;
  float zero;
  __device__ float at(int code) const { return step * (static_cast<float>(code) - zero); }
};

__device__ float nearest_level(float steps, float levels) {
  steps = steps > 0.0F ? steps : 0.0F;  // in this order a NaN becomes 0
  steps = steps < levels ? steps : levels;
  return (steps + kRoundingShift) - kRoundingShift;
}

// The line that spans what the rows want, for every lane of a warp; its step is infinite where it has none.
__device__ Line span_line(const float* wanted, int rows, float levels) {
  float least = wanted[0];
  float most = wanted[0];
  for (int r = threadIdx.x % kWarp; r < rows; r += kWarp) {
    least = wanted[r] < least ? wanted[r] : least;
    most = wanted[r] > most ? wanted[r] : most;
  }
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const float other_least = __shfl_xor_sync(kAll, least, distance);
    const float other_most = __shfl_xor_sync(kAll, most, distance);
    least = other_least < least ? other_least : least;
    most = other_most > most ? other_most : most;
  }
  const double low = static_cast<double>(least);
  const double high = static_cast<double>(most);
  const double largest = fmax(fabs(low), fabs(high));
  const double step = fmax(fmax((high - low) / static_cast<double>(levels), largest * kFinestStep), 0x1p-24);
  Line line;
  line.step = step > 65504 ? INFINITY : __half2float(__float2half_rn(static_cast<float>(step)));
  line.zero = __half2float(__float2half_rn(static_cast<float>(-low / static_cast<double>(line.step))));
  return line;
}

// The scale that a row wants.
__device__ float scale_wanted(const Plan& plan, float low, float high, float factor) {
  const double levels = (1 << plan.bits) - 1;
  const double middle = (static_cast<double>(low) + static_cast<double>(high)) / 2;
  const double range = static_cast<double>(factor) * (static_cast<double>(high) - static_cast<double>(low));
  const double steps = fmax(range, fabs(middle) / kFarthestMiddle) / levels;
  return static_cast<float>(fmin(steps, static_cast<double>(0x1.fffffep127F)));
}

struct Lines {
  Line scales;
  Line zeros;
  bool finite;
};

// A warp fits the rows of a block with their factors: wanted [rows] is for its use; scale and zero [rows]
// take the parameters.
template <class Factor>
__device__ Lines fit_rows(const Plan& plan, int rows, const float* low, const float* high,
                          const Factor& factor_of, float* wanted, float* scale, float* zero) {
  const int lane = threadIdx.x % kWarp;
  const double levels = (1 << plan.bits) - 1;
  for (int r = lane; r < rows; r += kWarp) wanted[r] = scale_wanted(plan, low[r], high[r], factor_of(r));
  __syncwarp();
  const auto scale_levels = static_cast<float>((1 << plan.scale_bits) - 1);
  const auto zero_levels = static_cast<float>((1 << plan.zero_bits) - 1);
  Lines lines;
  lines.scales = span_line(wanted, rows, scale_levels);
  __syncwarp();
  for (int r = lane; r < rows; r += kWarp) {
    const int code =
        static_cast<int>(nearest_level(wanted[r] / lines.scales.step + lines.scales.zero, scale_levels));
    scale[r] = lines.scales.at(code);
    const double middle = (static_cast<double>(low[r]) + static_cast<double>(high[r])) / 2;
    const double shift = scale[r] > 0 ? middle / static_cast<double>(scale[r]) : 0.0;
    const double farthest = kFarthestMiddle * levels;
    const double kept = shift < -farthest ? -farthest : (farthest < shift ? farthest : shift);
    wanted[r] = static_cast<float>(levels / 2 - kept);
  }
  __syncwarp();
  lines.zeros = span_line(wanted, rows, zero_levels);
  for (int r = lane; r < rows; r += kWarp) {
    zero[r] = lines.zeros.at(
        static_cast<int>(nearest_level(wanted[r] / lines.zeros.step + lines.zeros.zero, zero_levels)));
  }
  __syncwarp();
  lines.finite = lines.scales.step <= 65504.0F && lines.zeros.step <= 65504.0F;
  return lines;
}

__device__ float decoded_level(float steps, float scale, float zero, float levels) {
  return scale * (nearest_level(steps + zero, levels) - zero);
}

// The error of one row under a search's parameters.
__device__ double search_row(const Segment& segment, float scale, float zero, float levels, double norm) {
  double sum = 0;
  for (int64_t c = 0; c < segment.count; ++c) {
    const float value = segment.value(c);
    const float decoded = decoded_level(value / scale, scale, zero, levels);
    sum += search_error(static_cast<double>(segment.weight(c)), segment.error(c, value, decoded), norm);
  }
  return sum;
}

__device__ int candidate_count(int bits) {
  return bits <= kSearchedBits ? 1 << bits : 15;
}

__device__ int candidate(int bits, int present, int index) {
  if (bits <= kSearchedBits) return index;
  const int code = present + kSearchedOffsets[index];
  return min(max(code, 0), (1 << bits) - 1);
}

// A warp finds the codes of scale and zero point of one row that err least on the block's lines.
__device__ void refine_row(const Segment& segment, const Plan& plan, const Lines& lines, int& scale_code,
                           int& zero_code) {
  const auto levels = static_cast<float>((1 << plan.bits) - 1);
  const int zeros = candidate_count(plan.zero_bits);
  const int total = candidate_count(plan.scale_bits) * zeros;
  float least = INFINITY;
  int best = INT_MAX;
  for (int index = threadIdx.x % kWarp; index < total; index += kWarp) {
    const float scale = lines.scales.at(candidate(plan.scale_bits, scale_code, index / zeros));
    const float zero = lines.zeros.at(candidate(plan.zero_bits, zero_code, index % zeros));
    const float inverse = scale > 0 ? 1 / scale : 0.0F;
    float error = 0;
    for (int64_t c = 0; c < segment.count; ++c) {
      const float value = segment.value(c);
      const float missing = decoded_level(value * inverse, scale, zero, levels) - value;
      error += segment.weight(c) * (missing * missing);
    }
    if (error < least) {
      least = error;
      best = index;
    }
  }
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(kAll, least, distance);
    const int other_best = __shfl_xor_sync(kAll, best, distance);
    if (other < least || (other == least && other_best < best)) {
      least = other;
      best = other_best;
    }
  }
  if (best == INT_MAX) return;  // errors beyond float32: as fitted
  const int new_scale = candidate(plan.scale_bits, scale_code, best / zeros);
  zero_code = candidate(plan.zero_bits, zero_code, best % zeros);
  scale_code = new_scale;
}

// factors [n, groups_here]; null: 1, or those of the search. refine: with a search, and after fit_scaled().
__global__ void __launch_bounds__(kThreads)
    fit_kernel(FitTask task, int64_t groups_here, Plan plan, Search search, const float* factors, bool refine,
               Stored stored) {
  extern __shared__ double spqr_memory[];
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const auto most = static_cast<int>(min(plan.block, task.w.rows));
  double* const errors = spqr_memory;  // [warps, most]
  int* const best_steps = reinterpret_cast<int*>(errors + plan.warps * most);
  float* const low = reinterpret_cast<float*>(best_steps + plan.warps * most);
  float* const high = low + most;
  float* const factor = high + most;
  float* const scratch = factor + most + min(warp, plan.warps - 1) * 3 * most;
  float* const wanted = scratch;
  float* const scale = scratch + most;
  float* const zero = scratch + 2 * most;
  const auto levels = static_cast<float>((1 << plan.bits) - 1);
  for (int64_t at = blockIdx.x; at < plan.blocks * groups_here; at += gridDim.x) {
    const int64_t block = at / groups_here;
    const int64_t local = at % groups_here;
    const int64_t group = task.first_group + local;
    const int64_t first_row = block * plan.block;
    const auto rows = static_cast<int>(min(plan.block, task.w.rows - first_row));
    const int64_t first = task.first_column + local * task.group_size;
    const int64_t count = min(task.group_size, task.end_column - first);
    __syncthreads();
    for (int r = warp; r < rows; r += kWarps) {
      const Segment segment = segment_of(task, first_row + r, first, count);
      float least = INFINITY;
      float largest = -INFINITY;
      for (int64_t c = lane; c < count; c += kWarp) {
        const float value = segment.value(c);
        least = value < least ? value : least;
        largest = value > largest ? value : largest;
      }
#pragma unroll
      for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        least = fminf(least, __shfl_xor_sync(kAll, least, distance));
        largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, distance));
      }
      if (lane == 0) {
        low[r] = least;
        high[r] = largest;
        factor[r] = factors != nullptr ? factors[(first_row + r) * groups_here + local] : 1.0F;
      }
    }
    __syncthreads();
    bool finite = true;
    if (search.steps > 0) {
      if (warp < plan.warps) {
        for (int r = lane; r < rows; r += kWarp) {
          errors[warp * most + r] = INFINITY;
          best_steps[warp * most + r] = INT_MAX;
        }
        for (int step = warp; step < search.steps; step += plan.warps) {
          const float own = search.factors[step];
          const Lines lines = fit_rows(
              plan, rows, low, high, [&](int) { return own; }, wanted, scale, zero);
          finite = finite && lines.finite;
          for (int r = lane; r < rows; r += kWarp) {
            const double error = search_row(segment_of(task, first_row + r, first, count), scale[r], zero[r],
                                            levels, search.norm);
            if (error < errors[warp * most + r]) {
              errors[warp * most + r] = error;
              best_steps[warp * most + r] = step;
            }
          }
          __syncwarp();
        }
      }
      __syncthreads();
      for (int r = threadIdx.x; r < rows; r += kThreads) {
        double error = INFINITY;
        int step = INT_MAX;
        for (int i = 0; i < plan.warps; ++i) {
          const double other = errors[i * most + r];
          const int other_step = best_steps[i * most + r];
          if (other < error || (other == error && other_step < step)) {
            error = other;
            step = other_step;
          }
        }
        factor[r] = step < search.steps ? search.factors[step] : 1.0F;
      }
      __syncthreads();
    }
    // Every warp that has scratch memory makes the same lines; the first one's parameters are taken.
    Lines lines{};
    if (warp < plan.warps) {
      lines = fit_rows(
          plan, rows, low, high, [&](int r) { return factor[r]; }, wanted, scale, zero);
      finite = finite && lines.finite;
    }
    if (!finite && lane == 0) {
      atomicMin(reinterpret_cast<unsigned long long*>(task.failure),
                static_cast<unsigned long long>(first_row * task.group_count + group));
    }
    __syncthreads();
    if (warp < plan.warps) {
      for (int r = warp; r < rows; r += plan.warps) {
        int scale_code = static_cast<int>(nearest_level(
            scale_wanted(plan, low[r], high[r], factor[r]) / lines.scales.step + lines.scales.zero,
            static_cast<float>((1 << plan.scale_bits) - 1)));
        int zero_code = static_cast<int>(nearest_level(wanted[r] / lines.zeros.step + lines.zeros.zero,
                                                       static_cast<float>((1 << plan.zero_bits) - 1)));
        if (refine) {
          refine_row(segment_of(task, first_row + r, first, count), plan, lines, scale_code, zero_code);
        }
        if (lane == 0) {
          const int64_t cell = group * task.w.rows + first_row + r;
          stored.scale_codes[cell] = static_cast<uint8_t>(scale_code);
          stored.zero_codes[cell] = static_cast<uint8_t>(zero_code);
          stored.parameters.scales[cell] = lines.scales.at(scale_code);
          stored.parameters.zeros[cell] = lines.zeros.at(zero_code);
        }
      }
    }
    if (threadIdx.x == 0) {
      const int64_t cell = (group * plan.blocks + block) * 2;
      stored.scale_grids[cell] = __float2half_rn(lines.scales.step);
      stored.scale_grids[cell + 1] = __float2half_rn(lines.scales.zero);
      stored.zero_grids[cell] = __float2half_rn(lines.zeros.step);
      stored.zero_grids[cell + 1] = __float2half_rn(lines.zeros.zero);
    }
  }
}

class SpqrDeviceEncoder final : public DeviceEncoder {
 public:
  SpqrDeviceEncoder(const std::shared_ptr<const Format>& format, const Spqr& spqr, int64_t n, int64_t k,
                    cudaStream_t stream)
      : DeviceEncoder(format, n, k, spqr.group_count(k), spqr.columns_per_group(k), stream),
        plan_{spqr.bits, spqr.scale_bits, spqr.zero_bits, spqr.block, spqr.block_count(n), groups_, kWarps},
        scales_(checked_mul(groups_, n), stream),
        zeros_(scales_.count(), stream),
        scale_codes_(scales_.count(), stream),
        zero_codes_(scales_.count(), stream),
        scale_grids_(checked_mul(groups_ * 2, plan_.blocks), stream),
        zero_grids_(scale_grids_.count(), stream) {
    if (std::min(spqr.block, n) > kMostRows) {
      throw Unsupported(text_of("no CUDA kernel fits ", format->spec(), ": got blocks of ", spqr.block,
                                " rows, expected at most ", kMostRows));
    }
    while (shared_bytes() > (int64_t{96} << 10) && plan_.warps > 1) plan_.warps /= 2;
    GroupParameters parameters{scales_.data(), zeros_.data(), 1, n};
    rounder_ = SpqrRounder{static_cast<float>((1 << spqr.bits) - 1), parameters};
  }

  int64_t rows_per_fit() const override { return std::min(plan_.block, n_); }
  void fit(const FitTask& task, const SearchFactors& search) override {
    run(task, search_of(search), nullptr, search.steps() > 0);
  }
  void fit_scaled(const FitTask& task, const float* factors) override { run(task, {}, factors, false); }
  void fit_scaled_and_refine(const FitTask& task, const float* factors) override {
    run(task, {}, factors, true);
  }

  void store_codes(const uint8_t* codes, const int32_t* position, PackedTensor& packed) override {
    Tensor& plane = packed.planes.at("codes");
    pack_codes(codes, position, n_, k_, plan_.bits, reinterpret_cast<uint32_t*>(plane.bytes()),
               plane.shape()[1], stream_);
  }
  void store_parameters(PackedTensor& packed) override {
    const auto pack = [&](const char* name, const uint8_t* codes, int bits) {
      Tensor& plane = packed.planes.at(name);
      pack_codes(codes, nullptr, groups_, n_, bits, reinterpret_cast<uint32_t*>(plane.bytes()),
                 plane.shape()[1], stream_);
    };
    pack("scales", scale_codes_.data(), plan_.scale_bits);
    pack("zeros", zero_codes_.data(), plan_.zero_bits);
    const auto copy = [&](const char* name, const __half* grids) {
      Tensor& plane = packed.planes.at(name);
      check_cuda(cudaMemcpyAsync(plane.bytes(), grids, static_cast<size_t>(plane.byte_count()),
                                 cudaMemcpyDeviceToDevice, stream_),
                 "copy of planes");
    };
    copy("scale_grids", scale_grids_.data());
    copy("zero_grids", zero_grids_.data());
  }

 private:
  int64_t shared_bytes() const {
    const int64_t rows = rows_per_fit();
    return rows * (plan_.warps * (8 + 4 + 3 * 4) + 3 * 4);
  }

  void run(FitTask task, const Search& search, const float* factors, bool refine) {
    task.failure = failure_.data();
    task.group_count = groups_;
    const int64_t groups_here = ceil_div(task.end_column - task.first_column, task.group_size);
    const int64_t blocks = std::clamp<int64_t>(checked_mul(plan_.blocks, groups_here), 1, kMaxBlocks);
    const auto bytes = static_cast<int>(shared_bytes());
    check_cuda(cudaFuncSetAttribute(fit_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
               "shared memory of the fit of spqr");
    const Stored stored{std::get<SpqrRounder>(rounder_).parameters, scale_codes_.data(), zero_codes_.data(),
                        scale_grids_.data(), zero_grids_.data()};
    fit_kernel<<<static_cast<unsigned>(blocks), kThreads, static_cast<size_t>(bytes), stream_>>>(
        task, groups_here, plan_, search, factors, refine, stored);
    check_cuda(cudaGetLastError(), "launch of the fit of spqr");
  }

  Plan plan_;
  DeviceBuffer<float> scales_;  // [groups, n]
  DeviceBuffer<float> zeros_;
  DeviceBuffer<uint8_t> scale_codes_;
  DeviceBuffer<uint8_t> zero_codes_;
  DeviceBuffer<__half> scale_grids_;  // [groups, blocks, 2]
  DeviceBuffer<__half> zero_grids_;
};

}  // namespace

std::unique_ptr<DeviceEncoder> make_spqr_device_encoder(const std::shared_ptr<const Format>& format,
                                                        int64_t n, int64_t k, cudaStream_t stream) {
  return std::make_unique<SpqrDeviceEncoder>(format, dynamic_cast<const Spqr&>(*format), n, k, stream);
}

}  // namespace quantloom::cuda
