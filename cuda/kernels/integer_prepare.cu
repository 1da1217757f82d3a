// Brings packed planes on the device into integer order, and back. Done once for each matrix, so written to
// be plain: a thread moves 16 codes of one row.
#include <vector>

#include "common/check.cuh"
#include "common/device.hpp"
#include "common/device_buffer.hpp"
#include "common/load_float.cuh"
#include "kernels/integer_layout.hpp"
#include "kernels/integer_product.hpp"
#include "kernels/packed_codes.cuh"
#include "kernels/product_memory.hpp"
#include "kernels/register_records.hpp"
#include "quantloom/activations/cuda_activations.hpp"
#include "quantloom/formats/bit_packing.hpp"

namespace quantloom {
namespace {

using cuda::put_code;
using cuda::read_code;
using cuda::RowTerms;

constexpr int kThreads = 256;
constexpr int kPiece = 16;

struct Source {
  int bits = 8;
  int center = 0;
  int shift_bits = 0;
  int64_t group_columns = 1;
  int64_t n = 0;
  int64_t k = 0;
  int64_t blocks = 0;
  int64_t row_words = 0;
  int64_t shift_words = 0;
  const uint32_t* shifts = nullptr;
  const int32_t* group_index = nullptr;
};

__device__ int shift_of(const Source& source, int64_t row, int64_t column) {
  if (source.shift_bits == 0) return 0;
  const int64_t group =
      source.group_index != nullptr ? source.group_index[column] : column / source.group_columns;
  return static_cast<int>(read_code(source.shifts + row * source.shift_words, source.shift_bits, group));
}

__global__ void __launch_bounds__(kThreads)
    order_codes(Source source, int64_t pieces, const uint32_t* __restrict__ codes,
                int8_t* __restrict__ integers) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= pieces) return;
  const int64_t row_pieces = source.blocks * (integers::kBlockBytes / kPiece);
  const int64_t row = index / row_pieces;
  const int64_t first = index % row_pieces * kPiece;
  alignas(16) int8_t values[kPiece] = {};
  const int half = 1 << (source.bits - 1);
  for (int i = 0; i < kPiece && row < source.n && first + i < source.k; ++i) {
    const auto code = static_cast<int>(read_code(codes + row * source.row_words, source.bits, first + i));
    const int value = source.shift_bits > 0 ? ((code ^ half) - half) * (1 << shift_of(source, row, first + i))
                                            : code - source.center;
    values[i] = static_cast<int8_t>(value);
  }
  *reinterpret_cast<uint4*>(integers + integers::place_of(row, first, source.blocks)) =
      *reinterpret_cast<const uint4*>(values);
}

// `codes` is zeroed before.
__global__ void __launch_bounds__(kThreads)
    unorder_codes(Source source, int64_t pieces, const int8_t* __restrict__ integers,
                  uint32_t* __restrict__ codes) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= pieces) return;
  const int64_t row_pieces = source.blocks * (integers::kBlockBytes / kPiece);
  const int64_t row = index / row_pieces;
  const int64_t first = index % row_pieces * kPiece;
  for (int i = 0; i < kPiece && row < source.n && first + i < source.k; ++i) {
    const int value = integers[integers::place_of(row, first + i, source.blocks)];
    const int code =
        source.shift_bits > 0 ? value >> shift_of(source, row, first + i) : value + source.center;
    put_code(codes + row * source.row_words, source.bits, first + i,
             static_cast<uint32_t>(code) & (~0U >> (32 - source.bits)));
  }
}

// A warp to a row.
__global__ void __launch_bounds__(kThreads)
    find_row_terms(Source source, int64_t rows, const int8_t* __restrict__ integers,
                   const void* __restrict__ scales, DType scale_dtype, const uint32_t* __restrict__ zeros,
                   bool per_tensor, RowTerms* __restrict__ terms) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (row >= rows) return;
  int sum = 0;
  for (int64_t column = 4 * lane; column < source.blocks * integers::kBlockBytes; column += 128) {
    const int word = *reinterpret_cast<const int*>(integers + integers::place_of(row, column, source.blocks));
    sum = __dp4a(word, 0x01010101, sum);
  }
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0U, sum, step);
  if (lane > 0) return;
  RowTerms result{};
  if (row < source.n) {
    const int64_t from = per_tensor ? 0 : row;
    result.scale = cuda::load_float(scales, scale_dtype, from);
    result.sum = sum;
    if (zeros != nullptr) result.zero = static_cast<int>(read_code(zeros, source.bits, from)) - source.center;
  }
  terms[row] = result;
}

