// Places are sorted by entry and cut into pieces of one entry each: a warp sums up a piece, a thread the
// pieces of an entry, both in order.
#include <algorithm>
#include <bit>
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>
#include <limits>

#include "additive/entry_sums.hpp"
#include "additive/every_element.cuh"

namespace quantloom::cuda {
namespace {

constexpr int kPiece = 256;  // places

__global__ void __launch_bounds__(kThreads) key_kernel(const uint16_t* codes, int64_t places, int books,
                                                       int64_t entries, int32_t* keys, int32_t* numbers) {
  for (int64_t at = first_thread(); at < places; at += thread_count()) {
    keys[at] = static_cast<int32_t>(at % books * entries + codes[at]);
    numbers[at] = static_cast<int32_t>(at);
  }
}

// begins[e] = the first place whose key is e or more; counts[e]: pieces of e.
__global__ void __launch_bounds__(kThreads)
    begin_kernel(const int32_t* keys, int64_t places, int64_t entries, int32_t* begins) {
  for (int64_t entry = first_thread(); entry <= entries; entry += thread_count()) {
    int64_t low = 0;
    int64_t high = places;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (keys[middle] < entry) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    begins[entry] = static_cast<int32_t>(low);
  }
}

__global__ void __launch_bounds__(kThreads)
    count_kernel(const int32_t* begins, int64_t entries, int32_t* counts) {
  for (int64_t entry = first_thread(); entry <= entries; entry += thread_count()) {
    counts[entry] = entry < entries ? (begins[entry + 1] - begins[entry] + kPiece - 1) / kPiece : 0;
  }
}

struct SumTask {
  const int32_t* sorted;
  const int32_t* begins;
  const int32_t* pieces;
  int64_t entries;
  int books;
  int64_t blocks;
  int in_group;
  int out_group;
  int64_t columns;
  int64_t scale_count;
  int64_t scale_columns;
  const float* values;
  const double* scales;
  int size;
  double* partial;
};

template <bool kOfBlocks>
__global__ void __launch_bounds__(kThreads) piece_kernel(SumTask task) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t warps = thread_count() / 32;
  const int32_t total = task.pieces[task.entries];
  const int g = task.in_group;
  for (int64_t piece = first_thread() / 32; piece < total; piece += warps) {
    // The last entry whose first piece is not beyond this one: entries without places have none.
    int64_t low = 0;
    int64_t high = task.entries;
    while (low + 1 < high) {
      const int64_t middle = (low + high) / 2;
      if (task.pieces[middle] <= piece) {
        low = middle;
      } else {
        high = middle;
      }
    }
    const int64_t begin = task.begins[low] + (piece - task.pieces[low]) * kPiece;
    const int64_t end = min(begin + kPiece, static_cast<int64_t>(task.begins[low + 1]));
    const auto scale_of = [&](int64_t row_group, int64_t block) {
      return task.scales[row_group * task.scale_count + block * g / task.scale_columns];
    };
    if constexpr (kOfBlocks) {
      for (int first = 0; first < task.size; first += 32) {
        const int element = first + lane;
        const int i = element / g;
        const int j = element % g;
        if (element >= task.size) continue;
        double sum = 0;
        for (int64_t at = begin; at < end && j <= i; ++at) {
          const int64_t place = task.sorted[at] / task.books;
          const int64_t block = place % task.blocks;
          const double scale = scale_of(place / task.blocks, block);
          sum += scale * scale *
                 static_cast<double>(task.values[(block * g + i) * task.columns + block * g + j]);
        }
        task.partial[piece * task.size + element] = sum;
      }
    } else {
      int lanes = 1;
      while (lanes < task.size) lanes *= 2;  // of a place: 1 to 16
      const int element = lane % lanes;
      double sum = 0;
      for (int64_t at = begin + lane / lanes; at < end; at += 32 / lanes) {
        const int64_t place = task.sorted[at] / task.books;
        const int64_t block = place % task.blocks;
        const int64_t row_group = place / task.blocks;
        if (element >= task.size) continue;
        const int64_t row = row_group * task.out_group + element / g;
        sum += scale_of(row_group, block) *
               static_cast<double>(task.values[row * task.columns + block * g + element % g]);
      }
      for (int mask = lanes; mask < 32; mask *= 2) sum += __shfl_xor_sync(0xffffffffU, sum, mask);
      if (lane < task.size) task.partial[piece * task.size + lane] = sum;
    }
  }
}

__global__ void __launch_bounds__(kThreads) combine_kernel(SumTask task, double* sums) {
  for (int64_t at = first_thread(); at < task.entries * task.size; at += thread_count()) {
    const int64_t entry = at / task.size;
    double sum = 0;
    for (int32_t piece = task.pieces[entry]; piece < task.pieces[entry + 1]; ++piece) {
      sum += task.partial[static_cast<int64_t>(piece) * task.size + at % task.size];
    }
    sums[at] = sum;
  }
}

}  // namespace

