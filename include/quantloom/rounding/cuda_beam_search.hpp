// Rounding "beam_search" on a CUDA device: what beam_search.hpp and fit_additive() do on the CPU, with
// weights, Hessian and planes on the current device.
//
// `packed` holds planes of the format additive there, as empty_packed_cuda() makes them. They are written
// only after every check has passed. `stream` is a cudaStream_t; each function returns after its work is
// done. Results depend on arguments and the kind of device alone, not on what else it does.
//
// Errors are those of the functions on the CPU; besides, Unsupported where cuBLAS is missing, for formats
// whose scales or tables are codes into levels, for refits by Adam, and in a CPU-only build.
#pragma once

#include "quantloom/calibration/cuda_hessian.hpp"
#include "quantloom/cuda_matrix.hpp"
#include "quantloom/rounding/beam_search.hpp"

namespace quantloom {

// As fit_additive(), from the same blocks of w, with the k-means of kmeans_cuda(). Tables of more than 1024
// entries start from blocks drawn at random, others by k-means++.
std::shared_ptr<const Additive> fit_additive_cuda(const Additive& format, const CudaMatrix& w,
                                                  const AdditiveFitOptions& options, void* stream);

// As search_codes(), from and to the codes of `packed`. In float64 the codes of that search. Else candidates
// are scored by tensor cores (with code penalties by float32 sums alone), to about 2^-22 of the largest term,
// and the best of them again in float32; a code changes only if that lowers the loss of its hypothesis, in
// these sums. Products of errors and H are taken of TF32 parts: about 21 bits of each value count.
//
// Memory on the device beyond inputs and planes, for float32: 4 n k for the weights, 12 k^2 for H, and for
// each hypothesis 8 n k (16 n k from two hypotheses on); tables and their norms.
void search_codes_cuda(const CudaMatrix& w, PackedTensor& packed, const CudaHessian& hessian,
                       const CodeSearchOptions& options, std::span<const int64_t> row_groups, void* stream);

// As refit_tables(), from and to the planes of `packed`.
void refit_tables_cuda(const CudaMatrix& w, PackedTensor& packed, const CudaHessian& hessian,
                       const RefitOptions& options, void* stream);

struct CudaBeamSearched {
  RoundingReport report;
  std::vector<double> losses;  // as in BeamSearched
};

// As round_beam_search(). The format of `packed` may have tables to start from. options.held_out must be
// null, `held_out` may be.
CudaBeamSearched round_beam_search_cuda(const CudaMatrix& w, PackedTensor& packed, const CudaHessian& hessian,
                                        const BeamSearchOptions& options, const CudaHessian* held_out,
                                        void* stream);

}  // namespace quantloom
