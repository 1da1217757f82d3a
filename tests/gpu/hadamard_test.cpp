#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cuda_streams.hpp"
#include "device_memory.hpp"
#include "quantloom/transforms/hadamard_cuda.hpp"

namespace quantloom {
namespace {

class HadamardCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  }
};
// Few launches: this suite also runs under compute-sanitizer.
class HadamardCudaSmall : public HadamardCuda {};

constexpr std::byte kPoison{0xA5};

struct Case {
  int64_t rows = 1;
  int64_t block = 16;
  int64_t per_row = 1;
  DType dtype = DType::f16;
  bool inverse = false;
  bool with_signs = false;
  bool with_channels = false;
  int64_t padding = 0;  // elements between rows
  int64_t offset = 0;   // elements before the first row
  bool in_place = false;
};

float element_at(const std::vector<std::byte>& bytes, DType dtype, int64_t i) {
  if (dtype == DType::f32) {
    float value = 0;
    std::memcpy(&value, bytes.data() + 4 * i, 4);
    return value;
  }
  uint16_t half = 0;
  std::memcpy(&half, bytes.data() + 2 * i, 2);
  return dtype == DType::f16 ? float_from_f16(half) : float_from_bf16(half);
}

// Compares with the CPU, and every byte outside the rows with what it was.
void expect_equal_to_cpu(const Case& c, uint64_t seed) {
  SCOPED_TRACE(text_of(c.rows, " rows of ", c.per_row, " x ", c.block, " ", name_of(c.dtype), " inverse ",
                       c.inverse, " signs ", c.with_signs, " channels ", c.with_channels, " padding ",
                       c.padding, " offset ", c.offset, " in place ", c.in_place));
  const int64_t cols = c.block * c.per_row;
  const int64_t stride = cols + c.padding;
  const int64_t element = size_of(c.dtype);
  const int64_t total = c.offset + c.rows * stride + 64;
  std::vector<std::byte> x(static_cast<size_t>(total * element));
  const CounterRandom random(seed);
  for (int64_t i = 0; i < total; ++i) {
    const auto value = static_cast<float>(random.normal(static_cast<uint64_t>(i)));
    if (c.dtype == DType::f32) {
      std::memcpy(x.data() + 4 * i, &value, 4);
    } else {
      const uint16_t half = c.dtype == DType::f16 ? f16_from_float(value) : bf16_from_float(value);
      std::memcpy(x.data() + 2 * i, &half, 2);
    }
  }
  const std::vector<uint8_t> signs = c.with_signs ? random_signs(cols, seed) : std::vector<uint8_t>();
  std::vector<float> channels(c.with_channels ? static_cast<size_t>(cols) : 0);
  for (size_t i = 0; i < channels.size(); ++i)
    channels[i] = static_cast<float>(random.uniform(i + (1U << 30)));

  std::vector<std::byte> expected = c.in_place ? x : std::vector<std::byte>(x.size(), kPoison);
  HadamardOptions options;
  options.block = c.block;
  options.inverse = c.inverse;
  options.signs = signs;
  options.channel_scale = channels;
  options.scale = 0.75F;
  const FloatMatrix view(x.data() + c.offset * element, c.dtype, c.rows, cols, stride);
  hadamard(view, expected.data() + c.offset * element, stride, options);

  const auto device_x = device_bytes(total * element);
  const auto device_out = c.in_place ? device_x : device_bytes(total * element);
  check_cuda(cudaMemset(device_out.get(), 0xA5, x.size()), "poison");
  upload(x.data(), device_x.get(), total * element);
  const auto device_signs = device_bytes(static_cast<int64_t>(signs.size()));
  const auto device_channels = device_bytes(static_cast<int64_t>(4 * channels.size()));
  if (!signs.empty()) upload(signs.data(), device_signs.get(), static_cast<int64_t>(signs.size()));
  if (!channels.empty())
    upload(channels.data(), device_channels.get(), static_cast<int64_t>(4 * channels.size()));
  CudaHadamardOptions cuda_options;
  cuda_options.block = c.block;
  cuda_options.inverse = c.inverse;
  cuda_options.scale = 0.75F;
  if (c.with_signs) cuda_options.signs = reinterpret_cast<const uint8_t*>(device_signs.get());
  if (c.with_channels) cuda_options.channel_scale = reinterpret_cast<const float*>(device_channels.get());
  const CudaMatrix matrix{device_x.get() + c.offset * element, c.dtype, c.rows, cols, stride};
  hadamard_cuda(matrix, device_out.get() + c.offset * element, stride, cuda_options, nullptr);
  check_cuda(cudaDeviceSynchronize(), "hadamard");

  const std::vector<std::byte> got = download(device_out.get(), total * element);
  // Two roundings to the dtype at most, and sums of float32 in another order: of up to 924 terms at once.
  const double absolute = 1e-5;
  const double unit = c.dtype == DType::f32 ? 4e-6 : c.dtype == DType::f16 ? 0x1p-10 : 0x1p-7;
  for (int64_t i = 0; i < total; ++i) {
    const int64_t at = i - c.offset;
    const bool written = at >= 0 && at < c.rows * stride && at % stride < cols;
    if (!written) {
      ASSERT_EQ(
          std::memcmp(got.data() + i * element, expected.data() + i * element, static_cast<size_t>(element)),
          0)
          << "written outside the rows at " << at;
      continue;
    }
    const double wanted = element_at(expected, c.dtype, i);
    ASSERT_NEAR(element_at(got, c.dtype, i), wanted, unit * std::abs(wanted) + absolute)
        << "row " << at / stride << ", column " << at % stride;
  }
}

