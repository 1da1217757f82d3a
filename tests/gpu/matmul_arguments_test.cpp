// Bad arguments of products are refused by name, before anything is launched.
#include <functional>
#include <regex>

#include "product_case.hpp"
#include "product_table.hpp"

namespace quantloom {
namespace {

class MatmulCudaArguments : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  }
};

// A call that is right; tests spoil one thing each.
struct Call {
  PreparedPlanes w;
  CudaMatmulArguments arguments;
  CudaMatmulOptions options;
};

// `named`: a word of the message, as a pattern.
void expect_refused(const Product& product, Call call, const std::string& named,
                    const std::function<void(Call&)>& spoil) {
  SCOPED_TRACE(named);
  spoil(call);
  try {
    matmul_cuda(call.w, call.arguments, call.options);
    ADD_FAILURE() << "no error about " << named;
  } catch (const Error& error) {
    const std::string message = error.what();
    EXPECT_TRUE(std::regex_search(message, std::regex("(^|[^a-z_])(" + named + ")($|[^a-z_])"))) << message;
  }
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  const auto y = product.read();
  ASSERT_TRUE(y);
  EXPECT_TRUE(std::all_of(y->begin(), y->end(), [](uint32_t v) { return v == 0xFFFF; })) << "y was written";
}

ProductCase usual_case(int64_t m) {
  ProductCase c{.format = std::make_shared<const Uniform>(4, 32, false), .n = 40, .k = 64, .m = m};
  c.bias = true;
  return c;
}

TEST_F(MatmulCudaArguments, AreRefusedByName) {
  const Product product(usual_case(3));
  const GuardedMemory workspace = product.workspace({});
  const Call good{product.prepared(), product.arguments(workspace), {}};
  const auto refused = [&](const std::string& named, const std::function<void(Call&)>& spoil) {
    expect_refused(product, good, named, spoil);
  };
  std::vector<uint16_t> host(4096);
  const auto shifted = [](const void* p) {
    return const_cast<void*>(static_cast<const void*>(static_cast<const std::byte*>(p) + 1));
  };
  refused("x", [&](Call& c) { c.arguments.x = nullptr; });
  refused("x", [&](Call& c) { c.arguments.x = shifted(c.arguments.x); });
  refused("x", [&](Call& c) { c.arguments.x = host.data(); });
  refused("y", [&](Call& c) { c.arguments.y = nullptr; });
  refused("y", [&](Call& c) { c.arguments.y = shifted(c.arguments.y); });
  refused("y", [&](Call& c) { c.arguments.y = host.data(); });
  refused("bias", [&](Call& c) { c.arguments.bias = shifted(c.arguments.bias); });
  refused("bias", [&](Call& c) { c.arguments.bias = host.data(); });
  refused("x_stride", [&](Call& c) { c.arguments.x_stride = 63; });
  refused("x_stride", [&](Call& c) { c.arguments.x_stride = -64; });
  refused("y_stride", [&](Call& c) { c.arguments.y_stride = 39; });
  refused("x_stride|size", [&](Call& c) { c.arguments.x_stride = std::numeric_limits<int64_t>::max() / 2; });
  refused("y_stride|size", [&](Call& c) { c.arguments.y_stride = std::numeric_limits<int64_t>::max() / 2; });
  refused("m", [&](Call& c) { c.arguments.m = -1; });
  for (const DType dtype : {DType::f64, DType::i8}) {
    refused("dtype|" + std::string(name_of(dtype)), [&](Call& c) { c.arguments.dtype = dtype; });
  }
  refused("kernel", [&](Call& c) { c.options.kernel = "no_such_kernel"; });
  refused("splits", [&](Call& c) { c.options.splits = -1; });
}

TEST_F(MatmulCudaArguments, PlanesAreRefusedByName) {
  const Product product(usual_case(3));
  const GuardedMemory workspace = product.workspace({});
  const Call good{product.prepared(), product.arguments(workspace), {}};
  for (const auto& [name, plane] : product.prepared().planes) {
    const std::string& plane_name = name;
    const Tensor& tensor = plane;
    const auto refused = [&](const std::function<void(Call&)>& spoil) {
      expect_refused(product, good, plane_name, spoil);
    };
    refused([&](Call& c) { c.w.planes.erase(plane_name); });
    refused([&](Call& c) { c.w.planes.at(plane_name) = Tensor(tensor.dtype(), tensor.shape()); });
    refused([&](Call& c) { c.w.planes.at(plane_name) = to_device(Tensor(DType::f64, tensor.shape())); });
    refused([&](Call& c) { c.w.planes.at(plane_name) = to_device(Tensor(tensor.dtype(), {1, 2, 3})); });
    // Says cuda, lies in the host's memory.
    const Tensor host(tensor.dtype(), tensor.shape());
    refused([&](Call& c) {
      c.w.planes.at(plane_name) =
          Tensor(host.dtype(), host.shape(), const_cast<std::byte*>(host.bytes()), nullptr, Device::cuda);
    });
  }
  // Planes of a matrix of another size.
  expect_refused(product, good, "prepared[.a-z]*", [](Call& c) { c.w.n = 400; });
  expect_refused(product, good, "prepared[.a-z]*", [](Call& c) { c.w.k = 640; });
  expect_refused(product, good, "prepared|format", [](Call& c) { c.w.format = nullptr; });
}

