// The products for many tokens, kernel by kernel, against float64 on the CPU.
#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <limits>

#include "device_memory.hpp"
#include "kernels/fragment_layout.hpp"
#include "kernels/tile_products.cuh"
#include "quantloom/kernels/dequantize.hpp"
#include "quantloom/kernels/matmul_cuda.hpp"

namespace quantloom::cuda {

template <int kBits>
class UniformFragments;

namespace {

enum class Kernel { tiles, wgmma, decode };

const char* name_of(Kernel kernel) {
  return kernel == Kernel::tiles ? "tiles" : kernel == Kernel::wgmma ? "tiles_wgmma" : "decode";
}

template <template <class> class Call, class... Arguments>
void for_bits(int bits, const Arguments&... arguments) {
  switch (bits) {
    case 1:
      return Call<UniformFragments<1>>()(arguments...);
    case 2:
      return Call<UniformFragments<2>>()(arguments...);
    case 3:
      return Call<UniformFragments<3>>()(arguments...);
    case 4:
      return Call<UniformFragments<4>>()(arguments...);
    case 5:
      return Call<UniformFragments<5>>()(arguments...);
    case 6:
      return Call<UniformFragments<6>>()(arguments...);
    case 7:
      return Call<UniformFragments<7>>()(arguments...);
    default:
      return Call<UniformFragments<8>>()(arguments...);
  }
}

template <class Decoder>
struct CallTiles {
  void operator()(const ProductLaunch& launch, void* workspace) const {
    launch_tiles<Decoder>(launch, workspace);
  }
};
template <class Decoder>
struct CallWgmma {
  void operator()(const ProductLaunch& launch, void* workspace) const {
    launch_tiles_wgmma<Decoder>(launch, workspace);
  }
};
template <class Decoder>
struct CallDecoded {
  void operator()(const ProductLaunch& launch, void* workspace) const {
    launch_decoded<Decoder>(launch, workspace);
  }
};
template <class Decoder>
struct CallDecodeFragments {
  void operator()(const FragmentMatrix& w, void* out, int64_t stride, DType dtype) const {
    launch_decode_fragments<Decoder>(w, out, stride, dtype, false, nullptr);
  }
};

struct Case {
  int bits = 4;
  int64_t group_size = 128;
  bool symmetric = true;
  DType scale_dtype = DType::f16;
  bool with_group_index = false;
  int64_t n = 64;
  int64_t k = 128;
  int m = 32;
  DType dtype = DType::f16;
  int splits = 0;
  bool in_pieces = true;  // rows of x lie at multiples of 16 bytes
  bool bias = true;
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << c.bits << " bits, groups of " << c.group_size << (c.symmetric ? " sym " : " asym ")
             << quantloom::name_of(c.scale_dtype) << (c.with_group_index ? " indexed, [" : ", [") << c.n
             << ", " << c.k << "], m = " << c.m << ' ' << quantloom::name_of(c.dtype) << ", " << c.splits
             << " splits" << (c.in_pieces ? "" : ", x unaligned");
}

float round_to(DType dtype, double value) {
  const auto f = static_cast<float>(value);
  if (dtype == DType::f16) return float_from_f16(f16_from_float(f));
  if (dtype == DType::bf16) return float_from_bf16(bf16_from_float(f));
  return f;
}

void put(DType dtype, std::vector<std::byte>& bytes, int64_t i, float value) {
  if (dtype == DType::f32) {
    std::memcpy(bytes.data() + 4 * i, &value, 4);
  } else {
    const uint16_t half = dtype == DType::f16 ? f16_from_float(value) : bf16_from_float(value);
    std::memcpy(bytes.data() + 2 * i, &half, 2);
  }
}

float get(DType dtype, const std::vector<std::byte>& bytes, int64_t i) {
  if (dtype == DType::f32) {
    float value = 0;
    std::memcpy(&value, bytes.data() + 4 * i, 4);
    return value;
  }
  uint16_t half = 0;
  std::memcpy(&half, bytes.data() + 2 * i, 2);
  return dtype == DType::f16 ? float_from_f16(half) : float_from_bf16(half);
}

// A matrix on the device in fragment order, and its values.
struct Matrix {
  PackedTensor packed;
  PreparedPlanes prepared;  // on the device
  FragmentMatrix w;
  std::vector<float> values;  // [n, k]
};

Matrix make_matrix(const Case& c, uint64_t seed, const std::function<float(int64_t)>& scale) {
  Matrix matrix{random_packed(Uniform(c.bits, c.group_size, c.symmetric, c.scale_dtype), c.n, c.k, seed,
                              c.with_group_index),
                {},
                {},
                {}};
  Tensor& scales = matrix.packed.planes.at("scales");
  for (int64_t i = 0; i < scales.element_count(); ++i) {
    const float value = scale(i);
    if (c.scale_dtype == DType::f32) {
      scales.values<float>()[static_cast<size_t>(i)] = value;
    } else {
      scales.values<uint16_t>()[static_cast<size_t>(i)] =
          c.scale_dtype == DType::f16 ? f16_from_float(value) : bf16_from_float(value);
    }
  }
  matrix.values.resize(static_cast<size_t>(c.n * c.k));
  dequantize(matrix.packed, MatrixView<float>(matrix.values.data(), c.n, c.k));

  const PreparedPlanes on_cpu = prepare_fragments(matrix.packed);
  matrix.prepared = {on_cpu.format, on_cpu.n, on_cpu.k, {}};
  for (const auto& [name, plane] : on_cpu.planes) matrix.prepared.planes.emplace(name, to_device(plane));
  const auto data = [&](const char* name) -> const void* {
    return matrix.prepared.has(name) ? matrix.prepared.plane(name).bytes() : nullptr;
  };
  const FragmentLayout layout = fragment_layout(*on_cpu.format, c.n, c.k, c.with_group_index);
  matrix.w.codes = static_cast<const uint4*>(data("codes"));
  matrix.w.scales = data("scales");
  matrix.w.zeros = static_cast<const uint8_t*>(data("zeros"));
  matrix.w.source = static_cast<const int32_t*>(data("source"));
  matrix.w.n = c.n;
  matrix.w.k = c.k;
  matrix.w.row_blocks = static_cast<int>(layout.row_blocks);
  matrix.w.column_blocks = static_cast<int>(layout.column_blocks);
  matrix.w.group_count = static_cast<int>(layout.group_count);
  matrix.w.group_steps = static_cast<int>(layout.group_columns / 16);
  matrix.w.scale_dtype = c.scale_dtype;
  return matrix;
}

struct Product {
  std::vector<float> x;     // [m, k], as rounded to the dtype
  std::vector<float> bias;  // [n]
  std::vector<std::byte> y;
  int64_t y_stride = 0;
};

// Runs a kernel on garbage in workspace and output; y has a stride of its own.
Product run(const Case& c, Kernel kernel, const Matrix& matrix, const std::function<float(int64_t)>& x_value,
            uint64_t seed, unsigned char garbage = 0xFF) {
  const CounterRandom random(seed);
  const int64_t size = size_of(c.dtype);
  const int64_t x_stride = c.in_pieces ? (c.k + 7) / 8 * 8 + 8 : c.k + 1;
  Product product;
  product.y_stride = c.n + 3;
  product.x.resize(static_cast<size_t>(c.m * c.k));
  std::vector<std::byte> x(static_cast<size_t>(c.m * x_stride * size), std::byte{0x7F});
  for (int64_t token = 0; token < c.m; ++token) {
    for (int64_t column = 0; column < c.k; ++column) {
      const float value = round_to(c.dtype, x_value(token * c.k + column));
      product.x[static_cast<size_t>(token * c.k + column)] = value;
      put(c.dtype, x, token * x_stride + column, value);
    }
  }
  product.bias.resize(static_cast<size_t>(c.n), 0.0F);
  std::vector<std::byte> bias(static_cast<size_t>(c.n * size));
  if (c.bias) {
    for (int64_t row = 0; row < c.n; ++row) {
      const auto value = static_cast<float>(static_cast<int>(random.below(row, 17)) - 8);
      product.bias[static_cast<size_t>(row)] = value;
      put(c.dtype, bias, row, value);
    }
  }
  const auto x_memory = device_bytes(static_cast<int64_t>(x.size()));
  // Half of the time no multiple of 16 bytes.
  const int64_t bias_offset = static_cast<int64_t>(seed % 2) * size;
  const auto bias_memory = device_bytes(static_cast<int64_t>(bias.size()) + bias_offset);
  const int64_t y_bytes = (c.m + 1) * product.y_stride * size;
  const auto y_memory = device_bytes(y_bytes);
  upload(x.data(), x_memory.get(), static_cast<int64_t>(x.size()));
  upload(bias.data(), bias_memory.get() + bias_offset, static_cast<int64_t>(bias.size()));
  check_cuda(cudaMemset(y_memory.get(), 0xFF, static_cast<size_t>(y_bytes)), "poison");

  ProductLaunch launch;
  launch.arguments.w = matrix.w;
  launch.arguments.x = x_memory.get();
  launch.arguments.x_stride = x_stride;
  launch.arguments.bias = c.bias ? bias_memory.get() + bias_offset : nullptr;
  launch.arguments.y = y_memory.get();
  launch.arguments.y_stride = product.y_stride;
  launch.arguments.m = c.m;
  launch.arguments.x_in_pieces = c.in_pieces && c.k % 8 == 0 && matrix.w.source == nullptr;
  launch.dtype = c.dtype;
  launch.splits = c.splits;
  const int64_t workspace_bytes = kernel == Kernel::decode ? decoded_workspace(matrix.w, c.m, c.dtype)
                                                           : tiles_workspace(matrix.w, c.m, c.splits);
  const auto workspace = device_bytes(workspace_bytes + 256);
  check_cuda(cudaMemset(workspace.get(), garbage, static_cast<size_t>(workspace_bytes + 256)), "garbage");
  if (kernel == Kernel::tiles) {
    for_bits<CallTiles>(c.bits, launch, static_cast<void*>(workspace.get()));
  } else if (kernel == Kernel::wgmma) {
    for_bits<CallWgmma>(c.bits, launch, static_cast<void*>(workspace.get()));
  } else {
    for_bits<CallDecoded>(c.bits, launch, static_cast<void*>(workspace.get()));
  }
  check_cuda(cudaDeviceSynchronize(), "product");
  product.y = download(y_memory.get(), y_bytes);
  const std::vector<std::byte> guard = download(workspace.get() + workspace_bytes, 256);
  for (const std::byte byte : guard) {
    if (byte != std::byte{garbage}) {
      ADD_FAILURE() << "written past the workspace";
      break;
    }
  }
  // Between the rows of y, and after them, nothing is written.
  for (int64_t i = 0; i < (c.m + 1) * product.y_stride; ++i) {
    if (i / product.y_stride < c.m && i % product.y_stride < c.n) continue;
    for (int64_t b = 0; b < size; ++b) {
      if (product.y[static_cast<size_t>(i * size + b)] != std::byte{0xFF}) {
        ADD_FAILURE() << "written outside y at element " << i;
        return product;
      }
    }
  }
  return product;
}

// Compares with float64. `steps`: how often a weight may have been rounded; 0: everything is exact but the
// result.
void compare(const Case& c, const Matrix& matrix, const Product& product, double steps) {
  const double unit = c.dtype == DType::f16 ? 0x1p-11 : c.dtype == DType::bf16 ? 0x1p-8 : 0x1p-24;
  for (int64_t token = 0; token < c.m; ++token) {
    for (int64_t row = 0; row < c.n; ++row) {
      double sum = 0;
      double squares = 0;
      double magnitude = 0;
      for (int64_t column = 0; column < c.k; ++column) {
        const double term = static_cast<double>(product.x[static_cast<size_t>(token * c.k + column)]) *
                            matrix.values[static_cast<size_t>(row * c.k + column)];
        sum += term;
        squares += term * term;
        magnitude += std::abs(term);
      }
      sum += product.bias[static_cast<size_t>(row)];
      const double got = get(c.dtype, product.y, token * product.y_stride + row);
      if (steps == 0) {
        if (got != round_to(c.dtype, sum)) {
          FAIL() << "token " << token << ", row " << row << ": got " << got << ", expected "
                 << round_to(c.dtype, sum);
        }
        continue;
      }
      const double bound =
          unit * (steps * 8 * std::sqrt(squares) + std::abs(sum)) + magnitude * 0x1p-20 + 1e-30;
      if (!(std::abs(got - sum) <= bound)) {
        FAIL() << "token " << token << ", row " << row << ": got " << got << ", expected " << sum << " +- "
               << bound;
      }
    }
  }
}

double rounding_steps(const Case& c, Kernel kernel) {
  return kernel == Kernel::decode || c.dtype == c.scale_dtype ? 1 : 2;
}

class TileProducts : public ::testing::TestWithParam<Kernel> {
 protected:
  void SetUp() override {
    if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
    if (GetParam() == Kernel::wgmma && !runs_wgmma()) GTEST_SKIP() << "no wgmma on this device";
  }

