// The whole flow of the library on one page.
//
//   W [out, in] ──► rounding(format, H) ──► PackedTensor ──► save_packed ──► file
//                        ▲                       │
//   X ──► Hessian::add ──┘                       ├──► dequantize ──► W', bits_per_weight()
//                                                └──► prepare ──► matmul(x) on the CPU
//
//   auto format = std::make_shared<Uniform>(4, 128);         // formats/: what is stored
//   Hessian hessian(k);                                      // calibration/: what matters
//   hessian.add(x);
//   Rounded r = round_error_feedback(w, format, hessian);    // rounding/: how codes are chosen
//   save_packed("w.safetensors", {.packed = {{"layer", r.tensor}}, .plain = {}, .metadata = {}});
//   matmul(x, *prepare(r.tensor), y);                        // kernels/: products from packed codes
//
// Weights are [out_features, in_features] = [n, k], row-major; groups run along in_features. Every function
// throws an error of error.hpp before it changes anything; none prints, exits or touches global state.
// `threads` = 0 means OpenMP's default; results never depend on it.
#pragma once

#include "quantloom/activations/activation_format.hpp"
#include "quantloom/activations/cuda_activations.hpp"
#include "quantloom/activations/producers.hpp"
#include "quantloom/activations/quantized_activations.hpp"
#include "quantloom/calibration/cuda_hessian.hpp"
#include "quantloom/calibration/hessian.hpp"
#include "quantloom/error.hpp"
#include "quantloom/fit/cuda_kmeans.hpp"
#include "quantloom/fit/kmeans.hpp"
#include "quantloom/fit/lloyd_max.hpp"
#include "quantloom/fit/scale_search.hpp"
#include "quantloom/formats/additive.hpp"
#include "quantloom/formats/bcq.hpp"
#include "quantloom/formats/codebook.hpp"
#include "quantloom/formats/coded_matrix.hpp"
#include "quantloom/formats/entropy.hpp"
#include "quantloom/formats/entropy_cuda.hpp"
#include "quantloom/formats/format.hpp"
#include "quantloom/formats/outliers.hpp"
#include "quantloom/formats/sdr.hpp"
#include "quantloom/formats/spqr.hpp"
#include "quantloom/formats/trellis.hpp"
#include "quantloom/formats/trellis_cuda.hpp"
#include "quantloom/formats/uniform.hpp"
#include "quantloom/formats/vector_codebook.hpp"
#include "quantloom/io/aqlm.hpp"
#include "quantloom/io/awq.hpp"
#include "quantloom/io/compressed_tensors.hpp"
#include "quantloom/io/exl3.hpp"
#include "quantloom/io/gptq.hpp"
#include "quantloom/io/packed_file.hpp"
#include "quantloom/io/safetensors.hpp"
#include "quantloom/kernels/coded_product.hpp"
#include "quantloom/kernels/dequantize.hpp"
#include "quantloom/kernels/integer_cuda.hpp"
#include "quantloom/kernels/kernel_table.hpp"
#include "quantloom/kernels/matmul.hpp"
#include "quantloom/kv_cache/kv_attention.hpp"
#include "quantloom/kv_cache/kv_cache.hpp"
#include "quantloom/kv_cache/kv_tables.hpp"
#include "quantloom/packed_tensor.hpp"
#include "quantloom/rounding/beam_search.hpp"
#include "quantloom/rounding/channel_scales.hpp"
#include "quantloom/rounding/cuda.hpp"
#include "quantloom/rounding/cuda_beam_search.hpp"
#include "quantloom/rounding/error_feedback.hpp"
#include "quantloom/rounding/nearest.hpp"
#include "quantloom/rounding/trellis_feedback.hpp"
#include "quantloom/transforms/hadamard.hpp"
#include "quantloom/transforms/hadamard_cuda.hpp"
