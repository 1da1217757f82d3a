// Codes into levels as the numbers that they stand for. Done once for each matrix.
#include "common/check.cuh"
#include "common/device_buffer.hpp"
#include "kernels/level_planes.hpp"
#include "kernels/packed_codes.cuh"

namespace quantloom::cuda {
namespace {

constexpr int kThreads = 128;

// Rows of codes, each a stream; runs of numbers share levels, those of scales a row, those of tables a place
// in the entries of a group.
struct LevelCodes {
  int bits;
  int64_t row_words;
  int64_t row_numbers;
  int64_t run_numbers;  // that follow each other before the next runs begin
  int64_t dim;          // runs that take turns in them

  __device__ int64_t level_of(const uint32_t* codes, int64_t i) const {
    const int64_t run = i / run_numbers * dim + i % dim;
    return (run << bits) + read_code(codes + i / row_numbers * row_words, bits, i % row_numbers);
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    expand(LevelCodes rows, int64_t count, const uint32_t* __restrict__ codes, const T* __restrict__ levels,
           T* __restrict__ numbers) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) numbers[i] = levels[rows.level_of(codes, i)];
}

void launch_expand(const LevelCodes& rows, const Tensor& codes, const Tensor& levels, Tensor& numbers,
                   cudaStream_t stream) {
  const int64_t count = numbers.element_count();
  if (count == 0) return;
  const int64_t blocks = ceil_div(count, kThreads);
  if (blocks > 2147483647) throw Unsupported(text_of("prepare_cuda: no kernel for ", count, " scales"));
  const auto run = [&]<class T>(T) {
    expand<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
        rows, count, reinterpret_cast<const uint32_t*>(codes.bytes()),
        reinterpret_cast<const T*>(levels.bytes()), reinterpret_cast<T*>(numbers.bytes()));
  };
  if (size_of(numbers.dtype()) == 4) {
    run(uint32_t{});
  } else {
    run(uint16_t{});
  }
  check_cuda(cudaGetLastError(), "prepare_cuda: launch of expand");
}

// Memory that is freed in the order of the stream.
Tensor empty_plane(DType dtype, const std::vector<int64_t>& shape, cudaStream_t stream) {
  const auto memory =
      std::make_shared<DeviceBuffer<std::byte>>(checked_mul(checked_product(shape), size_of(dtype)), stream);
  return Tensor(dtype, shape, memory->data(), memory, Device::cuda);
}

void copy(const Tensor& from, Tensor& to, cudaStream_t stream) {
  if (from.byte_count() == 0) return;
  check_cuda(cudaMemcpyAsync(to.bytes(), from.bytes(), static_cast<size_t>(from.byte_count()),
                             cudaMemcpyDeviceToDevice, stream),
             "copying a plane");
}

// The packed planes of the matrix without levels: those that are there, and memory for the others.
PackedTensor plain_planes(const PackedTensor& packed, cudaStream_t stream) {
  PackedTensor plain{without_levels(dynamic_cast<const Additive&>(*packed.format)), packed.n, packed.k, {}};
  for (const PlaneSpec& spec : plain.format->planes(packed.n, packed.k)) {
    const auto there = packed.planes.find(spec.name);
    plain.planes.emplace(spec.name, there != packed.planes.end()
                                        ? there->second
                                        : empty_plane(spec.dtype, spec.shape, stream));
  }
  return plain;
}

}  // namespace

void prepare_levels(const PackedTensor& packed, PreparedPlanes& prepared, cudaStream_t stream) {
  const auto& format = dynamic_cast<const Additive&>(*packed.format);
  PackedTensor plain = plain_planes(packed, stream);
  if (format.has_table_levels()) {
    const int64_t numbers = format.entries() * format.dim();
    const LevelCodes rows{format.levels.table_bits, packed.plane("codebook_codes").shape()[1], numbers,
                          numbers / format.levels.table_groups, format.dim()};
    launch_expand(rows, packed.plane("codebook_codes"), packed.plane("codebook_levels"),
                  plain.planes.at("codebook"), stream);
  }
  if (format.has_scale_levels(packed.k)) {
    const int64_t numbers = format.scale_count(packed.k);
    const LevelCodes rows{format.levels.scale_bits, packed.plane("scale_codes").shape()[1], numbers, numbers,
                          1};
    launch_expand(rows, packed.plane("scale_codes"), packed.plane("scale_levels"), plain.planes.at("scales"),
                  stream);
  }
  PreparedPlanes expanded = without_levels(prepared);
  prepare_cuda(plain, expanded, stream);
  for (const PlaneSpec& spec : level_planes(format, packed.n, packed.k)) {
    copy(packed.plane(spec.name), prepared.planes.at(spec.name), stream);
  }
}

void unprepare_levels(const PreparedPlanes& prepared, PackedTensor& packed, cudaStream_t stream) {
  PackedTensor plain = plain_planes(packed, stream);
  unprepare_cuda(without_levels(prepared), plain, stream);
  for (const PlaneSpec& spec : level_planes(*packed.format, packed.n, packed.k)) {
    copy(prepared.plane(spec.name), packed.planes.at(spec.name), stream);
  }
}

}  // namespace quantloom::cuda
