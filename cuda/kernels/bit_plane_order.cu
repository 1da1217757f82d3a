// Planes of bits on the device into the order of the product kernels and back, and decoded.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/check.cuh"
#include "kernels/bit_plane_product.hpp"

namespace quantloom::cuda {
namespace {

constexpr int kThreads = 256;

dim3 grid_for(int64_t threads) {
  const int64_t blocks = ceil_div(threads, kThreads);
  if (blocks > 2147483647) throw Unsupported(text_of("no kernel for ", threads, " words of signs"));
  return dim3(static_cast<unsigned>(blocks));
}

struct Orders {
  int planes;
  int parameters;
  int64_t n;
  int64_t k;
  int64_t row_words;
  int64_t row_blocks;
  int64_t column_blocks;
  int64_t group_count;
  const int32_t* source;

  // Of a word of the prepared plane: its plane, its row, and the place of its first column.
  __device__ void locate(int64_t word, int& plane, int64_t& row, int64_t& place) const {
    const int at = static_cast<int>(word % bit_planes::kPlaneWords);
    const int64_t plane_of_block = word / bit_planes::kPlaneWords;
    plane = static_cast<int>(plane_of_block % planes);
    const int64_t block = plane_of_block / planes;
    row = block / column_blocks * bit_planes::kBlockRows + bit_planes::row_of(at);
    place = block % column_blocks * bit_planes::kBlockColumns + bit_planes::column_of(at);
  }
  // Of parameter `i` of a row and group in the prepared plane.
  __device__ int64_t place_of(int64_t row, int64_t group, int i) const {
    return ((row / bit_planes::kBlockRows * group_count + group) * parameters + i) * bit_planes::kBlockRows +
           fragments::parameter_in_block(static_cast<int>(row % bit_planes::kBlockRows));
  }
};

Orders orders_of(const BitPlaneLayout& layout, const PreparedPlanes& prepared) {
  return {layout.planes,
          layout.parameters(),
          layout.n,
          layout.k,
          ceil_div(layout.k, 32),
          layout.row_blocks,
          layout.column_blocks,
          layout.group_count,
          layout.gathered ? reinterpret_cast<const int32_t*>(prepared.plane("source").bytes()) : nullptr};
}

__global__ void __launch_bounds__(kThreads)
    prepare_signs(Orders orders, int64_t words, const uint32_t* __restrict__ packed,
                  uint32_t* __restrict__ prepared) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= words) return;
  int plane = 0;
  int64_t row = 0;
  int64_t place = 0;
  orders.locate(i, plane, row, place);
  uint32_t word = 0;
  if (row < orders.n) {
    const uint32_t* const from = packed + (plane * orders.n + row) * orders.row_words;
    for (int bit = 0; bit < 32; ++bit) {
      const int64_t column = orders.source != nullptr ? orders.source[place + bit] : place + bit;
      if (column < 0 || column >= orders.k) continue;
      word |= (from[column / 32] >> (column % 32) & 1U) << bit;
    }
  }
  prepared[i] = word;
}

// `packed` is zeroed before; several threads write bits of one word.
__global__ void __launch_bounds__(kThreads)
    unprepare_signs(Orders orders, int64_t words, const uint32_t* __restrict__ prepared,
                    uint32_t* __restrict__ packed) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= words) return;
  int plane = 0;
  int64_t row = 0;
  int64_t place = 0;
  orders.locate(i, plane, row, place);
  if (row >= orders.n) return;
  uint32_t* const to = packed + (plane * orders.n + row) * orders.row_words;
  for (int bit = 0; bit < 32; ++bit) {
    const int64_t column = orders.source != nullptr ? orders.source[place + bit] : place + bit;
    if (column < 0 || column >= orders.k || (prepared[i] >> bit & 1U) == 0) continue;
    atomicOr(to + column / 32, 1U << (column % 32));
  }
}

// T: the bytes of a scale. Between [parameter, row, group] of scales, and of offsets, and the prepared plane,
// which is zeroed before. kBack: from there.
template <class T, bool kBack>
__global__ void __launch_bounds__(kThreads)
    move_parameters(Orders orders, T* __restrict__ scales, T* __restrict__ offsets,
                    T* __restrict__ prepared) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t matrix = orders.n * orders.group_count;
  const auto parameter = static_cast<int>(i / matrix);
  if (parameter >= orders.parameters) return;
  const int64_t at = i % matrix;
  const int64_t place = orders.place_of(at / orders.group_count, at % orders.group_count, parameter);
  T& packed = parameter < orders.planes ? scales[i] : offsets[at];
  if (kBack) {
    packed = prepared[place];
  } else {
    prepared[place] = packed;
  }
}

