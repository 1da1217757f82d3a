#include "quantloom/rounding/beam_search.hpp"

#include <gtest/gtest.h>

#include <cmath>

#include "beam_search_reference.hpp"
#include "quantloom/rounding/error_feedback.hpp"
#include "quantloom/rounding/nearest.hpp"
#include "test_matrices.hpp"

namespace quantloom {
namespace {

using testing::decoded_values;
using testing::LiteralSearch;
using testing::normal_values;
using testing::same_planes;

MatrixView<const float> view(const std::vector<float>& values, int64_t n, int64_t k) {
  return {values.data(), n, k};
}

Hessian correlated(int64_t k, int64_t tokens, uint64_t seed, float correlation = 0.8F) {
  std::vector<float> x = normal_values(tokens * k, seed);
  for (size_t i = 1; i < x.size(); ++i) x[i] += correlation * x[i - 1];
  Hessian hessian(k);
  hessian.add(view(x, tokens, k));
  return hessian;
}

double loss_of(const std::vector<float>& w, const PackedTensor& packed, const Hessian& hessian) {
  const std::vector<float> decoded = decoded_values(packed);
  return proxy_loss(view(w, packed.n, packed.k), view(decoded, packed.n, packed.k), hessian);
}

const Additive& additive(const PackedTensor& packed) {
  return dynamic_cast<const Additive&>(*packed.format);
}

struct Case {
  const char* spec;
  int64_t n;
  int64_t k;
};

TEST(BeamSearch, FindsTheCodesOfTheLiteralSearch) {
  const std::vector<Case> cases = {{"additive:1x3:g4", 5, 24},
                                   {"additive:2x3:g4", 4, 22},
                                   {"additive:3x2:g2:f32", 3, 14},
                                   {"additive:2x3:g2x3:scale6", 4, 19},
                                   {"additive:1x4:g1:scale5:bf16", 3, 11},
                                   {"additive:2x4:g16", 2, 40},
                                   {"additive:1x1:g8", 1, 160},
                                   {"additive:2x3:g4:scale4:s1:t2", 3, 22}};
  uint64_t seed = 1;
  for (const Case& c : cases) {
    const std::vector<float> w = normal_values(c.n * c.k, ++seed);
    const Hessian hessian = correlated(c.k, 3 * c.k, ++seed);
    const PackedTensor start = round_nearest(view(w, c.n, c.k), format_from_spec(c.spec)).tensor;
    const Additive& format = additive(start);
    const auto most = static_cast<int>(std::min<int64_t>(c.k > 100 ? 2 : 8, format.entries()));
    for (int beam = 1; beam <= most; beam += beam < 4 ? 1 : 4) {
      for (const bool shuffled : {false, true}) {
        for (const bool penalized : {false, true}) {
          SCOPED_TRACE(
              text_of(c.spec, " beam ", beam, shuffled ? " shuffled" : "", penalized ? " penalties" : ""));
          const std::vector<float> penalties =
              penalized ? normal_values(format.codebooks * format.entries(), ++seed) : std::vector<float>();
          const double damping = penalized ? 0.1 : 0;
          CodeSearchOptions options;
          options.beam = beam;
          options.shuffled = shuffled;
          options.seed = ++seed;
          options.float64 = true;
          options.damping = damping;
          options.code_penalties = penalties;
          const PackedTensor found = search_codes(view(w, c.n, c.k), start, hessian, options);
          validate(found);
          const AdditiveParts before = unpack_additive(format, start);
          const AdditiveParts after = unpack_additive(format, found);
          EXPECT_EQ(before.tables, after.tables);
          EXPECT_EQ(before.scales, after.scales);
          const LiteralSearch literal{format,        w,       c.n,       c.k,    before.tables,
                                      before.scales, hessian, penalties, damping};
          const int64_t length = format.code_count(c.k);
          for (int64_t r = 0; r < format.row_groups(c.n); ++r) {
            const std::vector<uint16_t> own(before.codes.begin() + r * length,
                                            before.codes.begin() + (r + 1) * length);
            const std::vector<uint16_t> got(after.codes.begin() + r * length,
                                            after.codes.begin() + (r + 1) * length);
            std::vector<double> losses = {literal.loss(r, own)};
            EXPECT_EQ(got, literal.sweep(r, own, beam, shuffled, options.seed, &losses)) << "row group " << r;
            for (size_t i = 1; i < losses.size(); ++i)
              ASSERT_LE(losses[i], losses[i - 1] + 1e-9 * std::abs(losses[0]));
          }
        }
      }
    }
  }
}

TEST(BeamSearch, EqualEntriesTakeTheLowerCode) {
  const int64_t n = 3;
  const int64_t k = 16;
  const std::vector<float> w = normal_values(n * k, 3);
  std::vector<float> tables = normal_values(2 * 8 * 4, 4);
  for (int64_t book = 0; book < 2; ++book)
    std::copy_n(tables.begin() + book * 32, 16, tables.begin() + book * 32 + 16);
  const auto format = std::make_shared<const Additive>(2, 3, 4, 1, Additive::kPerChannel, DType::f16, tables);
  const PackedTensor start = round_nearest(view(w, n, k), format).tensor;
  const Hessian hessian = correlated(k, 50, 5);
  for (const bool float64 : {false, true}) {
    for (const int beam : {1, 2}) {
      const PackedTensor found = search_codes(view(w, n, k), start, hessian,
                                              {.beam = beam, .float64 = float64, .code_penalties = {}});
      const AdditiveParts parts = unpack_additive(*format, found);
      if (beam == 1) {
        for (const uint16_t code : parts.codes) EXPECT_LT(code, 4);
      }
      const AdditiveParts before = unpack_additive(*format, start);
      const LiteralSearch literal{*format, w, n, k, before.tables, before.scales, hessian, {}};
      for (int64_t r = 0; r < n; ++r) {
        const std::vector<uint16_t> own(before.codes.begin() + r * 8, before.codes.begin() + (r + 1) * 8);
        const std::vector<uint16_t> got(parts.codes.begin() + r * 8, parts.codes.begin() + (r + 1) * 8);
        EXPECT_NEAR(literal.loss(r, got), literal.loss(r, literal.sweep(r, own, beam, false, 0)), 1e-6);
      }
    }
  }
}

TEST(BeamSearch, ComesCloseToTheBestOfAllCodes) {
  const int64_t k = 8;
  double sum[3] = {0, 0, 0};
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const std::vector<float> w = normal_values(k, 100 + seed);
    const Hessian hessian = correlated(k, 40, 200 + seed);
    const auto format = std::make_shared<const Additive>(2, 3, 4, 1, Additive::kPerChannel, DType::f32,
                                                         normal_values(2 * 8 * 4, 300 + seed));
    const PackedTensor start = round_nearest(view(w, 1, k), format).tensor;
    const AdditiveParts parts = unpack_additive(*format, start);
    const LiteralSearch literal{*format, w, 1, k, parts.tables, parts.scales, hessian, {}};
    double best = INFINITY;
    for (int i = 0; i < 8 * 8 * 8 * 8; ++i) {
      const std::vector<uint16_t> codes = {static_cast<uint16_t>(i % 8), static_cast<uint16_t>(i / 8 % 8),
                                           static_cast<uint16_t>(i / 64 % 8), static_cast<uint16_t>(i / 512)};
      best = std::min(best, literal.loss(0, codes));
    }
    const auto loss = [&](int beam) {
      return literal.loss(0, unpack_additive(*format, search_codes(view(w, 1, k), start, hessian,
                                                                   {.beam = beam, .code_penalties = {}}))
                                 .codes);
    };
    const double one = loss(1);
    const double eight = loss(8);
    EXPECT_GE(one, best * (1 - 1e-6));
    EXPECT_GE(eight, best * (1 - 1e-6));
    sum[0] += best;
    sum[1] += one;
    sum[2] += eight;
  }
  EXPECT_LT(sum[2], sum[1]);
  EXPECT_LT(sum[2], 1.25 * sum[0]);
}

TEST(BeamSearch, Float32IsAlmostFloat64AndNoThreadChangesIt) {
  const int64_t n = 150;
  const int64_t k = 200;
  const std::vector<float> w = normal_values(n * k, 21);
  const Hessian hessian = correlated(k, 700, 22);
  for (const char* spec : {"additive:2x6:g8", "additive:1x8:g2x4:scale40"}) {
    const PackedTensor start = round_nearest(view(w, n, k), format_from_spec(spec)).tensor;
    for (const int beam : {1, 3}) {
      CodeSearchOptions options;
      options.beam = beam;
      options.shuffled = beam == 3;
      options.threads = 1;
      const PackedTensor found = search_codes(view(w, n, k), start, hessian, options);
      options.threads = 4;
      EXPECT_TRUE(same_planes(found, search_codes(view(w, n, k), start, hessian, options)));
      options.float64 = true;
      const PackedTensor exact = search_codes(view(w, n, k), start, hessian, options);
      EXPECT_NEAR(loss_of(w, found, hessian), loss_of(w, exact, hessian), 2e-3 * loss_of(w, exact, hessian));
      EXPECT_LT(loss_of(w, found, hessian), 0.8 * loss_of(w, start, hessian));
      const AdditiveParts a = unpack_additive(additive(start), found);
      const AdditiveParts b = unpack_additive(additive(start), exact);
      int64_t equal = 0;
      for (size_t i = 0; i < a.codes.size(); ++i) equal += a.codes[i] == b.codes[i] ? 1 : 0;
      EXPECT_GT(static_cast<double>(equal), 0.98 * static_cast<double>(a.codes.size()));
      // Some rows alone.
      const std::vector<int64_t> rows = {7, 3, n / additive(start).out_group - 1};
      const AdditiveParts some =
          unpack_additive(additive(start), search_codes(view(w, n, k), start, hessian, options, rows));
      const AdditiveParts none = unpack_additive(additive(start), start);
      const int64_t length = additive(start).code_count(k);
      for (int64_t i = 0; i < std::ssize(some.codes); ++i) {
        const bool chosen = std::ranges::find(rows, i / length) != rows.end();
        ASSERT_EQ(some.codes[i], chosen ? b.codes[i] : none.codes[i]);
      }
    }
  }
}

// Solves a x = b, symmetric and positive definite.
std::vector<double> solve(std::vector<double> a, std::vector<double> b) {
  const size_t size = b.size();
  for (size_t i = 0; i < size; ++i) {
    for (size_t r = i + 1; r < size; ++r) {
      const double factor = a[r * size + i] / a[i * size + i];
      for (size_t c = i; c < size; ++c) a[r * size + c] -= factor * a[i * size + c];
      b[r] -= factor * b[i];
    }
  }
  for (size_t i = size; i-- > 0;) {
    for (size_t c = i + 1; c < size; ++c) b[i] -= a[i * size + c] * b[c];
    b[i] /= a[i * size + i];
  }
  return b;
}

// The least loss over all of some numbers that values depend on linearly: value[i] = sum of design(i, x) * x.
double least_loss(const std::vector<float>& w, int64_t n, int64_t k, const Hessian& hessian,
                  const std::vector<std::vector<double>>& design) {
  const size_t count = design.size();
  std::vector<double> a(count * count, 0.0);
  std::vector<double> b(count, 0.0);
  const auto product = [&](const auto& left, const auto& right) {
    double sum = 0;
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t i = 0; i < k; ++i) {
        if (left[static_cast<size_t>(r * k + i)] == 0) continue;
        for (int64_t j = 0; j < k; ++j)
          sum += left[static_cast<size_t>(r * k + i)] * hessian.sum()(i, j) *
                 right[static_cast<size_t>(r * k + j)];
      }
    }
    return sum / static_cast<double>(hessian.tokens());
  };
  const std::vector<double> target(w.begin(), w.end());
  for (size_t x = 0; x < count; ++x) {
    for (size_t y = 0; y < count; ++y) a[x * count + y] = product(design[x], design[y]);
    a[x * count + x] *= 1 + 1e-10;  // tables that add up are determined but for constants
    b[x] = product(design[x], target);
  }
  const std::vector<double> x = solve(a, b);
  std::vector<double> error = target;
  for (size_t i = 0; i < error.size(); ++i) {
    for (size_t e = 0; e < count; ++e) error[i] -= design[e][i] * x[e];
  }
  return product(error, error);
}

