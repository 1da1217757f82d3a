// Beam search of additive codes on the device against the CPU's.
#include "quantloom/rounding/beam_search.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "formats/additive_encoder.hpp"
#include "quantloom/rounding/cuda_beam_search.hpp"
#include "quantloom/rounding/nearest.hpp"
#include "rounding_cases.hpp"
#include "test_matrices.hpp"

namespace quantloom {
namespace {

using testing::decoded_values;
using testing::normal_values;

class BeamSearchCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  }
};

class BeamSearchCudaSmall : public BeamSearchCuda {};

Hessian correlated(int64_t k, int64_t tokens, uint64_t seed) {
  std::vector<float> x = normal_values(tokens * k, seed);
  for (size_t i = 1; i < x.size(); ++i) x[i] += 0.8F * x[i - 1];
  Hessian hessian(k);
  hessian.add(MatrixView<const float>(x.data(), tokens, k));
  return hessian;
}

double loss_of(const FloatMatrix& w, const PackedTensor& packed, const Hessian& hessian) {
  const std::vector<float> decoded = decoded_values(packed);
  return proxy_loss(w, {decoded.data(), packed.n, packed.k}, hessian);
}

// A matrix, its Hessian and its nearest codes, in both memories.
struct Problem {
  Problem(const std::string& spec, int64_t n, int64_t k, uint64_t seed, DType dtype = DType::f32)
      : w(normal_values(n * k, seed), n, k, dtype, dtype == DType::f32 ? 0 : 3),
        hessian(correlated(k, 3 * k + 5, seed + 1)),
        on_device(hessian),
        start(round_nearest(w.host(), format_from_spec(spec)).tensor) {}
  const Additive& format() const { return dynamic_cast<const Additive&>(*start.format); }
  PackedTensor search(const CodeSearchOptions& options, std::span<const int64_t> rows = {}) const {
    PackedTensor packed = to_device(start);
    search_codes_cuda(w.device(), packed, on_device, options, rows, nullptr);
    PackedTensor host = to_host(packed);
    validate(host);
    return host;
  }

  TwinMatrix w;
  Hessian hessian;
  CudaHessian on_device;
  PackedTensor start;
};

struct Case {
  const char* spec;
  int64_t n;
  int64_t k;
};

const std::vector<Case>& cases() {
  static const std::vector<Case> all = {{"additive:1x3:g4", 5, 24},
                                        {"additive:2x3:g4", 20, 22},
                                        {"additive:3x2:g2:f32", 3, 150},
                                        {"additive:2x3:g2x3:scale6", 34, 19},
                                        {"additive:1x4:g1:scale5:bf16", 3, 131},
                                        {"additive:2x4:g16", 2, 40},
                                        {"additive:1x4:g16x1", 32, 17},
                                        {"additive:2x8:g8", 19, 136},
                                        {"additive:1x10:g8", 17, 72},
                                        {"additive:1x1:g8", 1, 160}};
  return all;
}

TEST_F(BeamSearchCudaSmall, FindsTheCodesOfTheCpuInFloat64) {
  uint64_t seed = 1;
  for (const Case& c : cases()) {
    seed += 10;
    const Problem problem(c.spec, c.n, c.k, seed, c.n % 2 == 0 ? DType::bf16 : DType::f32);
    const auto most = static_cast<int>(std::min<int64_t>(8, problem.format().entries()));
    for (const int beam : {1, 2, 3, 8}) {
      if (beam > most) continue;
      for (const bool penalized : {false, true}) {
        const std::vector<float> penalties =
            penalized ? normal_values(problem.format().codebooks * problem.format().entries(), ++seed)
                      : std::vector<float>();
        CodeSearchOptions options;
        options.beam = beam;
        options.shuffled = beam % 2 == 1;
        options.seed = ++seed;
        options.float64 = true;
        options.damping = penalized ? 0.1 : 0;
        options.code_penalties = penalties;
        std::vector<int64_t> rows;
        if (beam == 3) rows = {problem.format().row_groups(c.n) - 1, 0};
        if (beam == 3 && rows[0] == 0) rows.pop_back();
        SCOPED_TRACE(text_of(c.spec, " beam ", beam, penalized ? " penalties" : ""));
        EXPECT_EQ(difference(problem.search(options, rows),
                             search_codes(problem.w.host(), problem.start, problem.hessian, options, rows)),
                  "");
      }
    }
  }
}

