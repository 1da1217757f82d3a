#include "quantloom/formats/vector_codebook.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "kernels/random_vectors.hpp"
#include "quantloom/kernels/kernel_table.hpp"
#include "quantloom/kernels/matmul.hpp"
#include "quantloom/rounding/error_feedback.hpp"
#include "quantloom/rounding/nearest.hpp"
#include "test_matrices.hpp"

namespace quantloom {
namespace {

using testing::decoded_values;
using testing::normal_values;
using testing::random_vectors;
using testing::same_planes;

MatrixView<const float> view(const std::vector<float>& values, int64_t n, int64_t k) {
  return {values.data(), n, k};
}

template <class Refused, class Call>
std::string message_of(const Call& call) {
  try {
    call();
  } catch (const Refused& error) {
    return error.what();
  }
  ADD_FAILURE() << "accepted";
  return "";
}

uint16_t code_at(const PackedTensor& packed, int64_t row, int64_t index) {
  const auto& format = dynamic_cast<const VectorCodebook&>(*packed.format);
  const Tensor& codes = packed.plane("codes");
  const auto words = static_cast<size_t>(codes.shape()[1]);
  uint16_t code = 0;
  unpack_wide_bits(codes.values<uint32_t>().subspan(static_cast<size_t>(row) * words, words), format.bits,
                   index, {&code, 1});
  return code;
}

float table_value(const PackedTensor& packed, int64_t book, int64_t entry, int64_t c) {
  const auto& format = dynamic_cast<const VectorCodebook&>(*packed.format);
  const auto table = packed.plane("codebook").values<uint16_t>();
  return float_from_f16(table[static_cast<size_t>((book * format.entries + entry) * format.dim + c)]);
}

float row_scale(const PackedTensor& packed, int64_t row, int64_t column) {
  const auto& format = dynamic_cast<const VectorCodebook&>(*packed.format);
  const Tensor& scales = packed.plane("scales");
  const bool per_tensor = format.group_size == ScaledFormat::kPerTensor;
  return testing::scale_at(
      scales, per_tensor ? 0 : row * scales.shape()[1] + column / format.columns_per_group(packed.k));
}

std::vector<VectorCodebook> formats() {
  const auto table = normal_values(37 * 3, 5);
  return {VectorCodebook(64, 2),
          VectorCodebook(256, 4, 16, DType::bf16),
          VectorCodebook(200, 8, ScaledFormat::kPerChannel, DType::f32),
          VectorCodebook(2, 1, ScaledFormat::kPerTensor),
          VectorCodebook(1000, 4, 64),
          VectorCodebook(16, 4, 8, DType::f16, 3),
          VectorCodebook(37, 3, 6, DType::f16, 1, table),
          VectorCodebook(65536, 16, 32)};
}

TEST(VectorCodebook, DescribesItself) {
  EXPECT_EQ(VectorCodebook(256, 4).to_json(),
            R"({"codebooks":1,"dim":4,"entries":256,"format":"vector_codebook","group_size":64,)"
            R"("scale_dtype":"float16","version":1})");
  EXPECT_EQ(VectorCodebook(2, 1, 1, DType::f32, 2, std::vector<float>{-1, 0.25F, 3, 0}).to_json(),
            R"({"codebooks":2,"dim":1,"entries":2,"format":"vector_codebook","group_size":1,)"
            R"("scale_dtype":"float32","table":[-1.0,0.25,3.0,0.0],"version":1})");
  EXPECT_EQ(VectorCodebook(4096, 8, ScaledFormat::kPerChannel, DType::bf16).spec(),
            "vector_codebook:4096x8:channel:bf16");
  EXPECT_EQ(VectorCodebook(256, 8, 8, DType::f16, 2).spec(), "vector_codebook:2x256x8:g8");
  EXPECT_TRUE(formats()[6].spec().starts_with("vector_codebook:custom37x3-"));
  for (const VectorCodebook& format : formats()) {
    const auto again = format_from_json(format.to_json());
    EXPECT_EQ(again->to_json(), format.to_json());
    EXPECT_EQ(again->spec(), format.spec());
    if (!format.table.empty()) continue;
    EXPECT_EQ(format_from_spec(format.spec())->to_json(), format.to_json());
  }
  EXPECT_EQ(format_from_spec("vector_codebook:256x4")->spec(), "vector_codebook:256x4:g64");
  EXPECT_EQ(format_from_spec("vector_codebook:8x3")->spec(), "vector_codebook:8x3:g66");
  EXPECT_EQ(format_from_spec("vector_codebook:8x3:bf16:tensor")->spec(), "vector_codebook:8x3:tensor:bf16");
}

TEST(VectorCodebook, RefusesBadArguments) {
  const auto refused = [](const auto& call, const std::string& name) {
    const std::string text = message_of<Error>(call);
    EXPECT_NE(text.find(name), std::string::npos) << text;
  };
  refused([] { VectorCodebook(1, 4); }, "entries");
  refused([] { VectorCodebook(65537, 4); }, "entries");
  refused([] { VectorCodebook(16, 0); }, "dim");
  refused([] { VectorCodebook(16, 17); }, "dim");
  refused([] { VectorCodebook(16, 4, 6); }, "group_size");
  refused([] { VectorCodebook(16, 4, 0); }, "group_size");
  refused([] { VectorCodebook(16, 4, 8, DType::i8); }, "scale_dtype");
  refused([] { VectorCodebook(16, 4, 8, DType::f16, 9); }, "codebooks");
  refused([] { VectorCodebook(16, 4, 8, DType::f16, 1, std::vector<float>(63)); }, "table");
  refused([] { VectorCodebook(2, 1, 8, DType::f16, 1, std::vector<float>{0, NAN}); }, "table");
  refused([] { VectorCodebook(2, 1, 8, DType::f16, 1, std::vector<float>{0, 1e6F}); }, "table");
  for (const char* spec : {"vector_codebook", "vector_codebook:", "vector_codebook:4", "vector_codebook:4x",
                           "vector_codebook:x4", "vector_codebook:1x2x3x4", "vector_codebook:4x4:sym",
                           "vector_codebook:4x4:g6", "vector_codebook:0x4", "vector_codebook:4x0",
                           "vector_codebook:4x-4", "vector_codebook:custom4x4-12345678:g4",
                           "vector_codebook:4x4:g8:g8", "vector_codebook:99999999999999999999x4"}) {
    EXPECT_THROW(format_from_spec(spec), InvalidArgument) << spec;
  }
  const std::string json = VectorCodebook(2, 1, 1, DType::f32, 1, std::vector<float>{-1, 0.5F}).to_json();
  const auto changed = [&](const std::string& from, const std::string& to) {
    std::string text = json;
    text.replace(text.find(from), from.size(), to);
    return text;
  };
  for (const std::string& bad :
       {changed("0.5", "0.1"), changed("0.5", "\"a\""), changed("-1.0,", ""), changed("0.5", "1e5"),
        changed("\"dim\":1", "\"dim\":1.0"), changed("\"dim\":1", "\"dim\":0"), changed("\"entries\":2,", ""),
        changed("\"version\":1", "\"version\":2"), changed("\"codebooks\":1", "\"codebooks\":2"),
        changed("\"dim\"", "\"dims\""), changed("float32", "int8")}) {
    EXPECT_THROW(format_from_json(bad), InvalidArgument) << bad;
  }
  const auto own = std::make_shared<const VectorCodebook>(16, 4, 8);
  refused([&] { own->column_encoder(own, 4, 8, {}); }, "tables");
  const auto fitted = own->fitted(own, view(normal_values(64, 1), 4, 16), 1);
  refused(
      [&] {
        fitted->column_encoder(fitted, 4, 16,
                               std::vector<int32_t>{1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0});
      },
      "group_of_column");
  EXPECT_THROW(static_cast<void>(own->planes(-1, 4)), InvalidArgument);
  EXPECT_THROW(static_cast<void>(own->planes(int64_t{1} << 40, int64_t{1} << 40)), Error);
}

TEST(VectorCodebook, DecodesAsItsPlanesSay) {
  for (const VectorCodebook& format : formats()) {
    for (const auto& [n, k] : std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {3, 37}, {17, 64}, {5, 130}}) {
      SCOPED_TRACE(text_of(format.spec(), " [", n, ", ", k, "]"));
      const PackedTensor packed = random_vectors(
          n, k,
          VectorCodebook(format.entries, format.dim, format.group_size, format.scale_dtype, format.codebooks),
          static_cast<uint64_t>(n * 100 + k));
      validate(packed);
      const auto decoded = decoded_values(packed);
      for (int64_t r = 0; r < n; ++r) {
        for (int64_t c = 0; c < k; ++c) {
          float sum = 0;
          for (int64_t book = 0; book < format.codebooks; ++book) {
            const int code = code_at(packed, r, c / format.dim * format.codebooks + book);
            const float value = table_value(packed, book, code, c % format.dim);
            sum = book == 0 ? value : sum + value;
          }
          ASSERT_EQ(decoded[static_cast<size_t>(r * k + c)], sum * row_scale(packed, r, c)) << r << " " << c;
        }
      }
    }
  }
}

// The definition of the encoder: every entry of every table, in float64.
TEST(VectorCodebook, ChoosesTheNearestEntryOfOneTableAfterTheOther) {
  for (const VectorCodebook& described : formats()) {
    if (described.entries > 2000) continue;
    for (const auto& [n, k] : std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {67, 33}, {5, 130}}) {
      SCOPED_TRACE(text_of(described.spec(), " [", n, ", ", k, "]"));
      auto w = normal_values(n * k, static_cast<uint64_t>(n * k));
      for (int64_t c = 0; c < std::min<int64_t>(k, 32); ++c) w[static_cast<size_t>((n - 1) * k + c)] = 0;
      const auto shared = std::make_shared<const VectorCodebook>(described);
      const PackedTensor packed = round_nearest(view(w, n, k), shared).tensor;
      validate(packed);
      EXPECT_TRUE(dynamic_cast<const VectorCodebook&>(*packed.format).table.empty());
      const int64_t dim = described.dim;
      for (int64_t r = 0; r < n; ++r) {
        for (int64_t first = 0; first < k; first += dim) {
          const float scale = row_scale(packed, r, first);
          std::vector<float> left(static_cast<size_t>(dim), 0.0F);
          for (int64_t c = 0; c < std::min(dim, k - first); ++c) {
            left[static_cast<size_t>(c)] = w[static_cast<size_t>(r * k + first + c)] / scale;
          }
          for (int64_t book = 0; book < described.codebooks; ++book) {
            int64_t best = -1;
            double least = std::numeric_limits<double>::infinity();
            for (int64_t entry = 0; entry < described.entries; ++entry) {
              double distance = 0;
              for (int64_t c = 0; c < dim; ++c) {
                const double difference = static_cast<double>(left[static_cast<size_t>(c)]) -
                                          static_cast<double>(table_value(packed, book, entry, c));
                distance += difference * difference;
              }
              if (distance < least) {
                least = distance;
                best = entry;
              }
            }
            const int code = code_at(packed, r, first / dim * described.codebooks + book);
            // What lies beyond a row's end is 0 for the first table only.
            ASSERT_EQ(code, best) << "row " << r << ", column " << first << ", table " << book;
            for (int64_t c = 0; c < std::min(dim, k - first); ++c) {
              left[static_cast<size_t>(c)] -= table_value(packed, book, code, c);
            }
          }
        }
      }
      // Scales: the largest magnitude of a group as stored, 1 for a group of zeros.
      const int64_t width = described.columns_per_group(k);
      const bool per_tensor = described.group_size == ScaledFormat::kPerTensor;
      for (int64_t r = 0; r < n && !per_tensor; ++r) {
        for (int64_t first = 0; first < k; first += width) {
          float largest = 0;
          for (int64_t c = first; c < std::min(k, first + width); ++c) {
            largest = std::max(largest, std::abs(w[static_cast<size_t>(r * k + c)]));
          }
          if (described.scale_dtype == DType::f16) largest = float_from_f16(f16_from_float(largest));
          if (described.scale_dtype == DType::bf16) largest = float_from_bf16(bf16_from_float(largest));
          EXPECT_EQ(row_scale(packed, r, first), largest == 0 ? 1.0F : largest);
        }
      }
    }
  }
}