TEST(BeamSearch, RefitIsTheLeastSquares) {
  for (const char* spec : {"additive:1x2:g4:f32", "additive:2x2:g4:scale8:f32", "additive:2x1:g2x3:f32"}) {
    SCOPED_TRACE(spec);
    const int64_t n = 24;
    const int64_t k = 23;
    const std::vector<float> w = normal_values(n * k, 31);
    const Hessian hessian = correlated(k, 100, 32);
    const PackedTensor start = round_nearest(view(w, n, k), format_from_spec(spec)).tensor;
    const Additive& format = additive(start);
    const double before = loss_of(w, start, hessian);
    AdditiveParts parts = unpack_additive(format, start);
    // Values are linear in each number of the tables, and in each scale.
    std::vector<std::vector<double>> tables;
    std::vector<std::vector<double>> scales;
    const auto with = [&](float& number, const std::vector<float>& zero) {
      const float kept = number;
      number = 1;
      const std::vector<float> values = decoded_values(pack_additive(format, parts, n, k, 1));
      number = kept;
      std::vector<double> column(values.size());
      for (size_t i = 0; i < values.size(); ++i)
        column[i] = static_cast<double>(values[i]) - static_cast<double>(zero[i]);
      return column;
    };
    const std::vector<float> kept_tables = parts.tables;
    std::ranges::fill(parts.tables, 0.0F);
    const std::vector<float> zeros(w.size(), 0.0F);
    for (float& number : parts.tables) tables.push_back(with(number, zeros));
    parts.tables = kept_tables;
    const double best = least_loss(w, n, k, hessian, tables);
    const PackedTensor refit = refit_tables(view(w, n, k), start, hessian, {.steps = 60, .scales = false});
    EXPECT_EQ(unpack_additive(format, refit).codes, parts.codes);
    EXPECT_EQ(unpack_additive(format, refit).scales, parts.scales);
    EXPECT_LT(best, 0.98 * before);
    EXPECT_NEAR(loss_of(w, refit, hessian), best, 1e-4 * before);
    // Ten steps come close.
    const PackedTensor ten = refit_tables(view(w, n, k), start, hessian, {.steps = 10, .scales = false});
    EXPECT_LT(loss_of(w, ten, hessian), best + 0.02 * (before - best));

    const std::vector<float> kept_scales = parts.scales;
    std::ranges::fill(parts.scales, 0.0F);
    for (float& number : parts.scales) scales.push_back(with(number, zeros));
    parts.scales = kept_scales;
    const double best_scales = least_loss(w, n, k, hessian, scales);
    const PackedTensor scaled = refit_tables(view(w, n, k), start, hessian, {.steps = 60, .tables = false});
    EXPECT_EQ(unpack_additive(format, scaled).tables, parts.tables);
    EXPECT_LT(best_scales, before);
    EXPECT_NEAR(loss_of(w, scaled, hessian), best_scales, 2e-3 * (before - best_scales));
    for (const int threads : {1, 3}) {
      EXPECT_TRUE(same_planes(refit_tables(view(w, n, k), start, hessian, {.threads = threads}),
                              refit_tables(view(w, n, k), start, hessian)));
    }
  }
}

