// Brings packed planes on the device into fragment order, and back. Done once for each matrix, so written to
// be plain: a thread moves the 32 codes of one lane and unit.
#include <algorithm>

#include "common/check.cuh"
#include "common/device.hpp"
#include "formats/half_order.hpp"
#include "formats/sum_order.hpp"
#include "kernels/additive_product.hpp"
#include "kernels/bit_plane_product.hpp"
#include "kernels/fragment_layout.hpp"
#include "kernels/level_planes.hpp"
#include "kernels/packed_codes.cuh"
#include "kernels/product_memory.hpp"
#include "kernels/spqr_product.hpp"
#include "kernels/trellis_product.hpp"
#include "quantloom/formats/bit_packing.hpp"

namespace quantloom {
namespace {

using cuda::put_code;
using cuda::read_code;

constexpr int kThreads = 256;

// Both orders of one matrix.
struct Orders {
  fragments::CodeOrder code_order = fragments::CodeOrder::bytes;
  bool halves = false;  // codes lie as half_order.hpp says
  int bits = 0;
  int dim = 1;        // weights of a code
  int code_bits = 0;  // of a packed code, of all tables together
  int64_t n = 0;
  int64_t k = 0;
  int64_t column_blocks = 0;
  int64_t row_words = 0;   // of the packed codes
  int64_t zero_words = 0;  // of a packed row of zero points
  int64_t group_count = 0;
  int64_t parameter_rows = 0;  // n, or 1 per tensor
  const int32_t* source = nullptr;
};

// Where code `i` of a thread's unit lies in the matrix; row or column out of range: padding.
__device__ void locate(const Orders& orders, int64_t unit_index, int i, int64_t& row, int64_t& column) {
  const int lane = static_cast<int>(unit_index % 32);
  const int unit = static_cast<int>(unit_index / 32 % 4);
  const int64_t block = unit_index / 128;
  row = block / orders.column_blocks * 64 + unit * 16 + fragments::row_of(lane, i / 2);
  column = block % orders.column_blocks * 64 + fragments::column_of(lane, i / 2, i % 2);
  if (orders.source != nullptr) column = orders.source[column];
}

__device__ uint32_t* unit_words(const Orders& orders, uint32_t* codes, int64_t unit_index, int word) {
  const int lane = static_cast<int>(unit_index % 32);
  const int unit = static_cast<int>(unit_index / 32 % 4);
  return codes + unit_index / 128 * 128 * orders.bits +
         fragments::word_in_block(orders.bits, unit, word, lane);
}

__global__ void __launch_bounds__(kThreads)
    prepare_codes(Orders orders, int64_t units, const uint32_t* __restrict__ packed,
                  uint32_t* __restrict__ prepared) {
  const int64_t unit_index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (unit_index >= units) return;
  uint8_t codes[32];
  for (int i = 0; i < 32; ++i) {
    int64_t row = 0;
    int64_t column = 0;
    locate(orders, unit_index, i, row, column);
    const bool inside = row < orders.n && column >= 0 && column < orders.k;
    codes[i] =
        static_cast<uint8_t>(inside ? read_code(packed + row * orders.row_words, orders.bits, column) : 0U);
  }
  uint32_t words[8];
  if (orders.halves) {
    fragments::pack_halves(orders.bits, codes, words);
  } else {
    fragments::pack_unit(orders.code_order, orders.bits, codes, words);
  }
  for (int w = 0; w < orders.bits; ++w) *unit_words(orders, prepared, unit_index, w) = words[w];
}

// Where the vector in field `field` of a thread's unit lies in the matrix; row or column out of range:
// padding.
__device__ void locate_vector(const Orders& orders, int64_t unit_index, int field, int64_t& row,
                              int64_t& column) {
  const int lane = static_cast<int>(unit_index % 32);
  const int unit = static_cast<int>(unit_index / 32 % 4);
  const int64_t block = unit_index / 128;
  row = block / orders.column_blocks * 64 + unit * 16 + fragments::vector_row(orders.dim, lane, field);
  column = block % orders.column_blocks * 64 + fragments::vector_column(orders.dim, lane, field);
  if (orders.source != nullptr) column = orders.source[column];
}

__global__ void __launch_bounds__(kThreads)
    prepare_vectors(Orders orders, int64_t units, const uint32_t* __restrict__ packed,
                    uint32_t* __restrict__ prepared) {
  const int64_t unit_index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (unit_index >= units) return;
  uint32_t words[9] = {};
  for (int field = 0; field < 32 / orders.dim; ++field) {
    int64_t row = 0;
    int64_t column = 0;
    locate_vector(orders, unit_index, field, row, column);
    if (row >= orders.n || column < 0 || column >= orders.k) continue;
    const uint32_t code = read_code(packed + row * orders.row_words, orders.code_bits, column / orders.dim);
    fragments::put_field(words, orders.dim * orders.bits, field, code);
  }
  for (int w = 0; w < orders.bits; ++w) *unit_words(orders, prepared, unit_index, w) = words[w];
}

// `packed` is zeroed before; several units write bits of one word.
__global__ void __launch_bounds__(kThreads)
    unprepare_vectors(Orders orders, int64_t units, uint32_t* __restrict__ prepared,
                      uint32_t* __restrict__ packed) {
  const int64_t unit_index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (unit_index >= units) return;
  uint32_t words[9] = {};
  for (int w = 0; w < orders.bits; ++w) words[w] = *unit_words(orders, prepared, unit_index, w);
  for (int field = 0; field < 32 / orders.dim; ++field) {
    int64_t row = 0;
    int64_t column = 0;
    locate_vector(orders, unit_index, field, row, column);
    if (row >= orders.n || column < 0 || column >= orders.k) continue;
    put_code(packed + row * orders.row_words, orders.code_bits, column / orders.dim,
             fragments::wide_field_of(words, orders.dim * orders.bits, field));
  }
}

// `packed` is zeroed before; several units write bits of one word.
__global__ void __launch_bounds__(kThreads)
    unprepare_codes(Orders orders, int64_t units, uint32_t* __restrict__ prepared,
                    uint32_t* __restrict__ packed) {
  const int64_t unit_index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (unit_index >= units) return;
  uint32_t words[8];
  for (int w = 0; w < orders.bits; ++w) words[w] = *unit_words(orders, prepared, unit_index, w);
  uint8_t codes[32];
  if (orders.halves) {
    fragments::unpack_halves(orders.bits, words, codes);
  } else {
    fragments::unpack_unit(orders.code_order, orders.bits, words, codes);
  }
  for (int i = 0; i < 32; ++i) {
    int64_t row = 0;
    int64_t column = 0;
    locate(orders, unit_index, i, row, column);
    if (row >= orders.n || column < 0 || column >= orders.k) continue;
    put_code(packed + row * orders.row_words, orders.bits, column, codes[i]);
  }
}

__device__ int64_t parameter_at(const Orders& orders, int64_t row, int64_t group) {
  return (row / 64 * orders.group_count + group) * 64 +
         fragments::parameter_in_block(static_cast<int>(row % 64));
}

// T: the bytes of a scale. `prepared` is zeroed before.
template <class T>
__global__ void __launch_bounds__(kThreads)
    prepare_parameters(Orders orders, int64_t rows, const T* __restrict__ scales,
                       const uint32_t* __restrict__ zeros, T* __restrict__ prepared_scales,
                       uint8_t* __restrict__ prepared_zeros) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t group = i / rows;
  const int64_t row = i % rows;
  if (group >= orders.group_count) return;
  const int64_t from = orders.parameter_rows == 1 ? 0 : row;
  const int64_t to = parameter_at(orders, row, group);
  prepared_scales[to] = scales[from * orders.group_count + group];
  if (zeros != nullptr) {
    prepared_zeros[to] =
        static_cast<uint8_t>(read_code(zeros + group * orders.zero_words, orders.bits, from));
  }
}

// Packed zero points are zeroed before.
template <class T>
__global__ void __launch_bounds__(kThreads)
    unprepare_parameters(Orders orders, const T* __restrict__ prepared_scales,
                         const uint8_t* __restrict__ prepared_zeros, T* __restrict__ scales,
                         uint32_t* __restrict__ zeros) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t group = i / orders.parameter_rows;
  const int64_t row = i % orders.parameter_rows;
  if (group >= orders.group_count) return;
  const int64_t from = parameter_at(orders, row, group);
  scales[row * orders.group_count + group] = prepared_scales[from];
  if (zeros != nullptr) {
    put_code(zeros + group * orders.zero_words, orders.bits, row, prepared_zeros[from]);
  }
}

