#include "quantloom/kernels/dequantize.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>

#include "device_memory.hpp"
#include "kernels/cuda_kernels.hpp"

namespace quantloom {
namespace {

constexpr int kPoison = 0xA5;
constexpr int64_t kCanaryBytes = 512;

class DequantizeCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  }
};

// The CPU's decoded values in `dtype`, as bytes, n rows of k elements.
std::vector<std::byte> expected_bytes(const PackedTensor& packed, DType dtype) {
  std::vector<float> values(static_cast<size_t>(packed.n * packed.k));
  dequantize(packed, MatrixView<float>(values.data(), packed.n, packed.k));
  std::vector<std::byte> bytes(values.size() * static_cast<size_t>(size_of(dtype)));
  for (size_t i = 0; i < values.size(); ++i) {
    if (dtype == DType::f32) {
      std::memcpy(bytes.data() + 4 * i, &values[i], 4);
    } else {
      const uint16_t half = dtype == DType::f16 ? f16_from_float(values[i]) : bf16_from_float(values[i]);
      std::memcpy(bytes.data() + 2 * i, &half, 2);
    }
  }
  return bytes;
}

// An output buffer full of poison: a canary, `offset` elements, n rows of `stride` elements, a canary.
class PoisonedOutput {
 public:
  PoisonedOutput(int64_t n, int64_t k, int64_t stride, int64_t offset, DType dtype)
      : n_(n),
        element_(size_of(dtype)),
        row_bytes_(k * element_),
        stride_bytes_(stride * element_),
        begin_(kCanaryBytes + offset * element_),
        total_(begin_ + n * stride_bytes_ + kCanaryBytes),
        memory_(device_bytes(total_)) {
    check_cuda(cudaMemset(memory_.get(), kPoison, static_cast<size_t>(total_)), "poison");
  }
  void* data() const { return memory_.get() + begin_; }

  // Empty if the rows hold `expected` and nothing else was written, else what is wrong.
  std::string compare(const std::vector<std::byte>& expected) const {
    const std::vector<std::byte> host = download(memory_.get(), total_);
    for (int64_t i = 0; i < total_; ++i) {
      const int64_t at = i - begin_;
      const int64_t row = at >= 0 ? at / stride_bytes_ : -1;
      const int64_t within = at >= 0 ? at % stride_bytes_ : 0;
      const bool written = row >= 0 && row < n_ && within < row_bytes_;
      const std::byte wanted =
          written ? expected[static_cast<size_t>(row * row_bytes_ + within)] : std::byte{kPoison};
      if (host[static_cast<size_t>(i)] != wanted) {
        return text_of(written ? "wrong value" : "written outside the rows", " at row ", row, ", column ",
                       within / element_);
      }
    }
    return "";
  }

 private:
  int64_t n_;
  int64_t element_;
  int64_t row_bytes_;
  int64_t stride_bytes_;
  int64_t begin_;
  int64_t total_;
  std::shared_ptr<std::byte> memory_;
};

void expect_equal_to_cpu(const PackedTensor& packed, DType dtype, int64_t padding = 0, int64_t offset = 0) {
  SCOPED_TRACE(text_of(packed.format->spec(), " [", packed.n, ", ", packed.k, "] to ", name_of(dtype),
                       " padding ", padding, " offset ", offset));
  const PackedTensor device = to_device(packed);
  const int64_t stride = packed.k + padding;
  const PoisonedOutput out(packed.n, packed.k, stride, offset, dtype);
  dequantize_cuda(device, out.data(), dtype, stride, nullptr);
  check_cuda(cudaDeviceSynchronize(), "dequantize");
  EXPECT_EQ(out.compare(expected_bytes(packed, dtype)), "");
}

constexpr std::array<DType, 3> kFloatTypes = {DType::f16, DType::bf16, DType::f32};
constexpr std::array<std::array<int64_t, 2>, 8> kShapes = {
    {{1, 1}, {3, 5}, {17, 33}, {2, 8}, {64, 256}, {5, 1031}, {130, 384}, {257, 64}}};

class DequantizeCudaWidths : public DequantizeCuda, public ::testing::WithParamInterface<int> {};

TEST_P(DequantizeCudaWidths, EqualsTheCpuBitForBit) {
  uint64_t seed = 1;
  for (const bool symmetric : {true, false}) {
    for (const int64_t group : {int64_t{1}, int64_t{3}, int64_t{16}, int64_t{32}, int64_t{128},
                                int64_t{1} << 40, Uniform::kPerChannel, Uniform::kPerTensor}) {
      for (const auto& [n, k] : kShapes) {
        for (const DType dtype : kFloatTypes) {
          const DType scale_dtype = kFloatTypes[seed % 3];
          const Uniform uniform(GetParam(), group, symmetric, scale_dtype);
          expect_equal_to_cpu(random_packed(uniform, n, k, ++seed), dtype);
        }
        ++seed;  // another pairing of output and scale types for the next shape
      }
    }
  }
}

