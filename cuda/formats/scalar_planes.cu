// Choosing nearest codes, and writing planes: a thread makes one 32-bit word of a plane, so that no two write
// to the same one. Codes that straddle two words are chosen twice.
#include <algorithm>
#include <limits>
#include <vector>

#include "common/block_sum.cuh"
#include "common/load_float.cuh"
#include "common/matrix_checks.hpp"
#include "formats/scalar_planes.hpp"
#include "quantloom/error.hpp"

namespace quantloom::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 8192;

__device__ __forceinline__ void put_code(uint32_t code, int64_t bit, uint32_t& word) {
  word |= bit >= 0 ? code << bit : code >> -bit;
}

// The planes of a matrix, as the decoding of single values reads them.
struct StoredScalar {
  const uint32_t* codes;
  const void* scales;
  const uint32_t* zeros;       // null: zero_point holds everywhere
  const int32_t* group_index;  // null: groups of consecutive columns
  int64_t words_per_row;
  int64_t words_per_group;  // of zeros
  int64_t groups;
  int64_t group_size;
  const void* codebook;  // float16; null for a uniform grid
  float zero_point;
  int bits;
  DType scale_dtype;
  bool per_tensor;
};

__device__ __forceinline__ uint32_t code_at(const uint32_t* words, int64_t word_count, int64_t i, int bits) {
  const int64_t bit = i * bits;
  const int64_t word = bit / 32;
  const auto offset = static_cast<uint32_t>(bit % 32);
  uint64_t window = words[word];
  if (word + 1 < word_count) window |= static_cast<uint64_t>(words[word + 1]) << 32;
  return static_cast<uint32_t>(window >> offset) & ((1U << bits) - 1U);
}

// scale * (code - zero): the difference is exact, the product rounded once, as on the CPU.
__device__ __forceinline__ float decoded_value(const StoredScalar& stored, int64_t row, int64_t column) {
  const int64_t group = stored.group_index != nullptr ? static_cast<int64_t>(stored.group_index[column])
                                                      : column / stored.group_size;
  const int64_t parameter_row = stored.per_tensor ? 0 : row;
  const float scale = load_float(stored.scales, stored.scale_dtype, parameter_row * stored.groups + group);
  const uint32_t code =
      code_at(stored.codes + row * stored.words_per_row, stored.words_per_row, column, stored.bits);
  if (stored.codebook != nullptr) return scale * load_float(stored.codebook, DType::f16, code);
  float zero = stored.zero_point;
  if (stored.zeros != nullptr) {
    zero = static_cast<float>(code_at(stored.zeros + group * stored.words_per_group, stored.words_per_group,
                                      parameter_row, stored.bits));
  }
  return scale * (static_cast<float>(code) - zero);
}

__global__ void __launch_bounds__(kThreads) encode_kernel(EncodeTask task, double* partial_errors) {
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
      const EncodedValue encoded = encode_value(task.grid, value, scale, zero);
      const int64_t bit = column * bits - first_bit;
      put_code(encoded.code, bit, word);
      if (bit >= 0) {  // each code counts in the word that it begins in
        const double error = static_cast<double>(encoded.decoded) - static_cast<double>(value);
        squared_error += error * error;
      }
    }
    task.words[at] = word;
  }
  const double sum = block_sum<kThreads>(squared_error);
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

// errors [rows, k] = w - decoded, subtracted in float32; partial[block] takes the sum of squares.
__global__ void __launch_bounds__(kThreads)
    errors_kernel(CudaMatrix w, int64_t first_row, int64_t rows, StoredScalar stored, double* errors,
                  double* partial) {
  const int64_t total = rows * w.cols;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  double sum = 0;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < total; at += step) {
    const int64_t row = first_row + at / w.cols;
    const int64_t column = at % w.cols;
    const float value = load_float(w.data, w.dtype, row * w.stride + column);
    const double error = static_cast<double>(value - decoded_value(stored, row, column));
    errors[at] = error;
    sum += error * error;
  }
  const double whole = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = whole;
}

unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>(std::clamp<int64_t>(ceil_div(threads, kThreads), 1, kMaxBlocks));
}

}  // namespace