TEST(VectorCodebook, FitsTablesThatErrLessThanScalarOnesOfTheSameWidth) {
  const auto w = normal_values(256 * 512, 3);
  const auto error = [&](const char* spec) {
    return round_nearest(view(w, 256, 512), format_from_spec(spec)).report.mean_squared_error;
  };
  EXPECT_LT(error("vector_codebook:64x2:g64"), 0.9 * error("codebook:nf3:g64"));
  EXPECT_LT(error("vector_codebook:4096x4:g64"), 0.85 * error("codebook:nf3:g64"));
  EXPECT_LT(error("vector_codebook:2x64x4:g64"), error("codebook:nf3:g64"));
}

TEST(VectorCodebook, TakesTablesAsTheyAre) {
  const auto table = normal_values(int64_t{37} * 3, 5);
  const auto format = std::make_shared<const VectorCodebook>(37, 3, 6, DType::f16, 1, table);
  const auto w = normal_values(int64_t{10} * 66, 9);
  const PackedTensor packed = round_nearest(view(w, 10, 66), format).tensor;
  const auto stored = packed.plane("codebook").values<uint16_t>();
  for (size_t i = 0; i < table.size(); ++i) EXPECT_EQ(stored[i], f16_from_float(table[i]));
  PackedTensor described = packed;
  described.format = format;  // tables in the description must be those of the plane
  validate(described);
  described.planes.at("codebook").values<uint16_t>()[5] ^= 1;
  EXPECT_NE(message_of<InvalidArgument>([&] { validate(described); }).find("codebook"), std::string::npos);
}