constexpr DType kFloats[] = {DType::f16, DType::bf16, DType::f32};

class HadamardCudaBlocks : public HadamardCuda, public ::testing::WithParamInterface<int64_t> {};

TEST_P(HadamardCudaBlocks, EqualTheCpu) {
  const int64_t block = GetParam();
  uint64_t seed = static_cast<uint64_t>(block);
  for (const DType dtype : kFloats) {
    for (const bool inverse : {false, true}) {
      for (int mode = 0; mode < 6; ++mode) {
        Case c{1, block, 1, dtype, inverse};
        c.with_signs = mode > 0;
        c.with_channels = mode % 2 == 0;
        if (mode == 1) c.rows = 7;
        // More blocks than fit on the processors: the kernels that copy ahead.
        if (mode == 2) c.rows = std::max<int64_t>(300, std::min<int64_t>(6000, (int64_t{1} << 23) / block));
        if (mode == 3) c = {5, block, 3, dtype, inverse, true, false, 8, 8, false};
        if (mode == 4) c = {5, block, 3, dtype, inverse, true, true, 3, 1, false};  // no vectors
        if (mode == 5) c = {4, block, 2, dtype, inverse, true, false, 16, 0, true};
        expect_equal_to_cpu(c, ++seed);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Powers, HadamardCudaBlocks,
                         ::testing::Values(16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768));
INSTANTIATE_TEST_SUITE_P(Orders, HadamardCudaBlocks,
                         ::testing::Values(12 * 16, 12 * 256, 12288, 12 * 2048, 20 * 32, 2560, 5120, 10240,
                                           20480, 28 * 16, 28 * 64, 28 * 128, 7168, 14336, 28672, 36 * 16,
                                           52 * 128, 36 * 256, 60 * 512, 76 * 64, 13824, 27648, 11008, 22016,
                                           18944, 204 * 32, 252 * 128, 924 * 32, 276 * 16, 316 * 64));

TEST_F(HadamardCudaSmall, EqualsTheCpu) {
  uint64_t seed = 900;
  for (const int64_t block :
       {16, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768, 12 * 16, 20 * 64, 28 * 32, 172 * 16}) {
    ++seed;
    expect_equal_to_cpu({3, block, 2, kFloats[seed % 3], seed % 2 == 0, true, true, 8, 0, seed % 4 == 0},
                        seed);
    expect_equal_to_cpu({2, block, 1, kFloats[(seed + 1) % 3], seed % 2 == 1, true, false, 1, 1, false},
                        seed);
  }
}

TEST_F(HadamardCuda, CanBeCapturedAndRepeats) {
  for (const int64_t block : {128, 4096, 32768, 14336}) {
    const int64_t rows = 400;
    const auto x = device_bytes(rows * block * 2);
    const auto out = device_bytes(rows * block * 2);
    const auto again = device_bytes(rows * block * 2);
    std::vector<uint16_t> values(static_cast<size_t>(rows * block));
    const CounterRandom random(3);
    for (size_t i = 0; i < values.size(); ++i)
      values[i] = f16_from_float(static_cast<float>(random.normal(i)));
    upload(values.data(), x.get(), rows * block * 2);
    settle();
    const CudaMatrix matrix{x.get(), DType::f16, rows, block, block};
    const Stream stream;
    hadamard_cuda(matrix, out.get(), block, {}, stream);
    const Graph graph(stream, [&] { hadamard_cuda(matrix, again.get(), block, {}, stream); });
    graph.launch(stream);
    stream.synchronize();
    const std::vector<std::byte> first = download(out.get(), rows * block * 2);
    for (int repeat = 0; repeat < 20; ++repeat) {
      graph.launch(stream);
      stream.synchronize();
      ASSERT_EQ(download(again.get(), rows * block * 2), first) << block << " repeat " << repeat;
    }
  }
}

TEST_F(HadamardCuda, TakesInfinitiesAsTheCpu) {
  for (const int64_t block : {64, 4096, 192}) {
    std::vector<float> values(static_cast<size_t>(block), 1.0F);
    values[3] = INFINITY;
    std::vector<float> expected(values.size());
    hadamard(MatrixView<const float>(values.data(), 1, block), expected.data(), block);
    const auto x = device_bytes(4 * block);
    upload(values.data(), x.get(), 4 * block);
    hadamard_cuda({x.get(), DType::f32, 1, block, block}, x.get(), block, {}, nullptr);
    check_cuda(cudaDeviceSynchronize(), "hadamard");
    const std::vector<std::byte> got = download(x.get(), 4 * block);
    for (int64_t i = 0; i < block; ++i) {
      ASSERT_EQ(element_at(got, DType::f32, i), expected[static_cast<size_t>(i)]) << block << " " << i;
    }
  }
}

TEST_F(HadamardCuda, TakesMoreElementsThanAnInt32Counts) {
  constexpr int64_t kRows = (int64_t{1} << 31) / 4096 + 3;
  size_t free_bytes = 0;
  size_t total_bytes = 0;
  check_cuda(cudaMemGetInfo(&free_bytes, &total_bytes), "cudaMemGetInfo");
  if (free_bytes < size_t{6} << 30) GTEST_SKIP() << "needs 6 GiB of device memory";
  for (const int64_t block : {64, 4096}) {
    const auto x = device_bytes(kRows * 4096 * 2);
    check_cuda(cudaMemset(x.get(), 0, static_cast<size_t>(kRows * 4096 * 2)), "zero");
    const uint16_t one = f16_from_float(8);
    upload(&one, x.get() + (kRows * 4096 - block) * 2, 2);  // first of the last block
    CudaHadamardOptions options;
    options.block = block;
    hadamard_cuda({x.get(), DType::f16, kRows, 4096, 4096}, x.get(), 4096, options, nullptr);
    check_cuda(cudaDeviceSynchronize(), "hadamard");
    const std::vector<std::byte> got = download(x.get() + (kRows * 4096 - block) * 2, block * 2);
    for (int64_t i = 0; i < block; ++i) {
      ASSERT_EQ(element_at(got, DType::f16, i),
                static_cast<float>(8 / std::sqrt(static_cast<double>(block))));
    }
  }
}

TEST_F(HadamardCuda, RefusesByName) {
  const auto memory = device_bytes(1 << 20);
  const auto message = [&](int64_t cols, int64_t block, DType dtype = DType::f16) {
    CudaHadamardOptions options;
    options.block = block;
    try {
      hadamard_cuda({memory.get(), dtype, 1, cols, cols}, memory.get(), cols, options, nullptr);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_NE(message(8, 0).find("blocks of 8 = 1 * 2^3, expected at least 16"), std::string::npos);
  EXPECT_NE(message(65536, 0).find("expected at most 32768"), std::string::npos);
  EXPECT_NE(message(96, 96).find("12 * 2^3, expected at least 2^4"), std::string::npos);
  EXPECT_NE(message(116, 0).find("the largest that works is 4"), std::string::npos);
  EXPECT_NE(message(64, 0, DType::i32).find("x: got int32"), std::string::npos);
  std::vector<uint16_t> host(64);
  EXPECT_THROW(hadamard_cuda({host.data(), DType::f16, 1, 64, 64}, memory.get(), 64, {}, nullptr),
               InvalidArgument);
  EXPECT_THROW(hadamard_cuda({memory.get(), DType::f16, 1, 64, 64}, host.data(), 64, {}, nullptr),
               InvalidArgument);
  EXPECT_THROW(hadamard_cuda({memory.get(), DType::f16, 2, 64, 64}, memory.get() + 32, 64, {}, nullptr),
               InvalidArgument);
  EXPECT_THROW(hadamard_cuda({memory.get(), DType::f16, 2, 64, 63}, memory.get(), 64, {}, nullptr),
               InvalidArgument);
  EXPECT_NO_THROW(hadamard_cuda({nullptr, DType::f16, 0, 64, 64}, nullptr, 64, {}, nullptr));
  check_cuda(cudaDeviceSynchronize(), "refusals");
}

}  // namespace
}  // namespace quantloom
