// Products on the device from memory of the CPU, for quantloom doctor.
#include <memory>
#include <vector>

#include "common/check.cuh"
#include "quantloom/kernels/cuda_check.hpp"
#include "quantloom/kernels/integer_cuda.hpp"
#include "quantloom/kernels/matmul_cuda.hpp"

namespace quantloom {
namespace {

std::shared_ptr<std::byte> device_bytes(int64_t bytes) {
  void* memory = nullptr;
  check_cuda(cudaMalloc(&memory, static_cast<size_t>(bytes > 0 ? bytes : 1)), "multiply_on_cuda: allocation");
  return {static_cast<std::byte*>(memory), [](std::byte* p) { static_cast<void>(cudaFree(p)); }};
}

void upload(const void* from, std::byte* to, int64_t bytes) {
  if (bytes == 0) return;
  check_cuda(cudaMemcpy(to, from, static_cast<size_t>(bytes), cudaMemcpyHostToDevice),
             "multiply_on_cuda: copy to the device");
}

Tensor device_tensor(DType dtype, const std::vector<int64_t>& shape) {
  const auto memory = device_bytes(checked_mul(checked_product(shape), size_of(dtype)));
  return {dtype, shape, memory.get(), memory, Device::cuda};
}

PackedTensor on_device(const PackedTensor& packed) {
  PackedTensor copy{packed.format, packed.n, packed.k, {}};
  for (const auto& [name, plane] : packed.planes) {
    if (plane.device() != Device::cpu) {
      throw InvalidArgument("packed." + name, "memory of a CUDA device", "memory of the CPU");
    }
    Tensor there = device_tensor(plane.dtype(), plane.shape());
    upload(plane.bytes(), there.bytes(), plane.byte_count());
    copy.planes.emplace(name, std::move(there));
  }
  return copy;
}

// float16 x on the device and y back from it: `multiply` is given arguments without a workspace.
template <class Multiply>
void with_halves(MatrixView<const float> x, MatrixView<float> y, int64_t workspace_bytes,
                 const Multiply& multiply) {
  std::vector<uint16_t> halves(static_cast<size_t>(checked_mul(x.rows(), x.cols())));
  for (int64_t row = 0; row < x.rows(); ++row) {
    for (int64_t column = 0; column < x.cols(); ++column) {
      halves[static_cast<size_t>(row * x.cols() + column)] = f16_from_float(x(row, column));
    }
  }
  const auto in = device_bytes(static_cast<int64_t>(halves.size()) * 2);
  upload(halves.data(), in.get(), static_cast<int64_t>(halves.size()) * 2);
  std::vector<uint16_t> results(static_cast<size_t>(checked_mul(y.rows(), y.cols())));
  const auto out = device_bytes(static_cast<int64_t>(results.size()) * 2);
  const auto workspace = device_bytes(workspace_bytes);
  multiply(CudaMatmulArguments{.x = in.get(),
                               .x_stride = x.cols(),
                               .y = out.get(),
                               .y_stride = y.cols(),
                               .m = x.rows(),
                               .dtype = DType::f16,
                               .workspace = workspace.get(),
                               .workspace_bytes = workspace_bytes});
  if (results.empty()) return;
  check_cuda(cudaMemcpy(results.data(), out.get(), results.size() * 2, cudaMemcpyDeviceToHost),
             "multiply_on_cuda: copy from the device");
  for (int64_t row = 0; row < y.rows(); ++row) {
    for (int64_t column = 0; column < y.cols(); ++column) {
      y(row, column) = float_from_f16(results[static_cast<size_t>(row * y.cols() + column)]);
    }
  }
}

void check_shapes(const PackedTensor& packed, MatrixView<const float> x, MatrixView<const float> y) {
  validate(packed);
  if (x.cols() != packed.k) throw InvalidArgument("x", text_of(x.cols(), " columns"), text_of(packed.k));
  if (y.rows() != x.rows() || y.cols() != packed.n) {
    throw InvalidArgument("y", text_of("[", y.rows(), ", ", y.cols(), "]"),
                          text_of("[", x.rows(), ", ", packed.n, "]"));
  }
}

// Planes on the device, not filled yet.
void allocate(const std::vector<PlaneSpec>& specs, PreparedPlanes& prepared) {
  for (const PlaneSpec& spec : specs) {
    prepared.planes.emplace(spec.name, device_tensor(spec.dtype, spec.shape));
  }
}

}  // namespace

void multiply_on_cuda(const PackedTensor& packed, MatrixView<const float> x, MatrixView<float> y) {
  check_shapes(packed, x, y);
  if (const auto reason = why_not_matmul_cuda(*packed.format, x.rows(), DType::f16)) {
    throw Unsupported(*reason);
  }
  const bool indexed = packed.planes.contains("group_index");
  const PackedTensor there = on_device(packed);
  PreparedPlanes prepared{packed.format, packed.n, packed.k, {}};
  allocate(prepared_planes(*packed.format, packed.n, packed.k, indexed), prepared);
  const auto group_index =
      indexed ? packed.plane("group_index").values<int32_t>() : std::span<const int32_t>{};
  const std::vector<int32_t> source = fragment_source(*packed.format, packed.k, group_index);
  if (!source.empty()) {
    upload(source.data(), prepared.planes.at("source").bytes(), static_cast<int64_t>(source.size()) * 4);
  }
  prepare_cuda(there, prepared, nullptr);
  with_halves(x, y, matmul_cuda_workspace(prepared, x.rows(), DType::f16),
              [&](const CudaMatmulArguments& arguments) { matmul_cuda(prepared, arguments); });
}

void multiply_integers_on_cuda(const PackedTensor& packed, MatrixView<const float> x,
                               const ActivationFormat& activations, MatrixView<float> y) {
  check_shapes(packed, x, y);
  if (const auto reason = why_not_matmul_integers_cuda(*packed.format, activations, packed.k, DType::f16)) {
    throw Unsupported(*reason);
  }
  if (activations.has_outliers()) {
    throw Unsupported("multiply_integers_on_cuda: activations without outliers, not with them");
  }
  const PackedTensor there = on_device(packed);
  IntegerPlanes prepared{{packed.format, packed.n, packed.k, {}}, {}};
  allocate(integer_planes(*packed.format, packed.n, packed.k, 0, packed.planes.contains("group_index")),
           prepared);
  prepare_integers_cuda(there, prepared, nullptr);
  with_halves(
      x, y, matmul_integers_cuda_workspace(prepared, x.rows(), DType::f16, activations),
      [&](const CudaMatmulArguments& arguments) { matmul_integers_cuda(prepared, arguments, activations); });
}

}  // namespace quantloom
