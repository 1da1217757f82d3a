// The order of planes of bits against the definition in PreparedPlanes, sign by sign.
#include "kernels/bit_plane_layout.hpp"

#include <gtest/gtest.h>

#include "quantloom/random.hpp"

namespace quantloom {
namespace {

// Random signs, and numbers that tell each scale and offset from all others.
PackedTensor random_planes(const std::shared_ptr<const Format>& format, int64_t n, int64_t k,
                           bool group_index, uint64_t seed) {
  const CounterRandom random(seed);
  uint64_t draw = 0;
  PackedTensor packed{format, n, k, {}};
  const Bcq& bcq = *as_bcq(*format);
  for (const PlaneSpec& spec : format->planes(n, k)) {
    if (spec.optional && !group_index) continue;
    Tensor plane(spec.dtype, spec.shape);
    if (spec.name == "signs") {
      const int64_t words = spec.shape[2];
      for (int64_t i = 0; i < plane.element_count(); ++i) {
        auto word = static_cast<uint32_t>(random.bits(draw++));
        if (i % words == words - 1 && k % 32 != 0) word &= (1U << k % 32) - 1U;
        plane.values<uint32_t>()[static_cast<size_t>(i)] = word;
      }
    } else if (spec.name == "group_index") {
      const int64_t groups = bcq.group_count(k);
      for (int64_t i = 0; i < k; ++i) {
        // A stride that meets all columns: groups are full, but nowhere consecutive.
        const int64_t column = i * 7 % k;
        plane.values<int32_t>()[static_cast<size_t>(column)] =
            static_cast<int32_t>(std::min(i / bcq.columns_per_group(k), groups - 1));
      }
    } else {
      for (int64_t i = 0; i < plane.element_count(); ++i) {
        const float value = static_cast<float>(random.bits(draw++) % 2001) / 64 - 15;
        if (spec.dtype == DType::f32) {
          plane.values<float>()[static_cast<size_t>(i)] = value;
        } else {
          plane.values<uint16_t>()[static_cast<size_t>(i)] =
              spec.dtype == DType::f16 ? f16_from_float(value) : bf16_from_float(value);
        }
      }
    }
    packed.planes.emplace(spec.name, std::move(plane));
  }
  return packed;
}

float value_at(const Tensor& plane, int64_t i) {
  const auto at = static_cast<size_t>(i);
  if (plane.dtype() == DType::f32) return plane.values<float>()[at];
  const uint16_t half = plane.values<uint16_t>()[at];
  return plane.dtype() == DType::f16 ? float_from_f16(half) : float_from_bf16(half);
}

// W as the prepared planes define it.
std::vector<float> decoded(const PreparedPlanes& prepared) {
  const Bcq& format = *as_bcq(*prepared.format);
  const Tensor& signs = prepared.plane("signs");
  const Tensor& scales = prepared.plane("scales");
  const int64_t blocks = signs.shape()[1];
  const int64_t groups = scales.shape()[1];
  const int64_t parameters = scales.shape()[2];
  // 0 columns past the last block, and as many in each group.
  const int64_t padded_group =
      groups > 1 ? (format.columns_per_group(prepared.k) + 31) / 32 * 32 : 128 * blocks;
  std::vector<float> w(static_cast<size_t>(prepared.n * prepared.k));
  for (int64_t row = 0; row < prepared.n; ++row) {
    for (int64_t place = 0; place < 128 * blocks; ++place) {
      const int64_t column = prepared.has("source")
                                 ? prepared.plane("source").values<int32_t>()[static_cast<size_t>(place)]
                                 : place;
      if (column < 0 || column >= prepared.k) continue;
      const int64_t lane = row % 8 * 4 + place % 128 / 32;
      const int64_t i = row % 64 / 8;
      const int64_t parameter = (row / 64 * groups + place / padded_group) * parameters;
      const auto scale = [&](int64_t p) { return value_at(scales, (parameter + p) * 64 + row % 8 * 8 + i); };
      float value = format.offset ? scale(format.bits) : 0.0F;
      for (int64_t plane = 0; plane < format.bits; ++plane) {
        const int64_t word =
            (((row / 64 * blocks + place / 128) * format.bits + plane) * 2 + i / 4) * 128 + lane * 4 + i % 4;
        const bool plus = (signs.values<uint32_t>()[static_cast<size_t>(word)] >> (place % 32) & 1U) != 0;
        value += plus ? scale(plane) : -scale(plane);
      }
      w[static_cast<size_t>(row * prepared.k + column)] = value;
    }
  }
  return w;
}

TEST(BitPlaneLayout, DecodesByItsDefinitionAndComesBack) {
  uint64_t seed = 0;
  for (const char* spec : {"bcq:1:g32", "bcq:2:g24:offset", "bcq:3:g128:f32", "bcq:4:g100:offset:bf16",
                           "bcq:4:channel", "bcq:5:g96", "bcq:8:g256:offset"}) {
    for (const auto& [n, k] :
         std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {64, 128}, {67, 300}, {130, 257}, {3, 0}, {0, 5}}) {
      for (const bool group_index : {false, true}) {
        const auto format = format_from_spec(spec);
        if (group_index && (as_bcq(*format)->group_size == Bcq::kPerChannel || k % 7 == 0)) continue;
        SCOPED_TRACE(text_of(spec, " [", n, ", ", k, "]", group_index ? " with group_index" : ""));
        const PackedTensor packed = random_planes(format, n, k, group_index, ++seed);
        const PreparedPlanes prepared = prepare_fragments(packed);
        EXPECT_NO_THROW(validate(prepared));
        std::vector<float> expected(static_cast<size_t>(n * k));
        dequantize(packed, MatrixView<float>(expected.data(), n, k));
        EXPECT_EQ(decoded(prepared), expected);
        const PackedTensor back = unprepare_fragments(prepared);
        ASSERT_EQ(back.planes.size(), packed.planes.size());
        for (const auto& [name, plane] : packed.planes) {
          const Tensor& other = back.plane(name);
          ASSERT_EQ(other.shape(), plane.shape()) << name;
          EXPECT_TRUE(std::equal(plane.bytes(), plane.bytes() + plane.byte_count(), other.bytes())) << name;
        }
      }
    }
  }
}

TEST(BitPlaneLayout, RefusesWhatIsNotThePlanesOfAMatrix) {
  PreparedPlanes prepared = prepare_fragments(random_planes(format_from_spec("bcq:2:g32"), 5, 64, false, 1));
  prepared.planes.at("signs") = Tensor(DType::i32, {1, 1, 3, 2, 32, 4});
  EXPECT_THROW(validate(prepared), InvalidArgument);
  EXPECT_THROW(static_cast<void>(prepared_planes(*format_from_spec("bcq:2:g32"), 4, int64_t{1} << 40, false)),
               Unsupported);
  EXPECT_THROW(static_cast<void>(prepared_planes(*format_from_spec("bcq:2:g32"), -1, 8, false)),
               InvalidArgument);
}

}  // namespace
}  // namespace quantloom
