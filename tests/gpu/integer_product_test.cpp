// Products of integers, against exact sums, and integer order on the device.
#include "kernels/integer_product.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "cuda_streams.hpp"
#include "device_memory.hpp"
#include "kernels/integer_layout.hpp"
#include "product_case.hpp"
#include "quantloom/activations/quantized_activations.hpp"
#include "quantloom/formats/bit_packing.hpp"
#include "quantloom/formats/outliers.hpp"
#include "quantloom/formats/sdr.hpp"
#include "quantloom/kernels/integer_cuda.hpp"
#include "quantloom/rounding/nearest.hpp"

namespace quantloom {
namespace {

class IntegerCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
    const auto reason = why_not_matmul_integers_cuda(
        Uniform(8, Uniform::kPerChannel), activation_format_from_spec("int8:token"), 64, DType::f16);
    if (reason) GTEST_SKIP() << *reason;
  }
};
class IntegerCudaSmall : public IntegerCuda {};

// Devices without warpgroup products multiply no outliers.
bool takes_outliers() {
  const ActivationFormat format = activation_format_from_spec("int8:token:outliers=6:static-outliers");
  return !why_not_matmul_integers_cuda(Uniform(8, Uniform::kPerChannel), format, 64, DType::f16);
}

struct IntegerCase {
  int64_t n = 1;
  int64_t k = 1;
  int64_t m = 1;
  std::string format = "uniform:8:channel";
  std::string activations = "int8:token";
  int64_t outliers = 0;       // columns
  bool own_outliers = false;  // W has outliers there
  DType dtype = DType::f16;
  bool bias = false;
  int64_t x_offset = 0;  // elements
  int64_t x_gap = 0;
  int64_t y_offset = 0;
  int64_t y_gap = 0;
  bool prepare_on_cpu = false;
  uint64_t seed = 0;

  bool grouped() const { return format.starts_with("uniform") && format.find(":g") != std::string::npos; }
  std::string text() const {
    return text_of(format, " [", n, ", ", k, "] m=", m, " ", activations, " ", name_of(dtype),
                   " outliers=", outliers, own_outliers ? " own" : "", bias ? " bias" : "",
                   " x_offset=", x_offset, " x_gap=", x_gap, " y_offset=", y_offset, " y_gap=", y_gap,
                   " seed=", seed);
  }
};

uint16_t half_bits(DType dtype, float value) {
  return dtype == DType::f16 ? f16_from_float(value) : bf16_from_float(value);
}
float half_value(DType dtype, uint16_t bits) {
  return dtype == DType::f16 ? float_from_f16(bits) : float_from_bf16(bits);
}

class IntegerProduct {
 public:
  explicit IntegerProduct(const IntegerCase& c) : c_(c), draws_(c.seed) {
    std::set<int32_t> drawn;
    while (std::ssize(drawn) < std::min(c.outliers, c.k))
      drawn.insert(static_cast<int32_t>(draws_.below(c.k)));
    columns_.assign(drawn.begin(), drawn.end());
    std::vector<float> w(static_cast<size_t>(c.n * c.k));
    for (float& value : w) value = 0.05F * draws_.normal();
    packed_ = round_nearest(MatrixView<const float>(w.data(), c.n, c.k), format_from_spec(c.format)).tensor;
    if (c.own_outliers) add_outliers(w);
    activations_ = activation_format_from_spec(c.activations);
    if (activations_.is_static && !activations_.grid) activations_ = with_range(activations_, -3.5F, 4.0F);
    if (!columns_.empty()) {
      activations_.outlier_threshold = 6.0F;
      activations_.static_outliers = true;
      activations_ = with_columns(activations_, columns_);
    }
    x_.resize(static_cast<size_t>(c.m * c.k));
    for (size_t i = 0; i < x_.size(); ++i) {
      float value = draws_.normal();
      if (drawn.contains(static_cast<int32_t>(static_cast<int64_t>(i) % c.k))) value *= 20.0F;
      x_[i] = half_bits(c.dtype, value);
    }
    bias_.resize(static_cast<size_t>(c.n));
    for (uint16_t& value : bias_) value = half_bits(c.dtype, draws_.normal());
    const PackedTensor on_device = to_device(packed_);
    if (c.prepare_on_cpu) {
      const IntegerPlanes host = prepare_integers(packed_, columns_);
      w_ = {{host.format, host.n, host.k, {}}, host.outlier_columns};
      for (const auto& [name, plane] : host.planes) w_.planes.emplace(name, to_device(plane));
    } else {
      w_ = {{packed_.format, c.n, c.k, {}}, columns_};
      for (const PlaneSpec& spec : integer_planes(*packed_.format, c.n, c.k, std::ssize(columns_), false)) {
        w_.planes.emplace(spec.name, to_device(Tensor(spec.dtype, spec.shape)));
      }
      settle();
      prepare_integers_cuda(on_device, w_, nullptr);
    }
    settle();
  }

