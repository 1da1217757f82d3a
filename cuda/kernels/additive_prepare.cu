// Additive codes on the device into the order of their kernels and back. Done once for each matrix, so
// written to be plain: a thread makes one list.
#include "common/check.cuh"
#include "kernels/additive_product.hpp"
#include "kernels/packed_codes.cuh"

namespace quantloom::cuda {
namespace {

using additive::kPieceEntries;
using additive::kSliceBlocks;
using additive::PartEntry;
using additive::PartList;

constexpr int kThreads = 128;
constexpr int kFillThreads = 32;

struct Orders {
  int bits;       // of a code
  int part_bits;  // of them within a part
  int parts;
  int64_t n;
  int64_t blocks;
  int64_t row_words;
  int64_t slices;
  int64_t capacity;

  // Of a row and slice, counted slice by slice.
  __device__ int64_t first_block(int64_t of_row) const { return of_row / n * kSliceBlocks; }
  __device__ int block_count(int64_t of_row) const {
    const int64_t left = blocks - first_block(of_row);
    return static_cast<int>(left < kSliceBlocks ? left : kSliceBlocks);
  }
  __device__ uint32_t code(const uint32_t* packed, int64_t of_row, int place) const {
    return read_code(packed + of_row % n * row_words, bits, first_block(of_row) + place);
  }
};

Orders orders_of(const AdditiveLayout& layout) {
  return {layout.bits,   additive::part_bits(layout.in_group),
          layout.parts,  layout.n,
          layout.blocks, layout.row_words,
          layout.slices, layout.capacity};
}

dim3 grid_for(int64_t threads, int block = kThreads) {
  const int64_t blocks = ceil_div(threads, block);
  if (blocks > 2147483647) throw Unsupported(text_of("no kernel for ", threads, " lists of additive codes"));
  return dim3(static_cast<unsigned>(blocks));
}

// A thread counts the codes of each part in a row and slice, which gives where lists begin.
__global__ void __launch_bounds__(kThreads)
    count_lists(Orders orders, const uint32_t* __restrict__ packed, uint32_t* __restrict__ lists) {
  const int64_t of_row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (of_row >= orders.slices * orders.n) return;
  uint32_t* const own = lists + of_row * orders.parts;
  for (int part = 0; part < orders.parts; ++part) own[part] = 0;
  const int count = orders.block_count(of_row);
  for (int place = 0; place < count; ++place) ++own[orders.code(packed, of_row, place) >> orders.part_bits];
  int next = 0;
  for (int part = 0; part < orders.parts; ++part) {
    const PartList list{next, static_cast<int>(own[part])};
    own[part] = list.packed();
    next += (list.count + kPieceEntries - 1) / kPieceEntries * kPieceEntries;
  }
}

// A thread fills a list.
__global__ void __launch_bounds__(kFillThreads)
    fill_lists(Orders orders, const uint32_t* __restrict__ packed, const uint32_t* __restrict__ lists,
               uint16_t* __restrict__ codes, uint8_t* __restrict__ places) {
  __shared__ additive::Octet octets[additive::kMostOctets][kFillThreads];
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kFillThreads + threadIdx.x;
  const int64_t of_row = i / orders.parts;
  if (of_row >= orders.slices * orders.n) return;
  const auto part = static_cast<uint32_t>(i - of_row * orders.parts);
  const PartList list = PartList::from(lists[i]);
  for (int o = 0; o < additive::octets_of(list.count); ++o) octets[o][threadIdx.x] = 0;
  const int count = orders.block_count(of_row);
  for (int place = 0; place < count; ++place) {
    const uint32_t code = orders.code(packed, of_row, place);
    if (code >> orders.part_bits != part) continue;
    const PartEntry entry{code & ((1U << orders.part_bits) - 1U), static_cast<uint32_t>(place)};
    const int dealt = additive::deal_entry([&](int o) -> additive::Octet& { return octets[o][threadIdx.x]; },
                                           list.count, orders.part_bits, entry);
    const int64_t at = of_row * orders.capacity + list.first + dealt;
    codes[at] = static_cast<uint16_t>(entry.low(orders.part_bits));
    places[at] = static_cast<uint8_t>(entry.high(orders.part_bits));
  }
}

// `packed` is zeroed before; several threads write bits of one word.
__global__ void __launch_bounds__(kThreads)
    unfill_lists(Orders orders, uint32_t* __restrict__ packed, const uint32_t* __restrict__ lists,
                 const uint16_t* __restrict__ codes, const uint8_t* __restrict__ places) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t of_row = i / orders.parts;
  if (of_row >= orders.slices * orders.n) return;
  const auto part = static_cast<uint32_t>(i - of_row * orders.parts);
  const PartList list = PartList::from(lists[i]);
  const int count = orders.block_count(of_row);
  for (int e = 0; e < list.count && list.first + e < orders.capacity; ++e) {
    const int64_t at = of_row * orders.capacity + list.first + e;
    const PartEntry entry = PartEntry::from(orders.part_bits, codes[at], places[at]);
    if (static_cast<int>(entry.place) >= count) continue;
    put_code(packed + of_row % orders.n * orders.row_words, orders.bits,
             orders.first_block(of_row) + entry.place, entry.code | part << orders.part_bits);
  }
}

void copy(const Tensor& from, Tensor& to, cudaStream_t stream) {
  if (from.byte_count() == 0) return;
  check_cuda(cudaMemcpyAsync(to.bytes(), from.bytes(), static_cast<size_t>(from.byte_count()),
                             cudaMemcpyDeviceToDevice, stream),
             "copying a plane");
}

void zero(Tensor& plane, cudaStream_t stream) {
  if (plane.byte_count() == 0) return;
  check_cuda(cudaMemsetAsync(plane.bytes(), 0, static_cast<size_t>(plane.byte_count()), stream),
             "zeroing a plane");
}

template <class T>
const T* data(const Tensor& plane) {
  return reinterpret_cast<const T*>(plane.bytes());
}
template <class T>
T* data(Tensor& plane) {
  return reinterpret_cast<T*>(plane.bytes());
}

}  // namespace

