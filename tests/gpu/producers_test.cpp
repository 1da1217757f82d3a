// Norms and gated activations with their rounding, on the device, against the CPU: the same bytes.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "activation_values.hpp"
#include "activations/produced.hpp"
#include "cuda_streams.hpp"
#include "quantloom/activations/cuda_activations.hpp"
#include "quantloom/error.hpp"

namespace quantloom {
namespace {

class ProducersCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  }
};
// Few launches: this suite also runs under compute-sanitizer.
class ProducersCudaSmall : public ProducersCuda {};

constexpr DType kFloats[] = {DType::f16, DType::bf16, DType::f32};
constexpr const char* kSpecs[] = {"int8:token",
                                  "int8:token:asym",
                                  "int4:tensor:static=0.2",
                                  "int8:tensor:asym",
                                  "int4:g16",
                                  "sdr4:g16",
                                  "int8:token:outliers=2:columns=0,3,40"};

// What one test has on both sides. The weights are in the dtype of x, or in float32.
struct Case {
  ActivationValues x;
  ActivationValues up;
  std::vector<float> weight;
  std::vector<float> bias;
  std::shared_ptr<std::byte> device_weight;
  std::shared_ptr<std::byte> device_bias;
  ActivationProducer here;
  CudaProducer there;
  std::vector<float> produced;

  Case(ProducerKind kind, int64_t m, int64_t k, DType dtype, bool wide_weights, bool add_one, uint64_t seed,
       int64_t padding, int64_t offset)
      : x(activation_values(m, k, dtype, seed, padding, offset)),
        up(activation_values(m, k, dtype, seed + 1, padding, offset)),
        produced(static_cast<size_t>(m * k)) {
    here.kind = there.kind = kind;
    here.epsilon = there.epsilon = 1e-5F;
    if (kind == ProducerKind::silu_mul) {
      // Products of outliers are too large for float16.
      for (int64_t t = 0; t < m && k > 0; ++t) up.put(t, k / 3, 0.5F);
      here.up = up.on_host();
      there.up = up.on_device();
    } else {
      there.dtype = wide_weights ? DType::f32 : dtype;
      device_weight = vector(weight, seed + 2, there.dtype);
      here.weight = weight;
      there.weight = device_weight.get();
      here.add_one = there.add_one = add_one && kind == ProducerKind::rms_norm;
      if (kind == ProducerKind::layer_norm) {
        device_bias = vector(bias, seed + 3, there.dtype);
        here.bias = bias;
        there.bias = device_bias.get();
      }
    }
    produce_activations(x.on_host(), here, MatrixView<float>(produced.data(), m, k));
  }

  std::shared_ptr<std::byte> vector(std::vector<float>& values, uint64_t seed, DType dtype) const {
    ActivationValues one = activation_values(1, x.k, dtype, seed);
    values.resize(static_cast<size_t>(x.k));
    one.on_host().read(0, 0, x.k, values.data());
    return one.device;
  }
};

void expect_equal_to_cpu(const Case& c, const char* spec) {
  const int64_t m = c.x.m;
  const int64_t k = c.x.k;
  const DType dtype = c.x.dtype;
  SCOPED_TRACE(text_of(spec, " kind ", int(c.here.kind), " [", m, ", ", k, "] ", name_of(dtype), " weights ",
                       name_of(c.there.dtype), " add_one ", c.there.add_one, " stride ", c.x.stride));
  const ActivationFormat format = activation_format_from_spec(spec);
  const MatrixView<const float> produced(c.produced.data(), m, k);
  const QuantizedActivations expected = quantize_activations(produced, format);
  std::vector<float> rounded(c.produced.size());
  round_activations(produced, format, MatrixView<float>(rounded.data(), m, k));

  CudaActivationScratch scratch;
  scratch.workspace_bytes = produced_cuda_workspace(format, dtype, m, k);
  const auto workspace = device_bytes(scratch.workspace_bytes);
  scratch.workspace = workspace.get();
  std::shared_ptr<std::byte> index;
  if (format.outlier_columns) {
    const std::vector<int32_t> host = outlier_index(*format.outlier_columns, k);
    index = device_bytes(4 * std::ssize(host));
    upload(host.data(), index.get(), 4 * std::ssize(host));
    scratch.outlier_index = reinterpret_cast<const int32_t*>(index.get());
  }
  QuantizedActivations planes{format, m, k, {}};
  for (const auto& [name, plane] : expected.planes) {
    planes.planes.emplace(name, to_device(Tensor(plane.dtype(), plane.shape())));
  }
  const int64_t bytes = m * k * size_of(dtype);
  const auto out = device_bytes(bytes);
  const auto values = device_bytes(bytes);
  const Stream stream;
  settle();
  quantize_produced_cuda(c.x.on_device(), c.there, planes, scratch, stream);
  round_produced_cuda(c.x.on_device(), c.there, format, out.get(), k, scratch, stream);
  produce_activations_cuda(c.x.on_device(), c.there, values.get(), k, stream);
  stream.synchronize();

  const auto expect_values = [&](const std::shared_ptr<std::byte>& memory, const std::vector<float>& wanted,
                                 const char* what) {
    const std::vector<std::byte> got = download(memory.get(), bytes);
    for (int64_t i = 0; i < m * k; ++i) {
      std::byte element[4];
      if (dtype == DType::f32) {
        std::memcpy(element, &wanted[static_cast<size_t>(i)], 4);
      } else {
        const float value = wanted[static_cast<size_t>(i)];
        const uint16_t half = dtype == DType::f16 ? f16_from_float(value) : bf16_from_float(value);
        std::memcpy(element, &half, 2);
      }
      const auto size = static_cast<size_t>(size_of(dtype));
      ASSERT_EQ(std::memcmp(got.data() + i * size_of(dtype), element, size), 0)
          << what << " token " << i / k << ", input " << i % k;
    }
  };
  expect_values(values, c.produced, "produced");
  for (const auto& [name, plane] : expected.planes) {
    if (plane.byte_count() == 0) continue;
    const std::vector<std::byte> got = download(planes.planes.at(name).bytes(), plane.byte_count());
    ASSERT_EQ(std::memcmp(got.data(), plane.bytes(), got.size()), 0) << name;
  }
  expect_values(out, rounded, "rounded");

  if (format.has_shifts() || format.scope == ActivationScope::group ||
      (format.scope == ActivationScope::tensor && !format.is_static)) {
    return;
  }
  const int64_t row_blocks = ceil_div(k, int64_t{integers::kBlockBytes});
  const int64_t outliers = format.outlier_columns ? std::ssize(*format.outlier_columns) : 0;
  const auto codes = device_bytes(integers::order_bytes(m, k));
  const auto terms = device_bytes(16 * m);
  const auto kept = device_bytes(integers::order_bytes(m, 2 * outliers));
  // Rows of the last slab are written up to the next multiple of kTokenRows alone.
  check_cuda(cudaMemset(codes.get(), 0xA5, static_cast<size_t>(integers::order_bytes(m, k))), "poison");
  settle();
  cuda::IntegerTokens to;
  to.codes = reinterpret_cast<int8_t*>(codes.get());
  to.terms = reinterpret_cast<integers::TokenTerms*>(terms.get());
  to.outlier_index = scratch.outlier_index;
  to.outlier_values = kept.get();
  to.outliers = outliers;
  cuda::round_produced_tokens(c.x.on_device(), c.there, format, to, stream);
  stream.synchronize();
  const std::vector<std::byte> got = download(codes.get(), integers::order_bytes(m, k));
  const auto* const wanted = expected.planes.at("codes").bytes();
  for (int64_t t = 0; t < m; ++t) {
    for (int64_t i = 0; i < k; ++i) {
      ASSERT_EQ(got[static_cast<size_t>(integers::place_of(t, i, row_blocks))], wanted[t * k + i])
          << "in order, token " << t << ", input " << i;
    }
  }
}

