// A matrix of more weights than an int32 counts, made on the device and checked row by row.
#include "product_case.hpp"
#include "product_table.hpp"

namespace quantloom {
namespace {

constexpr int64_t kRows = 65'600;
constexpr int64_t kColumns = 32'832;  // 256 groups of 128 and half a group more
constexpr int64_t kGroups = 257;
constexpr uint64_t kSeed = 2024;

static_assert(kRows * kColumns > int64_t{1} << 31);

class MatmulCudaHuge : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
    size_t free_bytes = 0;
    size_t total_bytes = 0;
    check_cuda(cudaMemGetInfo(&free_bytes, &total_bytes), "cudaMemGetInfo");
    if (free_bytes < size_t{20} << 30) GTEST_SKIP() << "needs 20 GiB of device memory";
  }
};

const std::vector<int64_t> kSampled = {0,      1,      63,     64,     32'767, 32'768,
                                       65'407, 65'408, 65'409, 65'535, 65'536, 65'599};

float scale_of(int64_t row, int64_t group) {
  const uint32_t word = hash_word(kSeed + 1, static_cast<uint64_t>(row * kGroups + group));
  return std::ldexp(1.0F, -6 + static_cast<int>(word % 4));
}

TEST_P(MatmulCudaHuge, EveryRowIsRight) {
  const int bits = GetParam();
  const auto format = std::make_shared<const Uniform>(bits, 128);
  const int64_t row_words = packed_words(kColumns, bits);
  ASSERT_EQ(row_words * 32, kColumns * bits) << "no padding, or the hash would have to leave it out";

  PackedTensor packed{format, kRows, kColumns, {}};
  const auto codes = device_bytes(kRows * row_words * 4);
  fill_with_hash(reinterpret_cast<uint32_t*>(codes.get()), kRows * row_words, kSeed);
  packed.planes.emplace("codes", Tensor(DType::i32, {kRows, row_words}, codes.get(), codes, Device::cuda));
  Tensor scales(DType::f16, {kRows, kGroups});
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t g = 0; g < kGroups; ++g) {
      scales.values<uint16_t>()[static_cast<size_t>(row * kGroups + g)] = f16_from_float(scale_of(row, g));
    }
  }
  packed.planes.emplace("scales", to_device(scales));

  PreparedPlanes prepared{format, kRows, kColumns, {}};
  for (const PlaneSpec& spec : prepared_planes(*format, kRows, kColumns, false)) {
    const int64_t bytes = checked_mul(checked_product(spec.shape), size_of(spec.dtype));
    const auto memory = device_bytes(bytes);
    check_cuda(cudaMemset(memory.get(), 0xFF, static_cast<size_t>(bytes)), "poison");
    prepared.planes.emplace(spec.name, Tensor(spec.dtype, spec.shape, memory.get(), memory, Device::cuda));
  }
  prepare_cuda(packed, prepared, nullptr);
  check_cuda(cudaDeviceSynchronize(), "prepare_cuda");

  // Back again, over the same memory.
  check_cuda(cudaMemset(codes.get(), 0, static_cast<size_t>(kRows * row_words * 4)), "clear");
  unprepare_cuda(prepared, packed, nullptr);
  check_cuda(cudaDeviceSynchronize(), "unprepare_cuda");
  for (const int64_t row : kSampled) {
    std::vector<uint32_t> words(static_cast<size_t>(row_words));
    const auto bytes = download(codes.get() + row * row_words * 4, row_words * 4);
    std::memcpy(words.data(), bytes.data(), bytes.size());
    for (int64_t i = 0; i < row_words; ++i) {
      ASSERT_EQ(words[static_cast<size_t>(i)], hash_word(kSeed, static_cast<uint64_t>(row * row_words + i)))
          << "row " << row << ", word " << i;
    }
  }

  Draws draws(3);
  for (const int64_t m : {1, 16, 40, 300}) {
    std::vector<uint16_t> x(static_cast<size_t>(m * kColumns));
    std::vector<float> values(x.size());
    for (size_t i = 0; i < x.size(); ++i) {
      values[i] = static_cast<float>(draws.below(5) - 2);
      x[i] = f16_from_float(values[i]);
    }
    // [sampled row][token]
    std::vector<std::vector<double>> expected;
    for (const int64_t row : kSampled) {
      std::vector<double> weights(static_cast<size_t>(kColumns));
      for (int64_t c = 0; c < kColumns; ++c) {
        const uint32_t word = hash_word(kSeed, static_cast<uint64_t>(row * row_words + c * bits / 32));
        const auto code = static_cast<int>((word >> (c * bits % 32)) & ((1U << bits) - 1U));
        weights[static_cast<size_t>(c)] =
            static_cast<double>(scale_of(row, c / 128)) * (code - (1 << (bits - 1)));
      }
      expected.emplace_back();
      for (int64_t t = 0; t < m; ++t) {
        double sum = 0;
        for (int64_t c = 0; c < kColumns; ++c) {
          sum += weights[static_cast<size_t>(c)] *
                 static_cast<double>(values[static_cast<size_t>(t * kColumns + c)]);
        }
        expected.back().push_back(sum);
      }
    }
    const auto x_memory = device_bytes(m * kColumns * 2);
    upload(x.data(), x_memory.get(), m * kColumns * 2);
    for (const KernelCell& cell : matmul_cells()) {
      const CudaMatmulOptions options{.kernel = cell.kernel};
      if (cell.format != "uniform" || cell.bits != bits || cell.dtype != DType::f16 || !cell.takes(m) ||
          why_not_matmul_cuda(*format, m, DType::f16, options)) {
        continue;
      }
      SCOPED_TRACE(text_of("m = ", m, ", ", cell.kernel));
      const GuardedMemory workspace(matmul_cuda_workspace(prepared, m, DType::f16, options), 0, 512);
      const GuardedMemory y(m * kRows * 2, 0, 512);
      CudaMatmulArguments arguments;
      arguments.x = x_memory.get();
      arguments.x_stride = kColumns;
      arguments.y = y.data();
      arguments.y_stride = kRows;
      arguments.m = m;
      arguments.workspace = workspace.bytes() > 0 ? workspace.data() : nullptr;
      arguments.workspace_bytes = workspace.bytes();
      matmul_cuda(prepared, arguments, options);
      check_cuda(cudaDeviceSynchronize(), "matmul_cuda");
      const auto bytes = y.read();
      ASSERT_TRUE(bytes) << "written outside y";
      const auto at = [&](int64_t token, int64_t row) {
        uint16_t half = 0;
        std::memcpy(&half, bytes->data() + (token * kRows + row) * 2, 2);
        return float_from_f16(half);
      };
      int64_t unwritten = 0;
      for (int64_t i = 0; i < m * kRows; ++i) unwritten += std::isnan(at(0, i)) ? 1 : 0;
      EXPECT_EQ(unwritten, 0);
      for (size_t i = 0; i < kSampled.size(); ++i) {
        for (int64_t t = 0; t < m; ++t) {
          const auto wanted = static_cast<float>(expected[i][static_cast<size_t>(t)]);
          ASSERT_EQ(at(t, kSampled[i]), float_from_f16(f16_from_float(wanted)))
              << "token " << t << ", row " << kSampled[i];
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Bits, MatmulCudaHuge, ::testing::Values(2, 8));

}  // namespace
}  // namespace quantloom