  const PackedTensor& packed() const { return packed_; }
  const IntegerPlanes& prepared() const { return w_; }
  const std::vector<int32_t>& columns() const { return columns_; }
  std::vector<uint16_t>& x() { return x_; }

  // Rows [first, first + count) of x alone; nullopt if memory around y changed.
  std::optional<std::vector<uint16_t>> run(const CudaIntegerOptions& options, int64_t first,
                                           int64_t count) const {
    const int64_t x_stride = c_.k + c_.x_gap;
    const int64_t y_stride = c_.n + c_.y_gap;
    std::vector<uint16_t> x(static_cast<size_t>(c_.x_offset + count * x_stride), 0x7FFF);
    for (int64_t t = 0; t < count; ++t) {
      std::copy_n(x_.begin() + (first + t) * c_.k, c_.k, x.begin() + c_.x_offset + t * x_stride);
    }
    constexpr uint16_t kGuard = 0x1234;
    std::vector<uint16_t> y(static_cast<size_t>(c_.y_offset + count * y_stride + 64), kGuard);
    const auto x_device = device_bytes(std::ssize(x) * 2);
    const auto y_device = device_bytes(std::ssize(y) * 2);
    const auto bias_device = device_bytes(std::ssize(bias_) * 2);
    upload(x.data(), x_device.get(), std::ssize(x) * 2);
    upload(y.data(), y_device.get(), std::ssize(y) * 2);
    upload(bias_.data(), bias_device.get(), std::ssize(bias_) * 2);
    CudaMatmulArguments arguments;
    arguments.x = x_device.get() + c_.x_offset * 2;
    arguments.x_stride = x_stride;
    arguments.bias = c_.bias ? bias_device.get() : nullptr;
    arguments.y = y_device.get() + c_.y_offset * 2;
    arguments.y_stride = y_stride;
    arguments.m = count;
    arguments.dtype = c_.dtype;
    arguments.workspace_bytes = matmul_integers_cuda_workspace(w_, count, c_.dtype, activations_);
    const auto workspace = device_bytes(arguments.workspace_bytes);
    check_cuda(cudaMemset(workspace.get(), 0x7F, static_cast<size_t>(arguments.workspace_bytes)),
               "workspace");
    arguments.workspace = workspace.get();
    const Stream stream;
    arguments.stream = stream;
    settle();
    matmul_integers_cuda(w_, arguments, activations_, options);
    stream.synchronize();
    const std::vector<std::byte> bytes = download(y_device.get(), std::ssize(y) * 2);
    std::memcpy(y.data(), bytes.data(), bytes.size());
    std::vector<uint16_t> result;
    for (int64_t i = 0; i < std::ssize(y); ++i) {
      const int64_t at = i - c_.y_offset;
      const bool inside = at >= 0 && at / y_stride < count && at % y_stride < c_.n;
      if (inside) {
        result.push_back(y[static_cast<size_t>(i)]);
      } else if (y[static_cast<size_t>(i)] != kGuard) {
        return std::nullopt;
      }
    }
    return result;
  }

