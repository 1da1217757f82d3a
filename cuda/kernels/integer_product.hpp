// What the kernels of integer products take, and which of them suits.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>

#include "activations/integer_order.hpp"
#include "common/device.hpp"

namespace quantloom::cuda {

// What a product needs of each output beside its codes: value = scale * (code - zero).
struct RowTerms {
  float scale;
  int32_t sum;  // of the codes
  int32_t zero;
  int32_t unused;
};

struct IntegerArguments {
  const unsigned char* weights = nullptr;  // codes in integer order
  const RowTerms* rows = nullptr;          // [128 * row_tiles]
  const unsigned char* tokens = nullptr;   // codes in integer order
  const integers::TokenTerms* terms = nullptr;
  const unsigned char* outlier_weights = nullptr;  // float16 in integer order, or null
  const unsigned char* outlier_tokens = nullptr;
  const void* bias = nullptr;  // [n] of y's dtype, or null
  void* y = nullptr;
  int64_t y_stride = 0;
  int64_t m = 0;
  int64_t m_padded = 0;  // tokens whose codes are there
  int64_t n = 0;
  int blocks = 0;  // of 128 columns, > 0
  int outlier_blocks = 0;
  int row_tiles = 0;   // of 128 outputs
  int row_groups = 0;  // tiles of a cluster
  int token_tiles = 0;
  int tiles = 0;        // with each half of one that is cut
  int whole_tiles = 0;  // those before the ones that are cut into halves
  int band = 1;         // token tiles that are multiplied at about the same time
  bool has_zeros = false;
  bool bfloat16 = false;
  bool y_in_pieces = false;  // y may be written 16 bytes at a time
};

// The sizes of a tile, see integer_product.cuh.
struct IntegerShape {
  int tokens = 0;
  int rows = 1;
  int parts = 1;
  int tiles = 1;

  int cluster() const { return rows * parts * tiles; }
  int cluster_tokens() const { return tokens * tiles; }
  // Each part has a block of columns.
  bool takes(int64_t k) const { return parts == 1 || k > 128 * (parts - 1); }
  friend bool operator==(const IntegerShape&, const IntegerShape&) = default;
};

// Of so many tiles, those that are cut into halves: the last ones, where halves of them keep more of
// `resident` clusters busy for half the time.
int64_t halved_tiles(const IntegerShape& shape, int64_t tiles, int64_t resident);

struct IntegerKernel {
  IntegerShape shape;
  bool outliers = false;
  void (*launch)(const IntegerArguments& arguments, int clusters, bool overlap,
                 cudaStream_t stream) = nullptr;
  int (*resident)(const DeviceFacts& device) = nullptr;  // clusters that run at the same time
};

// Clusters of the kernel that run at the same time.
int resident_clusters(const IntegerKernel& kernel, const DeviceFacts& device);

// All that are built.
std::span<const IntegerKernel> integer_kernels();

// The shape that is expected to be the fastest.
IntegerShape choose_integer_shape(int64_t m, int64_t n, int64_t k, const DeviceFacts& device);

}  // namespace quantloom::cuda
