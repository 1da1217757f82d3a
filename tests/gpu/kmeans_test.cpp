// Nearest neighbours and k-means on the device against the CPU: the same bits.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "fit/vector_reference.hpp"
#include "quantloom/fit/cuda_kmeans.hpp"
#include "rounding_cases.hpp"

namespace quantloom {
namespace {

using testing::make_vectors;
using testing::normal_values;
using testing::reference_codes;
using testing::VectorCase;

class KMeansCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  }
};

class KMeansCudaSmall : public KMeansCuda {};

template <class T>
class DeviceArray {
 public:
  // Filled with a byte that no result is made of.
  explicit DeviceArray(int64_t count)
      : count_(count), memory_(device_bytes(count * static_cast<int64_t>(sizeof(T)))) {
    const std::vector<std::byte> poison(static_cast<size_t>(count) * sizeof(T), std::byte{0x77});
    if (count > 0) upload(poison.data(), memory_.get(), static_cast<int64_t>(poison.size()));
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(static_cast<int64_t>(values.size())) {
    if (!values.empty()) upload(values.data(), memory_.get(), count_ * static_cast<int64_t>(sizeof(T)));
  }
  T* data() const { return reinterpret_cast<T*>(memory_.get()); }
  std::vector<T> host() const {
    const std::vector<std::byte> bytes = download(memory_.get(), count_ * static_cast<int64_t>(sizeof(T)));
    std::vector<T> values(static_cast<size_t>(count_));
    if (!bytes.empty()) std::memcpy(values.data(), bytes.data(), bytes.size());
    return values;
  }

 private:
  int64_t count_;
  std::shared_ptr<std::byte> memory_;
};

std::vector<int32_t> codes_on_device(const TwinMatrix& x, const TwinMatrix& centroids) {
  const DeviceArray<int32_t> codes(x.host().rows());
  nearest_neighbour_cuda(x.device(), centroids.device(), codes.data(), nullptr);
  return codes.host();
}

// x and centroids as float32 values that the types hold.
std::vector<float> values_of(const FloatMatrix& matrix) {
  std::vector<float> values(static_cast<size_t>(matrix.rows() * matrix.cols()));
  for (int64_t r = 0; r < matrix.rows(); ++r) {
    matrix.read(r, 0, matrix.cols(), values.data() + r * matrix.cols());
  }
  return values;
}

void expect_same_codes(const VectorCase& c, DType dtype = DType::f32, int64_t padding = 0) {
  const int64_t d = c.x.cols();
  const TwinMatrix x(c.values, c.x.rows(), d, dtype, padding);
  const TwinMatrix table(c.entries, c.centroids.rows(), d, DType::f32, padding);
  const std::vector<float> stored = values_of(x.host());
  const MatrixView<const float> rows(stored.data(), c.x.rows(), d);
  std::vector<int32_t> expected(static_cast<size_t>(rows.rows()));
  nearest_neighbour(rows, c.centroids, expected);
  const std::vector<int32_t> codes = codes_on_device(x, table);
  for (size_t i = 0; i < codes.size(); ++i) {
    ASSERT_EQ(codes[i], expected[i]) << "row " << i << " of " << rows.rows() << ", K=" << c.centroids.rows()
                                     << ", d=" << d;
  }
}

TEST_F(KMeansCudaSmall, NearestCentroidsAreThoseOfTheDefinition) {
  uint64_t seed = 40;
  for (const int64_t d : {1, 2, 4, 5, 9, 10, 16}) {
    for (const int64_t entries : {1, 3, 64, 65, 257}) {
      const VectorCase c = make_vectors(77, entries, d, seed++);
      const TwinMatrix x(c.values, 77, d, DType::f32);
      const TwinMatrix table(c.entries, entries, d, DType::f32);
      EXPECT_EQ(codes_on_device(x, table), reference_codes(c.x, c.centroids))
          << "d=" << d << " K=" << entries;
    }
  }
}

TEST_F(KMeansCuda, NearestCentroidsAreThoseOfTheCpu) {
  uint64_t seed = 60;
  for (int64_t d = 1; d <= 16; ++d) {
    for (const int64_t entries : {1, 7, 100, 256, 1000, 4096}) {
      expect_same_codes(make_vectors(5003, entries, d, seed++), DType::f32, entries % 3);
    }
  }
  for (const int64_t n : {0, 1, 15, 16, 17, 511, 512, 513, 100003}) {
    expect_same_codes(make_vectors(n, 300, 4, seed++));
    expect_same_codes(make_vectors(n, 300, 11, seed++));
  }
  for (const DType dtype : {DType::f16, DType::bf16}) {
    for (const int64_t d : {1, 3, 8}) expect_same_codes(make_vectors(9001, 500, d, seed++), dtype, 1);
  }
}

TEST_F(KMeansCuda, ManyEntries) {
  expect_same_codes(make_vectors(20011, 65536, 4, 1));
  expect_same_codes(make_vectors(3001, 65535, 16, 2));
}

TEST_F(KMeansCuda, TiesGoToTheLowestIndex) {
  for (const int64_t d : {1, 2, 4, 8, 16}) {
    VectorCase c = make_vectors(4001, 500, d, 5);
    for (float& value : c.values) value = std::round(value * 2) / 2;
    for (float& value : c.entries) value = std::round(value);
    expect_same_codes(c);
  }
}

TEST_F(KMeansCuda, DifferencesBelowTheScoresAreResolved) {
  for (const int64_t d : {1, 4, 16}) {
    for (const float offset : {30.0F, 3000.0F, 1e6F}) {
      VectorCase c = make_vectors(3001, 400, d, 6);
      for (float& value : c.values) value = offset + value * 0.01F;
      for (float& value : c.entries) value = offset + value * 0.01F;
      expect_same_codes(c);
    }
    // Rows as near to the middle of two centroids as float32 comes.
    VectorCase c = make_vectors(3001, 200, d, 7);
    for (int64_t r = 0; r < c.x.rows(); ++r) {
      for (int64_t j = 0; j < d; ++j) {
        const float middle = (c.centroids(r % 200, j) + c.centroids((r * 7 + 1) % 200, j)) / 2;
        c.values[static_cast<size_t>(r * d + j)] = r % 2 == 0 ? middle : std::nextafter(middle, 10.0F);
      }
    }
    expect_same_codes(c);
  }
}

TEST_F(KMeansCuda, AnyFiniteMagnitudeIsTaken) {
  for (const float scale : {1e-45F, 1e-40F, 1e-30F, 1e-10F, 1e10F, 1e30F, 1e38F}) {
    VectorCase c = make_vectors(2003, 150, 3, 8);
    for (float& value : c.values) value = std::clamp(value, -3.0F, 3.0F) * scale;
    for (float& value : c.entries) value = std::clamp(value, -3.0F, 3.0F) * scale;
    expect_same_codes(c);
  }
  for (const int64_t d : {2, 7}) {
    VectorCase mixed = make_vectors(3001, 200, d, 9);
    for (size_t i = 0; i < mixed.values.size(); i += 5) mixed.values[i] *= 1e20F;
    for (size_t i = 0; i < mixed.values.size(); i += 7) mixed.values[i] *= 1e-20F;
    for (size_t i = 0; i < mixed.values.size(); i += 3) mixed.values[i] *= 300;
    for (size_t i = 0; i < mixed.entries.size(); i += 11) mixed.entries[i] *= 1e25F;
    expect_same_codes(mixed);
  }
}

void expect_same_fit(const VectorCase& c, int64_t count, const KMeansOptions& options,
                     const std::vector<float>& weights = {}) {
  const int64_t d = c.x.cols();
  const KMeansResult expected = kmeans(c.x, count, options, weights);
  const TwinMatrix x(c.values, c.x.rows(), d, DType::f32);
  const DeviceArray<float> device_weights(weights);
  const DeviceArray<float> centroids(count * d);
  const DeviceArray<int32_t> codes(c.x.rows());
  const CudaKMeansReport report =
      kmeans_cuda(x.device(), count, options, weights.empty() ? nullptr : device_weights.data(),
                  centroids.data(), codes.data(), nullptr);
  EXPECT_EQ(centroids.host(), expected.centroids) << "K=" << count << " d=" << d;
  EXPECT_EQ(codes.host(), expected.codes) << "K=" << count << " d=" << d;
  EXPECT_EQ(report.sweeps, expected.sweeps);
  EXPECT_EQ(report.changed, expected.changed);
  EXPECT_EQ(report.converged, expected.converged);
  EXPECT_NEAR(report.squared_error, expected.squared_error, 1e-11 * expected.squared_error);
}

std::vector<float> some_weights(int64_t n) {
  std::vector<float> weights = normal_values(n, 99);
  for (float& weight : weights) weight = weight < -1 ? 0 : weight * weight;
  return weights;
}

TEST_F(KMeansCudaSmall, FitsAreThoseOfTheCpu) {
  KMeansOptions options;
  options.max_sweeps = 4;
  for (const bool reseed : {false, true}) {
    options.reseed_empty = reseed;
    expect_same_fit(make_vectors(300, 1, 2, 20), 17, options);
    expect_same_fit(make_vectors(300, 1, 5, 21), 100, options, some_weights(300));
  }
}

TEST_F(KMeansCuda, FitsAreThoseOfTheCpu) {
  uint64_t seed = 80;
  for (const CodebookStart start : {CodebookStart::kmeans_plus_plus, CodebookStart::random}) {
    for (const int64_t d : {1, 2, 4, 9, 16}) {
      KMeansOptions options;
      options.start = start;
      options.seed = seed;
      options.max_sweeps = 30;
      expect_same_fit(make_vectors(8009, 1, d, seed++), 64, options);
      expect_same_fit(make_vectors(8009, 1, d, seed++), 1000, options, some_weights(8009));
      options.threshold = 0;
      expect_same_fit(make_vectors(2000, 1, d, seed++), 3, options);
    }
  }
  // More rows than the start looks at, and rows that are fewer than the centroids.
  KMeansOptions options;
  options.max_sweeps = 5;
  expect_same_fit(make_vectors(200003, 1, 2, seed++), 256, options);
  expect_same_fit(make_vectors(5, 1, 2, seed++), 20, options);
}

TEST_F(KMeansCuda, GivenCentroidsEmptyOnesAndReseeding) {
  VectorCase c = make_vectors(3001, 300, 3, 30);
  for (size_t i = 0; i < c.entries.size(); i += 4) c.entries[i] *= 100;  // many far from all rows
  KMeansOptions options;
  options.start = CodebookStart::given;
  options.centroids = c.centroids;
  options.max_sweeps = 10;
  for (const bool reseed : {false, true}) {
    options.reseed_empty = reseed;
    expect_same_fit(c, 300, options);
    expect_same_fit(c, 300, options, some_weights(3001));
    expect_same_fit(c, 300, options, std::vector<float>(3001, 0.0F));
  }
  options.max_sweeps = 0;
  expect_same_fit(c, 300, options);
}

TEST_F(KMeansCuda, RepeatsGiveTheSameBits) {
  const VectorCase c = make_vectors(100003, 1, 4, 31);
  const TwinMatrix x(c.values, 100003, 4, DType::f32);
  KMeansOptions options;
  options.max_sweeps = 20;
  std::vector<float> first;
  for (int repeat = 0; repeat < 5; ++repeat) {
    const DeviceArray<float> centroids(512 * 4);
    const DeviceArray<int32_t> codes(100003);
    kmeans_cuda(x.device(), 512, options, nullptr, centroids.data(), codes.data(), nullptr);
    if (repeat == 0) first = centroids.host();
    EXPECT_EQ(centroids.host(), first);
  }
}

TEST_F(KMeansCuda, BadArgumentsAreRefused) {
  const VectorCase c = make_vectors(50, 8, 3, 1);
  TwinMatrix x(c.values, 50, 3, DType::f32);
  TwinMatrix table(c.entries, 8, 3, DType::f32);
  const DeviceArray<int32_t> codes(50);
  const DeviceArray<float> centroids(8 * 3);
  std::vector<int32_t> host_codes(50);
  const TwinMatrix wide(normal_values(17, 1), 1, 17, DType::f32);
  EXPECT_THROW(nearest_neighbour_cuda(wide.device(), wide.device(), codes.data(), nullptr), InvalidArgument);
  EXPECT_THROW(nearest_neighbour_cuda(x.device(), wide.device(), codes.data(), nullptr), InvalidArgument);
  EXPECT_THROW(nearest_neighbour_cuda(x.device(), table.device(), host_codes.data(), nullptr), TypeMismatch);
  CudaMatrix none = table.device();
  none.rows = 0;
  EXPECT_THROW(nearest_neighbour_cuda(x.device(), none, codes.data(), nullptr), InvalidArgument);
  std::vector<float> weights(50, 1.0F);
  weights[20] = -1;
  const DeviceArray<float> negative(weights);
  EXPECT_THROW(kmeans_cuda(x.device(), 8, {}, negative.data(), centroids.data(), codes.data(), nullptr),
               InvalidArgument);
  EXPECT_THROW(kmeans_cuda(x.device(), 0, {}, nullptr, centroids.data(), codes.data(), nullptr),
               InvalidArgument);
  x.replace(31, 2, std::numeric_limits<float>::infinity());
  try {
    kmeans_cuda(x.device(), 8, {}, nullptr, centroids.data(), codes.data(), nullptr);
    FAIL();
  } catch (const NumericError& error) {
    EXPECT_NE(std::string(error.what()).find("x: got inf at row 31, column 2"), std::string::npos)
        << error.what();
  }
  table.replace(7, 0, std::numeric_limits<float>::quiet_NaN());
  x.replace(31, 2, 0);
  EXPECT_THROW(nearest_neighbour_cuda(x.device(), table.device(), codes.data(), nullptr), NumericError);
}

}  // namespace
}  // namespace quantloom