TEST_F(MatmulCudaArguments, WorkspacesAreRefusedByName) {
  int needed = 0;
  for (const KernelCell& cell : matmul_cells()) {
    if (cell.format != "uniform" || cell.bits != 4 || cell.dtype != DType::f16) continue;
    for (const int splits : {0, 16}) {
      const ProductCase c = usual_case(cell.first);
      const CudaMatmulOptions options{.kernel = cell.kernel, .splits = splits};
      if (why_not_matmul_cuda(*c.format, c.m, c.dtype, options)) continue;
      SCOPED_TRACE(cell.text());
      const Product product(c);
      const GuardedMemory workspace = product.workspace(options);
      const int64_t bytes = workspace.bytes();
      EXPECT_GE(bytes, 0);
      if (bytes == 0) continue;
      ++needed;
      const Call good{product.prepared(), product.arguments(workspace), options};
      std::vector<std::byte> host(static_cast<size_t>(bytes) + 256);
      const auto refused = [&](const std::string& named, const std::function<void(Call&)>& spoil) {
        expect_refused(product, good, named, spoil);
      };
      refused("workspace|workspace_bytes", [](Call& call) { call.arguments.workspace = nullptr; });
      refused("workspace|workspace_bytes", [](Call& call) { --call.arguments.workspace_bytes; });
      refused("workspace|workspace_bytes", [](Call& call) { call.arguments.workspace_bytes = 0; });
      refused("workspace", [](Call& call) {
        call.arguments.workspace = static_cast<std::byte*>(call.arguments.workspace) + 16;
      });
      refused("workspace", [&](Call& call) {
        // Aligned as a workspace must be, but not on the device.
        const auto address = reinterpret_cast<uintptr_t>(host.data());
        call.arguments.workspace = host.data() + (256 - address % 256) % 256;
      });
    }
  }
  EXPECT_GT(needed, 0) << "no kernel asks for a workspace";
}

TEST_F(MatmulCudaArguments, AKernelForOtherTokensIsRefused) {
  for (const KernelCell& cell : matmul_cells()) {
    if (cell.format != "uniform" || cell.bits != 4 || cell.dtype != DType::f16) continue;
    SCOPED_TRACE(cell.text());
    for (const int64_t m : {cell.first - 1, cell.last < 100'000 ? cell.last + 1 : 0}) {
      if (m < 1) continue;
      const Product product(usual_case(m));
      const CudaMatmulOptions options{.kernel = cell.kernel};
      // Another row of the table may give the kernel more tokens.
      const auto why = why_not_matmul_cuda(*product.the_case().format, m, DType::f16, options);
      if (!why) continue;
      EXPECT_FALSE(why->empty());
      const GuardedMemory none(4096, 0, 512);
      CudaMatmulArguments arguments = product.arguments(none);
      EXPECT_THROW(matmul_cuda(product.prepared(), arguments, options), Unsupported) << "m = " << m;
      EXPECT_THROW(static_cast<void>(matmul_cuda_workspace(product.prepared(), m, DType::f16, options)),
                   Error);
    }
  }
  check_cuda(cudaDeviceSynchronize(), "nothing was launched");
}

TEST_F(MatmulCudaArguments, WhyNotSaysWhatIsMissing) {
  const Uniform uniform(4, 128);
  EXPECT_EQ(why_not_matmul_cuda(uniform, 1, DType::f16), std::nullopt);
  EXPECT_NE(why_not_matmul_cuda(uniform, 1, DType::f64).value_or(""), "");
  EXPECT_NE(why_not_matmul_cuda(uniform, 1, DType::f16, {.kernel = "no_such_kernel"}).value_or(""), "");
  EXPECT_NE(why_not_matmul_cuda(uniform, 1, DType::f16, {.kernel = "dequantize_uniform"}).value_or(""), "");
}

TEST_F(MatmulCudaArguments, MemoryOfAnotherDeviceIsRefused) {
  int devices = 0;
  check_cuda(cudaGetDeviceCount(&devices), "devices");
  if (devices < 2) GTEST_SKIP() << "needs two CUDA devices";
  const Product product(usual_case(3));
  const GuardedMemory workspace = product.workspace({});
  Call good{product.prepared(), product.arguments(workspace), {}};
  check_cuda(cudaSetDevice(1), "device 1");
  const auto elsewhere = device_bytes(4096);
  EXPECT_THROW(matmul_cuda(good.w, good.arguments), InvalidArgument);
  check_cuda(cudaSetDevice(0), "device 0");
  expect_refused(product, good, "x", [&](Call& c) { c.arguments.x = elsewhere.get(); });
  expect_refused(product, good, "y", [&](Call& c) { c.arguments.y = elsewhere.get(); });
  EXPECT_NO_THROW(matmul_cuda(good.w, good.arguments));
  check_cuda(cudaDeviceSynchronize(), "matmul_cuda");
}

// A null bias, or strides that only one row would need, are not mistakes.
TEST_F(MatmulCudaArguments, WhatIsNotUsedMayBeMissing) {
  ProductCase c = usual_case(0);
  const Product none(c);
  EXPECT_TRUE(none.run({}));
  c.m = 3;
  c.n = 0;
  const Product no_rows(c);
  EXPECT_TRUE(no_rows.run({}));
  PreparedPlanes w = no_rows.prepared();
  CudaMatmulArguments nothing;
  nothing.m = 0;
  nothing.x_stride = c.k;
  EXPECT_NO_THROW(matmul_cuda(w, nothing));
}

}  // namespace
}  // namespace quantloom
