// Products of random configurations against float64, over every cell of the kernel table.
#include "quantloom/kernels/matmul.hpp"

#include "product_case.hpp"
#include "product_table.hpp"
#include "quantloom/kernels/matmul_cuda.hpp"

namespace quantloom {
namespace {

// 2,048 for the uniform format, which is the one with most ways through the kernels.
uint64_t cases_per_width(const std::string& format) {
  return format == "uniform" ? 256 : 96;
}

class MatmulCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  }
};

int64_t random_size(Draws& draws) {
  if (draws.below(32) == 0) return 1500 + draws.below(4000);
  const auto size = static_cast<int64_t>(std::exp2(10.55F * draws.uniform()));  // 1 to 1499
  switch (draws.below(4)) {
    case 0:
      return (size + 7) / 8 * 8;
    case 1:
      return (size + 63) / 64 * 64;
    default:
      return size;
  }
}

std::shared_ptr<const Format> random_format(const std::string& name, int bits, int64_t group, bool exact,
                                            Draws& draws) {
  const DType scale_dtype = draws.pick(std::vector{DType::f16, DType::bf16, DType::f32});
  if (name == "uniform")
    return std::make_shared<const Uniform>(bits, group, draws.below(2) == 0, scale_dtype);
  if (name == "codebook") return random_codebook(bits, group, scale_dtype, exact, draws);
  throw Unsupported("no random format " + name);
}

// The dtypes that the table has for this width, float32 seldom.
std::vector<DType> dtypes_of(const std::vector<KernelCell>& cells, const std::string& name, int bits) {
  std::set<DType> found;
  for (const KernelCell& cell : cells) {
    if (cell.format == name && cell.bits == bits) found.insert(cell.dtype);
  }
  std::vector<DType> dtypes;
  for (const DType dtype : found) dtypes.insert(dtypes.end(), dtype == DType::f32 ? 1 : 4, dtype);
  return dtypes;
}

ProductCase random_case(const std::string& name, int bits, const std::vector<DType>& dtypes, uint64_t seed) {
  static const std::vector<int64_t> kTokens = {1,  2,  3,  4,  5,  6,  7,  8,  9,  10,  11,  12,  13,  14,
                                               15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 1024};
  static const std::vector<int64_t> kGroups = {
      16, 24, 32, 48, 64, 96, 100, 128, 256, 0, Uniform::kPerChannel, Uniform::kPerTensor};
  Draws draws(seed * 0xD1B54A32D192ED03ULL + static_cast<uint64_t>(bits));
  ProductCase c;
  c.n = random_size(draws);
  c.k = random_size(draws);
  c.m = draws.pick(kTokens);
  // Many tokens are mostly taken with fewer rows, to spend the time on more configurations.
  if (c.m > 200 && draws.below(4) != 0) c.n = c.n % 500 + 1;
  const int64_t group = draws.pick(kGroups);
  c.exact = seed % 2 == 0;
  c.format = random_format(name, bits, group == 0 ? c.k : group, c.exact, draws);
  c.dtype = draws.pick(dtypes);
  c.group_index = group >= 0 && draws.below(4) == 0;
  c.bias = draws.below(2) == 0;
  c.prepare_on_cpu = c.n * c.k <= 65536 && draws.below(2) == 0;
  const auto shift = [&] { return draws.below(3) == 0 ? 1 + draws.below(15) : 0; };
  c.x_offset = shift();
  c.x_gap = draws.below(3) == 0 ? 8 * draws.below(3) : shift();
  c.y_offset = shift();
  c.y_gap = shift();
  c.seed = seed;
  return c;
}

// Runs the case with the kernel that the table picks and with each that claims it. Ticks the cells off.
// True if nothing was wrong.
bool check_case(const ProductCase& c, const std::vector<KernelCell>& cells, std::set<KernelCell>& hit) {
  SCOPED_TRACE(c.text());
  Product product(c);
  Draws draws(c.seed + 77);
  bool all_right = true;
  const auto check = [&](const CudaMatmulOptions& options) {
    if (why_not_matmul_cuda(*c.format, c.m, c.dtype, options)) return false;
    SCOPED_TRACE(text_of_options(options));
    std::string wrong;
    try {
      const auto y = product.run(options);
      const std::string kernel = matmul_cuda_kernel(product.prepared(), c.m, c.dtype, options);
      wrong = y ? product.compare(*y, kernel) : "memory damaged";
    } catch (const Error& error) {
      wrong = error.what();
    }
    EXPECT_EQ(wrong, "");
    all_right = all_right && wrong.empty();
    return wrong.empty();
  };
  if (check({})) {
    const std::string picked = matmul_cuda_kernel(product.prepared(), c.m, c.dtype);
    EXPECT_TRUE(std::any_of(cells.begin(), cells.end(), [&](const KernelCell& cell) {
      return cell.kernel == picked && cell.dtype == c.dtype && cell.takes(c.m);
    })) << picked;
  }
  for (const KernelCell& cell : cells) {
    if (cell.format != c.format->name() || cell.dtype != c.dtype || !cell.takes(c.m)) continue;
    if (fragment_layout(*c.format, c.n, c.k, c.group_index).bits != cell.bits) continue;
    CudaMatmulOptions options{.kernel = cell.kernel};
    if (check(options)) hit.insert(cell);
    options.splits = static_cast<int>(1 + draws.below(8));
    options.digits = true;
    check(options);
  }
  return all_right;
}

