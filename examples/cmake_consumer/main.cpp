// Quantizes a random matrix by nearest rounding and by GPTQ, saves both, loads them, multiplies straight
// from the packed codes, and checks every step. Exit code 0 means that all of it held.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <quantloom/quantloom.hpp>
#include <quantloom/random.hpp>
#include <string>
#include <vector>

namespace {

constexpr int64_t kOut = 96;
constexpr int64_t kIn = 320;
constexpr int64_t kCalibrationTokens = 1024;
constexpr int64_t kTokens = 5;

struct Matrix {
  Matrix(int64_t rows, int64_t cols) : rows(rows), cols(cols), values(static_cast<size_t>(rows * cols)) {}
  quantloom::MatrixView<float> view() { return {values.data(), rows, cols}; }

  int64_t rows;
  int64_t cols;
  std::vector<float> values;
};

// Neighbouring inputs are correlated, so that GPTQ has something to gain.
Matrix random_matrix(int64_t rows, int64_t cols, uint64_t seed, float correlation) {
  const quantloom::CounterRandom random(seed);
  Matrix matrix(rows, cols);
  for (int64_t r = 0; r < rows; ++r) {
    float previous = 0;
    for (int64_t c = 0; c < cols; ++c) {
      const auto fresh = static_cast<float>(random.normal(static_cast<uint64_t>(r * cols + c)));
      previous = correlation * previous + std::sqrt(1 - correlation * correlation) * fresh;
      matrix.view()(r, c) = previous;
    }
  }
  return matrix;
}

bool same_planes(const quantloom::PackedTensor& a, const quantloom::PackedTensor& b) {
  if (a.n != b.n || a.k != b.k || a.format->to_json() != b.format->to_json()) return false;
  return std::equal(a.planes.begin(), a.planes.end(), b.planes.begin(), b.planes.end(),
                    [](const auto& left, const auto& right) {
                      const auto& [left_name, left_plane] = left;
                      const auto& [right_name, right_plane] = right;
                      return left_name == right_name && left_plane.byte_count() == right_plane.byte_count() &&
                             std::equal(left_plane.bytes(), left_plane.bytes() + left_plane.byte_count(),
                                        right_plane.bytes());
                    });
}

// The largest difference of the product from x W'^T, relative to the largest output.
double product_error(Matrix& x, const quantloom::PackedTensor& packed) {
  Matrix y(x.rows, packed.n);
  Matrix expected(x.rows, packed.n);
  quantloom::matmul(x.view(), *quantloom::prepare(packed), y.view());
  quantloom::matmul_reference(x.view(), packed, expected.view());
  double difference = 0;
  double largest = 0;
  for (size_t i = 0; i < y.values.size(); ++i) {
    difference = std::max(difference, std::abs(static_cast<double>(y.values[i]) - expected.values[i]));
    largest = std::max(largest, std::abs(static_cast<double>(expected.values[i])));
  }
  return difference / largest;
}

int check(bool held, const char* what) {
  if (!held) std::fprintf(stderr, "cmake_consumer: failed: %s\n", what);
  return held ? 0 : 1;
}

int run() {
  Matrix w = random_matrix(kOut, kIn, 1, 0.0F);
  Matrix calibration = random_matrix(kCalibrationTokens, kIn, 2, 0.9F);
  Matrix x = random_matrix(kTokens, kIn, 3, 0.9F);

  const auto format = std::make_shared<quantloom::Uniform>(4, 128);
  quantloom::Hessian hessian(kIn);
  hessian.add(calibration.view());
  quantloom::NearestOptions nearest_options;
  nearest_options.hessian = &hessian;
  const quantloom::Rounded nearest = quantloom::round_nearest(w.view(), format, nearest_options);
  const quantloom::Rounded gptq = quantloom::round_error_feedback(w.view(), format, hessian);

  const std::string path =
      (std::filesystem::temp_directory_path() / "quantloom_cmake_consumer.safetensors").string();
  quantloom::PackedFile file;
  file.packed = {{"nearest", nearest.tensor}, {"gptq", gptq.tensor}};
  quantloom::save_packed(path, file);
  int failures = 0;
  {
    const quantloom::PackedFile loaded = quantloom::load_packed(path);
    failures += check(same_planes(loaded.packed.at("nearest"), nearest.tensor), "nearest: loaded = saved");
    failures += check(same_planes(loaded.packed.at("gptq"), gptq.tensor), "gptq: loaded = saved");
    failures += check(product_error(x, loaded.packed.at("nearest")) < 1e-5, "nearest: product");
    failures += check(product_error(x, loaded.packed.at("gptq")) < 1e-5, "gptq: product");
  }
  std::filesystem::remove(path);
  failures +=
      check(gptq.report.proxy_loss < nearest.report.proxy_loss, "GPTQ's proxy loss is below nearest's");
  if (failures == 0) {
    std::printf("cmake_consumer: %s, %.3f bits per weight, proxy loss %.4f nearest, %.4f GPTQ: passed\n",
                format->spec().c_str(), gptq.tensor.bits_per_weight(), nearest.report.proxy_loss,
                gptq.report.proxy_loss);
  }
  return failures;
}

}  // namespace

int main() {
  try {
    return run() == 0 ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "cmake_consumer: %s\n", error.what());
    return 1;
  }
}
