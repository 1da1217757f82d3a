// Products of integers whose weights come in register order: what their kernels take, and which suits.
#pragma once

#include <string>
#include <vector>

#include "kernels/integer_layout.hpp"
#include "kernels/integer_product.hpp"

namespace quantloom::cuda {

struct RegisterArguments : IntegerArguments {
  // `weights` are records, `row_tiles` those of the kernel's tiles, and with groups RowTerms::sum holds the
  // bits of a float32: the decoded weights' sum.
  //
  // For zero points of 8 bits: sums of the tokens' codes over each run of columns with one scale, float32
  // [blocks, steps, sums_tokens].
  const float* token_sums = nullptr;
  int64_t sums_tokens = 0;  // a multiple of kSumsTokens
};
inline constexpr int kSumsTokens = 256;

// What the weights are.
struct RegisterWeights {
  bool nibbles = true;
  int steps = 0;       // scales of a row in a block of 128 columns; 0: one for the whole row
  bool pairs = false;  // and zero points

  friend bool operator==(const RegisterWeights&, const RegisterWeights&) = default;
};

// The sizes of a tile: tokens, slabs of 64 rows, tiles that share tokens, and warpgroups that share a slab.
struct RegisterShape {
  int tokens = 0;
  int slabs = 1;
  int cluster = 1;
  int team = 1;

  friend bool operator==(const RegisterShape&, const RegisterShape&) = default;
};

struct RegisterKernel {
  RegisterWeights weights;
  RegisterShape shape;
  void (*launch)(const RegisterArguments& arguments, int clusters, cudaStream_t stream) = nullptr;
  int (*resident)(const DeviceFacts& device) = nullptr;  // clusters that run at the same time
};

// The kernel of that tile; empty: the one that is expected to be the fastest. Throws InvalidArgument if there
// is no such tile.
const RegisterKernel& register_kernel(const IntegerLayout& layout, const std::string& tile, int64_t m,
                                      const DeviceFacts& device);
std::string name_of_shape(const RegisterShape& shape);
// All tiles.
std::vector<std::string> register_tiles(const IntegerLayout& layout);

// Bytes for sums of the tokens' codes; 0 if none are needed.
int64_t register_sum_bytes(const IntegerLayout& layout, int64_t m);
// Sums the tokens' codes, if they are needed, and puts them into the arguments. overlap: as of other
// launches.
void add_token_sums(const IntegerLayout& layout, RegisterArguments& arguments, float* sums, bool overlap,
                    cudaStream_t stream);
// Multiplies what `arguments` describes as for weights in integer order; `sums`: memory for those sums.
void multiply_in_registers(const IntegerLayout& layout, const RegisterKernel& kernel,
                           const IntegerArguments& arguments, float* sums, const DeviceFacts& device,
                           cudaStream_t stream);

// The kernels of 4 bits with one scale for a row; of groups by the columns that share a scale: 128, 64, 32.
std::span<const RegisterKernel> register_kernels_of_rows();
std::span<const RegisterKernel> register_kernels_of_nibbles();       // 4 bits
std::span<const RegisterKernel> register_kernels_of_nibble_zeros();  // and zero points
std::span<const RegisterKernel> register_kernels_of_bytes();         // 8 bits
std::span<const RegisterKernel> register_kernels_of_byte_zeros();    // and zero points

}  // namespace quantloom::cuda
