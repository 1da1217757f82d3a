// Choosing nearest codes, and writing planes: a thread makes one 32-bit word of a plane, so that no two write
// to the same one. Codes that straddle two words are chosen twice.
#include <cmath>

#include "common/load_float.cuh"
#include "quantloom/error.hpp"
#include "rounding/steps.hpp"

namespace quantloom::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 8192;

__device__ __forceinline__ void put_code(uint32_t code, int64_t bit, uint32_t& word) {
  word |= bit >= 0 ? code << bit : code >> -bit;
}

// The sum over the block, valid in thread 0; always in the same order.
__device__ double block_sum(double value) {
  __shared__ double parts[kThreads];
  parts[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
    __syncthreads();
  }
  return parts[0];
}

__global__ void __launch_bounds__(kThreads) encode_kernel(EncodeTask task, double* partial_errors) {
  const bool is_sign = task.grid.is_sign();
  const float largest_code = task.grid.largest_code();
  const int bits = task.grid.bits;
  const int64_t total = task.w.rows * task.words_per_row;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  double squared_error = 0;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < total; at += step) {
    const int64_t row = at / task.words_per_row;
    const int64_t first_bit = (at % task.words_per_row) * 32;
    const int64_t end = min(task.w.cols, (first_bit + 32 + bits - 1) / bits);
    int64_t group = -1;
    int64_t group_end = 0;
    float scale = 1;
    float zero = 0;
    uint32_t word = 0;
    for (int64_t column = first_bit / bits; column < end; ++column) {
      if (column >= group_end) {
        group = column / task.group_size;
        group_end = (group + 1) * task.group_size;
        const int64_t index = row * task.parameters.row_stride + group * task.parameters.group_stride;
        scale = task.parameters.scales[index];
        zero = task.parameters.zeros[index];
      }
      const float value = load_float(task.w.data, task.w.dtype, row * task.w.stride + column);
      const EncodedValue encoded = encode_uniform(is_sign, largest_code, value, scale, zero);
      const int64_t bit = column * bits - first_bit;
      put_code(encoded.code, bit, word);
      if (bit >= 0) {  // each code counts in the word that it begins in
        const double error = static_cast<double>(encoded.decoded) - static_cast<double>(value);
        squared_error += error * error;
      }
    }
    task.words[at] = word;
  }
  const double sum = block_sum(squared_error);
  if (threadIdx.x == 0) partial_errors[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    pack_codes_kernel(const uint8_t* codes, const int32_t* position, int64_t n, int64_t k, int bits,
                      uint32_t* words, int64_t words_per_row) {
  const int64_t total = n * words_per_row;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < total; at += step) {
    const int64_t row = at / words_per_row;
    const int64_t first_bit = (at % words_per_row) * 32;
    const int64_t end = min(k, (first_bit + 32 + bits - 1) / bits);
    uint32_t word = 0;
    for (int64_t column = first_bit / bits; column < end; ++column) {
      const int64_t from = position == nullptr ? column : static_cast<int64_t>(position[column]);
      put_code(codes[row * k + from], column * bits - first_bit, word);
    }
    words[at] = word;
  }
}

// Word `at` of the plane zeros: row = group, codes = zero points of the weight rows.
__global__ void __launch_bounds__(kThreads)
    pack_zeros_kernel(GroupParameters parameters, int64_t groups, int64_t rows, int bits, uint32_t* words,
                      int64_t words_per_group) {
  const int64_t total = groups * words_per_group;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < total; at += step) {
    const int64_t group = at / words_per_group;
    const int64_t first_bit = (at % words_per_group) * 32;
    const int64_t end = min(rows, (first_bit + 32 + bits - 1) / bits);
    uint32_t word = 0;
    for (int64_t row = first_bit / bits; row < end; ++row) {
      const float zero = parameters.zeros[row * parameters.row_stride + group * parameters.group_stride];
      put_code(static_cast<uint32_t>(static_cast<int32_t>(zero)), row * bits - first_bit, word);
    }
    words[at] = word;
  }
}

__global__ void __launch_bounds__(kThreads)
    store_scales_kernel(GroupParameters parameters, int64_t rows, int64_t groups, DType dtype, void* plane) {
  const int64_t total = rows * groups;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < total; at += step) {
    const float scale =
        parameters.scales[at / groups * parameters.row_stride + at % groups * parameters.group_stride];
    if (dtype == DType::f16) {
      static_cast<__half*>(plane)[at] = __float2half_rn(scale);
    } else if (dtype == DType::bf16) {
      static_cast<__nv_bfloat16*>(plane)[at] = __float2bfloat16_rn(scale);
    } else {
      static_cast<float*>(plane)[at] = scale;
    }
  }
}

__global__ void __launch_bounds__(kThreads) sum_kernel(const double* values, int64_t count, double* out) {
  double mine = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) mine += values[i];
  const double sum = block_sum(mine);
  if (threadIdx.x == 0) *out = sum;
}

