// Products with trellises on the CPU against float64 ones of decoded weights, on every instruction set.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "formats/trellis_basis.hpp"
#include "formats/trellis_codes.hpp"
#include "kernels/hwy_targets.hpp"
#include "quantloom/formats/outliers.hpp"
#include "quantloom/formats/trellis.hpp"
#include "quantloom/kernels/kernel_table.hpp"
#include "quantloom/kernels/matmul.hpp"
#include "quantloom/random.hpp"
#include "quantloom/rounding/nearest.hpp"

namespace quantloom {
namespace {

const std::vector<std::string>& codebooks() {
  static const std::vector<std::string> names = {"3inst", "mcg",     "mcg-FF7A83E5", "mul1", "mul1-AD9A2EC5",
                                                 "1mad",  "octagon", "hyb",          "rptc", "rptc2"};
  return names;
}

bool has_two_weights(std::string_view codebook) {
  return trellis_codebook(codebook).weights_per_step == 2;
}

// Random bits, which are a valid trellis; random scales.
PackedTensor random_trellis(int64_t n, int64_t k, const Trellis& format, uint64_t seed, bool unit_scales) {
  const CounterRandom random(seed);
  uint64_t at = 0;
  PackedTensor packed{std::make_shared<const Trellis>(format), n, k, {}};
  for (const PlaneSpec& spec : format.planes(n, k)) {
    Tensor plane(spec.dtype, spec.shape);
    if (spec.name == "codes") {
      for (uint32_t& word : plane.values<uint32_t>()) word = static_cast<uint32_t>(random.bits(at++));
    } else if (spec.name == "table") {
      std::ranges::copy(format.codebook.table, plane.values<uint16_t>().begin());
    } else {
      for (uint16_t& scale : plane.values<uint16_t>()) {
        scale = f16_from_float(unit_scales ? 1.0F : static_cast<float>(random.normal(at++)));
      }
    }
    packed.planes.emplace(spec.name, std::move(plane));
  }
  return packed;
}

std::vector<float> decoded(const PackedTensor& packed) {
  std::vector<float> w(static_cast<size_t>(packed.n * packed.k));
  dequantize(packed, {w.data(), packed.n, packed.k}, 1);
  return w;
}

std::vector<float> product(const std::vector<float>& x, int64_t m, const PreparedTensor& w, int threads = 1,
                           Activations activations = Activations::exact) {
  const int64_t stride = w.n() + 5;  // gaps between rows must survive
  std::vector<float> padded(static_cast<size_t>(m * stride), std::numeric_limits<float>::quiet_NaN());
  matmul(MatrixView<const float>(x.data(), m, w.k()), w, {padded.data(), m, w.n(), stride},
         {.activations = activations, .threads = threads});
  std::vector<float> y;
  for (int64_t t = 0; t < m; ++t) {
    for (int64_t c = 0; c < stride; ++c) {
      const float value = padded[static_cast<size_t>(t * stride + c)];
      if (c < w.n()) {
        y.push_back(value);
      } else {
        EXPECT_TRUE(std::isnan(value)) << "written behind row " << t;
      }
    }
  }
  return y;
}

std::vector<float> random_x(int64_t m, int64_t k, uint64_t seed) {
  const CounterRandom random(seed);
  std::vector<float> x(static_cast<size_t>(m * k));
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = static_cast<float>(random.normal(i) * std::exp2(random.uniform(i + (uint64_t{1} << 40)) * 6 - 3));
  }
  return x;
}

double rms_of(const Format& format) {
  const auto* outliers = dynamic_cast<const Outliers*>(&format);
  return dynamic_cast<const Trellis&>(outliers != nullptr ? *outliers->dense : format).codebook.rms();
}

// What float32 rounding acts on: |output scale| * |scaled inputs| * RMS of weights, for each output.
void check(const PackedTensor& packed, const std::vector<float>& x, int64_t m, const std::vector<float>& y) {
  const std::vector<float> w = decoded(packed);
  const auto inputs = packed.plane("input_scales").values<uint16_t>();
  const auto outputs = packed.plane("output_scales").values<uint16_t>();
  const double rms = rms_of(*packed.format);
  for (int64_t t = 0; t < m; ++t) {
    const float* token = x.data() + t * packed.k;
    double square = 0;
    for (int64_t c = 0; c < packed.k; ++c) {
      square += std::pow(double{token[c]} * double{float_from_f16(inputs[static_cast<size_t>(c)])}, 2);
    }
    for (int64_t r = 0; r < packed.n; ++r) {
      double sum = 0;
      for (int64_t c = 0; c < packed.k; ++c) {
        sum += double{token[c]} * double{w[static_cast<size_t>(r * packed.k + c)]};
      }
      const double size =
          std::sqrt(square) * rms * std::abs(double{float_from_f16(outputs[static_cast<size_t>(r)])});
      ASSERT_NEAR(y[static_cast<size_t>(t * packed.n + r)], sum, 5e-6 * size + 1e-30)
          << "token " << t << ", output " << r;
    }
  }
}

template <class Body>
void for_each_target(const Body& body) {
  const std::vector<int64_t> targets = hwy::SupportedAndGeneratedTargets();
  ASSERT_FALSE(targets.empty());
  for (const int64_t target : targets) {
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    SCOPED_TRACE(cpu_target());
    body();
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

// A token with a single 1 reads one column of weights, which no sum rounds.
TEST(TrellisProduct, ReadsTheWeightsThatDecode) {
  std::vector<PackedTensor> matrices;
  for (const std::string& name : codebooks()) {
    for (int half_bits = 2; half_bits <= (has_two_weights(name) ? 8 : 16); ++half_bits) {
      for (const int window : {16, half_bits % 2 == 0 ? 15 : 19}) {
        if (name.starts_with("rptc") && window != 16 && half_bits != 4) continue;
        const Trellis format(half_bits / 2.0, name, 0,
                             name.starts_with("rptc") ? std::min(window, 16) : window);
        matrices.push_back(random_trellis(32, 32, format, matrices.size(), true));
      }
    }
  }
  std::vector<float> x(32 * 32);
  for (size_t i = 0; i < 32; ++i) x[i * 33] = 1;
  for_each_target([&] {
    for (const PackedTensor& packed : matrices) {
      SCOPED_TRACE(packed.format->spec());
      const std::vector<float> y = product(x, 32, *prepare(packed));
      const std::vector<float> w = decoded(packed);
      for (size_t c = 0; c < 32; ++c) {
        for (size_t r = 0; r < 32; ++r) ASSERT_EQ(y[c * 32 + r], w[r * 32 + c]) << r << ' ' << c;
      }
    }
  });
}

TEST(TrellisProduct, AgreesWithFloat64) {
  const CounterRandom random(99);
  for (uint64_t i = 0; i < 70; ++i) {
    const auto pick = [&](uint64_t which, uint64_t bound) { return random.below(16 * i + which, bound); };
    const std::string& name = codebooks()[i % codebooks().size()];
    const auto half_bits = static_cast<int>(2 + pick(0, has_two_weights(name) ? 7 : 15));
    const int64_t rotation = pick(1, 3) == 0 ? 0 : 128;
    const auto n = static_cast<int64_t>(1 + pick(2, i % 4 == 0 ? 700 : 150));
    const auto k = static_cast<int64_t>(1 + pick(3, i % 5 == 0 ? 1300 : 300));
    const int64_t m = std::vector<int64_t>{1, 2, 3, 4, 5, 6, 7, 13, 40}[pick(4, 9)];
    SCOPED_TRACE(text_of("case ", i, ": ", name, " ", half_bits, " [", n, ", ", k, "] m ", m));
    const PackedTensor packed = random_trellis(n, k, Trellis(half_bits / 2.0, name, rotation), i, false);
    const std::vector<float> x = random_x(m, k, i);
    const auto w = prepare(packed);
    EXPECT_EQ(w->n(), n);
    EXPECT_EQ(w->k(), k);
    const std::vector<float> y = product(x, m, *w);
    check(packed, x, m, y);
    if (HasFatalFailure()) return;
    for (const int threads : {2, 4}) EXPECT_EQ(product(x, m, *w, threads), y);
  }
}

TEST(TrellisProduct, AgreesOnEveryInstructionSet) {
  for_each_target([] {
    uint64_t seed = 500;
    for (const std::string& name : codebooks()) {
      for (const int64_t m : {1, 7}) {
        SCOPED_TRACE(name);
        const PackedTensor packed = random_trellis(150, 270, Trellis(3.5, name), seed++, false);
        const std::vector<float> x = random_x(m, 270, seed);
        check(packed, x, m, product(x, m, *prepare(packed), 2));
        if (HasFatalFailure()) return;
      }
    }
  });
}

// The sum of an output has an order of its own.
TEST(TrellisProduct, TokensDoNotKnowEachOther) {
  const PackedTensor packed = random_trellis(300, 2100, Trellis(2.5, "mul1"), 3, false);
  const auto w = prepare(packed);
  constexpr int64_t kTokens = 530;  // more than one batch
  const std::vector<float> x = random_x(kTokens, 2100, 4);
  const std::vector<float> all = product(x, kTokens, *w, 3);
  for (const int64_t count : {1, 2, 3, 4, 5, 6, 11, 32, 33}) {
    for (const int64_t first : {int64_t{0}, int64_t{57}, kTokens - count}) {
      const std::vector<float> some(x.begin() + first * 2100, x.begin() + (first + count) * 2100);
      const std::vector<float> y = product(some, count, *w);
      EXPECT_EQ(std::memcmp(y.data(), all.data() + first * 300, y.size() * sizeof(float)), 0)
          << count << " tokens from " << first;
    }
  }
  check(packed, std::vector<float>(x.begin(), x.begin() + 2100), 1, {all.begin(), all.begin() + 300});
}

TEST(TrellisProduct, TakesHalvesAndEmptyMatrices) {
  const PackedTensor packed = random_trellis(40, 50, Trellis(3, "mcg"), 8, false);
  const auto w = prepare(packed);
  const std::vector<float> x = random_x(3, 50, 9);
  for (const DType dtype : {DType::f16, DType::bf16}) {
    std::vector<uint16_t> halves(x.size());
    std::vector<float> rounded(x.size());
    for (size_t i = 0; i < x.size(); ++i) {
      halves[i] = dtype == DType::f16 ? f16_from_float(x[i]) : bf16_from_float(x[i]);
      rounded[i] = dtype == DType::f16 ? float_from_f16(halves[i]) : float_from_bf16(halves[i]);
    }
    std::vector<float> y(3 * 40);
    matmul(FloatMatrix(halves.data(), dtype, 3, 50, 50), *w, {y.data(), 3, 40});
    EXPECT_EQ(y, product(rounded, 3, *w));
  }
  for (const auto& [n, k] : std::vector<std::pair<int64_t, int64_t>>{{0, 0}, {0, 7}, {7, 0}}) {
    const auto empty = prepare(random_trellis(n, k, Trellis(2), 1, false));
    EXPECT_EQ(product(std::vector<float>(static_cast<size_t>(2 * k), 1.0F), 2, *empty),
              std::vector<float>(static_cast<size_t>(2 * n), 0.0F));
  }
  EXPECT_EQ(product({}, 0, *w), std::vector<float>{});
  std::vector<float> y(3 * 40);
  EXPECT_THROW(matmul(MatrixView<const float>(x.data(), 3, 50), *w, {y.data(), 3, 40},
                      {.activations = Activations::int8}),
               Unsupported);
  EXPECT_THROW(matmul(MatrixView<const float>(x.data(), 3, 49), *w, {y.data(), 3, 40}), InvalidArgument);
}

// The int8 path one number at a time, for matrices whose inputs are not cut (fewer than 1024).
std::vector<float> emulate_int8(const std::vector<float>& x, int64_t m, const PackedTensor& packed) {
  const auto& format = dynamic_cast<const Trellis&>(*packed.format);
  const Tensor& codes = packed.plane("codes");
  const int64_t columns = codes.shape()[0] * 16;
  const int64_t rows = codes.shape()[1] * 16;
  const int64_t rings = codes.shape()[0] * codes.shape()[1];
  std::vector<uint32_t> states(static_cast<size_t>(rings * 256));
  const auto words = codes.values<uint32_t>();
  unpack_rings(format.shape(), {words.data(), rings, codes.shape()[2]}, {states.data(), rings, 256});
  const auto bytes_at = [&](int64_t r, int64_t c) {
    const int64_t ring = c / 16 * codes.shape()[1] + r / 16;
    const int position = trellis::position_of(static_cast<int>(c % 16), static_cast<int>(r % 16));
    const uint32_t state = states[static_cast<size_t>(ring * 256 + position)];
    return trellis::byte_sum(trellis::hash_of(format.codebook.code, format.codebook.multiplier, state));
  };
  const bool mul1 = format.codebook.code == TrellisCode::mul1;
  const float slope = mul1 ? 1774 * 0x1p-18F : static_cast<float>(1 / 147.800537109375);
  const float offset = mul1 ? 1534 * slope - 10.3828125F : 0.0F;
  std::vector<float> y;
  for (int64_t t = 0; t < m; ++t) {
    std::vector<float> inputs(static_cast<size_t>(columns), 0.0F);
    for (int64_t c = 0; c < packed.k; ++c) {
      const auto i = static_cast<size_t>(c);
      inputs[i] = x[static_cast<size_t>(t * packed.k + c)] *
                  float_from_f16(packed.plane("input_scales").values<uint16_t>()[i]);
    }
    if (format.rotation > 0) trellis::rotate_columns(MatrixView<float>(inputs.data(), 1, columns));
    std::vector<float> total(static_cast<size_t>(rows), 0.0F);
    float sum = 0;
    for (int64_t first = 0; first < columns; first += 128) {
      const int64_t last = std::min(first + 128, columns);
      float largest = 0;
      for (int64_t c = first; c < last; ++c) {
        largest = std::max(largest, std::fabs(inputs[static_cast<size_t>(c)]));
      }
      const float inverse = largest > 0 ? 127.0F / largest : 0.0F;
      const float scale = largest / 127.0F;
      std::vector<int> rounded;
      int64_t code_sum = 0;
      for (int64_t c = first; c < last; ++c) {
        rounded.push_back(static_cast<int>(std::nearbyint(inputs[static_cast<size_t>(c)] * inverse)));
        code_sum += rounded.back();
      }
      sum += scale * static_cast<float>(code_sum);
      for (int64_t r = 0; r < rows; ++r) {
        int64_t dot = 0;
        for (int64_t c = first; c < last; ++c) {
          dot += rounded[static_cast<size_t>(c - first)] * (int64_t{bytes_at(r, c)} - 510);
        }
        const float products = static_cast<float>(dot) * scale;
        total[static_cast<size_t>(r)] += products;
      }
    }
    const float shift = offset * sum;
    for (float& value : total) {
      value *= slope;
      value += shift;
    }
    if (format.rotation > 0) trellis::rotate_columns(MatrixView<float>(total.data(), 1, rows));
    for (int64_t r = 0; r < packed.n; ++r) {
      const auto i = static_cast<size_t>(r);
      y.push_back(float_from_f16(packed.plane("output_scales").values<uint16_t>()[i]) * total[i]);
    }
  }
  return y;
}

TEST(TrellisProduct, Int8EqualsItsEmulationOnEveryInstructionSet) {
  struct Case {
    PackedTensor packed;
    std::vector<float> x, y;
    int64_t m;
  };
  std::vector<Case> cases;
  for (const std::string name : {"mul1", "1mad", "mul1-AD9A2EC5"}) {
    for (const int64_t rotation : {0, 128}) {
      for (const int64_t m : {1, 4, 9}) {
        const double bits = static_cast<double>(2 + cases.size() % 15) / 2;
        const int window = cases.size() % 3 == 0 ? 18 : 16;
        const int64_t k = 100 + 37 * std::ssize(cases) % 300;
        Case c{random_trellis(130, k, Trellis(bits, name, rotation, window), cases.size(), false),
               random_x(m, k, cases.size()),
               {},
               m};
        c.y = emulate_int8(c.x, m, c.packed);
        cases.push_back(std::move(c));
      }
    }
  }
  for_each_target([&] {
    for (const Case& c : cases) {
      EXPECT_EQ(product(c.x, c.m, *prepare(c.packed), 2, Activations::int8), c.y) << c.packed.format->spec();
    }
  });
}

TEST(TrellisProduct, Int8ErrsLittleAndTokensDoNotKnowEachOther) {
  constexpr int64_t kTokens = 530;
  for (const std::string name : {"mul1", "1mad"}) {
    const PackedTensor packed = random_trellis(300, 2100, Trellis(3, name), 5, false);
    const auto w = prepare(packed);
    const CounterRandom random(6);
    std::vector<float> x(kTokens * 2100);
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(random.normal(i));
    const std::vector<float> exact = product(x, kTokens, *w, 2);
    const std::vector<float> all = product(x, kTokens, *w, 3, Activations::int8);
    double squares = 0;
    double norm = 0;
    for (size_t i = 0; i < all.size(); ++i) {
      squares += std::pow(double{all[i]} - double{exact[i]}, 2);
      norm += std::pow(double{exact[i]}, 2);
    }
    EXPECT_LT(std::sqrt(squares / norm), 0.008);
    EXPECT_GT(std::sqrt(squares / norm), 0.002);
    for (const int64_t count : {1, 4, 32, 33}) {
      const std::vector<float> some(x.end() - count * 2100, x.end());
      const std::vector<float> y = product(some, count, *w, 1, Activations::int8);
      EXPECT_TRUE(std::equal(y.begin(), y.end(), all.end() - count * 300)) << count;
    }
    x[7 * 2100 + 3] = std::numeric_limits<float>::infinity();
    EXPECT_THROW(product(x, kTokens, *w, 1, Activations::int8), NumericError);
    x[7 * 2100 + 3] = 3e38F;
    x[7 * 2100 + 4] = 3e38F;
    EXPECT_THROW(product(x, 8, *w, 1, Activations::int8), NumericError);
  }
}

TEST(TrellisProduct, TakesOutliersBesides) {
  const std::vector<float> w = random_x(130, 140, 21);
  const PackedTensor packed =
      round_nearest(MatrixView<const float>(w.data(), 130, 140), format_from_spec("outliers:1%:trellis:3"))
          .tensor;
  const std::vector<float> x = random_x(5, 140, 22);
  check(packed, x, 5, product(x, 5, *prepare(packed)));
}

}  // namespace
}  // namespace quantloom
