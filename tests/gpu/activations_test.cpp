// Rounding of activations on the device, against the CPU: the same bytes.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "activation_values.hpp"
#include "cuda_streams.hpp"
#include "quantloom/activations/cuda_activations.hpp"
#include "quantloom/error.hpp"

namespace quantloom {
namespace {

class ActivationsCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  }
};
// Few launches: this suite also runs under compute-sanitizer.
class ActivationsCudaSmall : public ActivationsCuda {};

constexpr DType kFloats[] = {DType::f16, DType::bf16, DType::f32};
constexpr const char* kSpecs[] = {"int8:token",
                                  "int8:token:asym",
                                  "int4:token",
                                  "int2:token:asym",
                                  "int8:tensor",
                                  "int8:tensor:asym",
                                  "int6:tensor:static=0.02",
                                  "int4:tensor:asym:static=0.3,-3",
                                  "int4:g128",
                                  "int4:g128:asym",
                                  "int8:g32:asym",
                                  "int6:g7",
                                  "int2:g5:asym",
                                  "int3:g1000",
                                  "int8:token:outliers=20",
                                  "int4:token:asym:outliers=3:columns=0,2,17",
                                  "int8:tensor:outliers=9",
                                  "int4:g16:asym:outliers=20",
                                  "int4:g7:outliers=20",
                                  "int8:g1:outliers=30",
                                  "int8:tensor:static=0.05:outliers=2:columns=",
                                  "sdr4:g16",
                                  "sdr4:g16:b16",
                                  "sdr3:g8:b8",
                                  "sdr4:g5:b16:tensor",
                                  "sdr7:g32:b8:token",
                                  "sdr2:g16:b16:tensor:static=0.0001"};

// What a caller has on the device beside x.
struct Scratch {
  std::shared_ptr<std::byte> index;
  std::shared_ptr<std::byte> workspace;
  CudaActivationScratch view;

  Scratch(const ActivationFormat& format, int64_t m, int64_t k) {
    view.workspace_bytes = activations_cuda_workspace(format, m, k);
    workspace = device_bytes(view.workspace_bytes);
    view.workspace = workspace.get();
    check_cuda(cudaMemset(view.workspace, 0xA5, static_cast<size_t>(view.workspace_bytes)), "poison");
    if (!format.has_outliers()) return;
    // The number of columns comes last.
    index = device_bytes(4 * outlier_index_words(k, k) + 4);
    view.outlier_index = reinterpret_cast<const int32_t*>(index.get());
    if (!format.outlier_columns) return;
    const std::vector<int32_t> host = outlier_index(*format.outlier_columns, k);
    if (!host.empty()) upload(host.data(), index.get(), 4 * std::ssize(host));
  }
};

QuantizedActivations quantize_there(const ActivationValues& x, const ActivationFormat& format,
                                    const Stream& stream) {
  Scratch scratch(format, x.m, x.k);
  int64_t outliers = format.outlier_columns ? std::ssize(*format.outlier_columns) : 0;
  settle();
  if (format.has_outliers() && !format.static_outliers) {
    auto* const index = reinterpret_cast<int32_t*>(scratch.index.get());
    int32_t* const there = index + outlier_index_words(x.k, x.k);
    find_activation_outliers_cuda(x.on_device(), format, index, there, stream);
    stream.synchronize();
    int32_t count = 0;
    check_cuda(cudaMemcpy(&count, there, 4, cudaMemcpyDeviceToHost), "count");
    outliers = count;
  }
  QuantizedActivations found{format, x.m, x.k, {}};
  for (const PlaneSpec& spec : activation_planes(format, x.m, x.k, outliers)) {
    Tensor plane(spec.dtype, spec.shape);
    if (plane.byte_count() > 0) std::memset(plane.bytes(), 0xA5, static_cast<size_t>(plane.byte_count()));
    found.planes.emplace(spec.name, to_device(plane));
  }
  settle();
  quantize_activations_cuda(x.on_device(), found, scratch.view, stream);
  stream.synchronize();
  return found;
}

