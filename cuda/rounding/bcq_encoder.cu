// Binary coding on the device: a thread fits one group of one row, with the operations of the CPU in their
// order, so that scales are the CPU's to the bit.
#include <algorithm>
#include <cmath>

#include "quantloom/formats/bcq.hpp"
#include "rounding/device_encoder.hpp"
#include "rounding/segment.cuh"

namespace quantloom::cuda {
namespace {

constexpr int kThreads = 64;
constexpr int kPlaneThreads = 256;
constexpr int64_t kMaxBlocks = 65536;

struct Wanted {
  int bits;
  bool offset;
  int rounds;
  bool greedy;
  DType scale_dtype;
};

// The grid with a factor, as it is stored; false if its ends overflow.
__device__ bool store_rounded(const bcq::Grid& fitted, float factor, DType dtype, bcq::Grid& grid) {
  grid = fitted;
  float outermost = fabsf(fitted.offset);
  for (int p = 0; p < grid.bits; ++p) {
    grid.scale[p] = round_to_dtype(dtype, fitted.scale[p] * factor);
    outermost += grid.scale[p];
  }
  grid.offset = round_to_dtype(dtype, fitted.offset * factor);
  return outermost <= bcq::kLargest && fabsf(grid.offset) <= bcq::kLargest;
}

// factors [rows, groups_here]: null for the search, or 1 without one.
template <int kBits>
__global__ void __launch_bounds__(kThreads)
    fit_kernel(FitTask task, int64_t groups_here, Wanted wanted, Search search, const float* factors,
               bcq::Grid* grids, float* values, uint8_t* codes) {
  const int64_t total = task.w.rows * groups_here;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < total;
       at += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = at / groups_here;
    const int64_t group = at % groups_here;
    const int64_t first = task.first_column + group * task.group_size;
    const int64_t count = min(task.group_size, task.end_column - first);
    const Segment segment = segment_of(task, row, first, count);
    // A fit that a search or factors follow does not weigh columns, on the CPU either.
    bool weighted = false;
    for (int64_t i = 0; i < count && task.weights != nullptr && search.steps == 0 && factors == nullptr;
         ++i) {
      weighted = weighted || segment.weight(i) != 0;
    }
    const auto value_at = [&](int64_t i) { return segment.value(i); };
    const auto weight_at = [&](int64_t i) { return weighted ? static_cast<double>(segment.weight(i)) : 1.0; };
    bcq::Fitter<kBits, decltype(value_at), decltype(weight_at)> fitter(value_at, weight_at, count,
                                                                       wanted.rounds);
    bcq::Grid fitted;
    fitted.bits = wanted.bits;
    fitted.has_offset = wanted.offset;
    fitter.fit(fitted, wanted.greedy);

    const int64_t cell = (task.first_group + group) * task.w.rows + row;
    float* const own_values = values + (cell << wanted.bits);
    uint8_t* const own_codes = codes + (cell << wanted.bits);
    bcq::Grid grid;
    float factor = factors != nullptr ? factors[at] : 1.0F;
    bool finite = true;
    double least = INFINITY;
    for (int step = 0; step < search.steps; ++step) {
      finite = store_rounded(fitted, search.factors[step], wanted.scale_dtype, grid) && finite;
      bcq::sort_values(grid, own_values, own_codes);
      double sum = 0;
      for (int64_t i = 0; i < count; ++i) {
        const float value = segment.value(i);
        const float decoded = own_values[bcq::position_of(own_values, wanted.bits, value)];
        sum += search_error(static_cast<double>(segment.weight(i)), segment.error(i, value, decoded),
                            search.norm);
      }
      if (sum < least) {
        least = sum;
        factor = search.factors[step];
      }
    }
    finite = store_rounded(fitted, factor, wanted.scale_dtype, grid) && finite;
    bcq::sort_values(grid, own_values, own_codes);
    grids[cell] = grid;
    if (!finite) {
      atomicMin(reinterpret_cast<unsigned long long*>(task.failure),
                static_cast<unsigned long long>(row * task.group_count + task.first_group + group));
    }
  }
}

// Word `at` of the plane signs [bits, n, words].
__global__ void __launch_bounds__(kPlaneThreads)
    pack_signs_kernel(const uint8_t* codes, const int32_t* position, int64_t n, int64_t k, int bits,
                      uint32_t* signs, int64_t words) {
  const int64_t total = bits * n * words;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kPlaneThreads + threadIdx.x; at < total;
       at += static_cast<int64_t>(gridDim.x) * kPlaneThreads) {
    const int64_t row = at / words % n;
    const auto plane = static_cast<int>(at / words / n);
    const int64_t first = at % words * 32;
    uint32_t word = 0;
    for (int64_t column = first; column < min(k, first + 32); ++column) {
      const int64_t from = position == nullptr ? column : static_cast<int64_t>(position[column]);
      word |= (static_cast<uint32_t>(codes[row * k + from]) >> plane & 1U) << (column - first);
    }
    signs[at] = word;
  }
}