  // The exact integers, scaled and added in float64. "" if y is near.
  std::string compare(const std::vector<uint16_t>& y) const {
    const FloatMatrix x(x_.data(), c_.dtype, c_.m, c_.k, c_.k);
    const QuantizedActivations q = quantize_activations(x, activations_);
    std::vector<float> rounded(x_.size());
    dequantize_activations(q, {rounded.data(), c_.m, c_.k});
    std::vector<float> w(static_cast<size_t>(c_.n * c_.k));
    dequantize(packed_, {w.data(), c_.n, c_.k});
    for (int64_t t = 0; t < c_.m; ++t) {
      for (int64_t r = 0; r < c_.n; ++r) {
        double sum = c_.bias ? half_value(c_.dtype, bias_[static_cast<size_t>(r)]) : 0.0;
        double outliers = 0;
        double size = 0;
        size_t next = 0;
        for (int64_t i = 0; i < c_.k; ++i) {
          const double a = rounded[static_cast<size_t>(t * c_.k + i)];
          const double b = w[static_cast<size_t>(r * c_.k + i)];
          if (next < columns_.size() && columns_[next] == i) {
            ++next;
            outliers += std::abs(a * b);  // float16 rounds both factors
          }
          sum += a * b;
          size += std::abs(a * b);
        }
        const double got = half_value(c_.dtype, y[static_cast<size_t>(t * c_.n + r)]);
        const double unit = c_.dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
        // Products of scales and codes were rounded to float32 before they were added here.
        const double runs = c_.grouped() ? 0x1p-24 * static_cast<double>(ceil_div(c_.k, int64_t{32})) : 0.0;
        const double bound = unit * std::abs(sum) + (0x1p-20 + runs) * size + 0x1p-10 * outliers + 0x1p-24;
        if (!(std::abs(got - sum) <= bound)) {
          return text_of("token ", t, ", output ", r, ": ", got, ", expected ", sum, " within ", bound);
        }
      }
    }
    return "";
  }

