// Scales of a matrix that was rounded to a trellis, fitted again to what its codes decode to.
#pragma once

#include "quantloom/calibration/hessian.hpp"
#include "quantloom/packed_tensor.hpp"

namespace quantloom {

// Multiplies output scales by w H d^T / (d H d^T), with d the decoded row.
void refit_output_scales(const FloatMatrix& w, const Hessian& hessian, PackedTensor& packed, int threads);
// Multiplies input scales by 1 + x, with x the minimum of the error's quadratic form: for the decoded matrix
// D, (D^T D o H) x = diag(D^T (W - D) H). Left as they are if what is stored of x would not lower the error.
void refit_input_scales(const FloatMatrix& w, const Hessian& hessian, PackedTensor& packed, int threads);

// Under tr(H_out E H E^T), all scales of a side together: (D H D^T o H_out) x = diag(H_out (W - D) H D^T)
// and (D^T H_out D o H) x = diag(D^T H_out (W - D) H). Memory: 20 n k and 12 bytes for the squared side.
void refit_output_scales(const FloatMatrix& w, const Hessian& hessian, const Hessian& output_hessian,
                         PackedTensor& packed, int threads);
void refit_input_scales(const FloatMatrix& w, const Hessian& hessian, const Hessian& output_hessian,
                        PackedTensor& packed, int threads);

}  // namespace quantloom