TEST_F(BeamSearchCudaSmall, Float32IsAlmostFloat64) {
  uint64_t seed = 1000;
  for (const Case& c : cases()) {
    const Problem problem(c.spec, c.n, c.k, seed += 10);
    const auto most = static_cast<int>(std::min<int64_t>(8, problem.format().entries()));
    for (const int beam : {1, 2, 4, 8}) {
      if (beam > most) continue;
      CodeSearchOptions options;
      options.beam = beam;
      options.shuffled = beam == 1;
      options.seed = ++seed;
      SCOPED_TRACE(text_of(c.spec, " beam ", beam));
      const PackedTensor found = problem.search(options);
      EXPECT_EQ(difference(found, problem.search(options)), "");
      options.float64 = true;
      const PackedTensor exact = search_codes(problem.w.host(), problem.start, problem.hessian, options);
      const double before = loss_of(problem.w.host(), problem.start, problem.hessian);
      const double after = loss_of(problem.w.host(), found, problem.hessian);
      const double wanted = loss_of(problem.w.host(), exact, problem.hessian);
      EXPECT_LE(after, before * (1 + 1e-6));
      // One code that a rounding turns may lead elsewhere.
      EXPECT_NEAR(after, wanted, 5e-2 * wanted);
      int64_t equal = 0;
      const AdditiveParts a = unpack_additive(problem.format(), found);
      const AdditiveParts b = unpack_additive(problem.format(), exact);
      for (size_t i = 0; i < a.codes.size(); ++i) equal += a.codes[i] == b.codes[i] ? 1 : 0;
      EXPECT_GE(static_cast<double>(equal), 0.9 * static_cast<double>(a.codes.size()));
    }
  }
}

TEST_F(BeamSearchCuda, LargeTablesFindWhatTheCpuFinds) {
  for (const char* spec : {"additive:1x11:g8", "additive:1x10:g16", "additive:1x11:g2x4", "additive:1x12:g8",
                           "additive:1x12:g16"}) {
    const Problem problem(spec, 300, 512, 7);
    for (const int beam : {1, 3, 6}) {
      CodeSearchOptions options;
      options.beam = beam;
      SCOPED_TRACE(text_of(spec, " beam ", beam));
      const PackedTensor found = problem.search(options);
      options.float64 = true;
      const PackedTensor exact = problem.search(options);
      const double wanted = loss_of(problem.w.host(), exact, problem.hessian);
      EXPECT_NEAR(loss_of(problem.w.host(), found, problem.hessian), wanted, 1e-2 * wanted);
      EXPECT_LT(wanted, 0.9 * loss_of(problem.w.host(), problem.start, problem.hessian));
      if (beam == 1) {
        EXPECT_EQ(difference(exact, search_codes(problem.w.host(), problem.start, problem.hessian, options)),
                  "");
      }
    }
  }
}

// Scales and inputs so far apart that float16 cannot hold what is wanted of a code.
TEST_F(BeamSearchCudaSmall, ExtremeScales) {
  const int64_t n = 21;
  const int64_t k = 64;
  std::vector<float> values = normal_values(n * k, 5);
  for (int64_t i = 0; i < n * k; ++i)
    values[static_cast<size_t>(i)] *= std::ldexp(1.0F, static_cast<int>(i / k % 5) * 6 - 12);
  std::vector<float> x = normal_values(200 * k, 6);
  for (int64_t i = 0; i < 200 * k; ++i) {
    x[static_cast<size_t>(i)] += 1;
    if (i % k < 8) x[static_cast<size_t>(i)] *= 1000;
    if (i % k >= 56) x[static_cast<size_t>(i)] = 0;
  }
  Hessian hessian(k);
  hessian.add(MatrixView<const float>(x.data(), 200, k));
  const CudaHessian on_device(hessian);
  const TwinMatrix w(values, n, k, DType::f32);
  PackedTensor start = round_nearest(w.host(), format_from_spec("additive:2x6:g8:f32")).tensor;
  // Far too small a scale: what is left of the row is huge in its units.
  start.planes.at("scales").values<float>()[3] *= 1e-6F;
  start.planes.at("scales").values<float>()[4] = 0;
  start.planes.at("scales").values<float>()[5] *= -1;
  for (const int beam : {1, 2}) {
    PackedTensor packed = to_device(start);
    search_codes_cuda(w.device(), packed, on_device, {.beam = beam, .code_penalties = {}}, {}, nullptr);
    const PackedTensor found = to_host(packed);
    const PackedTensor exact =
        search_codes(w.host(), start, hessian, {.beam = beam, .float64 = true, .code_penalties = {}});
    const double wanted = loss_of(w.host(), exact, hessian);
    EXPECT_NEAR(loss_of(w.host(), found, hessian), wanted, 2e-2 * wanted) << beam;
  }
}

