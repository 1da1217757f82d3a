#include "common/check.cuh"
#include "formats/trellis_codes.hpp"
#include "rounding/trellis_diagonals.hpp"

namespace quantloom::cuda {
namespace {

constexpr int kSide = trellis::kTileSide;
constexpr int kThreads = kSide * kSide;

// A thread for each weight of a tile. What the tiles before have to say comes 16 positions at a time: those
// of the same rows first, then those of the same columns.
__global__ void __launch_bounds__(kThreads)
    gather(const DiagonalWalk walk, const Diagonal which, float* left, float* targets) {
  __shared__ float errors[2][kSide][kSide];
  __shared__ float upper[2][kSide][kSide + 1];
  const int r = static_cast<int>(threadIdx.x) / kSide;
  const int c = static_cast<int>(threadIdx.x) % kSide;
  const int64_t row = (which.first + blockIdx.x) * kSide;
  const int64_t column = (which.diagonal - which.first - blockIdx.x) * kSide;
  const int64_t steps_of_rows = column / kSide;
  const int64_t steps = steps_of_rows + row / kSide;
  const auto load = [&](int64_t step, float& error, float& factor) {
    if (step < steps_of_rows) {
      error = walk.along_rows[(row + r) * walk.k + step * kSide + c];
      factor = walk.input.upper[(step * kSide + r) * walk.input.stride + column + c];
    } else {
      const int64_t at = (step - steps_of_rows) * kSide + r;
      error = walk.along_columns[at * walk.k + column + c];
      factor = walk.output.upper[at * walk.output.stride + row + c];
    }
  };
  const int64_t n_at = walk.output.order[row];
  const int64_t k_at = walk.input.order[column];
  float value = walk.weights[(n_at + r) * walk.k + k_at + c];
  float of_rows = value;
  float error = 0;
  float factor = 0;
  if (steps > 0) load(0, error, factor);
  for (int64_t step = 0; step < steps; ++step) {
    const int half = static_cast<int>(step & 1);
    errors[half][r][c] = error;
    upper[half][r][c] = factor;
    if (step + 1 < steps) load(step + 1, error, factor);
    __syncthreads();
    if (step == steps_of_rows) of_rows = value;
    if (step < steps_of_rows) {
#pragma unroll
      for (int i = 0; i < kSide; ++i) value = fmaf(-errors[half][r][i], upper[half][i][c], value);
    } else {
#pragma unroll
      for (int i = 0; i < kSide; ++i) value = fmaf(-upper[half][i][r], errors[half][i][c], value);
    }
  }
  if (steps == steps_of_rows) of_rows = value;
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  left[at] = of_rows;
  targets[at] = value;
}

// Threads 0 to 15 solve for a row of along_rows each, 16 to 31 for a column of along_columns.
__global__ void __launch_bounds__(32)
    finish(const DiagonalWalk walk, const Diagonal which, const float* left, const float* targets,
           const float* decoded, const uint32_t* words, int64_t ring_words, uint32_t* all_words) {
  const int64_t row = (which.first + blockIdx.x) * kSide;
  const int64_t column = (which.diagonal - which.first - blockIdx.x) * kSide;
  const bool along_rows = threadIdx.x < kSide;
  const int lane = static_cast<int>(threadIdx.x) % kSide;
  const DiagonalSide& side = along_rows ? walk.input : walk.output;
  const int64_t corner = along_rows ? column : row;
  const float* of = (along_rows ? left : targets) + int64_t{blockIdx.x} * kThreads;
  const float* found = decoded + int64_t{blockIdx.x} * kThreads;
  float* out = along_rows ? walk.along_rows : walk.along_columns;
  float solved[kSide];
#pragma unroll
  for (int i = 0; i < kSide; ++i) {
    const int at = along_rows ? lane * kSide + i : i * kSide + lane;
    float value = of[at] - found[at];
#pragma unroll
    for (int before = 0; before < i; ++before) {
      value = fmaf(-side.upper[(corner + before) * side.stride + corner + i], solved[before], value);
    }
    solved[i] = value / side.upper[(corner + i) * side.stride + corner + i];
    const int64_t r = row + (along_rows ? lane : i);
    const int64_t c = column + (along_rows ? i : lane);
    out[r * walk.k + c] = solved[i];
  }
  const int64_t tile = walk.input.order[column] / kSide * (walk.n / kSide) + walk.output.order[row] / kSide;
  for (int64_t i = threadIdx.x; i < ring_words; i += 32) {
    all_words[tile * ring_words + i] = words[int64_t{blockIdx.x} * ring_words + i];
  }
}

}  // namespace

void gather_diagonal(const DiagonalWalk& walk, const Diagonal& which, float* left, float* targets,
                     cudaStream_t stream) {
  gather<<<static_cast<unsigned>(which.count), kThreads, 0, stream>>>(walk, which, left, targets);
  check_cuda(cudaGetLastError(), "launch of gather");
}

void finish_diagonal(const DiagonalWalk& walk, const Diagonal& which, const float* left, const float* targets,
                     const float* decoded, const uint32_t* words, int64_t ring_words, uint32_t* all_words,
                     cudaStream_t stream) {
  finish<<<static_cast<unsigned>(which.count), 32, 0, stream>>>(walk, which, left, targets, decoded, words,
                                                                ring_words, all_words);
  check_cuda(cudaGetLastError(), "launch of finish");
}

}  // namespace quantloom::cuda