TEST(BeamSearch, RefitOfLevelsStaysOnThem) {
  const int64_t n = 24;
  const int64_t k = 40;
  std::vector<float> w = normal_values(n * k, 33);
  for (size_t i = 0; i < w.size(); ++i) w[i] *= i / 4 % 3 == 0 ? 3.0F : 1.0F;
  const Hessian hessian = correlated(k, 150, 34);
  for (const char* spec :
       {"additive:2x4:g4:scale4:s2", "additive:1x5:g2x4:t3", "additive:2x4:g4:scale8:s1:t2x2"}) {
    SCOPED_TRACE(spec);
    const PackedTensor start = round_nearest(view(w, n, k), format_from_spec(spec)).tensor;
    const double before = loss_of(w, start, hessian);
    double by_steps = before;
    for (const int steps : {1, 10}) {
      const PackedTensor refit = refit_tables(view(w, n, k), start, hessian, {.steps = steps});
      validate(refit);
      EXPECT_EQ(unpack_additive(additive(start), refit).codes, unpack_additive(additive(start), start).codes);
      EXPECT_LT(loss_of(w, refit, hessian), by_steps);
      by_steps = loss_of(w, refit, hessian);
      // Nothing is lost on the way to the planes.
      const AdditiveParts parts = unpack_additive(additive(refit), refit);
      EXPECT_TRUE(same_planes(pack_additive(additive(refit), parts, n, k, 1), refit));
      for (const int threads : {1, 3}) {
        EXPECT_TRUE(same_planes(
            refit, refit_tables(view(w, n, k), start, hessian, {.steps = steps, .threads = threads})));
      }
    }
    EXPECT_LT(by_steps, 0.97 * before);
    // Better than levels for what is fitted without them.
    const PackedTensor free = with_levels(start, {});
    const PackedTensor after =
        with_levels(refit_tables(view(w, n, k), free, hessian, {}), additive(start).levels);
    EXPECT_LE(by_steps, loss_of(w, after, hessian));
  }
}