// Where each input lies among the padded columns.
__global__ void __launch_bounds__(kThreads) find_places(Orders orders, int32_t* __restrict__ places) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= orders.column_blocks * 64) return;
  const int32_t input = orders.source[column];
  if (input >= 0 && input < orders.k) places[input] = static_cast<int32_t>(column);
}

dim3 grid_for(int64_t threads) {
  const int64_t blocks = ceil_div(threads, kThreads);
  if (blocks > 2147483647)
    throw Unsupported(text_of("prepare_cuda: no kernel for ", threads, " pieces of work"));
  return dim3(static_cast<unsigned>(blocks));
}

Orders orders_of(const FragmentLayout& layout, const int32_t* source) {
  Orders orders;
  orders.code_order = layout.code_order;
  orders.halves = layout.bilevel();
  orders.bits = layout.bits;
  orders.dim = layout.dim;
  orders.code_bits = layout.code_bits;
  orders.n = layout.n;
  orders.k = layout.k;
  orders.column_blocks = layout.column_blocks;
  orders.row_words = packed_words(ceil_div(layout.k, layout.dim), layout.code_bits);
  orders.parameter_rows = layout.per_tensor ? 1 : layout.n;
  orders.zero_words = layout.asymmetric ? packed_words(orders.parameter_rows, layout.bits) : 0;
  orders.group_count = layout.group_count;
  orders.source = source;
  return orders;
}

