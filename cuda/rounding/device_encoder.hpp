// Formats that are rounded column by column on the device, as the roundings see them: what ColumnEncoder is
// on the CPU. Each function enqueues work on the stream of the encoder.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "rounding/rounders.cuh"
#include "rounding/steps.hpp"

namespace quantloom::cuda {

class DeviceEncoder {
 public:
  DeviceEncoder(std::shared_ptr<const Format> format, int64_t n, int64_t k, int64_t groups,
                int64_t group_size, cudaStream_t stream);
  virtual ~DeviceEncoder() = default;
  DeviceEncoder(const DeviceEncoder&) = delete;
  DeviceEncoder& operator=(const DeviceEncoder&) = delete;

  int64_t groups() const { return groups_; }
  int64_t group_size() const { return group_size_; }  // columns
  // Whether one group holds all columns of all rows.
  virtual bool per_tensor() const { return false; }
  // Consecutive rows that are fitted together.
  virtual int64_t rows_per_fit() const { return 1; }
  // Whether fits without a search weigh columns.
  virtual bool weighs_columns() const { return false; }

  // Fits the groups of `task`, whose grid, parameters, failure and group count need not be set.
  virtual void fit(const FitTask& task, const SearchFactors& search) = 0;
  // Fits them with ranges times factors [rows, groups of the task], without a search.
  virtual void fit_scaled(const FitTask& task, const float* factors) = 0;
  // The same, and refines parameters by the weights of columns where groups leave each other a choice.
  virtual void fit_scaled_and_refine(const FitTask& task, const float* factors) { fit_scaled(task, factors); }
  // Waits for the stream. Throws the CPU's NumericError if a grid of `task` is not finite.
  void require_fitted(const FitTask& task, const SearchFactors& search) const;

  const Rounder& rounder() const { return rounder_; }

  // Writes the planes of codes, from codes [n, k] of which that of column c lies at position[c] of its row
  // (null: at c), and those of parameters.
  virtual void store_codes(const uint8_t* codes, const int32_t* position, PackedTensor& packed) = 0;
  virtual void store_parameters(PackedTensor& packed) = 0;

 protected:
  std::shared_ptr<const Format> format_;
  int64_t n_;
  int64_t k_;
  int64_t groups_;
  int64_t group_size_;
  cudaStream_t stream_;
  Rounder rounder_;
  DeviceBuffer<uint64_t> failure_;
};

// Of a format whose columns are rounded on the device. walk: parameters lie as walks read them, those of
// neighbouring rows next to each other.
std::unique_ptr<DeviceEncoder> make_device_encoder(const std::shared_ptr<const Format>& format, int64_t n,
                                                   int64_t k, bool walk, cudaStream_t stream);
std::unique_ptr<DeviceEncoder> make_bcq_device_encoder(const std::shared_ptr<const Format>& format, int64_t n,
                                                       int64_t k, cudaStream_t stream);
std::unique_ptr<DeviceEncoder> make_spqr_device_encoder(const std::shared_ptr<const Format>& format,
                                                        int64_t n, int64_t k, cudaStream_t stream);

// Chooses the nearest codes [n, k] of groups of consecutive columns.
void encode_codes(const CudaMatrix& w, const Rounder& rounder, int64_t group_size, uint8_t* codes,
                  cudaStream_t stream);

// A matrix as codes; null for what is as it stands.
struct CodeMatrix {
  const Rounder* rounder = nullptr;
  const uint8_t* codes = nullptr;     // [n, k]
  const int32_t* position = nullptr;  // [k]: where the code of a column lies in its row; null: at the column
  const int32_t* group_of = nullptr;  // [k]; null: groups of consecutive columns
  int64_t group_size = 0;
  const uint16_t* missing = nullptr;    // [n, k], by position: outliers as walk_block() leaves them
  const float* input_scales = nullptr;  // [k]: what errors in a column are multiplied by
};

// As measure_errors(), for rows [first_row, first_row + rows).
void measure_code_errors(const CudaMatrix& w, const CodeMatrix& matrix, int64_t first_row, int64_t rows,
                         double* errors, double* partial_squares, cudaStream_t stream);

}  // namespace quantloom::cuda
