// The steps that the roundings on the device are made of. Each enqueues work on a stream and returns.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "common/device_buffer.hpp"
#include "formats/uniform_rounding.cuh"
#include "quantloom/cuda_matrix.hpp"
#include "quantloom/formats/uniform.hpp"
#include "quantloom/rounding/rounding.hpp"

namespace quantloom::cuda {

// No element found: the key of finds that take the least one.
inline constexpr uint64_t kNoneFound = ~uint64_t{0};

inline UniformGrid grid_of(const Uniform& format) {
  return {format.bits, format.symmetric, format.scale_dtype};
}

// Parameters of groups in float32, of values that the stored types hold exactly: those of row r and group g
// lie at r * row_stride + g * group_stride.
struct GroupParameters {
  float* scales = nullptr;
  float* zeros = nullptr;
  int64_t row_stride = 0;
  int64_t group_stride = 0;
};

// The factors of a scale search, on the device; none for no search.
class SearchFactors {
 public:
  SearchFactors(const std::optional<ScaleSearch>& search, cudaStream_t stream);
  const float* data() const { return factors_.data(); }
  int steps() const { return static_cast<int>(host_.size()); }
  double norm() const { return norm_; }
  const std::vector<float>& host() const { return host_; }

 private:
  std::vector<float> host_;
  double norm_ = 2;
  DeviceBuffer<float> factors_;
};

// What to fit: groups of `group_size` consecutive columns of `w`, beginning at first_column; the last one
// ends at end_column.
struct FitTask {
  CudaMatrix w;
  int64_t first_column = 0;
  int64_t end_column = 0;
  int64_t group_size = 0;
  int64_t first_group = 0;  // the number of the first one among all group_count of a row
  int64_t group_count = 0;
  const uint8_t* dead = nullptr;   // by column of w: not 0 where the weights count as 0; null for none
  const float* weights = nullptr;  // by column of w: how much errors count in the search; null for 1
  UniformGrid grid;
  GroupParameters parameters;
  uint64_t* failure = nullptr;  // takes the least row * group_count + group whose grid is not finite
};

// Fits each group of each row on its own.
void fit_groups(const FitTask& task, const SearchFactors& search, cudaStream_t stream);
// Fits all columns of all rows as one group; parameters at index 0.
void fit_whole(const FitTask& task, const SearchFactors& search, cudaStream_t stream);

// Takes the least key, (r * cols + c) * 4 + kind, of values that are not finite; kind: 0 Inf, 1 -Inf, 2 NaN.
// Keys begin at first_row.
void find_non_finite(const CudaMatrix& matrix, int64_t first_row, uint64_t* key, cudaStream_t stream);
// Waits for the stream. Throws NumericError naming `argument`, row and column if a key was found.
void require_none_found(const uint64_t* key, int64_t cols, const std::string& argument,
                        const std::string& rows, cudaStream_t stream);
// Both: throws NumericError unless all values are finite.
void require_finite_cuda(const CudaMatrix& matrix, const std::string& argument, cudaStream_t stream);

// How groups lie in a matrix, for encoding.
struct EncodeTask {
  CudaMatrix w;
  int64_t group_size = 0;
  UniformGrid grid;
  GroupParameters parameters;
  uint32_t* words = nullptr;  // [rows, words_per_row]
  int64_t words_per_row = 0;
};

// Chooses the nearest codes and packs them; squared_error [1] takes the sum of squared errors.
void encode_and_pack(const EncodeTask& task, double* squared_error, cudaStream_t stream);

// Packs codes [n, k], of which that of column c lies at position[c] of its row (null: at c).
void pack_codes(const uint8_t* codes, const int32_t* position, int64_t n, int64_t k, int bits,
                uint32_t* words, int64_t words_per_row, cudaStream_t stream);

// Writes the planes scales and, if asymmetric, zeros of `packed`.
void store_parameters(const Uniform& format, const GroupParameters& parameters, PackedTensor& packed,
                      cudaStream_t stream);

// out [1] = the sum of values [count], always in the same order.
void sum_values(const double* values, int64_t count, double* out, cudaStream_t stream);

}  // namespace quantloom::cuda