void zero(const Tensor& plane, cudaStream_t stream) {
  if (plane.byte_count() == 0) return;
  check_cuda(cudaMemsetAsync(const_cast<std::byte*>(plane.bytes()), 0,
                             static_cast<size_t>(plane.byte_count()), stream),
             "prepare_cuda: zeroing a plane");
}

void copy(const Tensor& from, Tensor& to, cudaStream_t stream) {
  if (from.byte_count() == 0) return;
  check_cuda(cudaMemcpyAsync(to.bytes(), from.bytes(), static_cast<size_t>(from.byte_count()),
                             cudaMemcpyDeviceToDevice, stream),
             "prepare_cuda: copying a plane");
}

// Outliers are the same in both orders.
void copy_outliers(const std::map<std::string, Tensor>& from, std::map<std::string, Tensor>& to,
                   cudaStream_t stream) {
  for (const auto& [name, plane] : from) {
    if (name.starts_with("outlier_")) copy(plane, to.at(name), stream);
  }
}

const int32_t* source_of(const PreparedPlanes& prepared) {
  return prepared.has("source") ? reinterpret_cast<const int32_t*>(prepared.plane("source").bytes())
                                : nullptr;
}

// Planes of a trellis beside its codes: the same in both orders.
void copy_trellis_scales(const std::map<std::string, Tensor>& from, std::map<std::string, Tensor>& to,
                         cudaStream_t stream) {
  for (const auto& [name, plane] : from) {
    if (name != "codes") copy(plane, to.at(name), stream);
  }
}

// Calls run(T{}) with an unsigned integer as wide as a scale.
template <class Run>
void with_scale_type(DType dtype, const Run& run) {
  if (size_of(dtype) == 4) return run(uint32_t{});
  return run(uint16_t{});
}

}  // namespace

