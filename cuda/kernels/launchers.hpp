// What launches the products of a format's decoder.
#pragma once

#include "kernels/fragment_layout.hpp"
#include "kernels/product_arguments.cuh"

namespace quantloom::cuda {

// The products of one decoder.
struct Launchers {
  int table_bytes = 0;  // of shared memory, in the streaming loop
  bool quads = false;   // codes can be taken out as bytes
  void (*stream)(const ProductLaunch&);
  void (*tiles)(const ProductLaunch&, void*);  // null, as the next, without tile loops
  void (*tiles_wgmma)(const ProductLaunch&, void*);
  void (*decoded)(const ProductLaunch&, void*);
  void (*decode)(const FragmentMatrix&, void*, int64_t, DType, bool, cudaStream_t);
};

const Launchers& launchers_of(const FragmentLayout& layout);

// Whether the streaming loop has a decoder for the format.
bool is_streamed(const FragmentLayout& layout);

// Whether the tile loops have one.
bool is_tiled(const FragmentLayout& layout);

// Most tokens for which the streaming loop is run several times.
constexpr int kMostRepeatedTokens = 64;

// Up to so many tokens the streaming loop, run for 16 of them at a time, is faster than decoding first.
int repeated_tokens(const FragmentLayout& layout);

}  // namespace quantloom::cuda
