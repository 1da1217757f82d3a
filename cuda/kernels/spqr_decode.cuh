// From fragment order to rows of values, for the format "spqr": to the bit what the CPU decodes.
//
// A warp decodes blocks of 64 x 64. Any number of rows may share a grid.
#pragma once

#include "formats/bilevel.cuh"
#include "formats/half_fragments.cuh"
#include "kernels/decode_loop.cuh"

namespace quantloom::cuda {

// Row blocks [first, first + count).
template <int kBits, bool kWide, class Out>
__global__ void __launch_bounds__(kDecodeThreads)
    decode_spqr_blocks(const __grid_constant__ FragmentMatrix w, int first, int count, Out* out,
                       int64_t stride) {
  using Decoder = HalfFragments<kBits>;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  let_next_begin();
  // Kernels before may still read what is written here.
  wait_for_previous();

  const int64_t blocks = static_cast<int64_t>(count) * w.column_blocks;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kDecodeThreads / 32);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * (kDecodeThreads / 32) + warp; i < blocks; i += warps) {
    const auto row_block = static_cast<int>(i / w.column_blocks);
    const auto block = static_cast<int>(i % w.column_blocks);
    const uint4* const codes =
        w.codes + (static_cast<int64_t>(first + row_block) * w.column_blocks + block) * (kBits * 32) + lane;
    uint4 pieces[kBits];
#pragma unroll
    for (int c = 0; c < kBits; ++c) pieces[c] = __ldcs(codes + c * 32);
    const int64_t row = static_cast<int64_t>(first + row_block) * fragments::kBlockRows + lane / 4;
    const int64_t rows = w.n - row;
    const uint2* grids[8];
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      const auto at = static_cast<uint32_t>(min(row + 8 * r, w.n - 1));
      grids[r] = static_cast<const uint2*>(w.table) +
                 static_cast<int64_t>(at / static_cast<uint32_t>(w.grid_rows)) * w.group_count;
    }
    Out* const place = out + (static_cast<int64_t>(row_block) * fragments::kBlockRows + lane / 4) * stride +
                       static_cast<int64_t>(block) * fragments::kBlockColumns;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float scales[2][8];
      float zeros[2][8];
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        // Columns past the last group are padding.
        const int group = min((4 * block + 2 * half + step) / w.group_steps, w.group_count - 1);
        BilevelCodes<kWide> parameters;
        parameters.load(w.scales,
                        (static_cast<int64_t>(first + row_block) * w.group_count + group) * 8 + lane / 4);
#pragma unroll
        for (int r = 0; r < 8; ++r) {
          const BilevelGrids grid(__ldg(grids[r] + group));
          scales[step][r] = __fmul_rn(grid.scale_step, __fsub_rn(parameters.code(false, r), grid.scale_zero));
          zeros[step][r] = __fmul_rn(grid.zero_step, __fsub_rn(parameters.code(true, r), grid.zero_zero));
        }
      }
#pragma unroll
      for (int unit = 0; unit < fragments::kUnits; ++unit) {
        uint32_t words[kBits];
        words_of_unit<kBits>(pieces, unit, words);
        uint32_t a[2][4];
        if (half == 0) {
          Decoder::template codes<0>(words, a[0]);
          Decoder::template codes<1>(words, a[1]);
        } else {
          Decoder::template codes<2>(words, a[0]);
          Decoder::template codes<3>(words, a[1]);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float values[2][4];
#pragma unroll
          for (int step = 0; step < 2; ++step) {
            const auto value = [&](float code) {
              return __fmul_rn(scales[step][2 * unit + r], __fsub_rn(code, zeros[step][2 * unit + r]));
            };
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const float2 pair = floats_of(a[step][r + 2 * j]);
              values[step][2 * j] = value(pair.x);
              values[step][2 * j + 1] = value(pair.y);
            }
          }
          const int down = 16 * unit + 8 * r;
          store_steps(values, place + down * stride + 32 * half, lane, down < rows);
        }
      }
    }
  }
}

template <int kBits, bool kWide, class Out>
void launch_spqr_blocks(const FragmentMatrix& w, int64_t first_row, int64_t rows, void* out, int64_t stride,
                        bool overlap, cudaStream_t stream) {
  const int64_t row_blocks = (rows + fragments::kBlockRows - 1) / fragments::kBlockRows;
  const int64_t blocks = row_blocks * w.column_blocks;
  if (blocks == 0) return;
  constexpr int64_t kWarps = kDecodeThreads / 32;
  const int64_t most = int64_t{64} * current_device().processors;
  LaunchSettings settings(dim3(static_cast<unsigned>(std::min((blocks + kWarps - 1) / kWarps, most))),
                          dim3(kDecodeThreads), stream, overlap, 1);
  check_cuda(cudaLaunchKernelEx(&settings.config, decode_spqr_blocks<kBits, kWide, Out>, w,
                                static_cast<int>(first_row / fragments::kBlockRows),
                                static_cast<int>(row_blocks), static_cast<Out*>(out), stride),
             "matmul_cuda: launch of decode_spqr_blocks");
}

template <int kBits>
void launch_spqr_decode(const FragmentMatrix& w, bool wide, int64_t first_row, int64_t rows, void* out,
                        DType dtype, int64_t stride, bool overlap, cudaStream_t stream) {
  const auto launch = [&]<class Out>(Out) {
    wide ? launch_spqr_blocks<kBits, true, Out>(w, first_row, rows, out, stride, overlap, stream)
         : launch_spqr_blocks<kBits, false, Out>(w, first_row, rows, out, stride, overlap, stream);
  };
  if (dtype == DType::f16) {
    launch(__half{});
  } else if (dtype == DType::bf16) {
    launch(__nv_bfloat16{});
  } else {
    launch(float{});
  }
}

}  // namespace quantloom::cuda