TEST_F(BeamSearchCudaSmall, RefitsLikeTheCpu) {
  uint64_t seed = 3000;
  for (const Case& c : cases()) {
    const Problem problem(c.spec, c.n, c.k, seed += 10);
    for (const bool scales : {false, true}) {
      SCOPED_TRACE(text_of(c.spec, scales ? " scales" : " tables"));
      RefitOptions options;
      options.tables = !scales;
      options.scales = scales;
      options.steps = 5;
      options.damping = 0.02;
      PackedTensor packed = to_device(problem.start);
      refit_tables_cuda(problem.w.device(), packed, problem.on_device, options, nullptr);
      const PackedTensor found = to_host(packed);
      validate(found);
      PackedTensor again = to_device(problem.start);
      refit_tables_cuda(problem.w.device(), again, problem.on_device, options, nullptr);
      EXPECT_EQ(difference(found, to_host(again)), "");
      const PackedTensor expected = refit_tables(problem.w.host(), problem.start, problem.hessian, options);
      const double wanted = loss_of(problem.w.host(), expected, problem.hessian);
      EXPECT_NEAR(loss_of(problem.w.host(), found, problem.hessian), wanted, 1e-2 * wanted);
      const AdditiveParts a = unpack_additive(problem.format(), found);
      const AdditiveParts b = unpack_additive(problem.format(), problem.start);
      EXPECT_EQ(a.codes, b.codes);
      if (scales) {
        EXPECT_EQ(a.tables, b.tables);
      } else {
        EXPECT_EQ(a.scales, b.scales);
      }
    }
  }
}

TEST_F(BeamSearchCudaSmall, NearestStartIsTheCpus) {
  for (const Case& c : cases()) {
    SCOPED_TRACE(c.spec);
    const Problem problem(c.spec, c.n, c.k, 77);
    const auto& format = problem.format();
    const AdditiveParts parts = unpack_additive(format, problem.start);
    const auto with_tables =
        std::make_shared<const Additive>(format.codebooks, format.bits, format.in_group, format.out_group,
                                         format.scale_group, format.scale_dtype, parts.tables);
    PackedTensor packed = poisoned_planes(with_tables, c.n, c.k);
    BeamSearchOptions options;
    options.max_rounds = 0;
    options.refit_steps = 0;
    const CudaBeamSearched result =
        round_beam_search_cuda(problem.w.device(), packed, problem.on_device, options, nullptr, nullptr);
    EXPECT_EQ(difference(to_host(packed), problem.start), "");
    EXPECT_EQ(result.losses.size(), 1U);
    EXPECT_NEAR(result.report.proxy_loss, loss_of(problem.w.host(), problem.start, problem.hessian),
                1e-6 * result.report.proxy_loss);
    EXPECT_EQ(result.report.proxy_loss, result.report.proxy_loss_nearest);
  }
}

