#include "quantloom/formats/bcq.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>

#include "formats/bcq_fit.hpp"
#include "quantloom/formats/uniform.hpp"
#include "quantloom/rounding/error_feedback.hpp"
#include "quantloom/rounding/nearest.hpp"
#include "test_matrices.hpp"

namespace quantloom {
namespace {

using testing::decoded_values;
using testing::normal_values;

std::shared_ptr<const Bcq> as_bcq(const std::shared_ptr<const Format>& format) {
  return std::dynamic_pointer_cast<const Bcq>(format);
}

// The value of a weight, straight from the description of the planes.
float slow_value(const PackedTensor& packed, int64_t row, int64_t column) {
  const auto& format = static_cast<const Bcq&>(*packed.format);
  const int64_t groups = format.group_count(packed.k);
  const int64_t group = packed.planes.contains("group_index")
                            ? packed.plane("group_index").values<int32_t>()[column]
                            : column / format.columns_per_group(packed.k);
  const auto at = [&](const Tensor& plane, int64_t i) {
    if (plane.dtype() == DType::f32) return plane.values<float>()[i];
    const uint16_t bits = plane.values<uint16_t>()[i];
    return plane.dtype() == DType::f16 ? float_from_f16(bits) : float_from_bf16(bits);
  };
  float value = format.offset ? at(packed.plane("offsets"), row * groups + group) : 0.0F;
  const Tensor& signs = packed.plane("signs");
  for (int64_t p = 0; p < format.bits; ++p) {
    const uint32_t word = signs.values<uint32_t>()[(p * packed.n + row) * signs.shape()[2] + column / 32];
    const float scale = at(packed.plane("scales"), (p * packed.n + row) * groups + group);
    value += (word >> (column % 32) & 1U) != 0 ? scale : -scale;
  }
  return value;
}

TEST(Bcq, DescriptionsRoundTrip) {
  for (const std::string spec : {"bcq:3:g128", "bcq:1:channel", "bcq:8:g7:offset:bf16",
                                 "bcq:2:g64:f32:r0:greedy", "bcq:4:g1:offset:r1000", "bcq:5:g32:greedy"}) {
    const auto format = format_from_spec(spec);
    EXPECT_EQ(format->spec(), spec);
    EXPECT_EQ(format_from_json(format->to_json())->spec(), spec);
    EXPECT_EQ(format_from_json(format->to_json())->to_json(), format->to_json());
  }
  EXPECT_EQ(format_from_spec("bcq:3")->spec(), "bcq:3:g128");
  EXPECT_EQ(format_from_spec("bcq:3:offset:g16:r15")->spec(), "bcq:3:g16:offset");
  EXPECT_EQ(as_bcq(format_from_spec("bcq:3:r4"))->rounds, 4);
  for (const std::string spec :
       {"bcq", "bcq:0", "bcq:9", "bcq:3:tensor", "bcq:3:offset:offset", "bcq:3:r", "bcq:3:r-1", "bcq:3:r1001",
        "bcq:3:g0", "bcq:3:sym", "bcq:x", "bcq:3:greedy:greedy"}) {
    EXPECT_THROW(format_from_spec(spec), InvalidArgument) << spec;
  }
  const std::string json = format_from_spec("bcq:3:g128")->to_json();
  for (const auto& [from, to] :
       std::vector<std::pair<std::string, std::string>>{{"\"bits\":3", "\"bits\":9"},
                                                        {"\"start\":\"best\"", "\"start\":\"first\""},
                                                        {"\"offset\":false", "\"offset\":0"},
                                                        {"\"rounds\":15", "\"rounds\":-1"},
                                                        {"\"group_size\":128", "\"group_size\":\"tensor\""},
                                                        {"\"version\":1", "\"version\":2"},
                                                        {"\"version\":1", "\"version\":1,\"more\":1"}}) {
    std::string changed = json;
    ASSERT_NE(changed.find(from), std::string::npos) << from;
    changed.replace(changed.find(from), from.size(), to);
    EXPECT_THROW(format_from_json(changed), InvalidArgument) << changed;
  }
  EXPECT_THROW(Bcq(3, Bcq::kPerTensor), InvalidArgument);
  EXPECT_THROW(Bcq(3, 128, false, DType::f16, 1001), InvalidArgument);
  EXPECT_THROW(Bcq(3, 128, false, DType::u8), TypeMismatch);
}

TEST(Bcq, TakesTheNearestValueAndDecodesAsDescribed) {
  uint64_t seed = 1;
  for (const std::string spec : {"bcq:1:g5", "bcq:2:g32:offset", "bcq:3:channel:bf16",
                                 "bcq:4:g16:offset:f32:r3", "bcq:8:g40", "bcq:3:g64:r0:greedy"}) {
    for (const auto& [n, k] :
         std::vector<std::pair<int64_t, int64_t>>{{0, 7}, {3, 0}, {1, 1}, {3, 31}, {5, 67}, {37, 128}}) {
      SCOPED_TRACE(text_of(spec, " [", n, ", ", k, "]"));
      const auto w = normal_values(n * k, ++seed);
      const auto format = as_bcq(format_from_spec(spec));
      const MatrixView<const float> view(w.data(), n, k);
      const Rounded rounded = round_nearest(view, format, {.threads = 1});
      validate(rounded.tensor);
      const auto decoded = decoded_values(rounded.tensor);
      const int64_t groups = format->group_count(k);
      const int64_t width = format->columns_per_group(k);
      for (int64_t row = 0; row < n; ++row) {
        for (int64_t c = 0; c < k; ++c) {
          ASSERT_EQ(decoded[row * k + c], slow_value(rounded.tensor, row, c)) << row << ", " << c;
        }
        for (int64_t g = 0; g < groups; ++g) {
          // All values of the group, as planes hold them: none is nearer than the one taken.
          std::vector<float> values = {0};
          const auto scale = [&](int64_t p) {
            const Tensor& plane = rounded.tensor.plane("scales");
            const int64_t i = (p * n + row) * groups + g;
            if (plane.dtype() == DType::f32) return plane.values<float>()[i];
            const uint16_t bits = plane.values<uint16_t>()[i];
            return plane.dtype() == DType::f16 ? float_from_f16(bits) : float_from_bf16(bits);
          };
          if (format->offset) {
            const Tensor& plane = rounded.tensor.plane("offsets");
            const int64_t i = row * groups + g;
            values = {plane.dtype() == DType::f32 ? plane.values<float>()[i]
                                                  : float_from_f16(plane.values<uint16_t>()[i])};
          }
          for (int64_t p = 0; p < format->bits; ++p) {
            const size_t count = values.size();
            ASSERT_GE(scale(p), 0);
            if (p > 0) {
              ASSERT_LE(scale(p), scale(p - 1));
            }
            for (size_t i = 0; i < count; ++i) values.push_back(values[i] + scale(p));
            for (size_t i = 0; i < count; ++i) values[i] -= scale(p);
          }
          for (int64_t c = g * width; c < std::min(k, (g + 1) * width); ++c) {
            float least = std::numeric_limits<float>::infinity();
            for (const float value : values) least = std::min(least, std::abs(value - w[row * k + c]));
            ASSERT_LE(std::abs(decoded[row * k + c] - w[row * k + c]), least * (1 + 1e-6F) + 1e-9F);
          }
        }
      }
      for (const int threads : {2, 4}) {
        EXPECT_TRUE(
            testing::same_planes(round_nearest(view, format, {.threads = threads}).tensor, rounded.tensor));
      }
    }
  }
}

TEST(BcqFit, NearestPositionIsTheLowerOneOnATie) {
  const CounterRandom random(5);
  for (int bits = 1; bits <= 8; ++bits) {
    bcq::Grid grid;
    grid.bits = bits;
    grid.has_offset = true;
    grid.offset = 0.25F;
    for (int p = 0; p < bits; ++p) grid.scale[p] = static_cast<float>(random.uniform(p));
    std::vector<float> values(static_cast<size_t>(grid.size()));
    std::vector<uint8_t> codes(values.size());
    bcq::sorted_values(grid, values, codes);
    EXPECT_TRUE(std::is_sorted(values.begin(), values.end()));
    for (size_t i = 0; i < values.size(); ++i) EXPECT_EQ(bcq::value_of(grid, codes[i]), values[i]);
    for (uint64_t i = 0; i < 200; ++i) {
      const auto x = static_cast<float>(6 * random.uniform(100 + i) - 3);
      const auto at = static_cast<size_t>(bcq::nearest_position(values, bits, x));
      for (const float value : values) EXPECT_GE(std::abs(value - x) * (1 + 1e-6F), std::abs(values[at] - x));
    }
  }
  const std::vector<float> pair = {-1, 3};
  EXPECT_EQ(bcq::nearest_position(pair, 1, 1.0F), 0);
  EXPECT_EQ(bcq::nearest_position(pair, 1, 1.5F), 1);
}

double fitted_error(int bits, bool offset, const std::vector<float>& x, const std::vector<float>& weights,
                    int rounds, bool greedy) {
  bcq::Grid grid;
  grid.bits = bits;
  grid.has_offset = offset;
  bcq::fit(grid, x, weights, {rounds, greedy});
  return bcq::error_of(grid, x, weights);
}

TEST(BcqFit, ErrorNeverGrowsWithRoundsNorWithBits) {
  for (uint64_t seed = 1; seed <= 12; ++seed) {
    const CounterRandom random(seed);
    const auto count = static_cast<int64_t>(1 + random.below(0, 150));
    std::vector<float> x = normal_values(count, seed);
    if (seed % 3 == 0) {
      for (float& value : x) value = value * value * value + 0.5F;
    }
    std::vector<float> weights;
    if (seed % 2 == 0) {
      for (int64_t i = 0; i < count; ++i) weights.push_back(static_cast<float>(random.uniform(10 + i)));
    }
    for (const bool offset : {false, true}) {
      for (const bool greedy : {false, true}) {
        std::vector<double> by_bits;
        for (int bits = 1; bits <= 6; ++bits) {
          SCOPED_TRACE(text_of("seed ", seed, ", ", bits, " bits, offset ", offset, ", greedy ", greedy));
          double before = std::numeric_limits<double>::infinity();
          for (const int rounds : {0, 1, 2, 3, 5, 8, 15, 40}) {
            const double error = fitted_error(bits, offset, x, weights, rounds, greedy);
            if (greedy) {
              EXPECT_LE(error, before * (1 + 1e-6) + 1e-12) << rounds << " rounds";
            }
            before = error;
          }
          by_bits.push_back(before);
        }
        for (size_t b = 1; b < by_bits.size() && !greedy; ++b) {
          EXPECT_LE(by_bits[b], by_bits[b - 1] * (1 + 1e-6) + 1e-12) << b + 1 << " bits, seed " << seed;
        }
      }
      for (int bits = 1; bits <= 4; ++bits) {
        EXPECT_LE(fitted_error(bits, offset, x, weights, 15, false),
                  fitted_error(bits, offset, x, weights, 15, true) * (1 + 1e-6) + 1e-12);
      }
    }
  }
}

TEST(BcqFit, KnownCases) {
  // One plane: the mean magnitude is the least squares.
  bcq::Grid grid;
  grid.bits = 1;
  bcq::fit(grid, std::vector<float>{1, -3, 2, -2}, {}, {});
  EXPECT_FLOAT_EQ(grid.scale[0], 2);
  bcq::fit(grid, std::vector<float>{1, -3, 2, -2}, std::vector<float>{1, 3, 0, 0}, {});
  EXPECT_FLOAT_EQ(grid.scale[0], 2.5F);
  // Values on a grid are found, evenly spaced or not.
  grid.bits = 3;
  grid.has_offset = true;
  std::vector<float> x;
  for (int code = 0; code < 8; ++code) x.push_back(0.3F * static_cast<float>(code) - 1);
  bcq::fit(grid, x, {}, {});
  EXPECT_LT(bcq::error_of(grid, x, {}), 1e-10);
  EXPECT_NEAR(grid.scale[0], 0.6, 1e-5);
  EXPECT_NEAR(grid.scale[2], 0.15, 1e-5);
  EXPECT_NEAR(grid.offset, 0.05, 1e-5);
  // One value, zeros, nothing at all.
  for (const std::vector<float>& values : {std::vector<float>(9, 0.7F), std::vector<float>(5, 0.0F), {}}) {
    bcq::fit(grid, values, {}, {});
    EXPECT_LT(bcq::error_of(grid, values, {}), 1e-10);
    EXPECT_TRUE(std::isfinite(grid.offset) && std::isfinite(grid.scale[0]));
  }
}

TEST(Bcq, WeightsOfAHessianCount) {
  const int64_t n = 20;
  const int64_t k = 96;
  const CounterRandom random(3);
  auto x = normal_values(300 * k, 8);
  for (int64_t t = 0; t < 300; ++t) {
    for (int64_t c = k - 1; c > 0; --c) x[t * k + c] += x[t * k + c - 1];
    for (int64_t c = 0; c < k; ++c) x[t * k + c] *= static_cast<float>(std::exp(2 * random.uniform(c)));
  }
  Hessian hessian(k);
  hessian.add(MatrixView<const float>(x.data(), 300, k));
  const auto w = normal_values(n * k, 9);
  const MatrixView<const float> view(w.data(), n, k);
  for (const std::string spec : {"bcq:3:g32", "bcq:2:g48:offset"}) {
    const auto format = format_from_spec(spec);
    const auto decoded = decoded_values(round_nearest(view, format, {.threads = 1}).tensor);
    const double plain = proxy_loss(view, MatrixView<const float>(decoded.data(), n, k), hessian);
    const double weighted =
        round_nearest(view, format, {.hessian = &hessian, .threads = 1}).report.proxy_loss;
    EXPECT_LT(weighted, 0.9 * plain) << spec;
    for (const bool static_groups : {true, false}) {
      ErrorFeedbackOptions options;
      options.static_groups = static_groups;
      options.threads = 1;
      const Rounded fed = round_error_feedback(view, format, hessian, options);
      EXPECT_LT(fed.report.proxy_loss, weighted) << spec;
      EXPECT_EQ(fed.tensor.planes.contains("group_index"), !static_groups);
      validate(fed.tensor);
      const auto values = decoded_values(fed.tensor);
      for (int64_t row = 0; row < n; ++row) {
        for (int64_t c = 0; c < k; ++c) ASSERT_EQ(values[row * k + c], slow_value(fed.tensor, row, c));
      }
      options.threads = 3;
      EXPECT_TRUE(
          testing::same_planes(round_error_feedback(view, format, hessian, options).tensor, fed.tensor));
    }
  }
}

TEST(Bcq, ExtremesEndInNumbersOrInAnError) {
  std::vector<float> w(64, 0.0F);
  w[0] = 3.0e38F;
  w[1] = -3.0e38F;
  w[40] = 1e-42F;
  const MatrixView<const float> view(w.data(), 2, 32);
  EXPECT_THROW(round_nearest(view, format_from_spec("bcq:2:g32")), NumericError);
  for (const std::string spec : {"bcq:2:g32:f32", "bcq:3:g16:offset:bf16"}) {
    try {
      for (const float value : decoded_values(round_nearest(view, format_from_spec(spec)).tensor)) {
        EXPECT_TRUE(std::isfinite(value)) << spec;
      }
    } catch (const NumericError&) {
      SUCCEED();
    }
  }
  const std::vector<float> small(64, 6e-8F);
  for (const float value : decoded_values(
           round_nearest(MatrixView<const float>(small.data(), 2, 32), format_from_spec("bcq:1:g32"))
               .tensor)) {
    EXPECT_FLOAT_EQ(value, 0x1p-24F);
  }
}

TEST(Bcq, RefusesPlanesThatDoNotDecode) {
  const auto w = normal_values(4 * 40, 2);
  const Rounded rounded =
      round_nearest(MatrixView<const float>(w.data(), 4, 40), format_from_spec("bcq:2:g20:offset"));
  for (const std::string name : {"scales", "offsets"}) {
    PackedTensor bad = rounded.tensor;
    Tensor plane(bad.plane(name).dtype(), bad.plane(name).shape());
    plane.values<uint16_t>()[3] = 0x7c00;  // infinity
    bad.planes.at(name) = plane;
    EXPECT_THROW(validate(bad), InvalidArgument) << name;
  }
  PackedTensor bad = rounded.tensor;
  Tensor signs(DType::i32, bad.plane("signs").shape());
  signs.values<uint32_t>()[5] = 1U << 8;  // column 40 of plane 0, row 2
  bad.planes.at("signs") = signs;
  EXPECT_THROW(validate(bad), InvalidArgument);
}

// With scales in float32 nothing is lost; in the tensor's own type symmetric grids stay as they are.
TEST(ToBcq, GivesTheSameValues) {
  uint64_t seed = 40;
  const int64_t n = 9;
  const int64_t k = 38;
  auto x = normal_values(200 * k, 3);
  Hessian hessian(k);
  hessian.add(MatrixView<const float>(x.data(), 200, k));
  for (const int bits : {1, 2, 3, 4, 8}) {
    for (const int64_t group : {int64_t{16}, int64_t{128}, Uniform::kPerChannel, Uniform::kPerTensor}) {
      for (const bool symmetric : {true, false}) {
        for (const DType dtype : {DType::f16, DType::bf16, DType::f32}) {
          const auto w = normal_values(n * k, ++seed);
          const MatrixView<const float> view(w.data(), n, k);
          const auto format = std::make_shared<const Uniform>(bits, group, symmetric, dtype);
          SCOPED_TRACE(format->spec());
          for (const bool feedback : {false, true}) {
            ErrorFeedbackOptions options;
            options.static_groups = false;
            const PackedTensor packed = feedback ? round_error_feedback(view, format, hessian, options).tensor
                                                 : round_nearest(view, format).tensor;
            const auto expected = decoded_values(packed);
            const PackedTensor exact = to_bcq(packed, DType::f32);
            EXPECT_EQ(static_cast<const Bcq&>(*exact.format).bits, bits);
            EXPECT_EQ(exact.planes.contains("group_index"), packed.planes.contains("group_index"));
            const auto wide = decoded_values(exact);
            const PackedTensor own = to_bcq(packed);
            EXPECT_EQ(static_cast<const Bcq&>(*own.format).scale_dtype, dtype);
            const auto near = decoded_values(own);
            // Sums of multiples of a scale of 24 bits round; those of 11 bits do not, unless an offset did.
            if (dtype != DType::f32) {
              EXPECT_EQ(wide, expected);
            }
            if (dtype != DType::f32 && symmetric) {
              EXPECT_EQ(near, expected);
            }
            const float relative =
                dtype == DType::f32 ? 0x1p-22F : (dtype == DType::f16 ? 0x1p-11F : 0x1p-8F);
            for (size_t i = 0; i < near.size(); ++i) {
              ASSERT_NEAR(wide[i], expected[i], 20 * 0x1p-22F);
              ASSERT_NEAR(near[i], expected[i], 20 * relative);
            }
          }
        }
      }
    }
  }
  const auto w = normal_values(64, 1);
  const MatrixView<const float> view(w.data(), 1, 64);
  EXPECT_THROW(to_bcq(round_nearest(view, format_from_spec("bcq:2:g32")).tensor), InvalidArgument);
  const std::vector<float> large(64, 6.0e4F);
  const auto huge = round_nearest(MatrixView<const float>(large.data(), 1, 64),
                                  std::make_shared<const Uniform>(2, 32, true, DType::f32));
  EXPECT_NO_THROW(to_bcq(huge.tensor));
  const std::vector<float> beyond(64, 1.0e6F);
  const auto more = round_nearest(MatrixView<const float>(beyond.data(), 1, 64),
                                  std::make_shared<const Uniform>(2, 32, true, DType::f32));
  EXPECT_THROW(to_bcq(more.tensor, DType::f16), NumericError);
}

TEST(ToBcq, TrueBitsAreThoseOfTheFormula) {
  const auto w = normal_values(64 * 256, 1);
  const MatrixView<const float> view(w.data(), 64, 256);
  for (const auto& [spec, bits] : std::vector<std::pair<std::string, double>>{
           {"bcq:4:g128", 4 * (1 + 16.0 / 128)},
           {"bcq:3:g128", 3 * (1 + 16.0 / 128)},
           {"bcq:3:g128:offset", 3 * (1 + 16.0 / 128) + 16.0 / 128},
           {"bcq:2:g64:offset:f32", 2 * (1 + 32.0 / 64) + 32.0 / 64}}) {
    EXPECT_DOUBLE_EQ(round_nearest(view, format_from_spec(spec)).tensor.bits_per_weight(), bits) << spec;
  }
  const auto rtn = round_nearest(view, format_from_spec("uniform:4:g128:sym"));
  EXPECT_DOUBLE_EQ(to_bcq(rtn.tensor).bits_per_weight(), 4 + 5 * 16.0 / 128);
}

}  // namespace
}  // namespace quantloom
