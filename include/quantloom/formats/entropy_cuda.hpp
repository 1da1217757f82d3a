// Entropy coded streams on a CUDA device: one warp decodes a chunk, to codes or straight to values.
#pragma once

#include <memory>

#include "quantloom/dtype.hpp"
#include "quantloom/formats/entropy.hpp"

namespace quantloom {

// How codes become values: value(row, column) = table[code] * scale, computed in float32 and rounded to the
// type of the output; codes are those of a matrix [n, k], row after row.
struct EntropyValues {
  int64_t n = 0;
  int64_t k = 0;
  const float* table = nullptr;  // on the device: [entries], entries >= the alphabet of the stream
  int64_t entries = 0;
  // On the device, of float16, bfloat16 or float32: [ceil(n / rows_per_scale), ceil(k / columns_per_scale)].
  const void* scales = nullptr;
  DType scale_dtype = DType::f32;
  int64_t rows_per_scale = 1;
  int64_t columns_per_scale = 1;
};

// A copy of a stream in memory of the CUDA device that is current when it is made. Decoding is asynchronous,
// allocates nothing, can be captured in a graph, and stays within its memory whatever the words are; words
// that no encoder writes are noted, and check() reports them.
//
// Every function throws Unsupported in a CPU-only build; `cuda_stream` is a cudaStream_t.
class CudaEntropyStream {
 public:
  // Throws Unsupported for alphabets above 256 and for tables that the device has no memory for.
  explicit CudaEntropyStream(const EntropyStream& stream, void* cuda_stream = nullptr);

  int64_t count() const;
  int64_t chunk() const;
  int64_t byte_count() const;  // of device memory

  // Codes [first, first + count) to device memory.
  void decode(int64_t first, int64_t count, uint8_t* codes, void* cuda_stream) const;

  // Rows [first_row, first_row + rows) of the values to `out`, with `stride` elements between rows, of
  // float16, bfloat16 or float32. values.n * values.k must be count().
  void decode_values(const EntropyValues& values, int64_t first_row, int64_t rows, void* out, DType out_dtype,
                     int64_t stride, void* cuda_stream) const;

  // Waits for the stream; throws FileFormatError if a chunk met by any decoding since construction holds
  // words that no encoder writes. What was decoded from such a chunk is unspecified.
  void check(void* cuda_stream) const;

 private:
  struct State;
  std::shared_ptr<const State> state_;
};

}  // namespace quantloom
