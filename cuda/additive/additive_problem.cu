#include <algorithm>
#include <cmath>
#include <numeric>

#include "additive/additive_problem.hpp"
#include "additive/every_element.cuh"
#include "common/block_sum.cuh"
#include "common/load_float.cuh"
#include "fit/centroid_sums.hpp"
#include "formats/scalar_planes.hpp"

namespace quantloom::cuda {
namespace {

__global__ void __launch_bounds__(kThreads)
    scale_weights_kernel(CudaMatrix w, int64_t columns, double factor, float* weights) {
  const int64_t total = w.rows * columns;
  for (int64_t at = first_thread(); at < total; at += thread_count()) {
    const int64_t row = at / columns;
    const int64_t column = at % columns;
    weights[at] =
        column < w.cols
            ? static_cast<float>(static_cast<double>(load_float(w.data, w.dtype, row * w.stride + column)) *
                                 factor)
            : 0.0F;
  }
}

template <class Real>
__global__ void __launch_bounds__(kThreads)
    hessian_kernel(const double* sum, int64_t k, int64_t columns, int64_t g, const int32_t* order,
                   double factor, double shift, Real* h) {
  for (int64_t at = first_thread(); at < columns * columns; at += thread_count()) {
    const int64_t row = at / columns;
    const int64_t column = at % columns;
    const int64_t from = order == nullptr ? row : order[row / g] * g + row % g;
    const int64_t to = order == nullptr ? column : order[column / g] * g + column % g;
    double value = from < k && to < k ? sum[from * k + to] * factor : 0.0;
    if (row == column && from < k) value += shift;
    h[at] = static_cast<Real>(value);
  }
}

struct CodeStream {
  uint32_t* words;
  int64_t words_per_row;
  int64_t rows;
  int64_t row_codes;
  int bits;
};

__global__ void __launch_bounds__(kThreads) unpack_codes_kernel(CodeStream stream, uint16_t* codes) {
  const uint32_t mask = (1U << stream.bits) - 1U;
  for (int64_t at = first_thread(); at < stream.rows * stream.row_codes; at += thread_count()) {
    const int64_t bit = at % stream.row_codes * stream.bits;
    const uint32_t* const word = stream.words + at / stream.row_codes * stream.words_per_row + bit / 32;
    const int offset = static_cast<int>(bit % 32);
    uint64_t window = word[0];
    if (offset + stream.bits > 32) window |= static_cast<uint64_t>(word[1]) << 32;
    codes[at] = static_cast<uint16_t>((window >> offset) & mask);
  }
}

// A thread makes a word of all codes that reach into it.
__global__ void __launch_bounds__(kThreads) pack_codes_kernel(const uint16_t* codes, CodeStream stream) {
  for (int64_t at = first_thread(); at < stream.rows * stream.words_per_row; at += thread_count()) {
    const int64_t row = at / stream.words_per_row;
    const int64_t begin = at % stream.words_per_row * 32;
    const int64_t last = min((begin + 31) / stream.bits, stream.row_codes - 1);
    uint32_t word = 0;
    for (int64_t i = begin / stream.bits; i <= last; ++i) {
      const int64_t shift = i * stream.bits - begin;
      const uint32_t code = codes[row * stream.row_codes + i];
      word |= shift >= 0 ? code << shift : code >> -shift;
    }
    stream.words[at] = word;
  }
}

__global__ void __launch_bounds__(kThreads)
    load_kernel(const void* from, DType dtype, int64_t count, float* to) {
  for (int64_t at = first_thread(); at < count; at += thread_count()) to[at] = load_float(from, dtype, at);
}

__global__ void __launch_bounds__(kThreads)
    store_kernel(const float* from, DType dtype, int64_t count, void* to) {
  for (int64_t at = first_thread(); at < count; at += thread_count()) {
    if (dtype == DType::f16) {
      static_cast<__half*>(to)[at] = __float2half_rn(from[at]);
    } else if (dtype == DType::bf16) {
      static_cast<__nv_bfloat16*>(to)[at] = __float2bfloat16_rn(from[at]);
    } else {
      static_cast<float*>(to)[at] = from[at];
    }
  }
}

template <class From, class To>
__global__ void __launch_bounds__(kThreads)
    convert_kernel(const From* from, To* to, int64_t count, double factor) {
  for (int64_t at = first_thread(); at < count; at += thread_count()) {
    to[at] = static_cast<To>(static_cast<double>(from[at]) * factor);
  }
}

struct DecodeTask {
  const float* tables;
  const float* scales;
  const uint16_t* codes;
  int64_t books;
  int64_t entries;
  int64_t out_group;
  int64_t in_group;
  int64_t blocks;
  int64_t scale_columns;
  int64_t scale_count;
};

__global__ void __launch_bounds__(kThreads) errors_kernel(CudaMatrix w, DecodeTask task, int64_t first_row,
                                                          int64_t rows, double* errors, double* partial) {
  const int64_t dim = task.out_group * task.in_group;
  double squares = 0;
  for (int64_t at = first_thread(); at < rows * w.cols; at += thread_count()) {
    const int64_t row = first_row + at / w.cols;
    const int64_t column = at % w.cols;
    const int64_t row_group = row / task.out_group;
    const uint16_t* const codes =
        task.codes + (row_group * task.blocks + column / task.in_group) * task.books;
    const int64_t element = row % task.out_group * task.in_group + column % task.in_group;
    float sum = task.tables[codes[0] * dim + element];
    for (int64_t book = 1; book < task.books; ++book) {
      sum += task.tables[(book * task.entries + codes[book]) * dim + element];
    }
    const float scale = task.scales[row_group * task.scale_count + column / task.scale_columns];
    const double error = static_cast<double>(load_float(w.data, w.dtype, row * w.stride + column)) -
                         static_cast<double>(__fmul_rn(sum, scale));
    errors[at] = error;
    squares += error * error;
  }
  const double whole = block_sum<kThreads>(squares);
  if (threadIdx.x == 0) partial[blockIdx.x] = whole;
}

CodeStream stream_of(const Additive& format, const PackedTensor& packed) {
  const Tensor& plane = packed.plane("codes");
  const bool empty = packed.n == 0 || packed.k == 0;
  return {reinterpret_cast<uint32_t*>(const_cast<std::byte*>(plane.bytes())), plane.shape()[1],
          empty ? 0 : format.row_groups(packed.n), format.code_count(packed.k), format.bits};
}

}  // namespace

AdditiveProblem::AdditiveProblem(const CudaMatrix& w_given, const Additive& format_given,
                                 const CudaHessian& hessian, double damping, cudaStream_t stream_given)
    : format(format_given),
      w(w_given),
      n(w.rows),
      k(w.cols),
      row_groups(format.row_groups(n)),
      blocks(format.blocks(k)),
      columns(blocks * format.in_group),
      scale_count(k > 0 ? format.scale_count(k) : 0),
      scale_columns(format.scale_columns(k)),
      stream(stream_given),
      hessian_(hessian),
      shift_(damping),
      weights_(checked_mul(n, columns), stream) {
  const float most = checked_largest(w, "w", true, stream);
  int exponent = 0;
  static_cast<void>(std::frexp(most, &exponent));
  weight_unit_ = most > 0 ? std::ldexp(1.0, exponent) : 1.0;
  if (n > 0 && k > 0) {
    scale_weights_kernel<<<blocks_for(n * columns), kThreads, 0, stream>>>(w, columns, 1 / weight_unit_,
                                                                           weights_.data());
    check_cuda(cudaGetLastError(), "launch of scale_weights");
  }
  const std::vector<double> diagonal = hessian.diagonal(stream);
  const double sum = std::accumulate(diagonal.begin(), diagonal.end(), 0.0);
  if (k > 0) hessian_unit_ = sum / static_cast<double>(k);
  if (!(hessian_unit_ > 0)) hessian_unit_ = 1;
}

template <class Real>
void AdditiveProblem::hessian(const int32_t* order, Real* h) const {
  if (columns == 0) return;
  const double factor = 1 / (static_cast<double>(hessian_.tokens()) * hessian_unit_);
  hessian_kernel<<<blocks_for(checked_mul(columns, columns)), kThreads, 0, stream>>>(
      hessian_.sum(stream), k, columns, format.in_group, order, factor, shift_, h);
  check_cuda(cudaGetLastError(), "launch of hessian");
}

template void AdditiveProblem::hessian(const int32_t*, float*) const;
template void AdditiveProblem::hessian(const int32_t*, double*) const;

AdditiveArrays unpack_additive(const Additive& format, const PackedTensor& packed, cudaStream_t stream) {
  const CodeStream codes = stream_of(format, packed);
  const Tensor& tables = packed.plane("codebook");
  const Tensor& scales = packed.plane("scales");
  AdditiveArrays arrays{DeviceBuffer<float>(tables.element_count(), stream),
                        DeviceBuffer<float>(scales.element_count(), stream),
                        DeviceBuffer<uint16_t>(codes.rows * codes.row_codes, stream)};
  load_kernel<<<blocks_for(tables.element_count()), kThreads, 0, stream>>>(
      tables.bytes(), tables.dtype(), tables.element_count(), arrays.tables.data());
  load_kernel<<<blocks_for(scales.element_count()), kThreads, 0, stream>>>(
      scales.bytes(), scales.dtype(), scales.element_count(), arrays.scales.data());
  unpack_codes_kernel<<<blocks_for(codes.rows * codes.row_codes), kThreads, 0, stream>>>(codes,
                                                                                         arrays.codes.data());
  check_cuda(cudaGetLastError(), "launch of unpack_codes");
  return arrays;
}

void pack_additive(const Additive& format, const AdditiveArrays& arrays, PackedTensor& packed,
                   cudaStream_t stream) {
  Tensor& tables = packed.planes.at("codebook");
  Tensor& scales = packed.planes.at("scales");
  store_kernel<<<blocks_for(tables.element_count()), kThreads, 0, stream>>>(
      arrays.tables.data(), tables.dtype(), tables.element_count(), tables.bytes());
  store_kernel<<<blocks_for(scales.element_count()), kThreads, 0, stream>>>(
      arrays.scales.data(), scales.dtype(), scales.element_count(), scales.bytes());
  const CodeStream codes = stream_of(format, packed);
  pack_codes_kernel<<<blocks_for(codes.rows * codes.words_per_row), kThreads, 0, stream>>>(
      arrays.codes.data(), codes);
  check_cuda(cudaGetLastError(), "launch of pack_codes");
}

template <class From, class To>
void convert(const From* from, To* to, int64_t count, double factor, cudaStream_t stream) {
  if (count == 0) return;
  convert_kernel<<<blocks_for(count), kThreads, 0, stream>>>(from, to, count, factor);
  check_cuda(cudaGetLastError(), "launch of convert");
}

template void convert(const float*, float*, int64_t, double, cudaStream_t);
template void convert(const float*, double*, int64_t, double, cudaStream_t);
template void convert(const double*, double*, int64_t, double, cudaStream_t);

void additive_errors(const CudaMatrix& w, const Additive& format, const AdditiveArrays& arrays,
                     int64_t first_row, int64_t rows, double* errors, double* partial, cudaStream_t stream) {
  const DecodeTask task{arrays.tables.data(),      arrays.scales.data(),  arrays.codes.data(),
                        format.codebooks,          format.entries(),      format.out_group,
                        format.in_group,           format.blocks(w.cols), format.scale_columns(w.cols),
                        format.scale_count(w.cols)};
  errors_kernel<<<kErrorBlocks, kThreads, 0, stream>>>(w, task, first_row, rows, errors, partial);
  check_cuda(cudaGetLastError(), "launch of errors");
}

}  // namespace quantloom::cuda
