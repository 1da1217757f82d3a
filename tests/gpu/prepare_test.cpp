// Bringing planes into fragment order on the device, against the scalar reference on the CPU.
#include "prepare_checks.hpp"

namespace quantloom {
namespace {

class PrepareCuda : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  }
};

TEST_P(PrepareCuda, EqualsTheCpuByteForByte) {
  const int bits = GetParam();
  Draws draws(static_cast<uint64_t>(bits));
  const std::vector<int64_t> sizes = {0, 1, 2, 7, 15, 16, 17, 63, 64, 65, 100, 127, 128, 129, 200, 333};
  const std::vector<int64_t> groups = {
      1, 3, 16, 24, 32, 64, 100, 128, 256, 400, Uniform::kPerChannel, Uniform::kPerTensor};
  const std::vector<DType> dtypes = {DType::f16, DType::bf16, DType::f32};
  for (uint64_t seed = 0; seed < 60; ++seed) {
    const int64_t group = draws.pick(groups);
    ProductCase c;
    const DType scales = draws.pick(dtypes);
    if (seed % 5 == 4) {
      c.format = random_codebook(bits, group, scales, false, draws);
    } else {
      c.format = std::make_shared<const Uniform>(bits, group, seed % 2 == 0, scales);
    }
    c.n = draws.pick(sizes);
    c.k = draws.pick(sizes);
    c.group_index = group > 0 && seed % 3 == 0;
    c.seed = seed;
    check_round_trip(c);
    check_decoding(c);
    if (HasFailure()) return;
  }
}

class PrepareCudaSmall : public PrepareCuda {};

TEST_P(PrepareCudaSmall, EqualsTheCpuByteForByte) {
  Draws draws(1);
  for (const int64_t group : {int64_t{24}, int64_t{32}, int64_t{64}, Uniform::kPerTensor}) {
    ProductCase c;
    c.format = std::make_shared<const Uniform>(GetParam(), group, false);
    if (group == 64) c.format = random_codebook(GetParam(), group, DType::f16, false, draws);
    c.n = 67;
    c.k = 130;
    c.group_index = group == 32;
    check_round_trip(c);
    check_decoding(c);
  }
}

class PrepareVectorsCuda : public PrepareCuda {};

TEST_P(PrepareVectorsCuda, EqualsTheCpuByteForByte) {
  const int dim = GetParam();
  Draws draws(static_cast<uint64_t>(dim));
  const std::vector<int64_t> sizes = {0, 1, 2, 7, 15, 16, 17, 63, 64, 65, 100, 127, 128, 129, 200, 333};
  const std::vector<int64_t> groups = {
      8, 16, 24, 32, 64, 128, 400, ScaledFormat::kPerChannel, ScaledFormat::kPerTensor};
  for (int bits = 1; bits <= (dim == 2 ? 12 : 16); ++bits) {
    for (uint64_t seed = 0; seed < 6; ++seed) {
      const int64_t most = int64_t{1} << bits;
      const int64_t entries = seed % 2 == 0 || most < 4 ? most : most - draws.below(most / 2 - 1);
      ProductCase c;
      c.format = std::make_shared<const VectorCodebook>(
          entries, dim, draws.pick(groups), draws.pick(std::vector{DType::f16, DType::bf16, DType::f32}));
      c.n = draws.pick(sizes);
      c.k = draws.pick(sizes);
      c.seed = seed;
      check_round_trip(c);
      check_decoding(c);
      if (HasFailure()) return;
    }
  }
}

TEST_P(PrepareVectorsCuda, SeveralTablesEqualTheCpuByteForByte) {
  const int dim = GetParam();
  Draws draws(static_cast<uint64_t>(10 + dim));
  const std::vector<int64_t> sizes = {0, 1, 2, 7, 16, 17, 63, 64, 65, 127, 128, 129, 333};
  const std::vector<int64_t> groups = {
      8, 16, 24, 64, 128, ScaledFormat::kPerChannel, ScaledFormat::kPerTensor};
  for (int64_t tables = 2; tables <= 8; ++tables) {
    for (int bits = 1; bits <= 16 && tables * bits <= 4 * dim; ++bits) {
      for (uint64_t seed = 0; seed < 3; ++seed) {
        const int64_t most = int64_t{1} << bits;
        const int64_t entries = seed % 2 == 0 || most < 4 ? most : most - draws.below(most / 2 - 1);
        ProductCase c;
        c.format = std::make_shared<const VectorCodebook>(
            entries, dim, draws.pick(groups), draws.pick(std::vector{DType::f16, DType::bf16, DType::f32}),
            tables);
        c.n = draws.pick(sizes);
        c.k = draws.pick(sizes);
        c.seed = seed;
        check_round_trip(c);
        check_decoding(c);
        if (HasFailure()) return;
      }
    }
  }
}