constexpr ProducerKind kKinds[] = {ProducerKind::rms_norm, ProducerKind::layer_norm, ProducerKind::silu_mul};

TEST_F(ProducersCudaSmall, EqualTheCpu) {
  uint64_t seed = 0;
  for (const ProducerKind kind : kKinds) {
    for (const DType dtype : kFloats) {
      const Case wide(kind, 6, 136, dtype, seed % 2 == 0, seed % 3 == 0, seed + 10, 0, 0);
      const Case narrow(kind, 5, 77, dtype, seed % 2 == 1, seed % 3 == 1, seed + 20, 3, 1);
      for (const char* spec : {"int8:token", "int4:g16", "int8:token:outliers=2:columns=0,3,40"}) {
        expect_equal_to_cpu(wide, spec);
        expect_equal_to_cpu(narrow, spec);
      }
      ++seed;
    }
  }
}

TEST_F(ProducersCuda, EqualTheCpuForAllFormatsAndLengths) {
  uint64_t seed = 1000;
  for (const ProducerKind kind : kKinds) {
    for (const DType dtype : kFloats) {
      for (const int64_t k : {41, 1024, 4096, 14336, 28680}) {
        const Case c(kind, k > 9000 ? 3 : 20, k, dtype, seed % 2 == 0, seed % 3 == 0, seed, 0, 0);
        for (const char* spec : kSpecs) expect_equal_to_cpu(c, spec);
        seed += 10;
      }
    }
  }
}

TEST_F(ProducersCudaSmall, TakesNothing) {
  for (const ProducerKind kind : kKinds) {
    expect_equal_to_cpu(Case(kind, 0, 8, DType::f16, false, false, 1, 0, 0), "int8:token");
    expect_equal_to_cpu(Case(kind, 3, 0, DType::f16, false, false, 1, 0, 0), "int8:token");
    expect_equal_to_cpu(Case(kind, 1, 1, DType::f32, false, false, 1, 0, 0), "int8:token");
  }
}

TEST_F(ProducersCudaSmall, RefusesWrongArguments) {
  const Case c(ProducerKind::rms_norm, 2, 16, DType::f16, false, false, 1, 0, 0);
  const ActivationFormat format = activation_format_from_spec("int8:token");
  const auto out = device_bytes(64);
  const auto workspace = device_bytes(64);
  CudaActivationScratch scratch;
  scratch.workspace = workspace.get();
  scratch.workspace_bytes = 64;
  const auto refuses = [&](const CudaProducer& producer) {
    EXPECT_ANY_THROW(round_produced_cuda(c.x.on_device(), producer, format, out.get(), 16, scratch, nullptr));
  };
  CudaProducer producer = c.there;
  producer.dtype = DType::bf16;
  refuses(producer);
  producer = c.there;
  producer.weight = c.weight.data();
  refuses(producer);
  producer = c.there;
  producer.bias = producer.weight;
  refuses(producer);
  producer = c.there;
  producer.epsilon = -1;
  refuses(producer);
  producer = {};
  producer.kind = ProducerKind::silu_mul;
  refuses(producer);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
}

}  // namespace
}  // namespace quantloom
