// Rounding on a CUDA device, for the formats "uniform", "codebook", "bcq", "spqr" (blocks of up to 2048
// rows), "additive" and "trellis" (with its rotation and a window of 16), and nearest rounding for "outliers"
// around the first four: weights, Hessian and planes stay on the current device.
//
// `packed` holds the planes to fill, with the format's names, dtypes and shapes, on the current device;
// empty_packed_cuda() makes one. They are written only after every check has passed. `stream` is a
// cudaStream_t; each function returns after the stream's work is done, because the report needs it.
//
// Errors are those of round_nearest() and round_error_feedback(); besides, Unsupported for any other format,
// for a missing cuBLAS or cuSOLVER, and in a CPU-only build.
#pragma once

#include "quantloom/calibration/cuda_hessian.hpp"
#include "quantloom/cuda_matrix.hpp"
#include "quantloom/rounding/error_feedback.hpp"
#include "quantloom/rounding/rounding.hpp"
#include "quantloom/rounding/trellis_feedback.hpp"

namespace quantloom {

struct CudaNearestOptions {
  std::optional<ScaleSearch> scale_search = std::nullopt;
  const CudaHessian* hessian = nullptr;
  const CudaHessian* held_out = nullptr;
};

// The same codes, scales and zero points as round_nearest(), bit for bit: each value is computed by the same
// sequence of IEEE operations. Exception: a scale search with a norm other than 2 takes the device's pow(),
// so that factors whose errors agree to about 1e-15 may change places; and one by output error sums in
// another order, so that those whose errors agree to about 1e-5 may. Of a trellis, scales and what its
// rings are to code are the CPU's up to roundings; rings are those of encode_rings_cuda(), whose costs are
// float16, and a scale search is not taken. Of additive codes the same holds for tables that are given; those
// that are fitted to w are fit_additive_cuda()'s, and a scale search is not taken (Unsupported).
RoundingReport round_nearest_cuda(const CudaMatrix& w, PackedTensor& packed,
                                  const CudaNearestOptions& options, void* stream);

// As ErrorFeedbackOptions; blocks of more than 128 columns are taken as 128.
struct CudaErrorFeedbackOptions {
  double damping = 0.01;
  std::vector<double> damping_ladder = {0.03, 0.1, 0.3, 1.0};
  bool act_order = true;
  bool static_groups = true;
  int64_t block = 128;
  std::optional<ScaleSearch> scale_search = std::nullopt;
  const CudaHessian* held_out = nullptr;
  const CudaHessian* output_hessian = nullptr;
  bool measure_losses = true;
  // With a search, `packed` comes with the planes of the dense format, which is uniform, a codebook or spqr;
  // it is given the format Outliers, and the outliers' planes in new memory of the device. Thresholds are
  // searched by walks over all rows: those of the CPU, which begins with some rows of larger matrices, spend
  // the same budget to 1% as well, but may be other ones.
  std::optional<OutlierSearch> outliers = std::nullopt;
};

// The walk of round_error_feedback(), with the factor of H in float64 by cuSOLVER and cuBLAS and the updates
// in float32: sums are taken in another order than on the CPU, so that a weight near the middle between two
// codes may take the other one. With static groups scales and zero points are the CPU's bit for bit.
//
// Additive codes take no scale search, and groups of scales only as static ones (Unsupported).
//
// With act_order and groups fitted on the walk (neither static_groups nor one group), `packed` must come with
// the plane group_index; it is removed again if the groups turn out to be of consecutive columns.
//
// Memory on the device beyond inputs and result: 8 k^2 + 4 k^2 bytes for the factor, 5 n k bytes for the
// walk, then, for the losses, 4 n k + 16 * 1024 * k bytes; for binary coding 5 * 2^bits + 44 bytes for each
// row and group, for a search by output error 8 n k (of the columns of a group on the walk), for outliers 6 n
// k.
RoundingReport round_error_feedback_cuda(const CudaMatrix& w, PackedTensor& packed,
                                         const CudaHessian& hessian, const CudaErrorFeedbackOptions& options,
                                         void* stream);

// The walk of round_trellis_feedback(), which round_error_feedback_cuda() takes for a trellis, with the
// choices of its own. Memory on the device beyond inputs and result, in elements of the sizes padded to 128:
// 24 k^2 bytes for the Hessian in the basis and its factor, 16 n k for the walk, and up to half of what is
// free for the search of rings.
RoundingReport round_trellis_feedback_cuda(const CudaMatrix& w, PackedTensor& packed,
                                           const CudaHessian& hessian,
                                           const CudaErrorFeedbackOptions& options,
                                           const TrellisFeedbackOptions& trellis, void* stream);

// Whether round_nearest_cuda() takes a format; also in a CPU-only build.
bool rounds_on_cuda(const Format& format);
// Whether its columns are rounded one by one: "uniform", "codebook", "bcq" and "spqr". So
// round_error_feedback_ cuda() takes it.
bool rounds_columns_on_cuda(const Format& format);

// Whether round_error_feedback_cuda() needs the plane group_index for a matrix of k columns.
bool walk_needs_group_index(const Format& format, int64_t k, bool act_order, bool static_groups);

// Planes for a matrix [n, k] in new memory of the current device, not initialized.
PackedTensor empty_packed_cuda(std::shared_ptr<const Format> format, int64_t n, int64_t k,
                               bool with_group_index = false);

}  // namespace quantloom
