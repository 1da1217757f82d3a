// A matrix and a Hessian on the device as the search and the refit of additive codes see them: what
// AdditiveProblem is on the CPU.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/device_buffer.hpp"
#include "quantloom/calibration/cuda_hessian.hpp"
#include "quantloom/cuda_matrix.hpp"
#include "quantloom/formats/additive.hpp"

namespace quantloom::cuda {

// What a matrix is stored as, unpacked.
struct AdditiveArrays {
  DeviceBuffer<float> tables;    // [codebooks, entries, dim], float16 values
  DeviceBuffer<float> scales;    // [N, S], values of the scale dtype
  DeviceBuffer<uint16_t> codes;  // [N, V, codebooks]
};

class AdditiveProblem {
 public:
  // Of arguments that are checked. `hessian` must outlive it.
  AdditiveProblem(const CudaMatrix& w, const Additive& format, const CudaHessian& hessian, double damping,
                  cudaStream_t stream);

  const Additive& format;
  CudaMatrix w;
  int64_t n;
  int64_t k;
  int64_t row_groups;
  int64_t blocks;   // of a group of rows
  int64_t columns;  // blocks * in_group >= k
  int64_t scale_count;
  int64_t scale_columns;
  cudaStream_t stream;

  // W / weight_unit, [n, columns], zeros beyond k.
  const float* weights() const { return weights_.data(); }
  // h [columns, columns] = H / hessian_unit, damped, with blocks of columns in the order given (null: their
  // own), zeros beyond k.
  template <class Real>
  void hessian(const int32_t* order, Real* h) const;
  double weight_unit() const { return weight_unit_; }
  double loss_unit() const { return weight_unit_ * weight_unit_ * hessian_unit_; }
  // What is added to the diagonal of H, in its own units.
  double shift() const { return shift_ * hessian_unit_; }

 private:
  const CudaHessian& hessian_;
  double weight_unit_ = 1;   // a power of two
  double hessian_unit_ = 1;  // the mean of diag(H)
  double shift_ = 0;
  DeviceBuffer<float> weights_;
};

// Of planes that are valid, on the current device. Both enqueue work.
AdditiveArrays unpack_additive(const Additive& format, const PackedTensor& packed, cudaStream_t stream);
void pack_additive(const Additive& format, const AdditiveArrays& arrays, PackedTensor& packed,
                   cudaStream_t stream);

// to [count] = factor * from, in another type.
template <class From, class To>
void convert(const From* from, To* to, int64_t count, double factor, cudaStream_t stream);

// errors [rows, k] = w - decoded of `arrays`, for rows [first_row, first_row + rows); partial [kErrorBlocks]:
// sums of their squares.
void additive_errors(const CudaMatrix& w, const Additive& format, const AdditiveArrays& arrays,
                     int64_t first_row, int64_t rows, double* errors, double* partial, cudaStream_t stream);

}  // namespace quantloom::cuda