struct Width {
  const char* format;
  int bits;
};
void PrintTo(const Width& width, std::ostream* out) {
  *out << width.format << " of " << width.bits << " bits";
}

class MatmulCudaWidths : public MatmulCuda, public ::testing::WithParamInterface<Width> {};

TEST_P(MatmulCudaWidths, RandomConfigurationsAgreeWithFloat64) {
  const auto [format, bits] = GetParam();
  const std::vector<KernelCell> cells = matmul_cells();
  const std::vector<DType> dtypes = dtypes_of(cells, format, bits);
  ASSERT_FALSE(dtypes.empty()) << "no kernel in the table";
  std::set<KernelCell> hit;
  // After many failures more tell little, and each costs time.
  int failures = 0;
  for (uint64_t seed = 0; seed < cases_per_width(format) && failures < 30; ++seed) {
    const ProductCase c = random_case(format, bits, dtypes, seed);
    try {
      failures += check_case(c, cells, hit) ? 0 : 1;
    } catch (const Error& error) {
      ADD_FAILURE() << c.text() << ": " << error.what();
      ++failures;
    }
  }
  // Cells that no configuration has met by chance get one of their own.
  for (const KernelCell& cell : cells) {
    if (cell.format != format || cell.bits != bits) continue;
    if (!hit.contains(cell)) {
      ProductCase c = random_case(format, bits, dtypes, 1000);
      Draws draws(5);
      c.format = random_format(format, bits, 128, c.exact, draws);
      c.n = 320;
      c.k = 512;
      c.m = cell.first;
      c.dtype = cell.dtype;
      const auto why = why_not_matmul_cuda(*c.format, c.m, c.dtype, {.kernel = cell.kernel});
      // Another GPU than this one.
      if (why && why->find("compute capability") != std::string::npos) continue;
      check_case(c, cells, hit);
    }
    EXPECT_TRUE(hit.contains(cell)) << "not run: " << cell.text();
  }
}

INSTANTIATE_TEST_SUITE_P(Codebook, MatmulCudaWidths,
                         ::testing::Values(Width{"codebook", 1}, Width{"codebook", 2}, Width{"codebook", 3},
                                           Width{"codebook", 4}, Width{"codebook", 5}, Width{"codebook", 6},
                                           Width{"codebook", 7}, Width{"codebook", 8}),
                         [](const auto& info) { return text_of(info.param.format, info.param.bits); });
INSTANTIATE_TEST_SUITE_P(Uniform, MatmulCudaWidths,
                         ::testing::Values(Width{"uniform", 1}, Width{"uniform", 2}, Width{"uniform", 3},
                                           Width{"uniform", 4}, Width{"uniform", 5}, Width{"uniform", 6},
                                           Width{"uniform", 7}, Width{"uniform", 8}),
                         [](const auto& info) { return text_of(info.param.format, info.param.bits); });

TEST_F(MatmulCuda, TheTableHoldsNoFormatThatIsNotTested) {
  const std::set<std::string> tested = {"uniform", "codebook"};
  const auto cells = matmul_cells();
  EXPECT_FALSE(cells.empty());
  for (const KernelCell& cell : cells) EXPECT_TRUE(tested.contains(cell.format)) << cell.text();
}

// From one token to many, some kernel of the table takes every number, in every format and at every width.
TEST_F(MatmulCuda, TheTableLeavesNoGaps) {
  const auto cells = matmul_cells();
  Draws draws(1);
  for (const char* name : {"uniform", "codebook"}) {
    for (int bits = 1; bits <= 8; ++bits) {
      const auto format = random_format(name, bits, 128, true, draws);
      for (const DType dtype : {DType::f16, DType::bf16}) {
        for (const int64_t m : {1, 2, 8, 9, 16, 17, 32, 33, 64, 65, 100, 128, 129, 256, 257, 1000, 70000}) {
          const auto why = why_not_matmul_cuda(*format, m, dtype);
          EXPECT_EQ(why, std::nullopt) << format->spec() << ", m = " << m << ": " << why.value_or("");
          EXPECT_TRUE(std::any_of(cells.begin(), cells.end(),
                                  [&](const KernelCell& cell) {
                                    return cell.format == name && cell.bits == bits && cell.dtype == dtype &&
                                           cell.takes(m);
                                  }))
              << format->spec() << ", m = " << m << " " << name_of(dtype);
        }
      }
    }
  }
}