template <bool kBack>
void launch_parameters(const Orders& orders, const Tensor& scales, const Tensor* offsets,
                       const Tensor& prepared, cudaStream_t stream) {
  const int64_t count = orders.n * orders.group_count * orders.parameters;
  if (count == 0) return;
  const auto launch = [&]<class T>(T) {
    const auto pointer = [](const Tensor* plane) {
      return plane == nullptr ? nullptr : reinterpret_cast<T*>(const_cast<std::byte*>(plane->bytes()));
    };
    move_parameters<T, kBack><<<grid_for(count), kThreads, 0, stream>>>(orders, pointer(&scales),
                                                                        pointer(offsets), pointer(&prepared));
  };
  size_of(prepared.dtype()) == 4 ? launch(uint32_t{}) : launch(uint16_t{});
  check_cuda(cudaGetLastError(), "launch of move_parameters");
}

void zero(const Tensor& plane, cudaStream_t stream) {
  if (plane.byte_count() == 0) return;
  check_cuda(cudaMemsetAsync(const_cast<std::byte*>(plane.bytes()), 0,
                             static_cast<size_t>(plane.byte_count()), stream),
             "zeroing a plane");
}

void copy(const Tensor& from, Tensor& to, cudaStream_t stream) {
  if (from.byte_count() == 0) return;
  check_cuda(cudaMemcpyAsync(to.bytes(), from.bytes(), static_cast<size_t>(from.byte_count()),
                             cudaMemcpyDeviceToDevice, stream),
             "copying a plane");
}

const Tensor* offsets_of(const PackedTensor& packed) {
  const auto found = packed.planes.find("offsets");
  return found == packed.planes.end() ? nullptr : &found->second;
}

__device__ __forceinline__ void store(float value, float* to) {
  *to = value;
}
__device__ __forceinline__ void store(float value, __half* to) {
  *to = __float2half_rn(value);
}
__device__ __forceinline__ void store(float value, __nv_bfloat16* to) {
  *to = __float2bfloat16_rn(value);
}

struct DecodedRows {
  const uint32_t* signs;
  const void* scales;
  DType scale_dtype;
  int planes;
  int parameters;
  int64_t first_row;  // a multiple of 64
  int64_t rows;
  int64_t column_blocks;
  int64_t group_count;
  int64_t group_words;
  int64_t stride;
};

__device__ __forceinline__ float parameter_at(const DecodedRows& w, int64_t at) {
  if (w.scale_dtype == DType::f32) return static_cast<const float*>(w.scales)[at];
  const uint32_t half = static_cast<const uint16_t*>(w.scales)[at];
  if (w.scale_dtype == DType::bf16) return __uint_as_float(half << 16);
  return __half2float(__ushort_as_half(static_cast<unsigned short>(half)));
}

// A block of threads decodes a block of 64 x 128, a thread as many columns of a row at a time as fill one
// 16-byte store. Offset first, then the planes in order, as the CPU adds them.
template <class Out>
__global__ void __launch_bounds__(kThreads) decode_signs(const __grid_constant__ DecodedRows w, Out* out) {
  constexpr int kPiece = 16 / sizeof(Out);
  constexpr int kPieces = bit_planes::kBlockColumns / kPiece;
  const int64_t in_rows = static_cast<int64_t>(blockIdx.x) / w.column_blocks;
  const int64_t block_column = static_cast<int64_t>(blockIdx.x) - in_rows * w.column_blocks;
  const int64_t row_block = w.first_row / bit_planes::kBlockRows + in_rows;
  const int column = static_cast<int>(threadIdx.x) % kPieces * kPiece;
  const int64_t word = block_column * 4 + column / bit_planes::kWordColumns;
  const int64_t group = min(word / w.group_words, w.group_count - 1);
  const int64_t parameters = (row_block * w.group_count + group) * w.parameters * bit_planes::kBlockRows;
  const int64_t block = (row_block * w.column_blocks + block_column) * w.planes * bit_planes::kPlaneWords;
  const bool has_offset = w.parameters > w.planes;
#pragma unroll 1
  for (int in_block = static_cast<int>(threadIdx.x) / kPieces; in_block < bit_planes::kBlockRows;
       in_block += kThreads / kPieces) {
    const int64_t row = in_rows * bit_planes::kBlockRows + in_block;
    if (row >= w.rows) return;
    int64_t parameter = parameters + fragments::parameter_in_block(in_block);
    int64_t at = block + bit_planes::word_of(in_block, column);
    const float offset = has_offset ? parameter_at(w, parameter + w.planes * bit_planes::kBlockRows) : 0.0F;
    float values[kPiece];
#pragma unroll
    for (int c = 0; c < kPiece; ++c) values[c] = offset;
#pragma unroll 4
    for (int plane = 0; plane < w.planes; ++plane) {
      const uint32_t minus = ~(__ldg(w.signs + at) >> (column % bit_planes::kWordColumns));
      const uint32_t scale = __float_as_uint(parameter_at(w, parameter));
#pragma unroll
      for (int c = 0; c < kPiece; ++c) {
        values[c] = __fadd_rn(values[c], __uint_as_float((minus << (31 - c) & 0x80000000U) ^ scale));
      }
      at += bit_planes::kPlaneWords;
      parameter += bit_planes::kBlockRows;
    }
    alignas(16) Out stored[kPiece];
#pragma unroll
    for (int c = 0; c < kPiece; ++c) store(values[c], stored + c);
    *reinterpret_cast<uint4*>(out + row * w.stride + block_column * bit_planes::kBlockColumns + column) =
        *reinterpret_cast<const uint4*>(stored);
  }
}

}  // namespace