  // Small integers times powers of two: all sums are exact. cuBLASLt rounds before it adds a bias.
  static void expect_exact(Case c, uint64_t seed) {
    if (GetParam() == Kernel::decode && c.k > 0) c.bias = false;
    SCOPED_TRACE(testing::Message() << c);
    const CounterRandom random(seed);
    const Matrix matrix = make_matrix(c, seed, [&](int64_t i) {
      return std::ldexp(random.below(i, 2) == 0 ? 1.0F : -1.0F, static_cast<int>(random.below(i + 7, 3)) - 9);
    });
    const Product product = run(
        c, GetParam(), matrix,
        [&](int64_t i) { return static_cast<float>(static_cast<int>(random.below(i, 9)) - 4); }, seed + 1);
    compare(c, matrix, product, 0);
  }

  static void expect_close(const Case& c, uint64_t seed) {
    SCOPED_TRACE(testing::Message() << c);
    const CounterRandom random(seed);
    const Matrix matrix = make_matrix(c, seed, [&](int64_t i) {
      const double scale = std::exp2(-static_cast<double>(i % 5) - c.bits) * (0.5 + random.uniform(i));
      return static_cast<float>(random.below(i + 1, 2) == 0 ? scale : -scale);
    });
    const Product product = run(
        c, GetParam(), matrix, [&](int64_t i) { return static_cast<float>(random.normal(i)); }, seed + 1);
    compare(c, matrix, product, rounding_steps(c, GetParam()));
  }
};

TEST_P(TileProducts, AreExactOnExactInputs) {
  uint64_t seed = 1;
  for (int bits = 1; bits <= 8; ++bits) {
    for (const bool symmetric : {true, false}) {
      for (const DType dtype : {DType::f16, DType::bf16}) {
        for (const int64_t group : {int64_t{16}, int64_t{128}, Uniform::kPerChannel}) {
          expect_exact({.bits = bits,
                        .group_size = group,
                        .symmetric = symmetric,
                        .n = 100,
                        .k = 264,
                        .m = bits % 2 == 0 ? 50 : 21,
                        .dtype = dtype},
                       seed++);
        }
      }
    }
  }
}

TEST_P(TileProducts, TakeAnyShapeAndSplit) {
  const std::vector<std::pair<int64_t, int64_t>> shapes = {{1, 1},    {63, 64},  {64, 65},   {257, 127},
                                                           {300, 77}, {513, 16}, {129, 1000}};
  uint64_t seed = 1000;
  for (const auto& [n, k] : shapes) {
    for (const int m : {1, 9, 17, 32, 33, 64, 65, 130}) {
      for (const int splits : {0, 1, 3}) {
        expect_exact({.bits = static_cast<int>(seed % 8) + 1,
                      .group_size = seed % 3 == 0 ? 32 : 64,
                      .symmetric = seed % 2 == 0,
                      .n = n,
                      .k = k,
                      .m = m,
                      .dtype = seed % 5 < 3 ? DType::f16 : DType::bf16,
                      .splits = splits,
                      .in_pieces = seed % 4 != 0,
                      .bias = seed % 7 != 0},
                     seed);
        ++seed;
      }
    }
  }
}

TEST_P(TileProducts, PutColumnsInOrder) {
  uint64_t seed = 2000;
  for (const int64_t group : {20, 48, 80, 128}) {
    for (const bool indexed : {false, true}) {
      for (const int m : {17, 70}) {
        expect_exact({.bits = 3,
                      .group_size = group,
                      .symmetric = false,
                      .with_group_index = indexed,
                      .n = 130,
                      .k = 413,
                      .m = m,
                      .dtype = m == 17 ? DType::f16 : DType::bf16},
                     seed++);
      }
    }
  }
}

TEST_P(TileProducts, StayWithinRoundingOnDenseInputs) {
  uint64_t seed = 3000;
  for (const int bits : {1, 2, 3, 4, 5, 8}) {
    for (const DType dtype : {DType::f16, DType::bf16}) {
      for (const DType scale_dtype : {DType::f16, DType::bf16, DType::f32}) {
        for (const bool symmetric : {true, false}) {
          expect_close({.bits = bits,
                        .group_size = bits % 2 == 0 ? int64_t{128} : int64_t{48},
                        .symmetric = symmetric,
                        .scale_dtype = scale_dtype,
                        .n = 192,
                        .k = 1000,
                        .m = 40,
                        .dtype = dtype,
                        .bias = false},
                       seed++);
        }
      }
    }
  }
}

TEST_P(TileProducts, TakeScalesFarOutsideTheRangeOfHalves) {
  if (GetParam() == Kernel::decode) GTEST_SKIP() << "weights are decoded to the activations' type";
  const Case c{.scale_dtype = DType::f32, .n = 130, .k = 640, .m = 33, .bias = false};
  const CounterRandom random(4000);
  const Matrix matrix = make_matrix(
      c, 4000, [&](int64_t i) { return static_cast<float>(0x1p-30 * (0.5 + random.uniform(i))); });
  const Product product = run(
      c, GetParam(), matrix, [&](int64_t i) { return static_cast<float>(20000 * random.uniform(i)); }, 4001);
  compare(c, matrix, product, 2);
}

TEST_P(TileProducts, RepeatToTheBit) {
  const Case c{.bits = 3, .group_size = 32, .symmetric = false, .n = 500, .k = 2000, .m = 65};
  const CounterRandom random(5000);
  const auto scale = [&](int64_t i) { return static_cast<float>(random.uniform(i) / 16); };
  const auto x = [&](int64_t i) { return static_cast<float>(random.normal(i)); };
  const Matrix matrix = make_matrix(c, 5000, scale);
  const Product first = run(c, GetParam(), matrix, x, 5001, 0xFF);
  for (int i = 0; i < 20; ++i) {
    const Product again = run(c, GetParam(), matrix, x, 5001, static_cast<unsigned char>(i * 13));
    ASSERT_EQ(again.y, first.y);
  }
}

TEST_P(TileProducts, GiveTheBiasWhereThereAreNoColumns) {
  expect_exact({.n = 70, .k = 0, .m = 40}, 6000);
  expect_exact({.n = 70, .k = 0, .m = 40, .bias = false}, 6001);
}

INSTANTIATE_TEST_SUITE_P(Kernels, TileProducts,
                         ::testing::Values(Kernel::tiles, Kernel::wgmma, Kernel::decode),
                         [](const auto& info) { return std::string(name_of(info.param)); });

TEST(DecodedProduct, TakesFloat32Activations) {
  if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  for (const bool indexed : {false, true}) {
    const Case c{.bits = 5,
                 .group_size = 40,
                 .symmetric = false,
                 .with_group_index = indexed,
                 .n = 130,
                 .k = 333,
                 .m = 50,
                 .dtype = DType::f32,
                 .in_pieces = false};
    SCOPED_TRACE(testing::Message() << c);
    const CounterRandom random(7000);
    const Matrix matrix =
        make_matrix(c, 7000, [&](int64_t i) { return static_cast<float>(random.uniform(i) / 16); });
    const Product product = run(
        c, Kernel::decode, matrix, [&](int64_t i) { return static_cast<float>(random.normal(i)); }, 7001);
    compare(c, matrix, product, 1);
  }
}

// Activations are put in order for 8192 tokens at a time.
TEST(DecodedProduct, PutsManyTokensInOrder) {
  if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  const Case c{.bits = 4, .group_size = 20, .n = 70, .k = 45, .m = 8200, .splits = 2, .bias = false};
  SCOPED_TRACE(testing::Message() << c);
  const CounterRandom random(7100);
  const Matrix matrix = make_matrix(c, 7100, [&](int64_t i) { return i % 2 == 0 ? 0x1p-5F : -0x1p-7F; });
  const Product product = run(
      c, Kernel::decode, matrix,
      [&](int64_t i) { return static_cast<float>(static_cast<int>(random.below(i, 9)) - 4); }, 7101);
  compare(c, matrix, product, 0);
}

TEST(DecodeFragments, GivesTheValuesOfTheCpu) {
  if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  uint64_t seed = 8000;
  for (int bits = 1; bits <= 8; ++bits) {
    for (const bool symmetric : {true, false}) {
      for (const DType dtype : {DType::f16, DType::bf16, DType::f32}) {
        const Case c{.bits = bits,
                     .group_size = bits % 2 == 0 ? int64_t{32} : int64_t{112},
                     .symmetric = symmetric,
                     .scale_dtype = bits % 3 == 0 ? DType::f32 : DType::f16,
                     .n = 77,
                     .k = 300};
        SCOPED_TRACE(testing::Message() << c << " to " << quantloom::name_of(dtype));
        const CounterRandom random(seed);
        const Matrix matrix =
            make_matrix(c, seed++, [&](int64_t i) { return static_cast<float>(random.normal(i)); });
        const int64_t stride = int64_t{64} * matrix.w.column_blocks;
        const int64_t bytes = (c.n + 1) * stride * size_of(dtype);
        const auto out = device_bytes(bytes);
        check_cuda(cudaMemset(out.get(), 0xFF, static_cast<size_t>(bytes)), "poison");
        for_bits<CallDecodeFragments>(bits, matrix.w, static_cast<void*>(out.get()), stride, dtype);
        const std::vector<std::byte> host = download(out.get(), bytes);
        for (int64_t row = 0; row < c.n; ++row) {
          for (int64_t column = 0; column < c.k; ++column) {
            ASSERT_EQ(get(dtype, host, row * stride + column),
                      round_to(dtype, matrix.values[static_cast<size_t>(row * c.k + column)]))
                << row << ", " << column;
          }
        }
        for (int64_t i = c.n * stride * size_of(dtype); i < bytes; ++i) {
          ASSERT_EQ(host[static_cast<size_t>(i)], std::byte{0xFF}) << "written past row " << c.n;
        }
      }
    }
  }
}

}  // namespace
}  // namespace quantloom::cuda