void prepare_cuda(const PackedTensor& packed, PreparedPlanes& prepared, void* stream) {
  validate(packed);
  validate(prepared);
  require_same_matrix(packed, prepared);
  auto* const cuda_stream = static_cast<cudaStream_t>(stream);
  if (!level_planes(*packed.format, packed.n, packed.k).empty()) {
    return cuda::prepare_levels(packed, prepared, cuda_stream);
  }
  if (const Trellis* trellis = as_trellis(*packed.format)) {
    copy_trellis_scales(packed.planes, prepared.planes, cuda_stream);
    return cuda::prepare_trellis_words(trellis_layout(*trellis, packed.n, packed.k),
                                       reinterpret_cast<const uint32_t*>(packed.plane("codes").bytes()),
                                       reinterpret_cast<uint32_t*>(prepared.planes.at("codes").bytes()),
                                       cuda_stream);
  }
  if (const Bcq* bcq = as_bcq(*packed.format)) {
    return cuda::prepare_bit_plane_words(
        bit_plane_layout(*bcq, packed.n, packed.k, packed.planes.contains("group_index")), packed, prepared,
        cuda_stream);
  }
  if (const Additive* additive = as_additive(*packed.format)) {
    return cuda::prepare_additive_planes(additive_layout(*additive, packed.n, packed.k), packed, prepared,
                                         cuda_stream);
  }
  const FragmentLayout layout =
      fragment_layout(*packed.format, packed.n, packed.k, packed.planes.contains("group_index"));
  const Orders orders = orders_of(layout, source_of(prepared));
  if (prepared.has("group_index"))
    copy(packed.plane("group_index"), prepared.planes.at("group_index"), cuda_stream);
  if (prepared.has("codebook")) copy(packed.plane("codebook"), prepared.planes.at("codebook"), cuda_stream);
  copy_outliers(packed.planes, prepared.planes, cuda_stream);
  if (layout.placed()) {
    find_places<<<grid_for(layout.padded_k()), kThreads, 0, cuda_stream>>>(
        orders, reinterpret_cast<int32_t*>(prepared.planes.at("place").bytes()));
    check_cuda(cudaGetLastError(), "prepare_cuda: launch of find_places");
  }
  if (layout.bilevel()) {
    cuda::prepare_spqr_parameters(layout, packed, prepared, cuda_stream);
  } else {
    zero(prepared.plane("scales"), cuda_stream);
  }
  if (layout.asymmetric) zero(prepared.plane("zeros"), cuda_stream);
  // Without columns there are no groups, but a scale of the whole tensor stays.
  if (layout.k == 0 && !layout.per_tensor) return;

  const int64_t units = layout.row_blocks * layout.column_blocks * 128;
  if (units > 0) {
    const auto kernel = layout.dim > 1 ? prepare_vectors : prepare_codes;
    kernel<<<grid_for(units), kThreads, 0, cuda_stream>>>(
        orders, units, reinterpret_cast<const uint32_t*>(packed.plane("codes").bytes()),
        reinterpret_cast<uint32_t*>(prepared.planes.at("codes").bytes()));
    check_cuda(cudaGetLastError(), "prepare_cuda: launch of prepare_codes");
  }
  const int64_t rows = layout.per_tensor ? std::max<int64_t>(layout.n, 1) : layout.n;
  if (rows == 0 || layout.bilevel()) return;
  with_scale_type(layout.scale_dtype, [&]<class T>(T) {
    prepare_parameters<T><<<grid_for(rows * layout.group_count), kThreads, 0, cuda_stream>>>(
        orders, rows, reinterpret_cast<const T*>(packed.plane("scales").bytes()),
        layout.asymmetric ? reinterpret_cast<const uint32_t*>(packed.plane("zeros").bytes()) : nullptr,
        reinterpret_cast<T*>(prepared.planes.at("scales").bytes()),
        layout.asymmetric ? reinterpret_cast<uint8_t*>(prepared.planes.at("zeros").bytes()) : nullptr);
  });
  check_cuda(cudaGetLastError(), "prepare_cuda: launch of prepare_parameters");
}