  // With groups: exact sums of runs of columns with one scale, each scaled and added by std::fma in the order
  // of columns, which is what the product says it does.
  std::vector<uint16_t> in_order() const {
    const auto& format = dynamic_cast<const Uniform&>(*packed_.format);
    const int64_t step = format.group_size % 128 == 0 ? 128 : format.group_size % 64 == 0 ? 64 : 32;
    const int64_t groups = ceil_div(c_.k, format.group_size);
    const FloatMatrix x(x_.data(), c_.dtype, c_.m, c_.k, c_.k);
    const QuantizedActivations q = quantize_activations(x, activations_);
    const auto codes = q.planes.at("codes").values<int8_t>();
    const auto scales = q.planes.at("scales").values<float>();
    const auto shared = activations_.scope == ActivationScope::tensor;
    const auto shifts =
        activations_.has_shifts() ? q.planes.at("shifts").values<uint8_t>() : std::span<const uint8_t>();
    const int64_t shift_groups = activations_.has_shifts() ? ceil_div(c_.k, activations_.group_size) : 0;
    std::vector<uint16_t> y;
    std::vector<std::vector<int>> w(static_cast<size_t>(c_.n));
    std::vector<float> sums;
    const auto scale_of = [&](int64_t r, int64_t group) {
      const Tensor& plane = packed_.plane("scales");
      const auto at = static_cast<size_t>(r * groups + group);
      return plane.dtype() == DType::f32   ? plane.values<float>()[at]
             : plane.dtype() == DType::f16 ? float_from_f16(plane.values<uint16_t>()[at])
                                           : float_from_bf16(plane.values<uint16_t>()[at]);
    };
    for (int64_t r = 0; r < c_.n; ++r) {
      const Tensor& plane = packed_.plane("codes");
      const auto words = static_cast<size_t>(plane.shape()[1]);
      std::vector<uint8_t> row(static_cast<size_t>(c_.k));
      unpack_bits(plane.values<uint32_t>().subspan(static_cast<size_t>(r) * words, words), format.bits, 0,
                  row);
      double sum = 0;
      for (int64_t c = 0; c < c_.k; ++c) {
        uint8_t zero = static_cast<uint8_t>(1 << (format.bits - 1));
        if (!format.symmetric) {
          const Tensor& zeros = packed_.plane("zeros");
          const auto zero_words = static_cast<size_t>(zeros.shape()[1]);
          unpack_bits(zeros.values<uint32_t>().subspan(
                          static_cast<size_t>(c / format.group_size) * zero_words, zero_words),
                      format.bits, r, {&zero, 1});
        }
        w[static_cast<size_t>(r)].push_back(row[static_cast<size_t>(c)] - zero);
        sum += static_cast<double>(scale_of(r, c / format.group_size)) * (row[static_cast<size_t>(c)] - zero);
      }
      sums.push_back(static_cast<float>(sum));
    }
    for (int64_t t = 0; t < c_.m; ++t) {
      for (int64_t r = 0; r < c_.n; ++r) {
        float sum = 0;
        for (int64_t first = 0; first < c_.k; first += step) {
          int run = 0;
          for (int64_t c = first; c < std::min(first + step, c_.k); ++c) {
            int code = codes[static_cast<size_t>(t * c_.k + c)];
            if (!shifts.empty()) {
              code *= 1 << shifts[static_cast<size_t>(t * shift_groups + c / activations_.group_size)];
            }
            run += code * w[static_cast<size_t>(r)][static_cast<size_t>(c)];
          }
          sum = std::fma(static_cast<float>(run), scale_of(r, first / format.group_size), sum);
        }
        const auto at = static_cast<size_t>(shared ? 0 : t);
        if (!activations_.symmetric) {
          sum = std::fma(-static_cast<float>(q.planes.at("zeros").values<int8_t>()[at]),
                         sums[static_cast<size_t>(r)], sum);
        }
        sum *= scales[at];
        if (c_.bias) sum += half_value(c_.dtype, bias_[static_cast<size_t>(r)]);
        y.push_back(half_bits(c_.dtype, sum));
      }
    }
    return y;
  }

 private:
  // As keep_columns() of Python makes them.
  void add_outliers(const std::vector<float>& w) {
    std::vector<float> decoded(w.size());
    dequantize(packed_, {decoded.data(), c_.n, c_.k});
    std::vector<int64_t> positions;
    std::vector<uint16_t> values;
    for (int64_t r = 0; r < c_.n; ++r) {
      for (const int32_t column : columns_) {
        const auto at = static_cast<size_t>(r * c_.k + column);
        positions.push_back(static_cast<int64_t>(at));
        values.push_back(f16_from_float(w[at] - decoded[at]));
      }
    }
    packed_ = with_outliers(std::move(packed_), positions, values);
  }

  IntegerCase c_;
  Draws draws_;
  std::vector<int32_t> columns_;
  PackedTensor packed_;
  ActivationFormat activations_;
  std::vector<uint16_t> x_;
  std::vector<uint16_t> bias_;
  IntegerPlanes w_;
};

const std::vector<std::string> kFormats = {"uniform:8:channel",
                                           "uniform:8:channel:asym",
                                           "uniform:8:tensor",
                                           "uniform:4:channel",
                                           "uniform:6:channel:f32",
                                           "uniform:3:channel:asym:bf16",
                                           "uniform:5:tensor:asym",
                                           "uniform:2:channel",
                                           "uniform:4:g128",
                                           "uniform:4:g64:asym",
                                           "uniform:3:g32:asym:bf16",
                                           "uniform:2:g384",
                                           "uniform:4:g128:asym",
                                           "uniform:8:g128",
                                           "uniform:5:g96:f32",
                                           "uniform:7:g64:asym",
                                           "uniform:8:g128:asym",
                                           "uniform:8:g32:asym:f32",
                                           "sdr:4:g16",
                                           "sdr:3:g24"};