// The slow products of the tests, against sums on the CPU.
TEST_F(MatmulCuda, SlowProductsAgreeWithTheCpu) {
  for (const DType dtype : {DType::f16, DType::bf16, DType::f32}) {
    for (const auto& [m, n, k] :
         {std::array<int64_t, 3>{1, 1, 1}, {3, 17, 33}, {18, 40, 100}, {16, 16, 16}}) {
      ProductCase c{.format = std::make_shared<const Uniform>(4, 32, false), .n = n, .k = k, .m = m};
      c.dtype = dtype;
      c.x_gap = 3;
      c.seed = static_cast<uint64_t>(m);
      const Product product(c);
      const std::vector<float> w = product.weights();
      const auto w_memory = device_bytes(n * k * 4);
      upload(w.data(), w_memory.get(), n * k * 4);
      const GuardedMemory none(0, 0, 0);
      const CudaMatmulArguments a = product.arguments(none);
      const SlowProduct slow{
          a.x, a.x_stride, reinterpret_cast<const float*>(w_memory.get()), nullptr, dtype, m, n, k};
      const auto y64 = device_bytes(m * n * 8);
      const int64_t size = size_of(dtype);
      const auto plain = device_bytes(m * n * size);
      slow.in_float64(reinterpret_cast<double*>(y64.get()));
      slow.in_dtype(plain.get());
      const auto y64_bytes = download(y64.get(), m * n * 8);
      const auto plain_bytes = download(plain.get(), m * n * size);
      for (int64_t t = 0; t < m; ++t) {
        for (int64_t r = 0; r < n; ++r) {
          double sum = 0;
          double rounded_sum = 0;
          double magnitude = 0;
          for (int64_t i = 0; i < k; ++i) {
            const auto value = static_cast<double>(
                float_from(product.x()[static_cast<size_t>(t * product.x_stride() + i)], dtype));
            const float weight = w[static_cast<size_t>(r * k + i)];
            sum += value * static_cast<double>(weight);
            rounded_sum += value * static_cast<double>(float_from(bits_from(weight, dtype), dtype));
            magnitude += std::fabs(value * static_cast<double>(weight));
          }
          double got = 0;
          std::memcpy(&got, y64_bytes.data() + (t * n + r) * 8, 8);
          ASSERT_NEAR(got, sum, 1e-13 * magnitude) << t << " " << r;
          ASSERT_NEAR(
              static_cast<double>(float_from(element_at(plain_bytes.data(), t * n + r, dtype), dtype)),
              rounded_sum, 1.01 * unit_of(dtype) * std::fabs(rounded_sum) + 1e-5 * magnitude)
              << t << " " << r;
        }
      }
    }
  }
}

// The reference of the CPU's products is one of these products too.
TEST_F(MatmulCuda, AgreesWithTheProductsOfTheCpu) {
  ProductCase c{.format = std::make_shared<const Uniform>(3, 32, false), .n = 70, .k = 201, .m = 5};
  c.exact = true;
  c.seed = 4;
  Product product(c);
  std::vector<float> x;
  for (const uint32_t value : product.x()) x.push_back(float_from(value, c.dtype));
  std::vector<float> expected(static_cast<size_t>(c.m * c.n));
  matmul_reference(MatrixView<const float>(x.data(), c.m, c.k), product.packed(),
                   {expected.data(), c.m, c.n});
  const auto y = product.run({});
  ASSERT_TRUE(y);
  EXPECT_EQ(product.compare(*y), "");
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_EQ(float_from((*y)[i], c.dtype), float_from(bits_from(expected[i], c.dtype), c.dtype)) << i;
  }
}

TEST_F(MatmulCuda, EmptySizesWriteNothing) {
  for (const bool symmetric : {true, false}) {
    for (const auto& [m, n, k] : {std::array<int64_t, 3>{0, 40, 64}, {3, 0, 64}, {0, 0, 64}, {0, 0, 0}}) {
      ProductCase c{.format = std::make_shared<const Uniform>(4, 32, symmetric), .n = n, .k = k, .m = m};
      c.bias = true;
      SCOPED_TRACE(c.text());
      const Product product(c);
      EXPECT_TRUE(product.run({}));
    }
  }
}

TEST_F(MatmulCuda, WithoutColumnsTheResultIsTheBias) {
  for (const bool bias : {true, false}) {
    ProductCase c{.format = std::make_shared<const Uniform>(4, 32, false), .n = 70, .k = 0, .m = 3};
    c.bias = bias;
    c.exact = true;
    Product product(c);
    const auto y = product.run({});
    ASSERT_TRUE(y);
    EXPECT_EQ(product.compare(*y), "");
  }
}

}  // namespace
}  // namespace quantloom
