// What this build knows of CUDA; the values come from cmake/cuda.cmake.
#include <utility>

#include "kernels/additive_product.hpp"
#include "kernels/bit_plane_product.hpp"
#include "kernels/cuda_kernels.hpp"
#include "kernels/cuda_products.hpp"
#include "kernels/lookups.hpp"
#include "kernels/spqr_product.hpp"
#include "kernels/trellis_product.hpp"
#include "quantloom/error.hpp"
#include "quantloom/kernels/dequantize.hpp"

namespace quantloom {

bool built_with_cuda() {
  return true;
}

std::string cuda_toolkit_version() {
  return QUANTLOOM_CUDA_TOOLKIT;
}

std::string cuda_architectures() {
  return QUANTLOOM_CUDA_ARCHITECTURES;
}

namespace {

std::string token_range(const CudaProduct& product) {
  if (product.max_tokens > 0) return text_of(product.min_tokens, "-", product.max_tokens);
  return product.min_tokens > 1 ? text_of(product.min_tokens, "-") : "any";
}

KernelEntry product_entry(const char* format, const std::string& bits, const CudaProduct& product,
                          DType dtype) {
  return {.operation = "matmul",
          .format = format,
          .bits = bits,
          .groups = "any",
          .device = "cuda",
          .activations = std::string(name_of(dtype)),
          .tokens = token_range(product),
          .kernel = std::string(product.name),
          .target = text_of("sm_", product.min_architecture, " and later, built for ", cuda_architectures())};
}

}  // namespace

std::vector<KernelEntry> cuda_kernel_table() {
  std::vector<KernelEntry> table;
  const auto add = [&](const char* format, const std::string& bits, bool plain) {
    for (const CudaProduct& product : cuda_products()) {
      const bool looked_up = product.name == cuda::kLookups;
      const bool tiled = !plain && !product.all_formats;
      if (plain && !product.plain) continue;
      if ((looked_up || tiled) && format == std::string_view("outliers")) continue;
      for (const DType dtype : {DType::f16, DType::bf16, DType::f32}) {
        if (dtype == DType::f32 && !product.float32) continue;
        table.push_back(product_entry(format, looked_up || tiled ? "8" : bits, product, dtype));
        if (looked_up) table.back().groups = "channel or tensor";
      }
    }
  };
  for (const char* format : {"uniform", "codebook"}) {
    for (int bits = 1; bits <= 8; ++bits) add(format, std::to_string(bits), true);
  }
  // Tables of vectors of 2, 4 or 8 weights. One of them: codes of up to 12 bits for 2 weights, 16 for others;
  // several: together codes of up to 4 bits for a weight.
  add("vector_codebook", "1-16", false);
  // Blocks of 2, 4 or 8 columns of a row, with codes as short; then those of other blocks and longer codes.
  add("additive", "1-16", false);
  for (const CudaProduct& product : cuda::additive_products()) {
    if (product.name == "decode") continue;  // listed
    for (const DType dtype : {DType::f16, DType::bf16}) {
      table.push_back(product_entry("additive", "13-16", product, dtype));
      table.back().groups = "channel";
    }
  }
  // With any dense format of those; beside spqr, the kernels of spqr.
  add("outliers", "1-16", false);
  // Streaming loops: blocks of multiples of 16 rows.
  for (const CudaProduct& product : cuda::spqr_products()) {
    for (const DType dtype : {DType::f16, DType::bf16, DType::f32}) {
      if (dtype == DType::f32 && !product.float32) continue;
      table.push_back(product_entry("spqr", "1-8", product, dtype));
    }
  }
  // All but `trellis_dense` and `decode`: whole bits, codebooks 3inst, mcg, mul1, octagon (and 1mad), windows
  // of 16.
  for (const CudaProduct& product : cuda::trellis_products()) {
    for (const DType dtype : {DType::f16, DType::bf16, DType::f32}) {
      if (dtype == DType::f32 && !product.float32) continue;
      table.push_back(product_entry("trellis", std::string(product.trellis_bits), product, dtype));
    }
  }
  for (const CudaProduct& product : cuda::bit_plane_products()) {
    for (const DType dtype : {DType::f16, DType::bf16, DType::f32}) {
      if (dtype == DType::f32 && !product.float32) continue;
      table.push_back(product_entry("bcq", "1-8", product, dtype));
    }
  }
  // Activations and weights with one scale for each token and each output, see integer_cuda.hpp.
  for (const char* format : {"uniform", "sdr"}) {
    table.push_back({.operation = "matmul",
                     .format = format,
                     .bits = format == std::string_view("sdr") ? "2-7" : "2-8",
                     .groups = "channel or tensor",
                     .device = "cuda",
                     .activations = "integers",
                     .tokens = "any",
                     .kernel = "integer_tiles",
                     .target = "sm_90a, built for " + cuda_architectures()});
  }
  // Of canonical planes for uniform grids; of prepared planes for the others.
  for (const auto& [format, kernel] :
       {std::pair("uniform", "dequantize_uniform"), std::pair("codebook", "decode_fragments"),
        std::pair("vector_codebook", "decode_fragments"), std::pair("additive", "decode_fragments"),
        std::pair("outliers", "decode_fragments"), std::pair("spqr", "decode_fragments"),
        std::pair("trellis", "decode_fragments"), std::pair("bcq", "decode_fragments")}) {
    table.push_back({.operation = "dequantize",
                     .format = format,
                     .bits = format == std::string_view("vector_codebook") ||
                                     format == std::string_view("additive") ||
                                     format == std::string_view("outliers")
                                 ? "1-16"
                                 : "1-8",
                     .groups = "any",
                     .device = "cuda",
                     .activations = "",
                     .tokens = "any",
                     .kernel = kernel,
                     .target = "built for " + cuda_architectures()});
  }
  return table;
}

}  // namespace quantloom