EntrySums::EntrySums(const AdditiveProblem& problem, const AdditiveArrays& arrays)
    : problem_(problem),
      places_(checked_mul(problem.row_groups, problem.blocks * problem.format.codebooks)),
      entries_(problem.format.codebooks * problem.format.entries()),
      most_pieces_(places_ / kPiece + entries_),
      sorted_(places_, problem.stream),
      begins_(entries_ + 1, problem.stream),
      pieces_(entries_ + 1, problem.stream) {
  if (places_ > std::numeric_limits<int32_t>::max()) {
    throw InvalidArgument("w", text_of(places_, " codes"), "fewer than 2^31");
  }
  const cudaStream_t stream = problem.stream;
  const DeviceBuffer<int32_t> keys(places_, stream);
  const DeviceBuffer<int32_t> numbers(places_, stream);
  const DeviceBuffer<int32_t> sorted_keys(places_, stream);
  const DeviceBuffer<int32_t> counts(entries_ + 1, stream);
  key_kernel<<<blocks_for(places_), kThreads, 0, stream>>>(arrays.codes.data(), places_,
                                                           problem.format.codebooks, problem.format.entries(),
                                                           keys.data(), numbers.data());
  check_cuda(cudaGetLastError(), "launch of key");
  const int bits = static_cast<int>(std::bit_width(static_cast<uint64_t>(entries_ - 1)));
  const auto count = static_cast<int>(places_);
  size_t sort_bytes = 0;
  size_t scan_bytes = 0;
  check_cuda(cub::DeviceRadixSort::SortPairs(nullptr, sort_bytes, keys.data(), sorted_keys.data(),
                                             numbers.data(), sorted_.data(), count, 0, bits, stream),
             "space to sort codes");
  check_cuda(cub::DeviceScan::ExclusiveSum(nullptr, scan_bytes, counts.data(), pieces_.data(),
                                           static_cast<int>(entries_ + 1), stream),
             "space to sum up");
  const DeviceBuffer<unsigned char> space(static_cast<int64_t>(std::max(sort_bytes, scan_bytes)), stream);
  check_cuda(cub::DeviceRadixSort::SortPairs(space.data(), sort_bytes, keys.data(), sorted_keys.data(),
                                             numbers.data(), sorted_.data(), count, 0, bits, stream),
             "sort of codes");
  begin_kernel<<<blocks_for(entries_ + 1), kThreads, 0, stream>>>(sorted_keys.data(), places_, entries_,
                                                                  begins_.data());
  count_kernel<<<blocks_for(entries_ + 1), kThreads, 0, stream>>>(begins_.data(), entries_, counts.data());
  check_cuda(cudaGetLastError(), "launch of count");
  check_cuda(cub::DeviceScan::ExclusiveSum(space.data(), scan_bytes, counts.data(), pieces_.data(),
                                           static_cast<int>(entries_ + 1), stream),
             "first pieces");
}

template <bool kBlocks>
void EntrySums::run(const float* values, const double* scales, double* sums, int64_t size) const {
  const DeviceBuffer<double> partial(checked_mul(most_pieces_, size), problem_.stream);
  const Additive& format = problem_.format;
  const SumTask task{sorted_.data(),
                     begins_.data(),
                     pieces_.data(),
                     entries_,
                     format.codebooks,
                     problem_.blocks,
                     static_cast<int>(format.in_group),
                     static_cast<int>(format.out_group),
                     problem_.columns,
                     problem_.scale_count,
                     problem_.scale_columns,
                     values,
                     scales,
                     static_cast<int>(size),
                     partial.data()};
  piece_kernel<kBlocks><<<blocks_for(most_pieces_ * 32), kThreads, 0, problem_.stream>>>(task);
  combine_kernel<<<blocks_for(entries_ * size), kThreads, 0, problem_.stream>>>(task, sums);
  check_cuda(cudaGetLastError(), "launch of combine");
}

void EntrySums::gather(const float* products, const double* scales, double* sums) const {
  run<false>(products, scales, sums, problem_.format.dim());
}

void EntrySums::gather_blocks(const float* h, const double* scales, double* sums) const {
  run<true>(h, scales, sums, problem_.format.in_group * problem_.format.in_group);
}

}  // namespace quantloom::cuda