TEST(BeamSearch, AdamErrsLessWithEveryStep) {
  const int64_t n = 24;
  const int64_t k = 32;
  const std::vector<float> w = normal_values(n * k, 35);
  const Hessian hessian = correlated(k, 150, 36, 0.3F);
  for (const char* spec : {"additive:2x3:g4:f32", "additive:2x4:g4:scale4:s2:f32"}) {
    SCOPED_TRACE(spec);
    const PackedTensor start = round_nearest(view(w, n, k), format_from_spec(spec)).tensor;
    RefitOptions options = {.steps = 20, .solver = RefitSolver::adam, .adam = {.learning_rate = 1e-3}};
    const PackedTensor moved = refit_tables(view(w, n, k), start, hessian, options);
    validate(moved);
    EXPECT_LT(loss_of(w, moved, hessian), 0.995 * loss_of(w, start, hessian));
    options.steps = 200;
    EXPECT_LT(loss_of(w, refit_tables(view(w, n, k), start, hessian, options), hessian),
              loss_of(w, moved, hessian));
    options.steps = 20;
    options.threads = 3;
    EXPECT_TRUE(same_planes(refit_tables(view(w, n, k), start, hessian, options), moved));
    options.adam.learning_rate = 10;  // away: nothing is kept
    EXPECT_TRUE(same_planes(refit_tables(view(w, n, k), start, hessian, options), start));
  }
  const PackedTensor start = round_nearest(view(w, n, k), format_from_spec("additive:1x2:g4")).tensor;
  for (const AdamOptions& bad :
       {AdamOptions{.learning_rate = 0}, AdamOptions{.beta1 = 1}, AdamOptions{.beta2 = -0.1},
        AdamOptions{.epsilon = 0}, AdamOptions{.learning_rate = std::nan("")}}) {
    EXPECT_THROW(refit_tables(view(w, n, k), start, hessian, {.adam = bad}), InvalidArgument);
  }
}