// The bytes of float32 values in a dtype.
std::vector<std::byte> in_dtype(const std::vector<float>& values, DType dtype) {
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

void expect_equal_to_cpu(const ActivationValues& x, const char* spec) {
  SCOPED_TRACE(text_of(spec, " [", x.m, ", ", x.k, "] ", name_of(x.dtype), " stride ", x.stride, " offset ",
                       x.offset));
  ActivationFormat format = activation_format_from_spec(spec);
  if (format.outlier_columns) {
    std::erase_if(*format.outlier_columns, [&](int32_t column) { return column >= x.k; });
  }
  const Stream stream;
  const QuantizedActivations expected = quantize_activations(x.on_host(), format);
  const QuantizedActivations found = quantize_there(x, format, stream);
  ASSERT_EQ(found.planes.size(), expected.planes.size());
  for (const auto& [name, plane] : expected.planes) {
    const Tensor& other = found.planes.at(name);
    ASSERT_EQ(other.shape(), plane.shape()) << name;
    if (plane.byte_count() == 0) continue;
    const std::vector<std::byte> bytes = download(other.bytes(), plane.byte_count());
    ASSERT_EQ(std::memcmp(bytes.data(), plane.bytes(), bytes.size()), 0) << name;
  }

  std::vector<float> values(static_cast<size_t>(x.m * x.k));
  round_activations(x.on_host(), format, MatrixView<float>(values.data(), x.m, x.k));
  const Scratch scratch(format, x.m, x.k);
  for (const int64_t padding : {0, 3, 8}) {
    const int64_t stride = x.k + padding;
    const std::vector<std::byte> wanted = in_dtype(values, x.dtype);
    const int64_t element = size_of(x.dtype);
    const auto out = device_bytes(x.m * stride * element);
    const auto decoded = device_bytes(x.m * stride * element);
    check_cuda(cudaMemset(out.get(), 0xA5, static_cast<size_t>(x.m * stride * element)), "poison");
    check_cuda(cudaMemset(decoded.get(), 0xA5, static_cast<size_t>(x.m * stride * element)), "poison");
    settle();
    round_activations_cuda(x.on_device(), format, out.get(), stride, scratch.view, stream);
    dequantize_activations_cuda(found, decoded.get(), x.dtype, stride, stream);
    stream.synchronize();
    for (const auto& memory : {out, decoded}) {
      const std::vector<std::byte> got = download(memory.get(), x.m * stride * element);
      for (int64_t t = 0; t < x.m; ++t) {
        ASSERT_EQ(std::memcmp(got.data() + t * stride * element, wanted.data() + t * x.k * element,
                              static_cast<size_t>(x.k * element)),
                  0)
            << (memory == out ? "rounded" : "decoded") << " token " << t << " padding " << padding;
        for (int64_t i = x.k * element; i < stride * element; ++i) {
          ASSERT_EQ(got[static_cast<size_t>(t * stride * element + i)], std::byte{0xA5}) << "padding";
        }
      }
    }
  }
}

TEST_F(ActivationsCudaSmall, EqualTheCpu) {
  uint64_t seed = 0;
  for (const char* spec : kSpecs) {
    const DType dtype = kFloats[seed % 3];
    expect_equal_to_cpu(activation_values(9, 264, dtype, ++seed), spec);
    expect_equal_to_cpu(activation_values(5, 131, dtype, ++seed, 2, 1), spec);
  }
}

TEST_F(ActivationsCuda, EqualTheCpuInAllDtypes) {
  uint64_t seed = 100;
  for (const DType dtype : kFloats) {
    for (const char* spec : kSpecs) {
      expect_equal_to_cpu(activation_values(33, 1024, dtype, ++seed), spec);
      expect_equal_to_cpu(activation_values(12, 1000, dtype, ++seed, 24, 8), spec);
      expect_equal_to_cpu(activation_values(14, 301, dtype, ++seed, 1), spec);
      expect_equal_to_cpu(activation_values(1, 1, dtype, ++seed), spec);
      expect_equal_to_cpu(activation_values(0, 17, dtype, ++seed), spec);
      expect_equal_to_cpu(activation_values(2, 0, dtype, ++seed), spec);
    }
  }
}

TEST_F(ActivationsCuda, EqualTheCpuForLongTokens) {
  uint64_t seed = 500;
  for (const char* spec :
       {"int8:token", "int8:tensor:asym", "int4:g128", "int8:token:outliers=150", "sdr4:g16"}) {
    for (const int64_t k : {4096, 14336, 28672, 40001}) {
      expect_equal_to_cpu(activation_values(6, k, DType::f16, ++seed), spec);
    }
    expect_equal_to_cpu(activation_values(700, 512, DType::bf16, ++seed), spec);
  }
}

TEST_F(ActivationsCudaSmall, RoundsInPlaceAndInGraphs) {
  for (const char* spec : {"int8:token", "int4:g16:asym", "sdr4:g16", "int8:tensor:outliers=9"}) {
    const ActivationFormat format = activation_format_from_spec(spec);
    ActivationValues x = activation_values(8, 192, DType::f16, 3);
    std::vector<float> values(8 * 192);
    round_activations(x.on_host(), format, MatrixView<float>(values.data(), 8, 192));
    const std::vector<std::byte> wanted = in_dtype(values, DType::f16);
    const Scratch scratch(format, 8, 192);
    const auto out = device_bytes(8 * 192 * 2);
    const Stream stream;
    settle();
    const Graph graph(
        stream, [&] { round_activations_cuda(x.on_device(), format, out.get(), 192, scratch.view, stream); });
    for (int i = 0; i < 2; ++i) {
      check_cuda(cudaMemsetAsync(out.get(), 0xA5, 8 * 192 * 2, stream), "poison");
      graph.launch(stream);
      stream.synchronize();
      EXPECT_EQ(download(out.get(), 8 * 192 * 2), wanted) << spec;
    }
    round_activations_cuda(x.on_device(), format, x.device.get(), 192, scratch.view, stream);
    stream.synchronize();
    EXPECT_EQ(download(x.device.get(), 8 * 192 * 2), wanted) << spec << " in place";
  }
}

TEST_F(ActivationsCudaSmall, MakesWhatSharesAScaleWithARefusedValueNaN) {
  for (const DType dtype : kFloats) {
    for (const float bad :
         {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
      for (const char* spec :
           {"int8:token", "int4:tensor", "int8:tensor:static=0.5", "int4:g8", "sdr4:g16"}) {
        SCOPED_TRACE(text_of(spec, " ", bad));
        ActivationValues x = activation_values(4, 48, dtype, 5);
        x.put(2, 20, bad);
        const ActivationFormat format = activation_format_from_spec(spec);
        const Scratch scratch(format, 4, 48);
        const auto out = device_bytes(4 * 48 * size_of(dtype));
        const Stream stream;
        settle();
        round_activations_cuda(x.on_device(), format, out.get(), 48, scratch.view, stream);
        stream.synchronize();
        const std::vector<std::byte> bytes = download(out.get(), 4 * 48 * size_of(dtype));
        const FloatMatrix got(bytes.data(), dtype, 4, 48, 48);
        std::vector<float> row(48);
        for (int64_t t = 0; t < 4; ++t) {
          got.read(t, 0, 48, row.data());
          for (int64_t c = 0; c < 48; ++c) {
            const bool shared = format.scope == ActivationScope::group    ? t == 2 && c / 8 == 2
                                : format.scope == ActivationScope::tensor ? !format.is_static || t == 2
                                                                          : t == 2;
            ASSERT_EQ(std::isnan(row[static_cast<size_t>(c)]), shared) << t << ", " << c;
          }
        }
      }
    }
  }
}

TEST_F(ActivationsCudaSmall, RefusesWrongArguments) {
  const ActivationFormat format = activation_format_from_spec("int8:token");
  const ActivationValues x = activation_values(3, 16, DType::f16, 1);
  const Scratch scratch(format, 3, 16);
  const auto out = device_bytes(3 * 16 * 2);
  const CudaMatrix there = x.on_device();
  std::vector<std::byte> host(96);
  CudaActivationScratch small = scratch.view;
  small.workspace_bytes = 1;
  EXPECT_THROW(round_activations_cuda(there, format, host.data(), 16, scratch.view, nullptr), TypeMismatch);
  EXPECT_THROW(round_activations_cuda(x.on_device(), format, out.get(), 15, scratch.view, nullptr),
               InvalidArgument);
  EXPECT_THROW(round_activations_cuda(there, format, out.get(), 16, small, nullptr), InvalidArgument);
  EXPECT_THROW(round_activations_cuda({host.data(), DType::f16, 3, 16, 16}, format, out.get(), 16,
                                      scratch.view, nullptr),
               TypeMismatch);
  EXPECT_THROW(round_activations_cuda(there, activation_format_from_spec("int8:tensor:static"), out.get(), 16,
                                      scratch.view, nullptr),
               InvalidArgument);
  EXPECT_THROW(round_activations_cuda(there, activation_format_from_spec("int8:token:outliers=6:columns=3"),
                                      out.get(), 16, scratch.view, nullptr),
               InvalidArgument);
  EXPECT_THROW(round_activations_cuda(there, activation_format_from_spec("int8:token:outliers=6:columns=16"),
                                      out.get(), 16, scratch.view, nullptr),
               InvalidArgument);
  QuantizedActivations planes{format, 3, 16, {}};
  EXPECT_THROW(quantize_activations_cuda(there, planes, scratch.view, nullptr), InvalidArgument);
  EXPECT_THROW(dequantize_activations_cuda(planes, out.get(), DType::f16, 16, nullptr), InvalidArgument);
  for (const PlaneSpec& spec : activation_planes(format, 3, 16)) {
    planes.planes.emplace(spec.name, Tensor(spec.dtype, spec.shape));
  }
  EXPECT_THROW(quantize_activations_cuda(there, planes, scratch.view, nullptr), InvalidArgument);
  EXPECT_THROW(find_activation_outliers_cuda(there, format, nullptr, nullptr, nullptr), InvalidArgument);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
}

}  // namespace
}  // namespace quantloom
