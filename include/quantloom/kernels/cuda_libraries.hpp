// Where the CUDA math libraries (cuBLAS, cuBLASLt, cuSOLVER) are looked for when first needed.
#pragma once

#include <string>
#include <vector>

namespace quantloom {

// Folders to try after a copy that the process has loaded already, the loader's search path and
// /usr/local/cuda/lib64. Replaces an earlier list; libraries that are open stay open. Thread-safe. Without
// effect in a CPU-only build.
void set_cuda_library_folders(std::vector<std::string> folders);

}  // namespace quantloom