__global__ void __launch_bounds__(kThreads)
    find_non_finite_kernel(CudaMatrix matrix, int64_t first_row, unsigned long long* key) {
  unsigned long long found = kNoneFound;
  for (int64_t row = blockIdx.y; row < matrix.rows; row += gridDim.y) {
    for (int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; column < matrix.cols;
         column += static_cast<int64_t>(gridDim.x) * kThreads) {
      const float value = load_float(matrix.data, matrix.dtype, row * matrix.stride + column);
      if (fabsf(value) <= 0x1.fffffep127F) continue;
      const unsigned long long kind = value != value ? 2 : (value < 0 ? 1 : 0);
      const auto index = static_cast<unsigned long long>((first_row + row) * matrix.cols + column);
      found = min(found, index * 4 + kind);
    }
  }
  if (found != kNoneFound) atomicMin(key, found);
}

unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>(std::clamp<int64_t>(ceil_div(threads, kThreads), 1, kMaxBlocks));
}

}  // namespace

void encode_and_pack(const EncodeTask& task, double* squared_error, cudaStream_t stream) {
  const unsigned blocks = blocks_for(checked_mul(task.w.rows, task.words_per_row));
  const DeviceBuffer<double> partial(blocks, stream);
  encode_kernel<<<blocks, kThreads, 0, stream>>>(task, partial.data());
  check_cuda(cudaGetLastError(), "launch of encode");
  sum_values(partial.data(), blocks, squared_error, stream);
}

void pack_codes(const uint8_t* codes, const int32_t* position, int64_t n, int64_t k, int bits,
                uint32_t* words, int64_t words_per_row, cudaStream_t stream) {
  pack_codes_kernel<<<blocks_for(checked_mul(n, words_per_row)), kThreads, 0, stream>>>(
      codes, position, n, k, bits, words, words_per_row);
  check_cuda(cudaGetLastError(), "launch of pack_codes");
}

void store_parameters(const Uniform& format, const GroupParameters& parameters, PackedTensor& packed,
                      cudaStream_t stream) {
  Tensor& scales = packed.planes.at("scales");
  const int64_t rows = scales.shape()[0];
  const int64_t groups = scales.shape()[1];
  store_scales_kernel<<<blocks_for(scales.element_count()), kThreads, 0, stream>>>(
      parameters, rows, groups, format.scale_dtype, scales.bytes());
  check_cuda(cudaGetLastError(), "launch of store_scales");
  if (format.symmetric) return;
  Tensor& zeros = packed.planes.at("zeros");
  pack_zeros_kernel<<<blocks_for(zeros.element_count()), kThreads, 0, stream>>>(
      parameters, zeros.shape()[0], rows, format.bits, reinterpret_cast<uint32_t*>(zeros.bytes()),
      zeros.shape()[1]);
  check_cuda(cudaGetLastError(), "launch of pack_zeros");
}

void sum_values(const double* values, int64_t count, double* out, cudaStream_t stream) {
  sum_kernel<<<1, kThreads, 0, stream>>>(values, count, out);
  check_cuda(cudaGetLastError(), "launch of sum");
}

void find_non_finite(const CudaMatrix& matrix, int64_t first_row, uint64_t* key, cudaStream_t stream) {
  if (matrix.rows == 0 || matrix.cols == 0) return;
  const dim3 blocks(static_cast<unsigned>(std::min<int64_t>(ceil_div(matrix.cols, kThreads * 4), 64)),
                    static_cast<unsigned>(std::min<int64_t>(matrix.rows, 4096)));
  find_non_finite_kernel<<<blocks, kThreads, 0, stream>>>(matrix, first_row,
                                                          reinterpret_cast<unsigned long long*>(key));
  check_cuda(cudaGetLastError(), "launch of find_non_finite");
}

void require_none_found(const uint64_t* key, int64_t cols, const std::string& argument,
                        const std::string& rows, cudaStream_t stream) {
  uint64_t found = 0;
  download(key, &found, 1, stream);
  if (found == kNoneFound) return;
  const float values[] = {INFINITY, -INFINITY, NAN, NAN};
  const auto index = static_cast<int64_t>(found / 4);
  throw NumericError(text_of(argument, ": got ", values[found % 4], " at row ", index / cols, rows,
                             ", column ", index % cols, ", expected finite values"));
}

void require_finite_cuda(const CudaMatrix& matrix, const std::string& argument, cudaStream_t stream) {
  if (matrix.rows == 0 || matrix.cols == 0) return;
  DeviceBuffer<uint64_t> key(1, stream);
  key.fill_bytes(0xff);
  find_non_finite(matrix, 0, key.data(), stream);
  require_none_found(key.data(), matrix.cols, argument, "", stream);
}

}  // namespace quantloom::cuda
