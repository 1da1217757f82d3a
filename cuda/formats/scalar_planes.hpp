// Writing and reading the planes of the formats "uniform" and "codebook" on the device, for the roundings
// there. Each function enqueues work on a stream and returns.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/device_buffer.hpp"
#include "formats/scalar_rounding.cuh"
#include "quantloom/cuda_matrix.hpp"
#include "quantloom/formats/codebook.hpp"
#include "quantloom/formats/uniform.hpp"

namespace quantloom::cuda {

// The grid of a uniform or codebook format, its table on the device.
class DeviceGrid {
 public:
  DeviceGrid(const GroupedFormat& format, cudaStream_t stream);
  const ScalarGrid& view() const { return view_; }

 private:
  ScalarGrid view_;
  DeviceBuffer<float> table_;
  DeviceBuffer<float> midpoints_;
};

// Parameters of groups in float32, of values that the stored types hold exactly: those of row r and group g
// lie at r * row_stride + g * group_stride.
struct GroupParameters {
  float* scales = nullptr;
  float* zeros = nullptr;
  int64_t row_stride = 0;
  int64_t group_stride = 0;
};

// How groups lie in a matrix, for encoding.
struct EncodeTask {
  CudaMatrix w;
  int64_t group_size = 0;
  ScalarGrid grid;
  GroupParameters parameters;
  uint32_t* words = nullptr;  // [rows, words_per_row]
  int64_t words_per_row = 0;
};

// Chooses the nearest codes and packs them; squared_error [1] takes the sum of squared errors.
void encode_and_pack(const EncodeTask& task, double* squared_error, cudaStream_t stream);

// Packs codes [n, k], of which that of column c lies at position[c] of its row (null: at c).
void pack_codes(const uint8_t* codes, const int32_t* position, int64_t n, int64_t k, int bits,
                uint32_t* words, int64_t words_per_row, cudaStream_t stream);

// Writes the planes scales and, where the format has them, zeros and codebook of `packed`.
void store_parameters(const GroupedFormat& format, const GroupParameters& parameters, PackedTensor& packed,
                      cudaStream_t stream);

// For rows [first_row, first_row + rows) of w: errors [rows, k] = w - decoded, subtracted in float32;
// partial_squares [kErrorBlocks] takes sums of their squares.
inline constexpr int kErrorBlocks = 1024;
void measure_errors(const CudaMatrix& w, const PackedTensor& packed, int64_t first_row, int64_t rows,
                    double* errors, double* partial_squares, cudaStream_t stream);

}  // namespace quantloom::cuda