TEST(VectorCodebook, RefusesHostilePlanes) {
  const PackedTensor packed = random_vectors(4, 40, VectorCodebook(100, 4, 8), 1);
  const auto with = [&](const char* name, const auto& change) {
    PackedTensor copy = packed;
    Tensor plane(packed.plane(name).dtype(), packed.plane(name).shape());
    std::memcpy(plane.bytes(), packed.plane(name).bytes(), static_cast<size_t>(plane.byte_count()));
    change(plane);
    copy.planes.at(name) = plane;
    return message_of<InvalidArgument>([&] { validate(copy); });
  };
  EXPECT_NE(with("codes", [](Tensor& t) { t.values<uint32_t>()[3] |= 0x7FU; }).find("plane codes"),
            std::string::npos);
  EXPECT_NE(with("codes", [](Tensor& t) { t.values<uint32_t>()[2] |= 1U << 31; }).find("padding"),
            std::string::npos);
  EXPECT_NE(with("codebook", [](Tensor& t) { t.values<uint16_t>()[7] = 0x7C00; }).find("codebook"),
            std::string::npos);
  EXPECT_NE(with("scales", [](Tensor& t) { t.values<uint16_t>()[7] = 0x7E00; }).find("scales"),
            std::string::npos);
  PackedTensor lacking = packed;
  lacking.planes.erase("codebook");
  EXPECT_THROW(validate(lacking), InvalidArgument);
}