TEST_P(DequantizeCudaWidths, TakesStridesUnalignedOutputsAndGroupIndices) {
  uint64_t seed = 1000;
  for (const DType dtype : kFloatTypes) {
    for (const int64_t offset : {0, 1, 3, 8}) {
      for (const int64_t padding : {0, 1, 8, 24}) {
        const Uniform uniform(GetParam(), 32, seed % 2 == 0);
        expect_equal_to_cpu(random_packed(uniform, 9, 200, ++seed), dtype, padding, offset);
        expect_equal_to_cpu(random_packed(uniform, 9, 201, ++seed, true), dtype, padding, offset);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Bits, DequantizeCudaWidths, ::testing::Range(1, 9));

// Few launches: this suite also runs under compute-sanitizer.
class DequantizeCudaSmall : public DequantizeCuda {};

TEST_F(DequantizeCudaSmall, EqualsTheCpuBitForBit) {
  uint64_t seed = 2000;
  for (int bits = 1; bits <= 8; ++bits) {
    for (const bool symmetric : {true, false}) {
      const Uniform uniform(bits, 32, symmetric);
      expect_equal_to_cpu(random_packed(uniform, 17, 203, ++seed), DType::f16, 1, 3);
      expect_equal_to_cpu(random_packed(uniform, 9, 256, ++seed, true), DType::f32);
    }
  }
}

TEST_F(DequantizeCuda, TakesEmptyMatrices) {
  for (const auto& [n, k] : {std::array<int64_t, 2>{0, 0}, {0, 7}, {7, 0}}) {
    for (const bool symmetric : {true, false}) {
      const PackedTensor device = to_device(random_packed(Uniform(3, 32, symmetric), n, k, 1));
      EXPECT_NO_THROW(dequantize_cuda(device, nullptr, DType::f16, k, nullptr));
    }
  }
  check_cuda(cudaDeviceSynchronize(), "empty matrices");
}

TEST_F(DequantizeCuda, TakesExtremeScales) {
  const std::array<float, 6> scales = {0x1p-149F, 0x1p-126F, -0x1p-140F, 0x1p120F, -3.0e38F, 0.0F};
  const Uniform uniform(8, 4, false, DType::f32);
  PackedTensor packed = random_packed(uniform, 3, 8, 5);
  std::copy(scales.begin(), scales.end(), packed.planes.at("scales").values<float>().begin());
  for (const DType dtype : kFloatTypes) expect_equal_to_cpu(packed, dtype);
}

TEST_F(DequantizeCuda, TakesMoreRowsThanTheGrid) {
  expect_equal_to_cpu(random_packed(Uniform(2, Uniform::kPerTensor), 5'000'001, 1, 9), DType::f16);
}

TEST_F(DequantizeCuda, TakesMoreElementsThanAnInt32Counts) {
  constexpr int64_t kRows = 70'001;
  constexpr int64_t kColumns = 32'768;
  size_t free_bytes = 0;
  size_t total_bytes = 0;
  check_cuda(cudaMemGetInfo(&free_bytes, &total_bytes), "cudaMemGetInfo");
  if (free_bytes < size_t{6} << 30) GTEST_SKIP() << "needs 6 GiB of device memory";

  // Every row is the row of a small matrix: its codes rotate through 64 rows.
  constexpr int64_t kDistinct = 64;
  const Uniform uniform(1, Uniform::kPerChannel);
  const PackedTensor small = random_packed(uniform, kDistinct, kColumns, 11);
  PackedTensor large{small.format, kRows, kColumns, {}};
  for (const auto& [name, plane] : small.planes) {
    Tensor tall(plane.dtype(), {kRows, plane.shape()[1]});
    const int64_t row_bytes = plane.byte_count() / kDistinct;
    for (int64_t row = 0; row < kRows; ++row) {
      std::memcpy(tall.bytes() + row * row_bytes, plane.bytes() + row % kDistinct * row_bytes,
                  static_cast<size_t>(row_bytes));
    }
    large.planes.emplace(name, std::move(tall));
  }
  const PackedTensor device = to_device(large);
  const int64_t row_bytes = kColumns * 2;
  const auto out = device_bytes(kRows * row_bytes);
  check_cuda(cudaMemset(out.get(), kPoison, static_cast<size_t>(kRows * row_bytes)), "poison");
  dequantize_cuda(device, out.get(), DType::f16, kColumns, nullptr);
  check_cuda(cudaDeviceSynchronize(), "dequantize");
  const std::vector<std::byte> expected = expected_bytes(small, DType::f16);
  for (const int64_t row : {int64_t{0}, int64_t{32'767}, int64_t{65'535}, int64_t{65'536}, kRows - 1}) {
    const auto got = download(out.get() + row * row_bytes, row_bytes);
    EXPECT_TRUE(std::equal(got.begin(), got.end(), expected.begin() + row % kDistinct * row_bytes)) << row;
  }
}

TEST_F(DequantizeCuda, CanBeCapturedInAGraph) {
  const Uniform uniform(3, 32, false);
  const PackedTensor first = random_packed(uniform, 40, 200, 21);
  const PackedTensor second = random_packed(uniform, 40, 200, 22);
  PackedTensor device = to_device(first);
  const PoisonedOutput out(40, 200, 200, 0, DType::bf16);

  cudaStream_t stream = nullptr;
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "begin capture");
  dequantize_cuda(device, out.data(), DType::bf16, 200, stream);
  cudaGraph_t graph = nullptr;
  check_cuda(cudaStreamEndCapture(stream, &graph), "end capture");
  cudaGraphExec_t executable = nullptr;
  check_cuda(cudaGraphInstantiate(&executable, graph, 0), "instantiate");

  for (const PackedTensor* packed : {&first, &second}) {
    for (auto& [name, plane] : device.planes) {
      const Tensor& fresh = packed->plane(name);
      upload(fresh.bytes(), plane.bytes(), fresh.byte_count());
    }
    check_cuda(cudaGraphLaunch(executable, stream), "launch");
    check_cuda(cudaStreamSynchronize(stream), "synchronize");
    EXPECT_EQ(out.compare(expected_bytes(*packed, DType::bf16)), "");
  }
  check_cuda(cudaGraphExecDestroy(executable), "destroy");
  check_cuda(cudaGraphDestroy(graph), "destroy");
  check_cuda(cudaStreamDestroy(stream), "destroy");
}

TEST_F(DequantizeCuda, CorruptGroupIndexDecodesToNanAndReadsNothing) {
  PackedTensor packed = random_packed(Uniform(4, 32), 3, 64, 31, true);
  packed.planes.at("group_index").values<int32_t>()[5] = 2'000'000'000;
  packed.planes.at("group_index").values<int32_t>()[6] = -1;
  const PackedTensor device = to_device(packed);
  const auto out = device_bytes(3 * 64 * 4);
  dequantize_cuda(device, out.get(), DType::f32, 64, nullptr);
  check_cuda(cudaDeviceSynchronize(), "dequantize");
  const auto bytes = download(out.get(), 3 * 64 * 4);
  for (int64_t row = 0; row < 3; ++row) {
    for (int64_t column = 0; column < 64; ++column) {
      float value = 0;
      std::memcpy(&value, bytes.data() + (row * 64 + column) * 4, 4);
      EXPECT_EQ(std::isnan(value), column == 5 || column == 6) << row << " " << column;
    }
  }
}

TEST_F(DequantizeCuda, RefusesBadArguments) {
  const PackedTensor host = random_packed(Uniform(4, 32), 4, 64, 41);
  const PackedTensor device = to_device(host);
  const auto out = device_bytes(4 * 64 * 4);
  std::vector<float> host_out(4 * 64);

  PackedTensor mixed = device;
  mixed.planes.at("scales") = host.plane("scales");
  PackedTensor disguised = device;  // says cuda, lies in the host's memory
  const Tensor& codes = host.plane("codes");
  disguised.planes.at("codes") =
      Tensor(codes.dtype(), codes.shape(), const_cast<std::byte*>(codes.bytes()), nullptr, Device::cuda);
  PackedTensor lacking = device;
  lacking.planes.erase("scales");
  PackedTensor mistyped = device;
  mistyped.planes.at("scales") = to_device(Tensor(DType::f32, host.plane("scales").shape()));

  const auto call = [&](const PackedTensor& packed, void* to, DType dtype, int64_t stride) {
    dequantize_cuda(packed, to, dtype, stride, nullptr);
  };
  EXPECT_THROW(call(host, out.get(), DType::f32, 64), InvalidArgument);
  EXPECT_THROW(call(mixed, out.get(), DType::f32, 64), InvalidArgument);
  EXPECT_THROW(call(disguised, out.get(), DType::f32, 64), InvalidArgument);
  EXPECT_THROW(call(lacking, out.get(), DType::f32, 64), InvalidArgument);
  EXPECT_THROW(call(mistyped, out.get(), DType::f32, 64), InvalidArgument);
  EXPECT_THROW(call(device, nullptr, DType::f32, 64), InvalidArgument);
  EXPECT_THROW(call(device, host_out.data(), DType::f32, 64), InvalidArgument);
  EXPECT_THROW(call(device, out.get() + 1, DType::f16, 64), InvalidArgument);
  EXPECT_THROW(call(device, out.get(), DType::f32, 63), InvalidArgument);
  EXPECT_THROW(call(device, out.get(), DType::f32, INT64_MAX / 2), InvalidArgument);
  EXPECT_THROW(call(device, out.get(), DType::i8, 64), TypeMismatch);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  EXPECT_NO_THROW(call(device, out.get(), DType::f32, 64));
  check_cuda(cudaDeviceSynchronize(), "dequantize");
}

}  // namespace
}  // namespace quantloom
