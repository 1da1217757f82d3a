// Done once for each matrix, so written to be plain: a thread moves 16 codes of one row.
#include "common/check.cuh"
#include "common/load_float.cuh"
#include "kernels/integer_product.hpp"
#include "kernels/packed_codes.cuh"
#include "kernels/register_records.hpp"
#include "quantloom/formats/bit_packing.hpp"

namespace quantloom::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPiece = 16;

struct Source {
  int bits = 4;
  int center = 8;
  int offset = 8;  // code - what is stored
  bool nibbles = true;
  bool zeros_in_codes = false;
  bool per_tensor = false;
  bool pairs = false;
  int steps = 0;
  int64_t step_columns = 128;
  int64_t group_columns = 128;
  int64_t groups = 1;
  int64_t n = 0;
  int64_t k = 0;
  int64_t blocks = 0;
  int64_t record_bytes = 0;
  int64_t row_words = 0;
  int64_t zero_words = 0;
  const uint32_t* zeros = nullptr;  // null: the center
  const void* scales = nullptr;
  DType scale_dtype = DType::f16;
};

__device__ int zero_at(const Source& source, int64_t row, int64_t group) {
  if (source.zeros == nullptr) return source.center;
  const int64_t column = source.per_tensor ? 0 : row;
  return static_cast<int>(read_code(source.zeros + group * source.zero_words, source.bits, column));
}
__device__ int offset_at(const Source& source, int64_t row, int64_t column) {
  return source.zeros_in_codes ? zero_at(source, row, column / source.group_columns) : source.offset;
}
__device__ int64_t record_of(const Source& source, int64_t row, int64_t column) {
  return (row / registers::kRows * source.blocks + column / registers::kColumns) * source.record_bytes;
}

// Nibbles of two rows share a byte, and those of a thread words: `records` is zeroed before.
__global__ void __launch_bounds__(kThreads)
    put_records(Source source, int64_t pieces, const uint32_t* __restrict__ codes,
                unsigned char* __restrict__ records) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= pieces) return;
  const int64_t row_pieces = source.blocks * (registers::kColumns / kPiece);
  const int64_t row = index / row_pieces;
  const int64_t first = index % row_pieces * kPiece;
  for (int i = 0; i < kPiece && first + i < source.k; i += 4) {
    uint32_t word = 0;
    for (int c = 0; c < 4 && first + i + c < source.k; ++c) {
      const int64_t column = first + i + c;
      const auto code = static_cast<int>(read_code(codes + row * source.row_words, source.bits, column));
      const auto value = static_cast<uint32_t>(code - offset_at(source, row, column));
      word |= (value & (source.nibbles ? 15U : 255U)) << (8 * c);
    }
    const registers::CodePlace place =
        registers::place_of_code(static_cast<int>(row % registers::kRows),
                                 static_cast<int>((first + i) % registers::kColumns), source.nibbles);
    atomicOr(reinterpret_cast<unsigned int*>(records + record_of(source, row, first + i) + place.byte),
             word << place.shift);
  }
}

__global__ void __launch_bounds__(kThreads)
    take_records(Source source, int64_t pieces, const unsigned char* __restrict__ records,
                 uint32_t* __restrict__ codes) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= pieces) return;
  const int64_t row_pieces = source.blocks * (registers::kColumns / kPiece);
  const int64_t row = index / row_pieces;
  const int64_t first = index % row_pieces * kPiece;
  for (int i = 0; i < kPiece && first + i < source.k; ++i) {
    const int64_t column = first + i;
    const registers::CodePlace place =
        registers::place_of_code(static_cast<int>(row % registers::kRows),
                                 static_cast<int>(column % registers::kColumns), source.nibbles);
    const int value = records[record_of(source, row, column) + place.byte] >> place.shift;
    put_code(codes + row * source.row_words, source.bits, column,
             static_cast<uint32_t>(value + offset_at(source, row, column)) & (~0U >> (32 - source.bits)));
  }
}

