// The search of a run of consecutive blocks: everything between two products of errors and H.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace quantloom::cuda {

inline constexpr int kMostBeam = 8;
inline constexpr int64_t kEntryTile = 64;  // entries that tables are padded to a multiple of

// Groups of rows are those that are searched, one after the other; hypotheses are [hypothesis][group of
// rows]. Blocks are by position in the order of the search, but where something else is said.
template <class Real>
struct WalkTask {
  int beam;
  int live;  // hypotheses there are when the run begins: 1 or beam
  int64_t count;
  int out_group;
  int in_group;
  int codebooks;
  int64_t entries;
  int64_t padded;
  int64_t blocks;  // of a group of rows
  int64_t columns;
  int64_t first_block;
  int run_blocks;

  const int32_t* rows;         // [count]: which groups of rows; null for all
  const int32_t* block_order;  // [blocks]: the block, as the matrix has it
  const int32_t* table_order;  // [blocks][codebooks]
  const Real* h;               // [columns, columns]
  const Real* tables;          // [codebooks][entries][dim]
  const Real* elements;        // [codebooks][dim][padded]
  const uint32_t* halves;      // [codebooks][padded][words]: entries as float16, for the search by tiles
  const Real* norms;      // [run_blocks][codebooks][padded], times the block's unit; infinite for padding
  const Real* units;      // [run_blocks]
  const Real* penalties;  // [codebooks][padded], or null
  const Real* scales;     // [N][scale_count], N as the matrix has it
  int64_t scale_count;
  int64_t scale_columns;
  const float* weights;  // [N * out_group, columns], blocks as the matrix has them

  const uint16_t* start;  // [count][blocks][codebooks]
  const Real* products;   // [live][count][out_group], rows `product_stride` apart: errors H, in the columns
                          // of the run
  int64_t product_stride;
  // What the run makes of its own columns and blocks:
  Real* error_changes;  // [count][out_group][run], of one hypothesis; null for none
  Real* errors;         // [beam][count][out_group][columns]; of float32 the TF32 part
  Real* errors_low;     // of float32: the rest
  uint16_t* codes;      // [beam][count][blocks][codebooks]
  double* losses;       // [beam][count]: beyond that of the start
  int32_t* origins;     // [beam][count]: which of those that began the run each comes from
};

// norms and units of a run. `reach`: the largest magnitude in the tables; 0 for units of 1.
template <class Real>
void weigh_entries(const WalkTask<Real>& task, Real* norms, Real* units, float reach, cudaStream_t stream);

// How candidates are scored: by the definition; each thread its entries of small tables, in float32; or by
// tensor cores, without penalties. With the latter two a code changes only if that lowers the loss.
enum class Scoring { plain, threads, tiles };

template <class Real>
Scoring scoring_of(const WalkTask<Real>& task);

// Walks along a run.
template <class Real>
void walk_run(const WalkTask<Real>& task, Scoring scoring, cudaStream_t stream);

// The widest run whose state fits into the shared memory of the current device.
template <class Real>
int widest_run(const WalkTask<Real>& task);

}  // namespace quantloom::cuda