class PrepareSpqrCuda : public PrepareCuda {};

TEST_P(PrepareSpqrCuda, EqualsTheCpuByteForByte) {
  const int bits = GetParam();
  Draws draws(static_cast<uint64_t>(30 + bits));
  const std::vector<int64_t> sizes = {0, 1, 2, 7, 15, 16, 17, 63, 64, 65, 100, 127, 128, 129, 200, 333};
  const std::vector<int64_t> groups = {1, 3, 16, 24, 32, 64, 100, 128, 400};
  const std::vector<int64_t> blocks = {1, 3, 8, 16, 17, 32, 48, 64, 100, 128, 1000};
  for (uint64_t seed = 0; seed < 40; ++seed) {
    ProductCase c;
    c.format = std::make_shared<const Spqr>(bits, draws.pick(groups), static_cast<int>(1 + draws.below(8)),
                                            static_cast<int>(1 + draws.below(8)), draws.pick(blocks));
    c.n = draws.pick(sizes);
    c.k = draws.pick(sizes);
    c.group_index = seed % 3 == 0;
    c.seed = seed;
    if (seed % 2 == 0) c.format = std::make_shared<const Outliers>(c.format, c.n * c.k / 20);
    check_round_trip(c);
    check_decoding(c);
    if (HasFailure()) return;
  }
}

INSTANTIATE_TEST_SUITE_P(Bits, PrepareSpqrCuda, ::testing::Range(1, 9));

class PrepareOutliersCuda : public PrepareCuda {};

TEST_F(PrepareOutliersCuda, TakesOtherOrdersOfColumns) {
  Draws draws(6);
  for (const char* dense : {"uniform:4:g32:asym", "codebook:nf4:g16", "uniform:3:g24"}) {
    ProductCase c;
    c.format = std::make_shared<const Outliers>(format_from_spec(dense), int64_t{600});
    c.n = 67;
    c.k = 200;
    c.group_index = true;
    check_round_trip(c);
    check_decoding(c);
  }
}

TEST_F(PrepareOutliersCuda, EqualsTheCpuByteForByte) {
  Draws draws(5);
  for (const char* dense : {"uniform:4:g24:asym", "uniform:3:g64", "codebook:nf4:g16",
                            "vector_codebook:64x4:g8", "vector_codebook:2x256x8:g16", "uniform:2:tensor"}) {
    for (const auto& [n, k] :
         std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {130, 100}, {67, 256}, {3, 0}}) {
      ProductCase c;
      c.format = std::make_shared<const Outliers>(format_from_spec(dense), n * k / 10);
      c.n = n;
      c.k = k;
      c.seed = static_cast<uint64_t>(n);
      check_round_trip(c);
      check_decoding(c);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Dims, PrepareVectorsCuda, ::testing::Values(2, 4, 8));
INSTANTIATE_TEST_SUITE_P(Bits, PrepareCuda, ::testing::Range(1, 9));
INSTANTIATE_TEST_SUITE_P(Bits, PrepareCudaSmall, ::testing::Range(1, 9));

class PrepareCudaArguments : public PrepareCuda {};

TEST_F(PrepareCudaArguments, RunsOnAStreamAndInAGraph) {
  ProductCase c{.format = std::make_shared<const Uniform>(3, 32, false), .n = 130, .k = 300};
  Draws draws(9);
  const PackedTensor packed = random_planes(c, draws);
  const PackedTensor device = to_device(packed);
  PreparedPlanes prepared = empty_planes(packed);
  cudaStream_t stream = nullptr;
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "begin capture");
  prepare_cuda(device, prepared, stream);
  cudaGraph_t graph = nullptr;
  check_cuda(cudaStreamEndCapture(stream, &graph), "end capture");
  cudaGraphExec_t executable = nullptr;
  check_cuda(cudaGraphInstantiate(&executable, graph, 0), "instantiate");
  check_cuda(cudaGraphLaunch(executable, stream), "launch");
  check_cuda(cudaStreamSynchronize(stream), "synchronize");
  for (const auto& [name, plane] : prepare_fragments(packed).planes) {
    expect_same_bytes(prepared.plane(name), plane, name);
  }
  check_cuda(cudaGraphExecDestroy(executable), "destroy");
  check_cuda(cudaGraphDestroy(graph), "destroy");
  check_cuda(cudaStreamDestroy(stream), "destroy");
}