void unprepare_cuda(const PreparedPlanes& prepared, PackedTensor& packed, void* stream) {
  validate(packed);
  validate(prepared);
  require_same_matrix(packed, prepared);
  auto* const cuda_stream = static_cast<cudaStream_t>(stream);
  if (!level_planes(*packed.format, packed.n, packed.k).empty()) {
    return cuda::unprepare_levels(prepared, packed, cuda_stream);
  }
  if (const Trellis* trellis = as_trellis(*packed.format)) {
    copy_trellis_scales(prepared.planes, packed.planes, cuda_stream);
    return cuda::unprepare_trellis_words(trellis_layout(*trellis, packed.n, packed.k),
                                         reinterpret_cast<const uint32_t*>(prepared.plane("codes").bytes()),
                                         reinterpret_cast<uint32_t*>(packed.planes.at("codes").bytes()),
                                         cuda_stream);
  }
  if (const Bcq* bcq = as_bcq(*packed.format)) {
    return cuda::unprepare_bit_plane_words(
        bit_plane_layout(*bcq, packed.n, packed.k, packed.planes.contains("group_index")), prepared, packed,
        cuda_stream);
  }
  if (const Additive* additive = as_additive(*packed.format)) {
    return cuda::unprepare_additive_planes(additive_layout(*additive, packed.n, packed.k), prepared, packed,
                                           cuda_stream);
  }
  const FragmentLayout layout =
      fragment_layout(*packed.format, packed.n, packed.k, packed.planes.contains("group_index"));
  const Orders orders = orders_of(layout, source_of(prepared));
  if (prepared.has("group_index"))
    copy(prepared.plane("group_index"), packed.planes.at("group_index"), cuda_stream);
  if (prepared.has("codebook")) copy(prepared.plane("codebook"), packed.planes.at("codebook"), cuda_stream);
  copy_outliers(prepared.planes, packed.planes, cuda_stream);
  zero(packed.plane("codes"), cuda_stream);
  if (layout.asymmetric) zero(packed.plane("zeros"), cuda_stream);
  if (layout.k == 0 && !layout.per_tensor) return;

  if (layout.n > 0 && layout.k > 0) {
    const int64_t units = layout.row_blocks * layout.column_blocks * 128;
    const auto kernel = layout.dim > 1 ? unprepare_vectors : unprepare_codes;
    kernel<<<grid_for(units), kThreads, 0, cuda_stream>>>(
        orders, units, reinterpret_cast<uint32_t*>(const_cast<std::byte*>(prepared.plane("codes").bytes())),
        reinterpret_cast<uint32_t*>(packed.planes.at("codes").bytes()));
    check_cuda(cudaGetLastError(), "unprepare_cuda: launch of unprepare_codes");
  }
  if (layout.bilevel()) return cuda::unprepare_spqr_parameters(layout, prepared, packed, cuda_stream);
  if (orders.parameter_rows == 0) return;
  with_scale_type(layout.scale_dtype, [&]<class T>(T) {
    unprepare_parameters<T>
        <<<grid_for(orders.parameter_rows * layout.group_count), kThreads, 0, cuda_stream>>>(
            orders, reinterpret_cast<const T*>(prepared.plane("scales").bytes()),
            layout.asymmetric ? reinterpret_cast<const uint8_t*>(prepared.plane("zeros").bytes()) : nullptr,
            reinterpret_cast<T*>(packed.planes.at("scales").bytes()),
            layout.asymmetric ? reinterpret_cast<uint32_t*>(packed.planes.at("zeros").bytes()) : nullptr);
  });
  check_cuda(cudaGetLastError(), "unprepare_cuda: launch of unprepare_parameters");
}

}  // namespace quantloom