DeviceGrid::DeviceGrid(const GroupedFormat& format, cudaStream_t stream) {
  view_.bits = format.bits;
  view_.scale_dtype = format.scale_dtype;
  if (const auto* uniform = dynamic_cast<const Uniform*>(&format)) {
    view_.symmetric = uniform->symmetric;
    return;
  }
  const std::vector<float>& table = static_cast<const Codebook&>(format).table;
  const auto entries = static_cast<int64_t>(table.size());
  std::vector<float> midpoints((size_t{1} << format.bits) - 1, std::numeric_limits<float>::infinity());
  for (size_t i = 0; i + 1 < table.size(); ++i) midpoints[i] = (table[i] + table[i + 1]) / 2;
  table_ = DeviceBuffer<float>(entries, stream);
  table_.upload(table.data(), entries);
  midpoints_ = DeviceBuffer<float>(static_cast<int64_t>(midpoints.size()), stream);
  midpoints_.upload(midpoints.data(), static_cast<int64_t>(midpoints.size()));
  check_cuda(cudaStreamSynchronize(stream), "copy to the device");
  view_.table = table_.data();
  view_.midpoints = midpoints_.data();
  view_.largest_magnitude = static_cast<const Codebook&>(format).largest_magnitude();
  view_.has_zero = std::binary_search(table.begin(), table.end(), 0.0F);
}

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

void store_parameters(const GroupedFormat& format, const GroupParameters& parameters, PackedTensor& packed,
                      cudaStream_t stream) {
  Tensor& scales = packed.planes.at("scales");
  const int64_t rows = scales.shape()[0];
  const int64_t groups = scales.shape()[1];
  store_scales_kernel<<<blocks_for(scales.element_count()), kThreads, 0, stream>>>(
      parameters, rows, groups, format.scale_dtype, scales.bytes());
  check_cuda(cudaGetLastError(), "launch of store_scales");
  if (const auto* codebook = dynamic_cast<const Codebook*>(&format)) {
    std::vector<uint16_t> table;
    for (const float value : codebook->table) table.push_back(f16_from_float(value));
    check_cuda(cudaMemcpyAsync(packed.planes.at("codebook").bytes(), table.data(), 2 * table.size(),
                               cudaMemcpyHostToDevice, stream),
               "copy to the device");
    check_cuda(cudaStreamSynchronize(stream), "copy to the device");
  }
  if (!packed.planes.contains("zeros")) return;
  Tensor& zeros = packed.planes.at("zeros");
  pack_zeros_kernel<<<blocks_for(zeros.element_count()), kThreads, 0, stream>>>(
      parameters, zeros.shape()[0], rows, format.bits, reinterpret_cast<uint32_t*>(zeros.bytes()),
      zeros.shape()[1]);
  check_cuda(cudaGetLastError(), "launch of pack_zeros");
}

void measure_errors(const CudaMatrix& w, const PackedTensor& packed, int64_t first_row, int64_t rows,
                    double* errors, double* partial_squares, cudaStream_t stream) {
  const auto& format = static_cast<const GroupedFormat&>(*packed.format);
  StoredScalar stored{};
  stored.codes = reinterpret_cast<const uint32_t*>(packed.plane("codes").bytes());
  stored.words_per_row = packed.plane("codes").shape()[1];
  stored.scales = packed.plane("scales").bytes();
  stored.groups = packed.plane("scales").shape()[1];
  stored.scale_dtype = format.scale_dtype;
  if (packed.planes.contains("zeros")) {
    stored.zeros = reinterpret_cast<const uint32_t*>(packed.plane("zeros").bytes());
    stored.words_per_group = packed.plane("zeros").shape()[1];
  }
  if (packed.planes.contains("group_index")) {
    stored.group_index = reinterpret_cast<const int32_t*>(packed.plane("group_index").bytes());
  }
  stored.group_size = format.columns_per_group(packed.k);
  if (packed.planes.contains("codebook")) stored.codebook = packed.plane("codebook").bytes();
  if (const auto* uniform = dynamic_cast<const Uniform*>(&format)) {
    stored.zero_point = uniform->symmetric_zero_point();
  }
  stored.bits = format.bits;
  stored.per_tensor = format.group_size == GroupedFormat::kPerTensor;
  errors_kernel<<<kErrorBlocks, kThreads, 0, stream>>>(w, first_row, rows, stored, errors, partial_squares);
  check_cuda(cudaGetLastError(), "launch of errors");
}

}  // namespace quantloom::cuda
