#include "quantloom/kernels/matmul.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <set>

#include "kernels/hwy_targets.hpp"
#include "kernels/prepared_strips.hpp"
#include "kernels/random_packed.hpp"
#include "quantloom/kernels/kernel_table.hpp"
#include "test_matrices.hpp"

namespace quantloom {
namespace {

using testing::random_packed;
using testing::random_table;
using testing::unpack;
using testing::Unpacked;

constexpr double kEpsilon = 0x1p-24;

struct Case {
  int64_t n, k, m;
  Uniform format;
  bool group_index;
  uint64_t seed;
};

std::vector<float> random_x(int64_t m, int64_t k, uint64_t seed) {
  const CounterRandom random(seed ^ 0x5eedULL);
  std::vector<float> x(static_cast<size_t>(m * k));
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = static_cast<float>(random.normal(i) * std::exp2(random.uniform(i + 0x100000000ULL) * 8.0 - 4.0));
  }
  return x;
}

std::vector<float> run(const std::vector<float>& x, int64_t m, const PreparedTensor& w,
                       Activations activations, int threads) {
  const int64_t stride = w.n() + 3;  // gaps between rows must survive
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

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

// The columns of each group, in order, cut into blocks of 128.
std::vector<std::vector<std::vector<int64_t>>> blocks_of(const Unpacked& w, int64_t k) {
  std::vector<std::vector<std::vector<int64_t>>> groups(static_cast<size_t>(w.group_count));
  for (int64_t c = 0; c < k; ++c) {
    auto& blocks = groups[static_cast<size_t>(w.groups[static_cast<size_t>(c)])];
    if (blocks.empty() || blocks.back().size() == 128) blocks.emplace_back();
    blocks.back().push_back(c);
  }
  return groups;
}

// The int8 path, one number at a time, and the largest error that rounding the activations can make.
struct Emulated {
  std::vector<float> y;
  std::vector<double> rounding_bound;
};

Emulated emulate_int8(const std::vector<float>& x, int64_t m, const PackedTensor& packed) {
  const auto& format = dynamic_cast<const Uniform&>(*packed.format);
  const Unpacked w = unpack(packed);
  const int64_t n = packed.n;
  const int64_t k = packed.k;
  const auto groups = blocks_of(w, k);
  // Symmetric 1-bit grids count in halves.
  const int unit = format.bits == 1 && format.symmetric ? 2 : 1;
  Emulated out;
  for (int64_t t = 0; t < m; ++t) {
    for (int64_t r = 0; r < n; ++r) {
      float y = 0.0F;
      double bound = 0.0;
      for (size_t g = 0; g < groups.size(); ++g) {
        const size_t parameter = static_cast<size_t>(r * w.group_count) + g;
        const int zero = static_cast<int>(w.zeros[parameter] * static_cast<float>(unit));
        float group_sum = 0.0F;
        for (const auto& block : groups[g]) {
          float largest = 0.0F;
          for (const int64_t c : block)
            largest = std::max(largest, std::fabs(x[static_cast<size_t>(t * k + c)]));
          const float lift = largest < 0x1p-95F ? 0x1p96F : 1.0F;
          const float inverse = largest > 0.0F ? 127.0F / (largest * lift) : 0.0F;
          const float step = largest * lift / 127.0F / lift;
          int64_t sum = 0;
          for (const int64_t c : block) {
            const float scaled = x[static_cast<size_t>(t * k + c)] * lift * inverse;
            const auto code = static_cast<int>(std::nearbyint(scaled));
            const int weight = w.codes[static_cast<size_t>(r * k + c)] * unit - zero;
            sum += int64_t{code} * weight;
            bound += std::fabs(static_cast<double>(weight)) / unit *
                     static_cast<double>(w.scales[parameter]) * static_cast<double>(step) * 0.5001;
          }
          const float scaled = static_cast<float>(sum) * (step / static_cast<float>(unit));
          group_sum = group_sum + scaled;
        }
        const float product = group_sum * w.scales[parameter];
        y = y + product;
      }
      out.y.push_back(y);
      out.rounding_bound.push_back(bound);
    }
  }
  return out;
}

// sum |x| * scale * (|code - center| + |zero - center|) for each output: what float32 rounding acts on.
std::vector<double> magnitudes(const std::vector<float>& x, int64_t m, const PackedTensor& packed) {
  const auto& format = dynamic_cast<const Uniform&>(*packed.format);
  const Unpacked w = unpack(packed);
  const auto center = static_cast<double>(format.symmetric_zero_point());
  std::vector<double> out;
  for (int64_t t = 0; t < m; ++t) {
    for (int64_t r = 0; r < packed.n; ++r) {
      double sum = 0.0;
      for (int64_t c = 0; c < packed.k; ++c) {
        const auto parameter = static_cast<size_t>(r * w.group_count + w.groups[static_cast<size_t>(c)]);
        const double weight = std::fabs(w.codes[static_cast<size_t>(r * packed.k + c)] - center) +
                              std::fabs(static_cast<double>(w.zeros[parameter]) - center);
        sum += std::fabs(static_cast<double>(x[static_cast<size_t>(t * packed.k + c)])) * weight *
               static_cast<double>(w.scales[parameter]);
      }
      out.push_back(sum);
    }
  }
  return out;
}

void check_case(const Case& c, const std::vector<int>& threads) {
  SCOPED_TRACE(text_of(c.format.spec(), " n=", c.n, " k=", c.k, " m=", c.m, " group_index=", c.group_index,
                       " seed=", c.seed, " target=", cpu_target()));
  const PackedTensor packed = random_packed(c.n, c.k, c.format, c.seed, c.group_index);
  const auto prepared = prepare(packed);
  const std::vector<float> x = random_x(c.m, c.k, c.seed);
  std::vector<float> reference(static_cast<size_t>(c.m * c.n));
  matmul_reference(MatrixView<const float>(x.data(), c.m, c.k), packed, {reference.data(), c.m, c.n});

  const auto exact = run(x, c.m, *prepared, Activations::exact, 1);
  const auto int8 = run(x, c.m, *prepared, Activations::int8, 1);
  const auto magnitude = magnitudes(x, c.m, packed);
  const Emulated emulated = emulate_int8(x, c.m, packed);
  // Additions in the longest chain of a block, over blocks and over groups.
  const auto groups = static_cast<double>(c.format.group_count(c.k));
  const double chain = 128.0 + static_cast<double>(c.k) / 128.0 + groups + 12.0;
  for (size_t i = 0; i < reference.size(); ++i) {
    const double accumulation = chain * kEpsilon * magnitude[i] + 1e-30;
    ASSERT_LE(std::fabs(static_cast<double>(exact[i]) - static_cast<double>(reference[i])), accumulation)
        << i;
    ASSERT_LE(std::fabs(static_cast<double>(int8[i]) - static_cast<double>(reference[i])),
              emulated.rounding_bound[i] + accumulation)
        << i;
  }
  ASSERT_TRUE(same_bits(int8, emulated.y)) << "int8 path differs from its emulation";
  for (const int count : threads) {
    ASSERT_TRUE(same_bits(exact, run(x, c.m, *prepared, Activations::exact, count))) << count << " threads";
    ASSERT_TRUE(same_bits(int8, run(x, c.m, *prepared, Activations::int8, count))) << count << " threads";
  }
}

Case random_case(uint64_t index) {
  static constexpr int64_t kSizes[] = {0, 1, 2, 3, 15, 16, 17, 31, 33, 64, 100, 127, 129, 257};
  static constexpr int64_t kTokens[] = {0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 64};
  static constexpr int64_t kGroups[] = {
      Uniform::kPerChannel, Uniform::kPerTensor, 1, 7, 16, 32, 48, 64, 100, 128, 200};
  static constexpr DType kScales[] = {DType::f16, DType::bf16, DType::f32};
  const CounterRandom random(index);
  const auto pick = [&](uint64_t draw, const auto& from) {
    return from[random.below(draw, std::size(from))];
  };
  const int64_t group = pick(0, kGroups);
  return {pick(1, kSizes),
          pick(2, kSizes),
          pick(3, kTokens),
          Uniform(static_cast<int>(index % 8) + 1, group, index / 8 % 2 == 0, pick(4, kScales)),
          group > 0 && random.below(5, 3) == 0,
          index};
}

// A codebook of any width and number of entries, on the shapes of a random case.
void check_codebook_case(uint64_t index, const std::vector<int>& threads) {
  const Case c = random_case(index);
  const CounterRandom random(index);
  const int bits = c.format.bits;
  const size_t entries = 2 + random.below(10, (uint64_t{1} << bits) - 1);
  const Codebook format(random_table(entries, index, index % 5 == 0 ? 50.0F : 1.0F), c.format.group_size,
                        c.format.scale_dtype, bits);
  SCOPED_TRACE(text_of(format.spec(), " n=", c.n, " k=", c.k, " m=", c.m, " group_index=", c.group_index,
                       " entries=", entries, " seed=", c.seed, " target=", cpu_target()));
  const PackedTensor packed = random_packed(c.n, c.k, format, c.seed, c.group_index);
  validate(packed);
  const auto prepared = prepare(packed);
  const std::vector<float> x = random_x(c.m, c.k, c.seed);
  std::vector<float> reference(static_cast<size_t>(c.m * c.n));
  matmul_reference(MatrixView<const float>(x.data(), c.m, c.k), packed, {reference.data(), c.m, c.n});
  std::vector<float> weights(static_cast<size_t>(c.n * c.k));
  dequantize(packed, {weights.data(), c.n, c.k}, 1);
  const auto exact = run(x, c.m, *prepared, Activations::exact, 1);
  const double chain =
      128.0 + static_cast<double>(c.k) / 128.0 + static_cast<double>(format.group_count(c.k)) + 12.0;
  for (int64_t t = 0; t < c.m; ++t) {
    for (int64_t r = 0; r < c.n; ++r) {
      double magnitude = 0.0;
      for (int64_t i = 0; i < c.k; ++i) {
        magnitude += std::fabs(static_cast<double>(x[static_cast<size_t>(t * c.k + i)]) *
                               static_cast<double>(weights[static_cast<size_t>(r * c.k + i)]));
      }
      const auto at = static_cast<size_t>(t * c.n + r);
      ASSERT_LE(std::fabs(static_cast<double>(exact[at]) - static_cast<double>(reference[at])),
                chain * kEpsilon * magnitude + 1e-30)
          << t << ", " << r;
    }
  }
  for (const int count : threads) {
    ASSERT_TRUE(same_bits(exact, run(x, c.m, *prepared, Activations::exact, count))) << count << " threads";
  }
}

// Runs the body once for each instruction set that this processor and this build have.
template <class Body>
void for_each_target(const Body& body) {
  const std::vector<int64_t> targets = hwy::SupportedAndGeneratedTargets();
  ASSERT_FALSE(targets.empty());
  std::set<std::string> seen;
  for (const int64_t target : targets) {
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    EXPECT_EQ(cpu_target(), hwy::TargetName(target));
    seen.insert(cpu_target());
    body();
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  EXPECT_EQ(seen.size(), targets.size());
}

TEST(Matmul, AgreesWithReferenceAndEmulationOnRandomCases) {
  for (uint64_t i = 0; i < 480; ++i) {
    check_case(random_case(i), i % 4 == 0 ? std::vector<int>{2, 4} : std::vector<int>{});
    if (HasFatalFailure()) return;
  }
}

TEST(Matmul, AgreesOnEveryInstructionSet) {
  for_each_target([] {
    for (uint64_t i = 1000; i < 1096; ++i) {
      check_case(random_case(i), {});
      if (HasFatalFailure()) return;
      check_codebook_case(i, {});
      if (HasFatalFailure()) return;
    }
  });
}

TEST(Matmul, CodebooksAgreeWithTheReferenceOnRandomCases) {
  for (uint64_t i = 3000; i < 3480; ++i) {
    check_codebook_case(i, i % 4 == 0 ? std::vector<int>{2, 4} : std::vector<int>{});
    if (HasFatalFailure()) return;
  }
}

// Activations that are powers of two, and sums below 2^24: nothing rounds.
TEST(Matmul, CodebooksMultiplyExactlyWhatFloatsHold) {
  for_each_target([] {
    for (int bits = 1; bits <= 8; ++bits) {
      std::vector<float> table(size_t{1} << bits);
      for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<float>(3 * i) - 70;
      const Codebook format(table, 32, DType::f32);
      PackedTensor packed = random_packed(35, 200, format, 5, false);
      for (float& scale : packed.planes.at("scales").values<float>()) scale = 0.5F;
      std::vector<float> x(9 * 200);
      for (size_t i = 0; i < x.size(); ++i)
        x[i] = std::ldexp(i % 3 == 0 ? -1.0F : 1.0F, static_cast<int>(i % 5));
      std::vector<float> reference(9 * 35);
      matmul_reference(MatrixView<const float>(x.data(), 9, 200), packed, {reference.data(), 9, 35});
      EXPECT_TRUE(same_bits(run(x, 9, *prepare(packed), Activations::exact, 1), reference)) << bits;
    }
  });
}

TEST(Matmul, ServesEveryFormatThatTheTableClaims) {
  for (const FormatEntry& entry : format_table()) {
    for (const std::string& spec : entry.examples) {
      const auto format = format_from_spec(spec);
      if (const auto* uniform = dynamic_cast<const Uniform*>(format.get())) {
        check_case({33, 300, 3, *uniform, false, 7}, {2});
      }
    }
  }
  std::set<std::pair<std::string, std::string>> claimed;
  std::set<std::string> claimed_codebooks;
  for (const KernelEntry& entry : kernel_table()) {
    if (entry.operation != "matmul" || entry.device != "cpu") continue;
    // additive_test.cpp, bcq_product_test.cpp, vector_codebook_test.cpp, outliers_test.cpp, sdr_test.cpp,
    // spqr_test.cpp, trellis_product_test.cpp
    if (entry.format == "bcq" || entry.format == "vector_codebook" || entry.format == "outliers") continue;
    if (entry.format == "trellis" || entry.format == "spqr" || entry.format == "sdr") continue;
    if (entry.format == "additive") continue;
    EXPECT_EQ(entry.target, cpu_target());
    if (entry.format == "codebook") {
      EXPECT_EQ(entry.activations, "float32");
      claimed_codebooks.insert(entry.bits);
      continue;
    }
    EXPECT_EQ(entry.format, "uniform");
    claimed.emplace(entry.bits, entry.activations);
  }
  for (int bits = 1; bits <= 8; ++bits) {
    EXPECT_TRUE(claimed.contains({std::to_string(bits), "float32"}));
    EXPECT_TRUE(claimed.contains({std::to_string(bits), "int8"}));
    check_case({40, 260, 5, Uniform(bits, 128), false, 11}, {2, 4});
    EXPECT_TRUE(claimed_codebooks.contains(std::to_string(bits)));
  }
  EXPECT_EQ(claimed.size(), 16U);
  EXPECT_EQ(claimed_codebooks.size(), 8U);
}

TEST(Matmul, ThreadsDoNotChangeLargerProducts) {
  for (const int bits : {2, 3, 4, 8}) {
    const PackedTensor packed = random_packed(1000, 1024, Uniform(bits, 128, bits % 2 == 0), 3, false);
    const auto one = prepare(packed, 1);
    const auto four = prepare(packed, 4);
    for (const int64_t m : {1, 20}) {
      const auto x = random_x(m, 1024, 9);
      for (const auto activations : {Activations::exact, Activations::int8}) {
        const auto expected = run(x, m, *one, activations, 1);
        for (const int threads : {2, 4}) {
          EXPECT_TRUE(same_bits(expected, run(x, m, *four, activations, threads))) << bits << " " << m;
        }
      }
    }
  }
}

TEST(Matmul, Int8ResultOfATokenDoesNotDependOnItsBatch) {
  const PackedTensor packed = random_packed(50, 300, Uniform(4, 64, false), 5, false);
  const auto prepared = prepare(packed);
  const int64_t m = 600;  // more than one batch
  const auto x = random_x(m, 300, 6);
  const auto all = run(x, m, *prepared, Activations::int8, 2);
  for (const int64_t t : {0, 7, 8, 511, 512, 599}) {
    const std::vector<float> token(x.begin() + t * 300, x.begin() + (t + 1) * 300);
    const auto alone = run(token, 1, *prepared, Activations::int8, 1);
    EXPECT_TRUE(same_bits(alone, {all.begin() + t * 50, all.begin() + (t + 1) * 50})) << t;
  }
}

TEST(Matmul, ExtremeActivationsAndScales) {
  for_each_target([] {
    const int64_t k = 140;
    for (const float size : {0.0F, 1e-44F, 1e-38F, 1e-30F, 1e28F}) {
      for (const int bits : {1, 2, 3, 4, 8}) {
        const PackedTensor packed = random_packed(20, k, Uniform(bits, 64), 8, false);
        auto x = random_x(2, k, 12);
        for (float& value : x) value *= size;
        const auto prepared = prepare(packed);
        const Emulated emulated = emulate_int8(x, 2, packed);
        EXPECT_TRUE(same_bits(run(x, 2, *prepared, Activations::int8, 1), emulated.y)) << size << " " << bits;
        for (const float value : run(x, 2, *prepared, Activations::exact, 1))
          EXPECT_TRUE(std::isfinite(value));
      }
    }
    // The largest sums that int8 dot products meet.
    for (const bool symmetric : {true, false}) {
      PackedTensor packed = random_packed(16, 256, Uniform(8, 128, symmetric), 8, false);
      for (uint32_t& word : packed.planes.at("codes").values<uint32_t>()) word = 0xffffffffU;
      if (!symmetric) {
        for (uint32_t& word : packed.planes.at("zeros").values<uint32_t>()) word = 0;
      }
      for (const float value : {1.0F, -1.0F}) {
        const std::vector<float> x(256, value);
        EXPECT_TRUE(
            same_bits(run(x, 1, *prepare(packed), Activations::int8, 1), emulate_int8(x, 1, packed).y));
      }
    }
  });
}

TEST(Matmul, Int8ErrorIsAsDocumented) {
  const PackedTensor packed = random_packed(128, 1024, Uniform(4, 128), 21, false);
  const CounterRandom random(22);
  std::vector<float> x(16 * 1024);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(random.normal(i));
  std::vector<float> reference(16 * 128);
  matmul_reference(MatrixView<const float>(x.data(), 16, 1024), packed, {reference.data(), 16, 128});
  const auto y = run(x, 16, *prepare(packed), Activations::int8, 1);
  double error = 0.0;
  double norm = 0.0;
  for (size_t i = 0; i < y.size(); ++i) {
    error += std::pow(static_cast<double>(y[i]) - static_cast<double>(reference[i]), 2);
    norm += std::pow(static_cast<double>(reference[i]), 2);
  }
  EXPECT_LT(std::sqrt(error / norm), 0.008);
  EXPECT_GT(std::sqrt(error / norm), 0.003) << "the documented figure is out of date";
}

TEST(Matmul, TakesActivationsInSixteenBits) {
  const PackedTensor packed = random_packed(20, 70, Uniform(3, 32, false), 31, false);
  const auto prepared = prepare(packed);
  for (const DType dtype : {DType::f16, DType::bf16}) {
    std::vector<uint16_t> stored(3 * 70);
    std::vector<float> x(3 * 70);
    const auto values = random_x(3, 70, 32);
    for (size_t i = 0; i < x.size(); ++i) {
      stored[i] = dtype == DType::f16 ? f16_from_float(values[i]) : bf16_from_float(values[i]);
      x[i] = dtype == DType::f16 ? float_from_f16(stored[i]) : float_from_bf16(stored[i]);
    }
    for (const auto activations : {Activations::exact, Activations::int8}) {
      std::vector<float> y(3 * 20);
      matmul({stored.data(), dtype, 3, 70, 70}, *prepared, {y.data(), 3, 20}, {.activations = activations});
      EXPECT_TRUE(same_bits(y, run(x, 3, *prepared, activations, 0)));
    }
  }
}

TEST(Matmul, RefusesInt8ActivationsForCodebooks) {
  const auto w = prepare(random_packed(8, 32, Codebook("nf4", 16), 41, false));
  const std::vector<float> x(2 * 32, 1.0F);
  std::vector<float> y(2 * 8, 5.0F);
  try {
    matmul(MatrixView<const float>(x.data(), 2, 32), *w, {y.data(), 2, 8},
           {.activations = Activations::int8});
    ADD_FAILURE() << "accepted";
  } catch (const Unsupported& error) {
    EXPECT_NE(std::string(error.what()).find("codebook:nf4:g16"), std::string::npos) << error.what();
  }
  for (const float value : y) EXPECT_EQ(value, 5.0F);
}

TEST(Matmul, RefusesBadArguments) {
  const PackedTensor packed = random_packed(8, 32, Uniform(4, 32), 41, false);
  const auto w = prepare(packed);
  std::vector<float> x(2 * 32, 1.0F);
  std::vector<float> y(2 * 8, 5.0F);
  const MatrixView<const float> good_x(x.data(), 2, 32);
  const MatrixView<float> good_y(y.data(), 2, 8);
  EXPECT_THROW(matmul(MatrixView<const float>(x.data(), 2, 31), *w, good_y), InvalidArgument);
  EXPECT_THROW(matmul(MatrixView<const float>(x.data(), 1, 32), *w, good_y), InvalidArgument);
  EXPECT_THROW(matmul(good_x, *w, {y.data(), 2, 7}), InvalidArgument);
  EXPECT_THROW(matmul(good_x, *w, {nullptr, 2, 8}), InvalidArgument);
  EXPECT_THROW(matmul(good_x, *w, {y.data(), 2, 8, 7}), InvalidArgument);
  EXPECT_THROW(matmul(good_x, *w, good_y, {.threads = -1}), InvalidArgument);
  EXPECT_THROW(matmul(good_x, *w, {x.data() + 40, 2, 8}), InvalidArgument);
  EXPECT_THROW(matmul_reference(MatrixView<const float>(x.data(), 2, 31), packed, good_y), InvalidArgument);
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    x[35] = bad;
    EXPECT_THROW(matmul(good_x, *w, good_y, {.activations = Activations::int8}), NumericError);
  }
  for (const float value : y) EXPECT_EQ(value, 5.0F);
  class Foreign final : public PreparedTensor {
    int64_t n() const override { return 8; }
    int64_t k() const override { return 32; }
    int64_t byte_count() const override { return 0; }
  };
  EXPECT_THROW(matmul(good_x, Foreign(), good_y), InvalidArgument);
  EXPECT_THROW(prepare(PackedTensor()), InvalidArgument);
  PackedTensor missing = packed;
  missing.planes.erase("scales");
  EXPECT_THROW(prepare(missing), InvalidArgument);
}

void expect_inverts(const PackedTensor& packed) {
  const auto prepared = prepare(packed, 2);
  EXPECT_EQ(prepared->n(), packed.n);
  EXPECT_EQ(prepared->k(), packed.k);
  const PackedTensor back =
      kernels::unprepare_strips(dynamic_cast<const kernels::PreparedStrips&>(*prepared), 2);
  EXPECT_EQ(back.n, packed.n);
  EXPECT_EQ(back.k, packed.k);
  EXPECT_EQ(back.format->to_json(), packed.format->to_json());
  ASSERT_EQ(back.planes.size(), packed.planes.size());
  for (const auto& [name, plane] : packed.planes) {
    const Tensor& other = back.plane(name);
    ASSERT_EQ(other.shape(), plane.shape()) << name;
    ASSERT_TRUE(plane.byte_count() == 0 ||
                std::memcmp(other.bytes(), plane.bytes(), static_cast<size_t>(plane.byte_count())) == 0)
        << name;
  }
}

TEST(Prepare, IsInvertedBitForBit) {
  for (uint64_t i = 2000; i < 2240; ++i) {
    const Case c = random_case(i);
    SCOPED_TRACE(text_of(c.format.spec(), " n=", c.n, " k=", c.k, " group_index=", c.group_index));
    expect_inverts(random_packed(c.n, c.k, c.format, c.seed, c.group_index));
    const Codebook codebook(random_table(size_t{1} << c.format.bits, i), c.format.group_size,
                            c.format.scale_dtype);
    expect_inverts(random_packed(c.n, c.k, codebook, c.seed, c.group_index));
  }
}

TEST(Prepare, StoresNoMoreThanTheWidthsAndTheHeaders) {
  for (const int bits : {2, 3, 4, 8}) {
    const auto prepared = prepare(random_packed(64, 1024, Uniform(bits, 128), 51, false));
    EXPECT_EQ(prepared->byte_count(), 64 * 1024 * bits / 8 + 64 * 8 * 2) << bits;
  }
}

}  // namespace
}  // namespace quantloom