void prepare_bit_plane_words(const BitPlaneLayout& layout, const PackedTensor& packed,
                             PreparedPlanes& prepared, cudaStream_t stream) {
  if (prepared.has("group_index"))
    copy(packed.plane("group_index"), prepared.planes.at("group_index"), stream);
  zero(prepared.plane("scales"), stream);
  if (layout.k == 0) return;
  const Orders orders = orders_of(layout, prepared);
  if (layout.words() > 0) {
    prepare_signs<<<grid_for(layout.words()), kThreads, 0, stream>>>(
        orders, layout.words(), reinterpret_cast<const uint32_t*>(packed.plane("signs").bytes()),
        reinterpret_cast<uint32_t*>(prepared.planes.at("signs").bytes()));
    check_cuda(cudaGetLastError(), "launch of prepare_signs");
  }
  launch_parameters<false>(orders, packed.plane("scales"), offsets_of(packed), prepared.plane("scales"),
                           stream);
}

void unprepare_bit_plane_words(const BitPlaneLayout& layout, const PreparedPlanes& prepared,
                               PackedTensor& packed, cudaStream_t stream) {
  if (prepared.has("group_index"))
    copy(prepared.plane("group_index"), packed.planes.at("group_index"), stream);
  zero(packed.plane("signs"), stream);
  if (layout.k == 0) return;
  const Orders orders = orders_of(layout, prepared);
  if (layout.words() > 0 && layout.n > 0) {
    unprepare_signs<<<grid_for(layout.words()), kThreads, 0, stream>>>(
        orders, layout.words(), reinterpret_cast<const uint32_t*>(prepared.plane("signs").bytes()),
        reinterpret_cast<uint32_t*>(packed.planes.at("signs").bytes()));
    check_cuda(cudaGetLastError(), "launch of unprepare_signs");
  }
  launch_parameters<true>(orders, packed.plane("scales"), offsets_of(packed), prepared.plane("scales"),
                          stream);
}

void decode_bit_planes(const BitPlaneLayout& layout, const PreparedPlanes& w, int64_t first_row, int64_t rows,
                       void* out, DType dtype, int64_t stride, cudaStream_t stream) {
  const DecodedRows decoded{reinterpret_cast<const uint32_t*>(w.plane("signs").bytes()),
                            w.plane("scales").bytes(),
                            layout.scale_dtype,
                            layout.planes,
                            layout.parameters(),
                            first_row,
                            std::min(rows, layout.n - first_row),
                            layout.column_blocks,
                            layout.group_count,
                            layout.group_columns / bit_planes::kWordColumns,
                            stride};
  if (decoded.rows <= 0 || decoded.column_blocks == 0) return;
  const int64_t blocks = ceil_div(decoded.rows, bit_planes::kBlockRows) * decoded.column_blocks;
  const auto launch = [&]<class Out>(Out* to) {
    decode_signs<Out><<<grid_for(blocks * kThreads), kThreads, 0, stream>>>(decoded, to);
  };
  if (dtype == DType::f16) {
    launch(static_cast<__half*>(out));
  } else if (dtype == DType::bf16) {
    launch(static_cast<__nv_bfloat16*>(out));
  } else {
    launch(static_cast<float*>(out));
  }
  check_cuda(cudaGetLastError(), "launch of decode_signs");
}

}  // namespace quantloom::cuda
