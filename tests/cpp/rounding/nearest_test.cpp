#include "quantloom/rounding/nearest.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "quantloom/formats/uniform.hpp"
#include "quantloom/random.hpp"

namespace quantloom {
namespace {

std::vector<float> random_matrix(int64_t n, int64_t k, uint64_t seed) {
  const CounterRandom random(seed);
  std::vector<float> values(static_cast<size_t>(n * k));
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(random.normal(i));
  return values;
}

std::vector<float> decode(const PackedTensor& packed) {
  std::vector<float> values(static_cast<size_t>(packed.n * packed.k));
  dequantize(packed, MatrixView<float>(values.data(), packed.n, packed.k));
  return values;
}

bool same_bytes(const PackedTensor& a, const PackedTensor& b) {
  if (a.planes.size() != b.planes.size()) return false;
  for (const auto& [name, plane] : a.planes) {
    const Tensor& other = b.plane(name);
    if (plane.shape() != other.shape() || plane.dtype() != other.dtype()) return false;
    if (std::memcmp(plane.bytes(), other.bytes(), static_cast<size_t>(plane.byte_count())) != 0) return false;
  }
  return true;
}

TEST(Nearest, EveryFormatTakesOddShapesWhateverTheThreads) {
  for (const FormatEntry& entry : format_table()) {
    for (const std::string& example : entry.examples) {
      for (const auto& [n, k] : std::vector<std::pair<int64_t, int64_t>>{
               {0, 0}, {0, 5}, {3, 0}, {1, 1}, {3, 129}, {65, 127}, {130, 257}, {67, 33}}) {
        SCOPED_TRACE(text_of(example, " [", n, ", ", k, "]"));
        const auto w = random_matrix(n, k, static_cast<uint64_t>(n * 1000 + k));
        const MatrixView<const float> view(w.data(), n, k);
        const auto format = format_from_spec(example);
        const Rounded one = round_nearest(view, format, {.threads = 1});
        validate(one.tensor);
        for (const int threads : {2, 4}) {
          EXPECT_TRUE(same_bytes(one.tensor, round_nearest(view, format, {.threads = threads}).tensor));
        }
        const auto decoded = decode(one.tensor);
        double sum = 0;
        for (size_t i = 0; i < w.size(); ++i) {
          ASSERT_TRUE(std::isfinite(decoded[i]));
          sum += std::pow(static_cast<double>(decoded[i]) - w[i], 2);
        }
        if (!w.empty()) {
          const double expected = sum / static_cast<double>(w.size());
          EXPECT_NEAR(one.report.mean_squared_error, expected, 1e-12 + 1e-12 * expected);
        }
        EXPECT_EQ(one.report.method, "nearest");
      }
    }
  }
}

TEST(Nearest, RefusesNonFiniteValuesByRowAndColumn) {
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    auto w = random_matrix(5, 7, 1);
    w[2 * 7 + 3] = bad;
    try {
      round_nearest(MatrixView<const float>(w.data(), 5, 7), std::make_shared<Uniform>(4, 4));
      FAIL() << "accepted " << bad;
    } catch (const NumericError& error) {
      EXPECT_NE(std::string(error.what()).find("row 2, column 3"), std::string::npos) << error.what();
    }
  }
}

}  // namespace
}  // namespace quantloom