__device__ void put(void* plane, DType dtype, int64_t at, float value) {
  if (dtype == DType::f16) {
    static_cast<__half*>(plane)[at] = __float2half_rn(value);
  } else if (dtype == DType::bf16) {
    static_cast<__nv_bfloat16*>(plane)[at] = __float2bfloat16_rn(value);
  } else {
    static_cast<float*>(plane)[at] = value;
  }
}

// scales [bits, n, groups] and offsets [n, groups] (null for none) of grids [groups, n].
__global__ void __launch_bounds__(kPlaneThreads)
    store_grids_kernel(const bcq::Grid* grids, int64_t n, int64_t groups, int bits, DType dtype, void* scales,
                       void* offsets) {
  const int64_t total = n * groups;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kPlaneThreads + threadIdx.x; at < total;
       at += static_cast<int64_t>(gridDim.x) * kPlaneThreads) {
    const bcq::Grid grid = grids[at % groups * n + at / groups];
    for (int p = 0; p < bits; ++p) put(scales, dtype, p * total + at, grid.scale[p]);
    if (offsets != nullptr) put(offsets, dtype, at, grid.offset);
  }
}

unsigned blocks_for(int64_t threads, int of_block) {
  return static_cast<unsigned>(std::clamp<int64_t>(ceil_div(threads, of_block), 1, kMaxBlocks));
}

class BcqDeviceEncoder final : public DeviceEncoder {
 public:
  BcqDeviceEncoder(const std::shared_ptr<const Format>& format, const Bcq& bcq, int64_t n, int64_t k,
                   cudaStream_t stream)
      : DeviceEncoder(format, n, k, bcq.group_count(k), std::min(bcq.columns_per_group(k), k), stream),
        wanted_{bcq.bits, bcq.offset, bcq.rounds, bcq.greedy, bcq.scale_dtype},
        grids_(checked_mul(groups_, n), stream),
        values_(checked_mul(checked_mul(groups_, n), int64_t{1} << bcq.bits), stream),
        codes_(values_.count(), stream) {
    rounder_ = BcqRounder{bcq.bits, n, grids_.data(), values_.data(), codes_.data()};
  }

  bool weighs_columns() const override { return true; }
  void fit(const FitTask& task, const SearchFactors& search) override {
    run(task, search_of(search), nullptr);
  }
  void fit_scaled(const FitTask& task, const float* factors) override { run(task, {}, factors); }

  void store_codes(const uint8_t* codes, const int32_t* position, PackedTensor& packed) override {
    Tensor& signs = packed.planes.at("signs");
    pack_signs_kernel<<<blocks_for(signs.element_count(), kPlaneThreads), kPlaneThreads, 0, stream_>>>(
        codes, position, n_, k_, wanted_.bits, reinterpret_cast<uint32_t*>(signs.bytes()), signs.shape()[2]);
    check_cuda(cudaGetLastError(), "launch of pack_signs");
  }
  void store_parameters(PackedTensor& packed) override {
    void* const offsets = wanted_.offset ? packed.planes.at("offsets").bytes() : nullptr;
    store_grids_kernel<<<blocks_for(checked_mul(n_, groups_), kPlaneThreads), kPlaneThreads, 0, stream_>>>(
        grids_.data(), n_, groups_, wanted_.bits, wanted_.scale_dtype, packed.planes.at("scales").bytes(),
        offsets);
    check_cuda(cudaGetLastError(), "launch of store_grids");
  }

 private:
  void run(FitTask task, const Search& search, const float* factors) {
    task.failure = failure_.data();
    task.group_count = groups_;
    const int64_t groups_here = ceil_div(task.end_column - task.first_column, task.group_size);
    const unsigned blocks = blocks_for(checked_mul(task.w.rows, groups_here), kThreads);
    const auto launch = [&](auto kernel) {
      kernel<<<blocks, kThreads, 0, stream_>>>(task, groups_here, wanted_, search, factors, grids_.data(),
                                               values_.data(), codes_.data());
    };
    if (wanted_.bits <= 4) {
      launch(fit_kernel<4>);
    } else {
      launch(fit_kernel<bcq::kMostBits>);
    }
    check_cuda(cudaGetLastError(), "launch of fit of binary coding");
  }

  Wanted wanted_;
  DeviceBuffer<bcq::Grid> grids_;  // [groups, n]
  DeviceBuffer<float> values_;     // [groups, n, 2^bits]
  DeviceBuffer<uint8_t> codes_;
};

}  // namespace

std::unique_ptr<DeviceEncoder> make_bcq_device_encoder(const std::shared_ptr<const Format>& format, int64_t n,
                                                       int64_t k, cudaStream_t stream) {
  return std::make_unique<BcqDeviceEncoder>(format, dynamic_cast<const Bcq&>(*format), n, k, stream);
}

}  // namespace quantloom::cuda