// A warp to a row: its terms, and those of its groups.
__global__ void __launch_bounds__(kThreads)
    put_terms(Source source, int64_t rows, const uint32_t* __restrict__ codes,
              unsigned char* __restrict__ records, RowTerms* __restrict__ terms) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (row >= rows) return;
  RowTerms result{};
  double total = 0;
  const bool grouped = source.steps > 0;
  const int64_t run = grouped ? source.step_columns : source.k;
  for (int64_t first = 0; row < source.n && first < source.k; first += run) {
    const int64_t group = grouped ? first / source.group_columns : 0;
    const int zero = zero_at(source, row, group);
    const int64_t last = first + run < source.k ? first + run : source.k;
    int sum = 0;
    for (int64_t column = first + lane; column < last; column += 32) {
      sum += static_cast<int>(read_code(codes + row * source.row_words, source.bits, column)) -
             (grouped ? zero : source.center);
    }
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0U, sum, step);
    if (!grouped) {
      result = {load_float(source.scales, source.scale_dtype, source.per_tensor ? 0 : row), sum,
                zero - source.center, 0};
      break;
    }
    const float scale = load_float(source.scales, source.scale_dtype, row * source.groups + group);
    total += static_cast<double>(scale) * sum;
    result.scale = 1.0F;
    if (lane > 0) continue;
    const int place = registers::place_of_term(
        static_cast<int>(row % registers::kRows),
        static_cast<int>(first % registers::kColumns / source.step_columns), source.nibbles, source.pairs);
    auto* const to = reinterpret_cast<uint32_t*>(records + record_of(source, row, first) + place);
    to[0] = __float_as_uint(source.nibbles && !source.pairs ? __fmul_rn(scale, 0.0625F) : scale);
    if (source.pairs) {
      to[1] = source.nibbles ? 0x01010101U * static_cast<uint32_t>(zero)
                             : __float_as_uint(static_cast<float>(source.center - zero));
    }
  }
  if (grouped) result.sum = __float_as_int(static_cast<float>(total));
  if (lane == 0) terms[row] = result;
}

template <class T>
const T* data_of(const Tensor& plane) {
  return reinterpret_cast<const T*>(plane.bytes());
}

Source source_of(const IntegerLayout& layout, const std::map<std::string, Tensor>& planes) {
  Source source;
  source.bits = layout.bits;
  source.center = layout.center();
  source.offset = layout.stored_center();
  source.nibbles = layout.nibbles();
  source.zeros_in_codes = layout.zeros_in_codes();
  source.per_tensor = layout.per_tensor;
  source.pairs = layout.pairs();
  source.steps = layout.steps();
  source.step_columns = layout.grouped() ? layout.step_columns : layout.k;
  source.group_columns = layout.grouped() ? layout.group_columns : layout.k;
  source.groups = layout.grouped() ? ceil_div(layout.k, layout.group_columns) : 1;
  source.n = layout.n;
  source.k = layout.k;
  source.blocks = layout.blocks;
  source.record_bytes = layout.record_bytes();
  source.row_words = packed_words(layout.k, layout.bits);
  source.zero_words = packed_words(layout.per_tensor ? 1 : layout.n, layout.bits);
  if (layout.asymmetric) source.zeros = data_of<uint32_t>(planes.at("zeros"));
  source.scales = planes.at("scales").bytes();
  source.scale_dtype = layout.scale_dtype;
  return source;
}

unsigned blocks_for(int64_t threads, const char* function) {
  const int64_t blocks = ceil_div(threads, int64_t{kThreads});
  if (blocks > 2147483647) throw Unsupported(text_of(function, ": no kernel for ", threads, " threads"));
  return static_cast<unsigned>(blocks);
}

}  // namespace

void order_records(const IntegerLayout& layout, const PackedTensor& packed, IntegerPlanes& prepared,
                   cudaStream_t stream) {
  constexpr const char* kFunction = "prepare_integers_cuda";
  Tensor& integers = prepared.planes.at("integers");
  Tensor& rows = prepared.planes.at("rows");
  for (Tensor* plane : {&integers, &rows}) {
    if (plane->byte_count() == 0) continue;
    check_cuda(cudaMemsetAsync(plane->bytes(), 0, static_cast<size_t>(plane->byte_count()), stream),
               "prepare_integers_cuda: zeroing a plane");
  }
  if (layout.n == 0 || layout.k == 0) return;
  const Source source = source_of(layout, packed.planes);
  auto* const records = reinterpret_cast<unsigned char*>(integers.bytes());
  const auto* const codes = data_of<uint32_t>(packed.plane("codes"));
  const int64_t pieces = layout.n * layout.blocks * (registers::kColumns / kPiece);
  put_records<<<blocks_for(pieces, kFunction), kThreads, 0, stream>>>(source, pieces, codes, records);
  check_cuda(cudaGetLastError(), "prepare_integers_cuda: launch of put_records");
  const int64_t all = 128 * layout.row_tiles;
  put_terms<<<blocks_for(32 * all, kFunction), kThreads, 0, stream>>>(
      source, all, codes, records, reinterpret_cast<RowTerms*>(rows.bytes()));
  check_cuda(cudaGetLastError(), "prepare_integers_cuda: launch of put_terms");
}

void unorder_records(const IntegerLayout& layout, const IntegerPlanes& prepared, PackedTensor& packed,
                     cudaStream_t stream) {
  const int64_t pieces = layout.n * layout.blocks * (registers::kColumns / kPiece);
  take_records<<<blocks_for(pieces, "unprepare_integers_cuda"), kThreads, 0, stream>>>(
      source_of(layout, prepared.planes), pieces, data_of<unsigned char>(prepared.plane("integers")),
      reinterpret_cast<uint32_t*>(packed.planes.at("codes").bytes()));
  check_cuda(cudaGetLastError(), "unprepare_integers_cuda: launch of take_records");
}

}  // namespace quantloom::cuda