const std::vector<std::string> kActivations = {
    "int8:token",      "int8:token:asym",    "int4:token",
    "int6:token:asym", "int8:tensor:static", "int8:tensor:asym:static",
    "int2:token",      "int8:tensor",        "int4:tensor:asym",
    "sdr4:g16",        "sdr4:g32:tensor"};

IntegerCase random_case(Draws& draws, uint64_t seed) {
  IntegerCase c;
  c.seed = seed;
  c.format = draws.pick(kFormats);
  c.activations = draws.pick(kActivations);
  c.n = 1 + draws.below(seed % 5 == 0 ? 700 : 200);
  c.k = 1 + draws.below(seed % 4 == 0 ? 1500 : 400);
  c.dtype = draws.below(2) == 0 ? DType::f16 : DType::bf16;
  c.bias = draws.below(2) == 0;
  c.x_offset = draws.below(3) == 0 ? draws.below(9) : 0;
  c.x_gap = draws.below(3) == 0 ? draws.below(9) : 0;
  c.y_offset = draws.below(3) == 0 ? draws.below(9) : 0;
  c.y_gap = draws.below(3) == 0 ? draws.below(9) : 0;
  c.prepare_on_cpu = draws.below(2) == 0;
  const bool grid = c.format.starts_with("uniform");
  // Significant digits have no outliers.
  if (draws.below(2) == 0 && !c.activations.starts_with("sdr") && !c.grouped()) {
    c.outliers = 1 + draws.below(std::min<int64_t>(c.k, 150));
    c.own_outliers = grid && draws.below(2) == 0;
  }
  return c;
}

void check_order(const IntegerCase& c) {
  SCOPED_TRACE(c.text());
  const IntegerProduct product(c);
  const IntegerPlanes expected = prepare_integers(product.packed(), product.columns());
  for (const auto& [name, plane] : expected.planes) {
    const auto bytes = download(product.prepared().plane(name).bytes(), plane.byte_count());
    EXPECT_TRUE(std::equal(bytes.begin(), bytes.end(), plane.bytes())) << name;
  }
  const PackedTensor back = unprepare_integers(expected);
  PackedTensor on_device = to_device(back);
  for (auto& [name, plane] : on_device.planes) {
    if (plane.byte_count() > 0) {
      check_cuda(cudaMemset(plane.bytes(), 0x55, static_cast<size_t>(plane.byte_count())), "fill");
    }
  }
  settle();
  // A damaged group_index would not pass for one; the others are written without being looked at.
  unprepare_integers_cuda(product.prepared(), on_device, nullptr);
  settle();
  for (const auto& [name, plane] : product.packed().planes) {
    EXPECT_TRUE(std::equal(plane.bytes(), plane.bytes() + plane.byte_count(), back.plane(name).bytes()))
        << name;
    const auto bytes = download(on_device.plane(name).bytes(), plane.byte_count());
    EXPECT_TRUE(std::equal(bytes.begin(), bytes.end(), plane.bytes())) << name;
  }
}

void check_product(IntegerCase c, bool all_tiles) {
  if (c.outliers > 0 && !takes_outliers()) c.outliers = 0;
  c.own_outliers = c.own_outliers && c.outliers > 0;
  SCOPED_TRACE(c.text());
  const IntegerProduct product(c);
  std::vector<std::string> tiles = {""};
  if (all_tiles) {
    const std::vector<std::string> names = integer_tiles(product.prepared());
    tiles.insert(tiles.end(), names.begin(), names.end());
  }
  std::optional<std::vector<uint16_t>> first;
  for (const std::string& tile : tiles) {
    SCOPED_TRACE("tile '" + tile + "'");
    const auto y = product.run({.overlap = !tile.empty(), .tile = tile}, 0, c.m);
    ASSERT_TRUE(y) << "memory around y changed";
    if (!first) {
      EXPECT_EQ(product.compare(*y), "");
      const bool small = c.m * c.n * c.k < 100'000'000;
      EXPECT_TRUE(!c.grouped() || !small || *y == product.in_order()) << "runs added in another order";
      first = y;
    }
    EXPECT_TRUE(*y == *first) << "another tile gives other bytes";
  }
  if (c.m < 2 || c.activations.find("tensor") == std::string::npos || c.activations.ends_with("static")) {
    const int64_t token = c.m / 2;
    const auto alone = product.run({}, token, 1);
    ASSERT_TRUE(alone);
    EXPECT_TRUE(std::equal(alone->begin(), alone->end(), first->begin() + token * c.n))
        << "a token alone differs";
  }
}