TEST(BeamSearch, LossesFallBelowThoseOfOtherRoundings) {
  const int64_t n = 96;
  const int64_t k = 128;
  const std::vector<float> w = normal_values(n * k, 41);
  const Hessian hessian = correlated(k, 500, 42);
  const Hessian held_out = correlated(k, 500, 43);
  for (const char* spec :
       {"additive:2x5:g8", "additive:1x6:g2x4:scale32:bf16", "additive:2x5:g8:scale16:s2:t4"}) {
    const auto format = std::dynamic_pointer_cast<const Additive>(format_from_spec(spec));
    const double feedback = round_error_feedback(view(w, n, k), format, hessian, {}).report.proxy_loss;
    for (const CodeStart start : {CodeStart::nearest, CodeStart::error_feedback}) {
      BeamSearchOptions options;
      options.search.beam = 2;
      options.start = start;
      options.held_out = &held_out;
      const BeamSearched found = round_beam_search(view(w, n, k), format, hessian, options);
      validate(found.tensor);
      EXPECT_EQ(found.tensor.format->spec(), spec);
      ASSERT_GT(found.losses.size(), 2U);
      for (size_t i = 1; i < found.losses.size(); ++i) EXPECT_LT(found.losses[i], found.losses[i - 1]);
      EXPECT_NEAR(found.losses.back(), loss_of(w, found.tensor, hessian), 1e-5 * found.losses.back());
      EXPECT_EQ(found.report.method, "beam_search");
      EXPECT_NEAR(found.report.proxy_loss, found.losses.back(), 1e-9 * found.losses.back());
      EXPECT_LT(found.report.proxy_loss, 0.75 * found.report.proxy_loss_nearest);
      EXPECT_LT(found.report.proxy_loss, 0.9 * feedback);
      EXPECT_LT(found.report.held_out_loss, 0.85 * found.report.held_out_loss_nearest);
      for (const int threads : {1, 3}) {
        options.search.threads = threads;
        EXPECT_TRUE(
            same_planes(found.tensor, round_beam_search(view(w, n, k), format, hessian, options).tensor));
      }
    }
  }
}