TEST(VectorCodebook, ErrorFeedbackErrsLessThanNearestUnderTheHessian) {
  constexpr int64_t kRows = 48;
  constexpr int64_t kCols = 128;
  const auto w = normal_values(kRows * kCols, 21);
  auto x = normal_values(600 * kCols, 22);
  for (int64_t t = 0; t < 600; ++t) {
    for (int64_t c = 1; c < kCols; ++c) {
      x[static_cast<size_t>(t * kCols + c)] += 0.8F * x[static_cast<size_t>(t * kCols + c - 1)];
    }
  }
  Hessian hessian(kCols);
  hessian.add(view(x, 600, kCols));
  for (const char* spec : {"vector_codebook:256x4:g32", "vector_codebook:64x2:channel",
                           "vector_codebook:128x4:tensor", "vector_codebook:2x16x4:g64"}) {
    for (const bool act_order : {false, true}) {
      SCOPED_TRACE(text_of(spec, act_order ? ", act-order" : ""));
      ErrorFeedbackOptions options;
      options.act_order = act_order;
      options.threads = 1;
      const Rounded rounded =
          round_error_feedback(view(w, kRows, kCols), format_from_spec(spec), hessian, options);
      validate(rounded.tensor);
      EXPECT_LT(rounded.report.proxy_loss, 0.9 * rounded.report.proxy_loss_nearest);
      options.threads = 3;
      EXPECT_TRUE(same_planes(
          rounded.tensor,
          round_error_feedback(view(w, kRows, kCols), format_from_spec(spec), hessian, options).tensor));
    }
  }
  ErrorFeedbackOptions dynamic;
  dynamic.static_groups = false;
  dynamic.act_order = false;
  validate(round_error_feedback(view(w, kRows, kCols), format_from_spec("vector_codebook:256x4:g32"), hessian,
                                dynamic)
               .tensor);
  dynamic.act_order = true;
  EXPECT_THROW(round_error_feedback(view(w, kRows, kCols), format_from_spec("vector_codebook:256x4:g32"),
                                    hessian, dynamic),
               InvalidArgument);
}