TEST_F(IntegerCuda, OrderEqualsTheCpuByteForByte) {
  Draws draws(1);
  for (uint64_t seed = 0; seed < 60 && !HasFailure(); ++seed) {
    IntegerCase c = random_case(draws, seed);
    c.prepare_on_cpu = false;
    if (seed % 10 == 0) c.n = 0;
    check_order(c);
  }
}

TEST_F(IntegerCuda, AgreesWithExactSums) {
  static const std::vector<int64_t> kTokens = {1, 2, 5, 8, 16, 17, 33, 64, 65, 100, 128, 129, 200, 257, 300};
  Draws draws(2);
  for (uint64_t seed = 0; seed < 60 && !HasFailure(); ++seed) {
    IntegerCase c = random_case(draws, 100 + seed);
    c.m = draws.pick(kTokens);
    check_product(c, true);
  }
}

TEST_F(IntegerCuda, LargeMatricesAreRight) {
  for (const int64_t m : {1, 70, 700}) {
    IntegerCase c;
    c.n = 1700;
    c.k = 3000;
    c.m = m;
    c.outliers = m == 1 ? 0 : 37;
    c.seed = static_cast<uint64_t>(m);
    check_product(c, true);
    c.outliers = 0;
    c.n = 300;
    c.m = std::min<int64_t>(m, 270);
    for (const char* format : {"uniform:4:channel", "uniform:4:g128", "uniform:8:g128:asym"}) {
      c.format = format;
      check_product(c, true);
    }
  }
}

TEST_F(IntegerCuda, LastTilesInHalvesGiveTheSameBytes) {
  for (const cuda::IntegerKernel& kernel : cuda::integer_kernels()) {
    if (kernel.shape.tokens != 256) continue;
    const int64_t resident = cuda::resident_clusters(kernel, current_device());
    for (const int64_t m : {100, 250}) {
      IntegerCase c;
      c.n = (resident + 3) * kernel.shape.rows * 128 - 100;
      c.k = 130;
      c.m = m;
      c.outliers = kernel.outliers ? 70 : 0;
      c.seed = static_cast<uint64_t>(m);
      SCOPED_TRACE(c.text());
      ASSERT_GT(cuda::halved_tiles(kernel.shape, resident + 3, resident), 0);
      const IntegerProduct product(c);
      const auto halves = product.run({.tile = "256x2x1"}, 0, c.m);
      const auto others = product.run({.tile = "128x2x1"}, 0, c.m);
      ASSERT_TRUE(halves && others);
      EXPECT_TRUE(*halves == *others);
    }
  }
}

TEST_F(IntegerCuda, ExtremeCodesAreSummedExactly) {
  // The largest magnitudes in all places: sums of 127 * 128 * k.
  IntegerCase c;
  c.n = 130;
  c.k = 20000;
  c.m = 3;
  IntegerProduct product(c);
  for (uint16_t& value : product.x()) value = half_bits(c.dtype, 1.0F);
  const auto y = product.run({}, 0, c.m);
  ASSERT_TRUE(y);
  EXPECT_EQ(product.compare(*y), "");
}