__global__ void __launch_bounds__(kThreads)
    order_outliers(Source source, int64_t pieces, int64_t outliers, int64_t outlier_blocks,
                   const int8_t* __restrict__ integers, const RowTerms* __restrict__ terms,
                   const int32_t* __restrict__ columns, const __half* __restrict__ values,
                   __half* __restrict__ weights) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= pieces) return;
  const int64_t row = index / (64 * outlier_blocks);
  const int64_t place = index % (64 * outlier_blocks);
  __half weight = __float2half_rn(0.0F);
  if (row < source.n && place < outliers) {
    const int64_t column = columns[place];
    const int code = integers[integers::place_of(row, column, source.blocks)] - terms[row].zero;
    const float dense = __fmul_rn(terms[row].scale, static_cast<float>(code));
    const float own = values == nullptr ? 0.0F : __half2float(values[row * outliers + place]);
    weight = __float2half_rn(__fadd_rn(dense, own));
  }
  weights[integers::place_of(row, 2 * place, outlier_blocks) / 2] = weight;
}

unsigned blocks_for(int64_t threads) {
  const int64_t blocks = ceil_div(threads, kThreads);
  if (blocks > 2147483647) {
    throw Unsupported(text_of("prepare_integers_cuda: no kernel for ", threads, " pieces of work"));
  }
  return static_cast<unsigned>(blocks);
}

template <class T>
const T* data_of(const Tensor& plane) {
  return reinterpret_cast<const T*>(plane.bytes());
}

Source source_of(const IntegerLayout& layout, const std::map<std::string, Tensor>& planes) {
  Source source;
  source.bits = layout.bits;
  source.center = layout.center();
  source.shift_bits = layout.shift_bits;
  source.group_columns = layout.group_columns;
  source.n = layout.n;
  source.k = layout.k;
  source.blocks = layout.blocks;
  source.row_words = packed_words(layout.k, layout.bits);
  if (layout.has_shifts()) {
    source.shift_words = packed_words(ceil_div(layout.k, layout.group_columns), layout.shift_bits);
    source.shifts = data_of<uint32_t>(planes.at("shifts"));
    if (const auto found = planes.find("group_index"); found != planes.end()) {
      source.group_index = data_of<int32_t>(found->second);
    }
  }
  return source;
}

void copy_to(const std::map<std::string, Tensor>& from, std::map<std::string, Tensor>& to,
             cudaStream_t stream) {
  for (auto& [name, plane] : to) {
    if (name == "codes" || is_integer_plane(name) || plane.byte_count() == 0) continue;
    check_cuda(cudaMemcpyAsync(plane.bytes(), from.at(name).bytes(), static_cast<size_t>(plane.byte_count()),
                               cudaMemcpyDeviceToDevice, stream),
               "prepare_integers_cuda: copying a plane");
  }
}

Tensor on_host(const Tensor& plane, cudaStream_t stream) {
  Tensor host(plane.dtype(), plane.shape());
  if (plane.byte_count() == 0) return host;
  check_cuda(cudaMemcpyAsync(host.bytes(), plane.bytes(), static_cast<size_t>(plane.byte_count()),
                             cudaMemcpyDeviceToHost, stream),
             "prepare_integers_cuda: reading outliers");
  return host;
}

// Waits for the stream.
void prepare_outliers(const IntegerLayout& layout, const Source& source, const PackedTensor& packed,
                      IntegerPlanes& prepared, cudaStream_t stream) {
  const std::vector<int32_t>& shared = prepared.outlier_columns;
  if (layout.own_outliers) {
    const Tensor offsets = on_host(packed.plane("outlier_offsets"), stream);
    const Tensor columns = on_host(packed.plane("outlier_columns"), stream);
    check_cuda(cudaStreamSynchronize(stream), "prepare_integers_cuda: reading outliers");
    require_outliers_at(shared, offsets, columns, layout.n);
  }
  if (shared.empty()) return;
  const std::vector<int32_t> index = outlier_index(shared, layout.k);
  check_cuda(cudaMemcpyAsync(prepared.planes.at("outlier_index").bytes(), index.data(), 4 * index.size(),
                             cudaMemcpyHostToDevice, stream),
             "prepare_integers_cuda: places of outliers");
  if (layout.n == 0) {
    check_cuda(cudaStreamSynchronize(stream), "prepare_integers_cuda: places of outliers");
    return;
  }
  cuda::DeviceBuffer<int32_t> on_device(std::ssize(shared), stream);
  on_device.upload(shared.data(), std::ssize(shared));
  const int64_t pieces = 128 * layout.row_tiles * 64 * layout.outlier_blocks();
  order_outliers<<<blocks_for(pieces), kThreads, 0, stream>>>(
      source, pieces, layout.outliers, layout.outlier_blocks(), data_of<int8_t>(prepared.plane("integers")),
      data_of<RowTerms>(prepared.plane("rows")), on_device.data(),
      layout.own_outliers ? data_of<__half>(packed.plane("outlier_values")) : nullptr,
      reinterpret_cast<__half*>(prepared.planes.at("outlier_weights").bytes()));
  check_cuda(cudaGetLastError(), "prepare_integers_cuda: launch of order_outliers");
  check_cuda(cudaStreamSynchronize(stream), "prepare_integers_cuda: places of outliers");
}

}  // namespace

