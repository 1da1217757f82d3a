#include "quantloom/kernels/kernel_table.hpp"

#include "algebra/dense.hpp"
#include "kernels/cuda_kernels.hpp"
#include "kernels/prepared_strips.hpp"
#include "kernels/strip_job.hpp"

namespace quantloom {

std::string cpu_target() {
  return kernels::strip_target();
}

std::vector<KernelEntry> kernel_table() {
  std::vector<KernelEntry> table;
  for (int bits = 1; bits <= 8; ++bits) {
    const int container = kernels::container_bits_for(bits);
    const std::string width = std::to_string(container) + "-bit" +
                              (container == bits ? " strips" : " strips (codes widened at load)");
    for (const char* activations : {"float32", "int8"}) {
      table.push_back({"matmul", "uniform", std::to_string(bits), "any", "cpu", activations, "any",
                       std::string(activations) + " strip loop, " + width, cpu_target()});
    }
    table.push_back({"matmul", "codebook", std::to_string(bits), "any", "cpu", "float32", "any",
                     "float32 strip loop with table, " + width, cpu_target()});
  }
  for (const char* format : {"vector_codebook", "additive"}) {
    table.push_back({"matmul", format, "1-8", "any", "cpu", "float32", "few",
                     "products of inputs and table entries, looked up by codes", cpu_target()});
    const std::string decoded = "rows decoded, then multiplied";
    table.push_back(
        {"matmul", format, "1-8", "any", "cpu", "float32", "many", decoded, algebra::instruction_set()});
    table.push_back(
        {"matmul", format, "9-16", "any", "cpu", "float32", "any", decoded, algebra::instruction_set()});
  }
  table.push_back({"matmul", "bcq", "1-8", "any", "cpu", "float32", "any",
                   "tables of sums of 4 inputs, looked up in registers by nibbles of signs", cpu_target()});
  table.push_back({"matmul", "trellis", "1-8", "any", "cpu", "float32", "any",
                   "rings decoded in vectors, multiplied in their basis", cpu_target()});
  table.push_back({"matmul", "trellis", "1-8", "any", "cpu", "int8", "any",
                   "dot products with hashes, for the codebooks mul1 and 1mad", cpu_target()});
  for (const char* activations : {"float32", "int8"}) {
    table.push_back({"matmul", "spqr", "1-8", "any", "cpu", activations, "any",
                     std::string(activations) + " strip loop, scales and zero points decoded at load",
                     cpu_target()});
  }
  for (const char* activations : {"float32", "int8"}) {
    table.push_back({"matmul", "sdr", "2-7", "any", "cpu", activations, "any",
                     std::string(activations) + " strip loop, codes or scales shifted at load",
                     cpu_target()});
  }
  // Of any dense format: with int8 activations where the dense format takes them.
  table.push_back({"matmul", "outliers", "1-16", "any", "cpu", "float32", "any",
                   "that of the dense format, outliers added", "portable"});
  for (const char* format : {"uniform", "codebook"}) {
    table.push_back({"dequantize", format, "1-8", "any", "cpu", "", "any", "row decoder", "portable"});
  }
  for (const char* format : {"vector_codebook", "additive"}) {
    table.push_back({"dequantize", format, "1-16", "any", "cpu", "", "any", "row decoder", "portable"});
  }
  table.push_back({"dequantize", "spqr", "1-8", "any", "cpu", "", "any", "row decoder", "portable"});
  table.push_back({"dequantize", "sdr", "2-7", "any", "cpu", "", "any", "row decoder", "portable"});
  table.push_back({"dequantize", "bcq", "1-8", "any", "cpu", "", "any", "row decoder", "portable"});
  table.push_back({"dequantize", "trellis", "1-8", "any", "cpu", "", "any", "row decoder", "portable"});
  for (KernelEntry& entry : cuda_kernel_table()) table.push_back(std::move(entry));
  return table;
}

}  // namespace quantloom