TEST(BeamSearch, TakesExtremes) {
  const int64_t k = 40;
  const Hessian hessian = correlated(k, 100, 51);
  const auto format = std::dynamic_pointer_cast<const Additive>(format_from_spec("additive:2x3:g4:f32"));
  const auto run = [&](const std::vector<float>& w, int64_t n, const Hessian& h) {
    BeamSearchOptions options;
    options.search.beam = 3;
    options.max_rounds = 3;
    const BeamSearched found = round_beam_search(view(w, n, k), format, h, options);
    validate(found.tensor);
    for (const float value : decoded_values(found.tensor)) EXPECT_TRUE(std::isfinite(value));
    return found;
  };
  const std::vector<float> w = normal_values(8 * k, 52);
  const double usual = run(w, 8, hessian).report.proxy_loss;
  for (const float unit : {0x1p60F, 0x1p-60F}) {
    std::vector<float> scaled = w;
    for (float& value : scaled) value *= unit;
    EXPECT_NEAR(run(scaled, 8, hessian).report.proxy_loss / (static_cast<double>(unit) * unit), usual,
                1e-6 * usual);
  }
  EXPECT_EQ(run(std::vector<float>(static_cast<size_t>(8 * k), 0.0F), 8, hessian).report.proxy_loss, 0);
  static_cast<void>(run({}, 0, hessian));
  // Inputs that are always zero.
  std::vector<float> x = normal_values(60 * k, 53);
  for (int64_t t = 0; t < 60; ++t) std::fill_n(x.begin() + t * k + 3, 9, 0.0F);
  Hessian dead(k);
  dead.add(view(x, 60, k));
  EXPECT_EQ(run(w, 8, dead).report.dead_columns, 9);
}

TEST(BeamSearch, RefusesBadArguments) {
  const int64_t k = 16;
  const std::vector<float> w = normal_values(6 * k, 61);
  const Hessian hessian = correlated(k, 40, 62);
  const auto format = std::make_shared<const Additive>(2, 2, 4);
  const PackedTensor start = round_nearest(view(w, 6, k), format).tensor;
  const auto search = [&](const CodeSearchOptions& options, std::span<const int64_t> rows = {}) {
    return search_codes(view(w, 6, k), start, hessian, options, rows);
  };
  CodeSearchOptions options;
  for (const int beam : {0, 5, 9}) {
    options.beam = beam;
    EXPECT_THROW(search(options), InvalidArgument);
  }
  options = {};
  options.damping = -1;
  EXPECT_THROW(search(options), InvalidArgument);
  options = {};
  const std::vector<float> few(7);
  options.code_penalties = few;
  EXPECT_THROW(search(options), InvalidArgument);
  std::vector<float> bad(8);
  bad[2] = NAN;
  options.code_penalties = bad;
  EXPECT_THROW(search(options), NumericError);
  options = {};
  for (const std::vector<int64_t>& rows : {std::vector<int64_t>{6}, {-1}, {2, 2}}) {
    EXPECT_THROW(search(options, rows), InvalidArgument);
  }
  EXPECT_THROW(search_codes(view(w, 3, 2 * k), start, hessian), InvalidArgument);
  EXPECT_THROW(search_codes(view(w, 6, k), start, correlated(8, 20, 1)), InvalidArgument);
  EXPECT_THROW(search_codes(view(w, 6, k),
                            round_nearest(view(w, 6, k), format_from_spec("uniform:4:g16")).tensor, hessian),
               InvalidArgument);
  EXPECT_THROW(refit_tables(view(w, 6, k), start, hessian, {.steps = -1}), InvalidArgument);
  const auto tall = std::make_shared<const Additive>(1, 2, 4, 4);
  EXPECT_THROW(round_beam_search(view(w, 6, k), tall, hessian), InvalidArgument);
  EXPECT_THROW(round_beam_search(view(w, 6, k), nullptr, hessian), InvalidArgument);
  BeamSearchOptions rounds;
  rounds.max_rounds = -1;
  EXPECT_THROW(round_beam_search(view(w, 6, k), format, hessian, rounds), InvalidArgument);
  rounds = {};
  rounds.tolerance = 1;
  EXPECT_THROW(round_beam_search(view(w, 6, k), format, hessian, rounds), InvalidArgument);
}

}  // namespace
}  // namespace quantloom