TEST(VectorProduct, EqualsTheReference) {
  for (const VectorCodebook& format : formats()) {
    if (format.entries > 2000 || !format.table.empty()) continue;
    for (const auto& [n, k, m] : std::vector<std::tuple<int64_t, int64_t, int64_t>>{
             {1, 1, 1}, {33, 37, 3}, {70, 130, 1}, {5, 64, 600}, {0, 5, 2}, {5, 0, 2}, {5, 8, 0}}) {
      SCOPED_TRACE(text_of(format.spec(), " [", n, ", ", k, "], ", m, " tokens"));
      const PackedTensor packed = random_vectors(n, k, format, static_cast<uint64_t>(n + k + m));
      const auto x = normal_values(m * k, 4);
      std::vector<float> expected(static_cast<size_t>(m * n), NAN);
      std::vector<float> one(expected);
      matmul_reference(view(x, m, k), packed, {expected.data(), m, n});
      const auto prepared = prepare(packed);
      EXPECT_EQ(prepared->n(), n);
      EXPECT_EQ(prepared->k(), k);
      // Codes of up to 8 bits take other orders (lookup_product_test.cpp).
      if (format.bits > 8) {
        EXPECT_EQ(prepared->byte_count() * 8, packed.size_in_bits());
      } else {
        EXPECT_GE(prepared->byte_count(), packed.plane("codes").byte_count() - 4 * n);
      }
      matmul(view(x, m, k), *prepared, {one.data(), m, n}, {.threads = 1});
      for (size_t i = 0; i < one.size(); ++i) {
        ASSERT_NEAR(one[i], expected[i], 1e-5 * std::sqrt(static_cast<double>(k)) + 1e-6) << i;
      }
      for (const int threads : {2, 4}) {
        std::vector<float> other(expected.size(), NAN);
        matmul(view(x, m, k), *prepared, {other.data(), m, n}, {.threads = threads});
        EXPECT_EQ(one, other);
      }
    }
  }
  const auto prepared = prepare(random_vectors(8, 8, VectorCodebook(16, 4, 8), 1));
  std::vector<float> x(8);
  std::vector<float> y(8);
  EXPECT_THROW(matmul(view(x, 1, 8), *prepared, {y.data(), 1, 8}, {.activations = Activations::int8}),
               Unsupported);
  EXPECT_THROW(matmul(view(x, 1, 7), *prepared, {y.data(), 1, 8}), InvalidArgument);
}

}  // namespace
}  // namespace quantloom