void prepare_additive_planes(const AdditiveLayout& layout, const PackedTensor& packed,
                             PreparedPlanes& prepared, cudaStream_t stream) {
  for (const char* name : {"codebook", "scales"}) copy(packed.plane(name), prepared.planes.at(name), stream);
  Tensor& codes = prepared.planes.at("codes");
  if (!layout.in_parts()) return copy(packed.plane("codes"), codes, stream);
  Tensor& places = prepared.planes.at("places");
  Tensor& lists = prepared.planes.at("lists");
  zero(codes, stream);
  zero(places, stream);
  const Orders orders = orders_of(layout);
  const int64_t rows = layout.slices * layout.n;
  if (rows == 0) return;
  const auto* const from = data<uint32_t>(packed.plane("codes"));
  count_lists<<<grid_for(rows), kThreads, 0, stream>>>(orders, from, data<uint32_t>(lists));
  check_cuda(cudaGetLastError(), "prepare_cuda: launch of count_lists");
  fill_lists<<<grid_for(rows * layout.parts, kFillThreads), kFillThreads, 0, stream>>>(
      orders, from, data<uint32_t>(lists), data<uint16_t>(codes), data<uint8_t>(places));
  check_cuda(cudaGetLastError(), "prepare_cuda: launch of fill_lists");
}

void unprepare_additive_planes(const AdditiveLayout& layout, const PreparedPlanes& prepared,
                               PackedTensor& packed, cudaStream_t stream) {
  for (const char* name : {"codebook", "scales"}) copy(prepared.plane(name), packed.planes.at(name), stream);
  Tensor& codes = packed.planes.at("codes");
  if (!layout.in_parts()) return copy(prepared.plane("codes"), codes, stream);
  zero(codes, stream);
  const int64_t lists = layout.slices * layout.n * layout.parts;
  if (lists == 0) return;
  unfill_lists<<<grid_for(lists), kThreads, 0, stream>>>(
      orders_of(layout), data<uint32_t>(codes), data<uint32_t>(prepared.plane("lists")),
      data<uint16_t>(prepared.plane("codes")), data<uint8_t>(prepared.plane("places")));
  check_cuda(cudaGetLastError(), "unprepare_cuda: launch of unfill_lists");
}

}  // namespace quantloom::cuda