void prepare_integers_cuda(const PackedTensor& packed, IntegerPlanes& prepared, void* stream) {
  validate(packed);
  validate_integers(prepared);
  require_same_matrix(packed, prepared);
  auto* const cuda_stream = static_cast<cudaStream_t>(stream);
  const IntegerLayout layout =
      integer_layout(*packed.format, packed.n, packed.k, std::ssize(prepared.outlier_columns));
  require_consecutive(layout, packed.planes);
  const Source source = source_of(layout, packed.planes);
  copy_to(packed.planes, prepared.planes, cuda_stream);
  if (layout.in_registers) return cuda::order_records(layout, packed, prepared, cuda_stream);
  const int64_t rows = 128 * layout.row_tiles;
  auto* const integers = reinterpret_cast<int8_t*>(prepared.planes.at("integers").bytes());
  if (const int64_t pieces = rows * layout.blocks * 8; pieces > 0) {
    order_codes<<<blocks_for(pieces), kThreads, 0, cuda_stream>>>(
        source, pieces, data_of<uint32_t>(packed.plane("codes")), integers);
    check_cuda(cudaGetLastError(), "prepare_integers_cuda: launch of order_codes");
    find_row_terms<<<blocks_for(32 * rows), kThreads, 0, cuda_stream>>>(
        source, rows, integers, packed.plane("scales").bytes(), layout.scale_dtype,
        layout.asymmetric ? data_of<uint32_t>(packed.plane("zeros")) : nullptr, layout.per_tensor,
        reinterpret_cast<RowTerms*>(prepared.planes.at("rows").bytes()));
    check_cuda(cudaGetLastError(), "prepare_integers_cuda: launch of find_row_terms");
  } else if (rows > 0) {
    check_cuda(cudaMemsetAsync(prepared.planes.at("rows").bytes(), 0,
                               static_cast<size_t>(prepared.plane("rows").byte_count()), cuda_stream),
               "prepare_integers_cuda: rows");
  }
  prepare_outliers(layout, source, packed, prepared, cuda_stream);
}

void unprepare_integers_cuda(const IntegerPlanes& prepared, PackedTensor& packed, void* stream) {
  validate(packed);
  validate_integers(prepared);
  require_same_matrix(packed, prepared);
  auto* const cuda_stream = static_cast<cudaStream_t>(stream);
  const IntegerLayout layout =
      integer_layout(*packed.format, packed.n, packed.k, std::ssize(prepared.outlier_columns));
  copy_to(prepared.planes, packed.planes, cuda_stream);
  Tensor& codes = packed.planes.at("codes");
  if (codes.byte_count() == 0) return;
  check_cuda(cudaMemsetAsync(codes.bytes(), 0, static_cast<size_t>(codes.byte_count()), cuda_stream),
             "unprepare_integers_cuda: zeroing codes");
  if (layout.in_registers) return cuda::unorder_records(layout, prepared, packed, cuda_stream);
  const int64_t pieces = layout.n * layout.blocks * 8;
  unorder_codes<<<blocks_for(pieces), kThreads, 0, cuda_stream>>>(source_of(layout, prepared.planes), pieces,
                                                                  data_of<int8_t>(prepared.plane("integers")),
                                                                  reinterpret_cast<uint32_t*>(codes.bytes()));
  check_cuda(cudaGetLastError(), "unprepare_integers_cuda: launch of unorder_codes");
}

}  // namespace quantloom
