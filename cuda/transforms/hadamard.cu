// Checks of the Hadamard transform on CUDA devices, and the choice of its kernels.
#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <mutex>
#include <tuple>

#include "common/check.cuh"
#include "common/device.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/transforms/hadamard_cuda.hpp"
#include "transforms/hadamard_dense.cuh"
#include "transforms/hadamard_dense_stream.hpp"
#include "transforms/hadamard_dense_wide.cuh"
#include "transforms/hadamard_launch.cuh"
#include "transforms/hadamard_walsh.cuh"

namespace quantloom {
namespace {

using cuda::DenseShape;
using cuda::DenseSigns;
using cuda::HadamardArguments;
using cuda::WalshShape;

constexpr int64_t kSmallestBlock = 16;
constexpr int64_t kLargestBlock = 32768;
constexpr int64_t kLargestTiled = 256;  // orders above it leave at most 2^6 of kLargestBlock
constexpr int kSmallestPower = 4;       // of blocks with a dense order

template <class T, int kLog>
void launch_walsh(const HadamardArguments& a, const DeviceFacts& device, cudaStream_t stream) {
  using S = WalshShape<T, kLog>;
  constexpr int64_t kBytes = int64_t{4} * S::kFloats;
  if constexpr (kLog >= 14 || (kLog == 13 && sizeof(T) == 4)) {
    // One that copies ahead, where shared memory has room for it.
    constexpr int64_t kAhead = kBytes + (int64_t{1} << kLog) * static_cast<int64_t>(sizeof(T));
    const int64_t resident =
        std::clamp<int64_t>(device.processor_memory / (kAhead + 1024), 1, int64_t{S::kBlocks});
    if (a.vectors && kAhead <= device.shared_memory && a.units > device.processors) {
      const int64_t blocks = std::min<int64_t>(a.units, resident * device.processors);
      return cuda::launch_hadamard(cuda::walsh_ahead_kernel<T, kLog>, blocks, S::kThreads, kAhead, stream, a);
    }
  }
  cuda::launch_hadamard(cuda::walsh_kernel<T, kLog>, ceil_div(a.units, S::kTeams), S::kThreads, kBytes,
                        stream, a);
}

template <class T>
void launch_walsh(int power, const HadamardArguments& a, const DeviceFacts& device, cudaStream_t stream) {
  switch (power) {
    case 4:
      return launch_walsh<T, 4>(a, device, stream);
    case 5:
      return launch_walsh<T, 5>(a, device, stream);
    case 6:
      return launch_walsh<T, 6>(a, device, stream);
    case 7:
      return launch_walsh<T, 7>(a, device, stream);
    case 8:
      return launch_walsh<T, 8>(a, device, stream);
    case 9:
      return launch_walsh<T, 9>(a, device, stream);
    case 10:
      return launch_walsh<T, 10>(a, device, stream);
    case 11:
      return launch_walsh<T, 11>(a, device, stream);
    case 12:
      return launch_walsh<T, 12>(a, device, stream);
    case 13:
      return launch_walsh<T, 13>(a, device, stream);
    case 14:
      return launch_walsh<T, 14>(a, device, stream);
    default:
      return launch_walsh<T, 15>(a, device, stream);
  }
}

template <class T, int kTiles>
void launch_dense(HadamardSize size, const HadamardArguments& a, cudaStream_t stream) {
  const int64_t columns = int64_t{1} << size.power;
  const int64_t bytes = 4 * (DenseSigns<kTiles>::kWords + size.order * (columns + cuda::kDensePadding));
  // A warp for each 8 columns, as far as there are enough elements for its threads.
  const int64_t elements = size.order * columns;
  const auto threads = static_cast<int>(
      std::clamp<int64_t>(std::min(columns / 8, ceil_div(elements, 1024)) * 32, 64, cuda::kDenseThreads));
  const DenseShape shape{static_cast<int>(size.order), size.power};
  cuda::launch_hadamard(cuda::dense_kernel<T, kTiles>, a.units, threads, bytes, stream, a, shape,
                        cuda::kept_signs<kTiles>(size.order, a.inverse));
}

template <class T>
void launch_dense(HadamardSize size, const HadamardArguments& a, const DeviceFacts& device,
                  cudaStream_t stream) {
  if (cuda::launch_dense_stream<T>(size, a, device, stream)) return;
  const int64_t tiles = ceil_div(size.order, 16);
  if (tiles <= 1) return launch_dense<T, 1>(size, a, stream);
  if (tiles <= 2) return launch_dense<T, 2>(size, a, stream);
  if (tiles <= 4) return launch_dense<T, 4>(size, a, stream);
  if (tiles <= 7) return launch_dense<T, 7>(size, a, stream);
  if (tiles <= 11) return launch_dense<T, 11>(size, a, stream);
  return launch_dense<T, 16>(size, a, stream);
}

// The words of M on a device, uploaded at their first use and kept for the life of the process.
const uint32_t* kept_words(int64_t order, bool transposed, int device, cudaStream_t stream) {
  static std::mutex mutex;
  static std::map<std::tuple<int, int64_t, bool>, const uint32_t*> kept;
  const std::scoped_lock lock(mutex);
  const std::tuple<int, int64_t, bool> key{device, order, transposed};
  if (const auto found = kept.find(key); found != kept.end()) return found->second;
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &capturing), "hadamard_cuda: stream");
  if (capturing != cudaStreamCaptureStatusNone) {
    throw Unsupported(text_of("hadamard_cuda: the first transform of order ", order,
                              " uploads its matrix, which a CUDA graph cannot capture: run one before"));
  }
  const std::vector<uint32_t> words =
      cuda::sign_words(order, transposed, static_cast<int>(ceil_div(order, 16)));
  void* memory = nullptr;
  check_cuda(cudaMalloc(&memory, 4 * words.size()), "hadamard_cuda: device memory");
  const cudaError_t status = cudaMemcpy(memory, words.data(), 4 * words.size(), cudaMemcpyHostToDevice);
  if (status != cudaSuccess) static_cast<void>(cudaFree(memory));
  check_cuda(status, "hadamard_cuda: copy to the device");
  return kept.emplace(key, static_cast<const uint32_t*>(memory)).first->second;
}