TEST_F(PrepareCudaArguments, DecodingRefusesBadArguments) {
  ProductCase c{.format = std::make_shared<const Uniform>(4, 32, false), .n = 10, .k = 70};
  Draws draws(9);
  const PreparedPlanes host = prepare_fragments(random_planes(c, draws));
  const PreparedPlanes prepared = to_device(host);
  const auto out = device_bytes(10 * 136 * 4);
  std::vector<std::byte> host_out(10 * 136 * 4 + 16);
  const auto address = reinterpret_cast<uintptr_t>(host_out.data());
  void* const aligned_host = host_out.data() + (16 - address % 16) % 16;
  const auto call = [&](const PreparedPlanes& w, void* to, DType dtype, int64_t stride) {
    decode_fragments_cuda(w, to, dtype, stride, nullptr);
  };
  EXPECT_THROW(call(host, out.get(), DType::f16, 128), InvalidArgument);
  EXPECT_THROW(call(prepared, nullptr, DType::f16, 128), InvalidArgument);
  EXPECT_THROW(call(prepared, out.get() + 8, DType::f16, 128), InvalidArgument);
  EXPECT_THROW(call(prepared, aligned_host, DType::f16, 128), InvalidArgument);
  EXPECT_THROW(call(prepared, out.get(), DType::i8, 128), TypeMismatch);
  EXPECT_THROW(call(prepared, out.get(), DType::f16, 127), InvalidArgument);
  EXPECT_THROW(call(prepared, out.get(), DType::f16, 120), InvalidArgument);
  EXPECT_THROW(call(prepared, out.get(), DType::f16, 129), InvalidArgument);
  EXPECT_THROW(call(prepared, out.get(), DType::f32, int64_t{1} << 62), InvalidArgument);
  check_cuda(cudaDeviceSynchronize(), "nothing was launched");
  EXPECT_NO_THROW(call(prepared, out.get(), DType::f32, 136));
  check_cuda(cudaDeviceSynchronize(), "decode_fragments_cuda");
}

TEST_F(PrepareCudaArguments, RefusesBadPlanes) {
  ProductCase c{.format = std::make_shared<const Uniform>(4, 32, false), .n = 10, .k = 64};
  Draws draws(9);
  const PackedTensor host = random_planes(c, draws);
  const PackedTensor device = to_device(host);
  const PreparedPlanes good = empty_planes(host);

  const auto refuses = [&](const PackedTensor& packed, PreparedPlanes prepared, const std::string& name) {
    try {
      prepare_cuda(packed, prepared, nullptr);
      ADD_FAILURE() << "no error about " << name;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(name), std::string::npos) << error.what();
    }
    PackedTensor to = packed;
    try {
      unprepare_cuda(prepared, to, nullptr);
      ADD_FAILURE() << "no error about " << name << " on the way back";
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(name), std::string::npos) << error.what();
    }
  };
  for (const auto& [name, plane] : host.planes) {
    SCOPED_TRACE(name);
    PackedTensor lacking = device;
    lacking.planes.erase(name);
    refuses(lacking, good, name);
    PackedTensor on_cpu = device;
    on_cpu.planes.at(name) = host.plane(name);
    refuses(on_cpu, good, "plane");  // of two devices: either may be named
    PackedTensor longer = device;
    std::vector<int64_t> shape = plane.shape();
    shape.push_back(1);
    longer.planes.at(name) = to_device(Tensor(plane.dtype(), shape));
    refuses(longer, good, name);
  }
  for (const auto& [name, plane] : good.planes) {
    SCOPED_TRACE("prepared " + name);
    PreparedPlanes lacking = good;
    lacking.planes.erase(name);
    refuses(device, lacking, name);
    PreparedPlanes on_cpu = good;
    on_cpu.planes.at(name) = Tensor(plane.dtype(), plane.shape());
    refuses(device, on_cpu, name);
    PreparedPlanes mistyped = good;
    mistyped.planes.at(name) = to_device(Tensor(DType::f64, plane.shape()));
    refuses(device, mistyped, name);
  }
  // Says cuda, lies in the host's memory.
  const Tensor& codes = host.plane("codes");
  PackedTensor disguised = device;
  disguised.planes.at("codes") =
      Tensor(codes.dtype(), codes.shape(), const_cast<std::byte*>(codes.bytes()), nullptr, Device::cuda);
  refuses(disguised, good, "codes");
  // Of another matrix.
  PreparedPlanes other = good;
  other.n = 200;
  PackedTensor unchanged = device;
  EXPECT_THROW(prepare_cuda(device, other, nullptr), Error);
  EXPECT_THROW(unprepare_cuda(other, unchanged, nullptr), Error);
  check_cuda(cudaDeviceSynchronize(), "nothing was launched");
}

}  // namespace
}  // namespace quantloom
