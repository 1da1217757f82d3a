// The table of kernels as data: which kernel serves which format, width, device and number of tokens.
#pragma once

#include <string>
#include <vector>

namespace quantloom {

struct KernelEntry {
  std::string operation;    // "matmul", "dequantize"
  std::string format;       // "uniform"
  std::string bits;         // "4", "1-8"
  std::string groups;       // group sizes: "any"
  std::string device;       // "cpu", "cuda"
  std::string activations;  // "float32", "float16", "int8", ...; "" where none enter
  std::string tokens;       // "1-16", "17-", "any"
  std::string kernel;       // a name
  std::string target;       // instruction set or architecture that this process would use
};

std::vector<KernelEntry> kernel_table();
// The CPU instruction set that run-time dispatch picked: "AVX3_DL", "AVX2", ...
std::string cpu_target();

}  // namespace quantloom