template <class T, int kPower>
void launch_wide(int64_t order, const HadamardArguments& a, const DeviceFacts& device, cudaStream_t stream) {
  using S = cuda::DenseWide<T, kPower>;
  const int bytes = S::bytes(static_cast<int>(order));
  if (bytes > device.shared_memory) {
    throw Unsupported(text_of("hadamard_cuda: order ", order, " takes ", bytes,
                              " bytes of shared memory, expected at most ", device.shared_memory,
                              " on this device"));
  }
  const uint32_t* words = kept_words(order, a.inverse, device.index, stream);
  const int64_t blocks = std::min<int64_t>(a.units, int64_t{2} * device.processors);
  cuda::launch_hadamard(cuda::dense_wide_kernel<T, kPower>, blocks, S::kThreads, bytes, stream, a,
                        static_cast<int>(order), words);
}

template <class T>
void launch_wide(HadamardSize size, const HadamardArguments& a, const DeviceFacts& device,
                 cudaStream_t stream) {
  if (size.power == 4) return launch_wide<T, 4>(size.order, a, device, stream);
  if (size.power == 5) return launch_wide<T, 5>(size.order, a, device, stream);
  launch_wide<T, 6>(size.order, a, device, stream);
}

template <class T>
void launch_any(HadamardSize size, const HadamardArguments& a, const DeviceFacts& device,
                cudaStream_t stream) {
  if (size.order == 1) return launch_walsh<T>(size.power, a, device, stream);
  if (size.order > kLargestTiled) return launch_wide<T>(size, a, device, stream);
  return launch_dense<T>(size, a, device, stream);
}

void check_overlap(const CudaMatrix& x, const void* out, int64_t out_stride) {
  const auto begin_x = reinterpret_cast<uintptr_t>(x.data);
  const auto begin_out = reinterpret_cast<uintptr_t>(out);
  if (begin_x == begin_out && (x.rows == 1 || x.stride == out_stride)) return;
  const auto bytes = [&](int64_t stride) {
    return static_cast<uintptr_t>(((x.rows - 1) * stride + x.cols) * size_of(x.dtype));
  };
  if (begin_x < begin_out + bytes(out_stride) && begin_out < begin_x + bytes(x.stride)) {
    throw InvalidArgument("out", "memory that overlaps x", "x itself, or memory apart from it");
  }
}

}  // namespace

