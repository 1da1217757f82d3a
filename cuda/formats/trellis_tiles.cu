// Rings of trellis codes as weights, and tiles of matrices as rings.
#include <algorithm>

#include "common/check.cuh"
#include "common/device_pointer.hpp"
#include "common/load_float.cuh"
#include "formats/trellis_checks.hpp"
#include "formats/trellis_codes.hpp"
#include "quantloom/checked_math.hpp"

namespace quantloom {
namespace {

using trellis::kRingLength;
using trellis::kTileSide;

constexpr int64_t kMostBlocks = int64_t{1} << 16;  // of a launch; each then takes several rings

struct RingWords {
  const uint32_t* words;
  const uint16_t* weights;  // of the states
  int64_t count;
  TrellisShape shape;
};

__device__ __forceinline__ void store_weight(float value, __half* to) {
  *to = __float2half_rn(value);
}
__device__ __forceinline__ void store_weight(float value, __nv_bfloat16* to) {
  *to = __float2bfloat16_rn(value);
}
__device__ __forceinline__ void store_weight(float value, float* to) {
  *to = value;
}

// The state is the 16 bits before the end of the step's fresh bits.
__device__ __forceinline__ float weight_at(const RingWords& rings, int64_t ring, int position) {
  const int ring_words = rings.shape.words();
  const int per_step = rings.shape.weights_per_step;
  const uint32_t* words = rings.words + ring * ring_words;
  const int end = rings.shape.first_bit(position / per_step + 1);
  const int first = end >= 16 ? end - 16 : end - 16 + 32 * ring_words;
  const int word = first / 32;
  const uint32_t next = words[word + 1 < ring_words ? word + 1 : 0];
  const uint32_t state = __funnelshift_l(next, words[word], static_cast<uint32_t>(first % 32)) >> 16;
  const uint32_t place = state * static_cast<uint32_t>(per_step) + static_cast<uint32_t>(position % per_step);
  return __half2float(__ushort_as_half(rings.weights[place]));
}

// A block for each ring, a thread for each of its weights.
template <class T>
__global__ void __launch_bounds__(kRingLength) decode(const RingWords rings, T* weights) {
  const int position = static_cast<int>(threadIdx.x);
  for (int64_t ring = blockIdx.x; ring < rings.count; ring += gridDim.x) {
    store_weight(weight_at(rings, ring, position), weights + ring * kRingLength + position);
  }
}

// Tiles of a matrix [n, k]: tile i * (n / 16) + j has inputs 16 i ... and outputs 16 j ... The threads of a
// block go through a tile row by row of the matrix.
struct TilePlace {
  int input;
  int output;
  int position;

  __device__ explicit TilePlace(int thread)
      : input(thread % kTileSide),
        output(thread / kTileSide),
        position(trellis::position_of(thread % kTileSide, thread / kTileSide)) {}
  __device__ int64_t row(int64_t tile, int64_t tile_rows) const {
    return tile % tile_rows * kTileSide + output;
  }
  __device__ int64_t column(int64_t tile, int64_t tile_rows) const {
    return tile / tile_rows * kTileSide + input;
  }
};

template <class T>
__global__ void __launch_bounds__(kRingLength)
    decode_matrix(const RingWords rings, int64_t tile_rows, T* matrix, int64_t stride) {
  const TilePlace place(static_cast<int>(threadIdx.x));
  for (int64_t tile = blockIdx.x; tile < rings.count; tile += gridDim.x) {
    store_weight(weight_at(rings, tile, place.position),
                 matrix + place.row(tile, tile_rows) * stride + place.column(tile, tile_rows));
  }
}

__global__ void __launch_bounds__(kRingLength)
    gather(const CudaMatrix matrix, int64_t tile_rows, int64_t tiles, float factor, float* targets) {
  const TilePlace place(static_cast<int>(threadIdx.x));
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t from = place.row(tile, tile_rows) * matrix.stride + place.column(tile, tile_rows);
    targets[tile * kRingLength + place.position] = factor * cuda::load_float(matrix.data, matrix.dtype, from);
  }
}

// Calls body(pointer of the type).
template <class Body>
void with_type(DType dtype, void* memory, const Body& body) {
  if (dtype == DType::f16) {
    body(static_cast<__half*>(memory));
  } else if (dtype == DType::bf16) {
    body(static_cast<__nv_bfloat16*>(memory));
  } else if (dtype == DType::f32) {
    body(static_cast<float*>(memory));
  } else {
    throw TypeMismatch("dtype", name_of(dtype), "float16, bfloat16 or float32");
  }
}

template <class Kernel, class... Arguments>
void launch(Kernel* kernel, int64_t rings, void* stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(kRingLength);
  config.gridDim = dim3(static_cast<unsigned>(std::min(rings, kMostBlocks)));
  config.stream = static_cast<cudaStream_t>(stream);
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), "launch of the trellis decoder");
}

// Tiles in a column of tiles.
int64_t require_tiles(const CudaMatrix& matrix, const std::string& argument) {
  cuda::require_matrix(matrix, argument);
  if (matrix.rows % kTileSide != 0 || matrix.cols % kTileSide != 0) {
    throw InvalidArgument(argument, text_of("[", matrix.rows, ", ", matrix.cols, "]"), "multiples of 16");
  }
  return matrix.rows / kTileSide;
}

}  // namespace

void decode_rings_cuda(const CudaTrellisCodebook& codebook, const uint32_t* words, int64_t count,
                       const TrellisShape& shape, void* weights, DType dtype, void* stream) {
  cuda::require_ring_shape(shape);
  cuda::require_ring_count(count);
  cuda::require_codebook(codebook, shape);
  with_type(dtype, weights, [&](auto* to) {
    if (count == 0) return;
    cuda::require_device_memory(words, "words");
    cuda::require_device_memory(weights, "weights");
    const RingWords rings{words, codebook.weights(), count, shape};
    launch(decode<std::remove_pointer_t<decltype(to)>>, count, stream, rings, to);
  });
}

void decode_tiles_cuda(const CudaTrellisCodebook& codebook, const uint32_t* words, const TrellisShape& shape,
                       const CudaMatrix& matrix, void* stream) {
  cuda::require_ring_shape(shape);
  cuda::require_codebook(codebook, shape);
  const int64_t tile_rows = require_tiles(matrix, "matrix");
  const int64_t tiles = tile_rows * (matrix.cols / kTileSide);
  with_type(matrix.dtype, const_cast<void*>(matrix.data), [&](auto* to) {
    if (tiles == 0) return;
    cuda::require_device_memory(words, "words");
    const RingWords rings{words, codebook.weights(), tiles, shape};
    launch(decode_matrix<std::remove_pointer_t<decltype(to)>>, tiles, stream, rings, tile_rows, to,
           matrix.stride);
  });
}

void gather_tiles_cuda(const CudaMatrix& matrix, float factor, float* targets, void* stream) {
  const int64_t tile_rows = require_tiles(matrix, "matrix");
  const int64_t tiles = tile_rows * (matrix.cols / kTileSide);
  if (tiles == 0) return;
  cuda::require_device_memory(targets, "targets");
  launch(gather, tiles, stream, matrix, tile_rows, tiles, factor, targets);
}

}  // namespace quantloom
