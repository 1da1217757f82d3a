// Decodes a matrix of the format "uniform" on the device.
//
// A thread owns as many consecutive columns as fill one 16-byte store and walks down the rows, so that the
// arithmetic of columns and groups is done once. The kernel is bound by memory: every output byte is
// written once, every plane read once from DRAM.
#include <algorithm>
#include <string>

#include "common/check.cuh"
#include "formats/uniform.cuh"
#include "quantloom/formats/bit_packing.hpp"
#include "quantloom/formats/uniform.hpp"
#include "quantloom/kernels/dequantize.hpp"

namespace quantloom {
namespace {

using cuda::CodeWindow;
using cuda::UniformParameters;
using cuda::UniformPlanes;

constexpr int kThreads = 256;
constexpr int kRowsPerThread = 8;
constexpr int64_t kMaxGridColumns = 2147483647;
constexpr int64_t kMaxGridRows = 65535;

__device__ __forceinline__ void convert(float value, float& out) {
  out = value;
}
__device__ __forceinline__ void convert(float value, __half& out) {
  out = __float2half_rn(value);
}
__device__ __forceinline__ void convert(float value, __nv_bfloat16& out) {
  out = __float2bfloat16_rn(value);
}

// kOneGroup: the columns of a thread always share their group, because groups are of consecutive columns
// and as wide as a multiple of kColumns.
template <int kBits, class Out, bool kOneGroup>
__global__ void __launch_bounds__(kThreads)
    dequantize_uniform(UniformPlanes planes, Out* __restrict__ out, int64_t n, int64_t k, int64_t stride,
                       bool vector_stores) {
  constexpr int kColumns = 16 / sizeof(Out);
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kColumns;
  if (column >= k) return;
  const int columns = static_cast<int>(min(static_cast<int64_t>(kColumns), k - column));
  int64_t groups[kOneGroup ? 1 : kColumns];
  if constexpr (kOneGroup) {
    groups[0] = column / planes.columns_per_group;
  } else {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      // Columns past the end decode the last one again; they are not stored.
      const int64_t c = column + min(i, columns - 1);
      groups[i] = planes.group_index != nullptr ? static_cast<int64_t>(__ldg(planes.group_index + c))
                                                : c / planes.columns_per_group;
    }
  }

  const int64_t row_step = static_cast<int64_t>(gridDim.y) * blockDim.y;
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; row < n; row += row_step) {
    CodeWindow<kBits, kColumns> window;
    window.load(planes.codes + row * planes.words_per_row, column * kBits, planes.words_per_row);
    alignas(16) Out values[kColumns];
    UniformParameters<kBits> parameters;
    if constexpr (kOneGroup) parameters.load(planes, row, groups[0]);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if constexpr (!kOneGroup) parameters.load(planes, row, groups[i]);
      convert(parameters.decode(window.code(i)), values[i]);
    }
    Out* target = out + row * stride + column;
    if (vector_stores && columns == kColumns) {
      *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(values);
    } else {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        if (i < columns) target[i] = values[i];
      }
    }
  }
}

template <int kBits, class Out>
void launch(const UniformPlanes& planes, void* out, int64_t n, int64_t k, int64_t stride,
            cudaStream_t stream) {
  constexpr int64_t kColumns = 16 / sizeof(Out);
  const int64_t column_threads = ceil_div(k, kColumns);
  int64_t width = 32;
  while (width < kThreads && width < column_threads) width *= 2;
  const int64_t height = kThreads / width;
  const int64_t column_blocks = ceil_div(column_threads, width);
  if (column_blocks > kMaxGridColumns) {
    throw Unsupported(text_of("dequantize_cuda: no kernel for k = ", k));
  }

  cudaLaunchConfig_t config{};
  config.blockDim = dim3(static_cast<unsigned>(width), static_cast<unsigned>(height));
  config.gridDim = dim3(static_cast<unsigned>(column_blocks),
                        static_cast<unsigned>(std::min(ceil_div(n, height * kRowsPerThread), kMaxGridRows)));
  config.stream = stream;
  const bool vector_stores = reinterpret_cast<uintptr_t>(out) % 16 == 0 && (n == 1 || stride % kColumns == 0);
  const bool one_group =
      planes.group_index == nullptr && (planes.group_count == 1 || planes.columns_per_group % kColumns == 0);
  auto* const kernel =
      one_group ? dequantize_uniform<kBits, Out, true> : dequantize_uniform<kBits, Out, false>;
  check_cuda(cudaLaunchKernelEx(&config, kernel, planes, static_cast<Out*>(out), n, k, stride, vector_stores),
             "dequantize_cuda: launch of dequantize_uniform");
}