std::optional<std::string> why_not_hadamard_cuda(HadamardSize size, DType dtype) {
  if (!is_float16_or_32(dtype)) return text_of("no kernel transforms ", name_of(dtype));
  const int64_t n = size.order << size.power;
  const std::string got =
      text_of("no CUDA kernel transforms blocks of ", n, " = ", size.order, " * 2^", size.power);
  if (n > kLargestBlock) return text_of(got, ", expected at most ", kLargestBlock);
  if (size.order == 1 && n < kSmallestBlock) return text_of(got, ", expected at least ", kSmallestBlock);
  if (size.order > 1 && size.power < kSmallestPower) {
    return text_of(got, ", expected at least 2^", kSmallestPower, " beside an order");
  }
  return std::nullopt;
}

void hadamard_cuda(const CudaMatrix& x, void* out, int64_t out_stride, const CudaHadamardOptions& options,
                   void* stream) {
  if (!is_float16_or_32(x.dtype)) throw TypeMismatch("x", name_of(x.dtype), "float32, float16 or bfloat16");
  if (x.rows < 0 || x.cols < 0) {
    throw InvalidArgument("x", text_of("shape [", x.rows, ", ", x.cols, "]"), "sizes of 0 or more");
  }
  if (x.stride < x.cols)
    throw InvalidArgument("x", text_of("stride ", x.stride), text_of("at least ", x.cols));
  if (out_stride < x.cols) {
    throw InvalidArgument("out_stride", text_of(out_stride), text_of("at least ", x.cols));
  }
  if (options.block < 0) throw InvalidArgument("block", text_of(options.block), "0 (whole rows) or more");
  if (!std::isfinite(options.scale))
    throw InvalidArgument("scale", text_of(options.scale), "a finite number");
  if (x.cols == 0) return;
  const HadamardSize size = require_hadamard_block(x.cols, options.block);
  if (const auto reason = why_not_hadamard_cuda(size, x.dtype))
    throw Unsupported("hadamard_cuda: " + *reason);
  if (x.rows == 0) return;
  const int64_t element = size_of(x.dtype);
  checked_mul(checked_mul(x.rows, std::max(x.stride, out_stride)), element);
  const auto require_memory = [](const void* pointer, const char* argument, int64_t alignment) {
    if (pointer == nullptr) throw InvalidArgument(argument, "a null pointer", "memory of the current device");
    if (reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(alignment) != 0) {
      throw InvalidArgument(argument, "an address that is not a multiple of the element size",
                            "an aligned address");
    }
  };
  require_memory(x.data, "x", element);
  require_memory(out, "out", element);
  check_overlap(x, out, out_stride);
  const DeviceFacts device = current_device();
  require_on_device(x.data, "x", device.index);
  require_on_device(out, "out", device.index);
  if (options.signs != nullptr) require_on_device(options.signs, "signs", device.index);
  if (options.channel_scale != nullptr) {
    require_memory(options.channel_scale, "channel_scale", 4);
    require_on_device(options.channel_scale, "channel_scale", device.index);
  }

  const int64_t block = size.order << size.power;
  HadamardArguments a;
  a.x = x.data;
  a.out = out;
  a.x_stride = x.stride;
  a.out_stride = out_stride;
  a.per_row = x.cols / block;
  a.units = checked_mul(x.rows, a.per_row);
  a.signs = options.signs;
  a.channels = options.channel_scale;
  a.factor = static_cast<float>(static_cast<double>(options.scale) / std::sqrt(static_cast<double>(block)));
  a.inverse = options.inverse;
  const auto aligned = [&](const void* pointer, int64_t stride) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && (x.rows == 1 || stride * element % 16 == 0);
  };
  a.vectors = aligned(x.data, x.stride) && aligned(out, out_stride);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (x.dtype) {
    case DType::f16:
      return launch_any<__half>(size, a, device, cuda_stream);
    case DType::bf16:
      return launch_any<__nv_bfloat16>(size, a, device, cuda_stream);
    default:
      return launch_any<float>(size, a, device, cuda_stream);
  }
}

}  // namespace quantloom
