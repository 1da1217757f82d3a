// Trellis-coded rings on CUDA devices: encoding and decoding of rings of 256 weights with 16 bits of state,
// of 1 to 8 bits a weight in steps of 1/2, and with two weights a step at most 4.
//
// Arrays lie in memory of the current CUDA device. Encoding and decoding are enqueued on `stream` (a
// cudaStream_t), allocate nothing, never wait, and can be captured in a graph. In a build without CUDA each
// function throws Unsupported.
#pragma once

#include <cstdint>
#include <memory>

#include "quantloom/cuda_matrix.hpp"
#include "quantloom/dtype.hpp"
#include "quantloom/formats/trellis.hpp"

namespace quantloom {

// The weights of all states, in memory of the device that is current when it is made.
class CudaTrellisCodebook {
 public:
  // Waits for the stream. Throws InvalidArgument unless `codebook` has a window of 16.
  explicit CudaTrellisCodebook(const TrellisCodebook& codebook, void* stream = nullptr);
  const uint16_t* weights() const;  // float16 bits, [65536, weights_per_step]
  int weights_per_step() const;
  int device() const;

 private:
  struct State;
  std::shared_ptr<const State> state_;
};

struct CudaRings {
  // [count, 256] in the order of the ring, in units of the codebook. Beyond 12 from zero they are searched
  // as 12, NaN as -12; errors are against the targets as they are.
  const float* targets = nullptr;
  int64_t count = 0;
  TrellisShape shape;               // of a window of 16 and 256 weights
  uint32_t* words = nullptr;        // result, [count, shape.words()], as pack_rings() orders them
  float* squared_errors = nullptr;  // result, [count] or null: the sum over a ring, NaN where a target is
  uint16_t* states = nullptr;       // result, [count, shape.steps()] or null
};

// What encode_rings_cuda() needs to be fast with `count` rings (several GiB for thousands), and what it needs
// to run at all.
struct TrellisWorkspace {
  int64_t fast_bytes = 0;
  int64_t least_bytes = 0;
};
// Throws InvalidArgument for another shape or count.
TrellisWorkspace trellis_workspace_cuda(const TrellisShape& shape, TrellisSearch search, int64_t count);

// Encodes rings: a Viterbi search over all 65536 states with float16 costs, whose squared error is within
// 0.03% of one with float32 costs on a normal source (1 to 6 bits; 0.1% at 7, 0.3% at 8). `fast` has 0.1 to
// 0.9% more, `best` up to 4 bits 0.01 to 0.3% less; from 5 bits on `best` gains nothing. A ring's result
// depends on its targets alone, not on its neighbours, the workspace or the device. `workspace` is aligned to
// 16 bytes.
//
// Throws InvalidArgument for shapes, counts and workspaces out of range and a codebook with other steps,
// TypeMismatch for null arrays and memory elsewhere.
void encode_rings_cuda(const CudaTrellisCodebook& codebook, const CudaRings& rings, TrellisSearch search,
                       void* workspace, int64_t workspace_bytes, void* stream);

// The weights [count, 256] of packed rings [count, shape.words()], as float16, bfloat16 or float32.
void decode_rings_cuda(const CudaTrellisCodebook& codebook, const uint32_t* words, int64_t count,
                       const TrellisShape& shape, void* weights, DType dtype, void* stream);

// ---- Tiles of a matrix ----
//
// Tiles are 16 x 16, those of the same 16 columns next to each other: tile i * (n / 16) + j of a matrix [n,
// k] has columns 16 i ... and rows 16 j ..., in the order of a ring (that of the file formats). n and k are
// multiples of 16.

// Targets [(k / 16) * (n / 16), 256] = factor * the matrix, rounded to float32.
void gather_tiles_cuda(const CudaMatrix& matrix, float factor, float* targets, void* stream);
// The weights of packed rings, [k / 16, n / 16, shape.words()], to the matrix; its memory is written.
void decode_tiles_cuda(const CudaTrellisCodebook& codebook, const uint32_t* words, const TrellisShape& shape,
                       const CudaMatrix& matrix, void* stream);

}  // namespace quantloom