template <class Out>
void launch_bits(int bits, const UniformPlanes& planes, void* out, int64_t n, int64_t k, int64_t stride,
                 cudaStream_t stream) {
  switch (bits) {
    case 1:
      return launch<1, Out>(planes, out, n, k, stride, stream);
    case 2:
      return launch<2, Out>(planes, out, n, k, stride, stream);
    case 3:
      return launch<3, Out>(planes, out, n, k, stride, stream);
    case 4:
      return launch<4, Out>(planes, out, n, k, stride, stream);
    case 5:
      return launch<5, Out>(planes, out, n, k, stride, stream);
    case 6:
      return launch<6, Out>(planes, out, n, k, stride, stream);
    case 7:
      return launch<7, Out>(planes, out, n, k, stride, stream);
    case 8:
      return launch<8, Out>(planes, out, n, k, stride, stream);
    default:
      throw Unsupported(text_of("dequantize_cuda: no kernel for ", bits, " bits, expected 1 to 8"));
  }
}

// Without this check a host pointer, or one of another GPU, would surface later as an illegal access that
// ends the process's CUDA context.
void require_on_current_device(const void* pointer, const std::string& argument) {
  int current = 0;
  check_cuda(cudaGetDevice(&current), "dequantize_cuda: current device");
  cudaPointerAttributes attributes{};
  check_cuda(cudaPointerGetAttributes(&attributes, pointer), "dequantize_cuda: place of " + argument);
  const bool managed = attributes.type == cudaMemoryTypeManaged;
  if (!managed && attributes.type != cudaMemoryTypeDevice) {
    throw InvalidArgument(argument, "memory of the host", "memory of a CUDA device");
  }
  if (!managed && attributes.device != current) {
    throw InvalidArgument(argument, text_of("memory of CUDA device ", attributes.device),
                          text_of("memory of the current device, ", current));
  }
}

const void* device_data(const PackedTensor& packed, const std::string& name) {
  const Tensor& plane = packed.plane(name);
  if (plane.device() != Device::cuda) {
    throw InvalidArgument("packed." + name, "a plane on the CPU", "a plane on the current CUDA device");
  }
  if (plane.element_count() > 0) require_on_current_device(plane.bytes(), "packed." + name);
  return plane.bytes();
}

}  // namespace

void dequantize_cuda(const PackedTensor& packed, void* out, DType out_dtype, int64_t stride, void* stream) {
  validate(packed);
  const auto* format = dynamic_cast<const Uniform*>(packed.format.get());
  if (format == nullptr) {
    throw Unsupported("dequantize_cuda: no CUDA kernel decodes format " + packed.format->spec());
  }
  if (!is_float16_or_32(out_dtype)) {
    throw TypeMismatch("out_dtype", name_of(out_dtype), "float32, float16 or bfloat16");
  }
  const int64_t n = packed.n;
  const int64_t k = packed.k;
  if (stride < k) throw InvalidArgument("stride", text_of(stride), text_of("at least k = ", k));
  checked_mul(checked_mul(n, stride), size_of(out_dtype));
  if (n == 0 || k == 0) return;
  if (out == nullptr) throw InvalidArgument("out", "a null pointer", text_of("memory for ", n, " rows"));
  if (reinterpret_cast<uintptr_t>(out) % static_cast<uintptr_t>(size_of(out_dtype)) != 0) {
    throw InvalidArgument("out", "an address that is not a multiple of the element size",
                          "an aligned address");
  }

  const bool indexed = packed.planes.contains("group_index");
  UniformPlanes planes;
  planes.codes = static_cast<const uint32_t*>(device_data(packed, "codes"));
  planes.scales = device_data(packed, "scales");
  if (!format->symmetric) planes.zeros = static_cast<const uint32_t*>(device_data(packed, "zeros"));
  if (indexed) planes.group_index = static_cast<const int32_t*>(device_data(packed, "group_index"));
  planes.per_tensor = format->group_size == Uniform::kPerTensor;
  planes.words_per_row = packed_words(k, format->bits);
  planes.words_per_zero_row = packed_words(planes.per_tensor ? 1 : n, format->bits);
  planes.group_count = format->group_count(k);
  planes.columns_per_group = format->columns_per_group(k);
  planes.zero_point = format->symmetric_zero_point();
  planes.scale_dtype = format->scale_dtype;
  require_on_current_device(out, "out");

  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (out_dtype) {
    case DType::f16:
      return launch_bits<__half>(format->bits, planes, out, n, k, stride, cuda_stream);
    case DType::bf16:
      return launch_bits<__nv_bfloat16>(format->bits, planes, out, n, k, stride, cuda_stream);
    default:
      return launch_bits<float>(format->bits, planes, out, n, k, stride, cuda_stream);
  }
}

}  // namespace quantloom