TEST_F(BeamSearchCuda, RoundsLikeTheCpu) {
  const int64_t n = 128;
  const int64_t k = 192;
  const Hessian other = correlated(k, 400, 9);
  const CudaHessian held_out(other);
  for (const char* spec : {"additive:2x5:g8", "additive:1x8:g8:scale64", "additive:2x4:g2x4:bf16"}) {
    const Problem problem(spec, n, k, 31);
    BeamSearchOptions options;
    options.search.beam = 2;
    options.search.damping = 0.01;
    const CudaHessian& hessian = problem.on_device;
    const auto format = std::dynamic_pointer_cast<const Additive>(format_from_spec(spec));
    PackedTensor packed = poisoned_planes(format, n, k);
    const CudaBeamSearched found =
        round_beam_search_cuda(problem.w.device(), packed, hessian, options, &held_out, nullptr);
    PackedTensor again = poisoned_planes(format, n, k);
    const CudaBeamSearched second =
        round_beam_search_cuda(problem.w.device(), again, hessian, options, &held_out, nullptr);
    EXPECT_EQ(difference(to_host(packed), to_host(again)), "");
    EXPECT_EQ(found.losses, second.losses);
    for (size_t i = 1; i < found.losses.size(); ++i) EXPECT_LT(found.losses[i], found.losses[i - 1]);
    const PackedTensor host = to_host(packed);
    validate(host);
    EXPECT_NEAR(loss_of(problem.w.host(), host, problem.hessian), found.report.proxy_loss,
                1e-5 * found.report.proxy_loss);
    EXPECT_NEAR(loss_of(problem.w.host(), host, other), found.report.held_out_loss,
                1e-5 * found.report.held_out_loss);
    options.held_out = &other;
    const BeamSearched expected = round_beam_search(problem.w.host(), format, problem.hessian, options);
    EXPECT_NEAR(found.report.proxy_loss, expected.report.proxy_loss, 0.1 * expected.report.proxy_loss);
    EXPECT_NEAR(found.report.proxy_loss_nearest, expected.report.proxy_loss_nearest,
                0.05 * expected.report.proxy_loss_nearest);
  }
}

TEST_F(BeamSearchCudaSmall, FitsTheTablesOfTheCpu) {
  for (const char* spec : {"additive:2x4:g4", "additive:1x3:g2x3:scale6"}) {
    const Problem problem(spec, 40, 66, 12);
    const auto format = std::dynamic_pointer_cast<const Additive>(format_from_spec(spec));
    AdditiveFitOptions options;
    const std::vector<double> diagonal = problem.hessian.diagonal();
    options.column_weights = diagonal;
    options.seed = 5;
    const auto found = fit_additive_cuda(*format, problem.w.device(), options, nullptr);
    EXPECT_EQ(found->tables, fit_additive(*format, problem.w.host(), options)->tables) << spec;
    EXPECT_EQ(found->spec(), format->spec());
  }
}

TEST_F(BeamSearchCudaSmall, EmptyMatrices) {
  for (const auto& [n, k] : {std::pair<int64_t, int64_t>{0, 16}, {4, 0}}) {
    const Hessian hessian = k > 0 ? correlated(k, 40, 3) : Hessian({nullptr, 0, 0}, 5);
    const CudaHessian on_device(hessian);
    const TwinMatrix w({}, n, k, DType::f32);
    const auto format = format_from_spec("additive:2x3:g4");
    PackedTensor packed = poisoned_planes(format, n, k);
    BeamSearchOptions options;
    const CudaBeamSearched found =
        round_beam_search_cuda(w.device(), packed, on_device, options, nullptr, nullptr);
    EXPECT_EQ(found.losses, std::vector<double>{0.0});
    validate(to_host(packed));
    search_codes_cuda(w.device(), packed, on_device, {.code_penalties = {}}, {}, nullptr);
    refit_tables_cuda(w.device(), packed, on_device, {}, nullptr);
  }
}