TEST_F(IntegerCuda, ValuesThatAreNotFiniteMakeTheirTokenNan) {
  for (const float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    IntegerCase c;
    c.n = 150;
    c.k = 300;
    c.m = 70;
    IntegerProduct product(c);
    const auto before = product.run({}, 0, c.m);
    product.x()[static_cast<size_t>(33 * c.k + 7)] = half_bits(c.dtype, bad);
    const auto after = product.run({}, 0, c.m);
    ASSERT_TRUE(before && after);
    for (int64_t t = 0; t < c.m; ++t) {
      for (int64_t r = 0; r < c.n; ++r) {
        const auto at = static_cast<size_t>(t * c.n + r);
        if (t == 33) {
          EXPECT_TRUE(std::isnan(half_value(c.dtype, (*after)[at])));
        } else {
          EXPECT_EQ((*after)[at], (*before)[at]);
        }
      }
    }
  }
}

TEST_F(IntegerCuda, EmptyProductsAndNoInputs) {
  IntegerCase c;
  c.n = 5;
  c.k = 0;
  c.m = 3;
  c.bias = true;
  const IntegerProduct product(c);
  const auto y = product.run({}, 0, c.m);
  ASSERT_TRUE(y);
  EXPECT_EQ(product.compare(*y), "");
  EXPECT_TRUE(product.run({}, 0, 0));
}

TEST_F(IntegerCuda, RefusesWithTheReason) {
  const ActivationFormat token = activation_format_from_spec("int8:token");
  const auto reason = [&](const char* format, const char* activations, int64_t k, DType dtype) {
    return why_not_matmul_integers_cuda(*format_from_spec(format), activation_format_from_spec(activations),
                                        k, dtype)
        .value_or("");
  };
  EXPECT_EQ(reason("uniform:8:channel", "int8:token", 4096, DType::f16), "");
  EXPECT_EQ(reason("uniform:8:g128:asym", "int8:token:asym", 400000, DType::f16), "");
  EXPECT_NE(reason("uniform:8:g16", "int8:token", 4096, DType::f16).find("multiple of 32"),
            std::string::npos);
  EXPECT_NE(reason("uniform:8:g128", "int8:token:outliers=6:static-outliers", 4096, DType::f16)
                .find("one scale for each output"),
            std::string::npos);
  EXPECT_NE(reason("uniform:8:channel", "int8:g128", 4096, DType::f16).find("one scale for each token"),
            std::string::npos);
  EXPECT_NE(reason("uniform:8:channel", "int8:token", 4096, DType::f32).find("float32"), std::string::npos);
  EXPECT_NE(reason("uniform:8:channel:asym", "int8:token:asym", 40000, DType::f16).find("at most"),
            std::string::npos);
  IntegerCase c;
  c.k = 64;
  c.outliers = 3;
  const IntegerProduct product(c);
  CudaMatmulArguments arguments;
  arguments.m = 1;
  EXPECT_THROW(matmul_integers_cuda(product.prepared(), arguments, token), InvalidArgument);
}

TEST_F(IntegerCudaSmall, EveryTileOfGroupsIsRight) {
  for (const char* format : {"uniform:4:channel:asym", "uniform:4:g128", "uniform:4:g32:asym",
                             "uniform:8:g64", "uniform:8:g128:asym", "uniform:6:g64:asym"}) {
    for (const int64_t m : {3, 150}) {
      IntegerCase c;
      c.n = 200;
      c.k = 300;
      c.m = m;
      c.bias = true;
      c.activations = m == 3 ? "int8:token:asym" : "int8:token";
      c.format = format;
      check_product(c, true);
      check_order(c);
    }
  }
}

TEST_F(IntegerCudaSmall, EveryTileIsRight) {
  for (const bool outliers : {false, true}) {
    for (const int64_t m : {3, 70}) {
      IntegerCase c;
      c.n = 200;
      c.k = 300;
      c.m = m;
      c.bias = true;
      c.outliers = outliers ? 70 : 0;
      c.own_outliers = outliers;
      c.activations = m == 3 ? "int8:token:asym" : "int8:token";
      c.format = m == 3 ? "uniform:4:channel:asym" : "uniform:8:channel";
      check_product(c, true);
      check_order(c);
    }
  }
}

}  // namespace
}  // namespace quantloom
