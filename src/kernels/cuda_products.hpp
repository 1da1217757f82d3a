// The kernels behind matmul_cuda() as data: what the table lists, and what the dispatcher chooses from.
#pragma once

#include <span>
#include <string_view>

#include "quantloom/dtype.hpp"

namespace quantloom {

struct CudaProduct {
  std::string_view name;  // as in CudaMatmulOptions::kernel
  std::string_view description;
  int64_t min_tokens = 1;  // what it can run
  int64_t max_tokens = 0;  // 0: any number
  int min_architecture = 80;
  bool needs_clusters = false;
  bool float32 = false;  // takes float32 activations besides float16 and bfloat16
  bool workspace = false;
  bool needs_wgmma = false;               // compute capability 9.0 only
  bool all_formats = false;               // takes all vectors, and outliers, besides scalar codes
  bool plain = true;                      // takes scalar codes without outliers
  std::string_view trellis_bits = "1-8";  // of trellises that it takes
};

// In the order of preference where more than one could run.
std::span<const CudaProduct> cuda_products();

}  // namespace quantloom