TEST_F(BeamSearchCudaSmall, RefusesWhatIsWrong) {
  Problem problem("additive:2x3:g2x4", 6, 24, 3);
  PackedTensor packed = to_device(problem.start);
  const auto search = [&](const CodeSearchOptions& options, std::span<const int64_t> rows = {}) {
    search_codes_cuda(problem.w.device(), packed, problem.on_device, options, rows, nullptr);
  };
  EXPECT_NE(message_of<InvalidArgument>([&] { search({.beam = 0, .code_penalties = {}}); }).find("beam"),
            std::string::npos);
  EXPECT_THROW(search({.beam = 9, .code_penalties = {}}), InvalidArgument);
  EXPECT_THROW(search({.damping = -1, .code_penalties = {}}), InvalidArgument);
  const std::vector<float> few(3);
  EXPECT_THROW(search({.code_penalties = few}), InvalidArgument);
  std::vector<float> bad(16);
  bad[5] = NAN;
  EXPECT_THROW(search({.code_penalties = bad}), NumericError);
  for (const std::vector<int64_t>& rows : {std::vector<int64_t>{3}, {-1}, {1, 1}}) {
    EXPECT_NE(message_of<InvalidArgument>([&] { search({.code_penalties = {}}, rows); }).find("row_groups"),
              std::string::npos);
  }
  const auto search_with = [&](const CudaMatrix& w, PackedTensor& planes, const CudaHessian& hessian) {
    search_codes_cuda(w, planes, hessian, {.code_penalties = {}}, {}, nullptr);
  };
  const CudaHessian wide(correlated(25, 60, 1));
  EXPECT_THROW(search_with(problem.w.device(), packed, wide), InvalidArgument);
  const CudaHessian none(24);
  EXPECT_THROW(search_with(problem.w.device(), packed, none), InvalidArgument);
  const TwinMatrix tall(normal_values(8 * 24, 1), 8, 24, DType::f32);
  EXPECT_THROW(search_with(tall.device(), packed, problem.on_device), InvalidArgument);
  PackedTensor on_host = problem.start;
  EXPECT_THROW(search_with(problem.w.device(), on_host, problem.on_device), TypeMismatch);
  CudaMatrix host_weights = problem.w.device();
  host_weights.data = problem.w.host().data();
  EXPECT_THROW(search_with(host_weights, packed, problem.on_device), TypeMismatch);
  PackedTensor uniform = to_device(round_nearest(problem.w.host(), format_from_spec("uniform:4:g8")).tensor);
  EXPECT_THROW(search_with(problem.w.device(), uniform, problem.on_device), InvalidArgument);
  PackedTensor odd_scales = problem.start;
  odd_scales.planes.at("scales") = Tensor(DType::f16, problem.start.plane("scales").shape());
  odd_scales.planes.at("scales").values<uint16_t>()[1] = 0x7e00;
  PackedTensor odd = to_device(odd_scales);
  EXPECT_NE(message_of<NumericError>([&] {
              search_with(problem.w.device(), odd, problem.on_device);
            }).find("scales"),
            std::string::npos);
  EXPECT_THROW(refit_tables_cuda(problem.w.device(), packed, problem.on_device, {.steps = -1}, nullptr),
               InvalidArgument);
  PackedTensor leveled = to_device(with_levels(problem.start, {.table_bits = 2}));
  EXPECT_THROW(search_with(problem.w.device(), leveled, problem.on_device), Unsupported);
  EXPECT_THROW(refit_tables_cuda(problem.w.device(), packed, problem.on_device, {.solver = RefitSolver::adam},
                                 nullptr),
               Unsupported);

  const auto round = [&](const BeamSearchOptions& options) {
    static_cast<void>(
        round_beam_search_cuda(problem.w.device(), packed, problem.on_device, options, nullptr, nullptr));
  };
  BeamSearchOptions options;
  options.held_out = &problem.hessian;
  EXPECT_THROW(round(options), InvalidArgument);
  options = {};
  options.tolerance = 1;
  EXPECT_THROW(round(options), InvalidArgument);
  const TwinMatrix three(normal_values(3 * 24, 1), 3, 24, DType::f32);
  PackedTensor planes = poisoned_planes(format_from_spec("additive:2x3:g2x4"), 3, 24);
  EXPECT_NE(message_of<InvalidArgument>([&] {
              static_cast<void>(
                  round_beam_search_cuda(three.device(), planes, problem.on_device, {}, nullptr, nullptr));
            }).find("multiple of 2"),
            std::string::npos);

  problem.w.replace(4, 7, NAN);
  EXPECT_NE(message_of<NumericError>([&] { search({.code_penalties = {}}); }).find("row 4, column 7"),
            std::string::npos);
  EXPECT_THROW(round({}), NumericError);
  EXPECT_EQ(difference(to_host(packed), problem.start), "");
}

}  // namespace
}  // namespace quantloom
