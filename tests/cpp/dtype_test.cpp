#include "quantloom/dtype.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <set>
#include <string>

#include "quantloom/error.hpp"
#include "quantloom/random.hpp"

namespace quantloom {
namespace {

constexpr DType kAll[] = {DType::f64, DType::f32, DType::f16,    DType::bf16, DType::i64,
                          DType::i32, DType::i16, DType::i8,     DType::u64,  DType::u32,
                          DType::u16, DType::u8,  DType::boolean};

TEST(DType, NamesAreDistinctAndReadBack) {
  std::set<std::string_view> names;
  for (const DType dtype : kAll) {
    EXPECT_EQ(dtype_from_name(name_of(dtype)), dtype);
    EXPECT_TRUE(names.insert(name_of(dtype)).second);
    EXPECT_TRUE(names.insert(safetensors_name_of(dtype)).second);
    EXPECT_TRUE(size_of(dtype) == 1 || size_of(dtype) == 2 || size_of(dtype) == 4 || size_of(dtype) == 8);
  }
  EXPECT_THROW(dtype_from_name("float8"), TypeMismatch);
  EXPECT_THROW(dtype_from_name(""), TypeMismatch);
  EXPECT_THROW(size_of(static_cast<DType>(200)), TypeMismatch);
}

// The value of a 16-bit float by its definition.
double value_of(uint16_t bits, int exponent_bits) {
  const int fraction_bits = 15 - exponent_bits;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits >> fraction_bits) & ((1 << exponent_bits) - 1);
  const int fraction = bits & ((1 << fraction_bits) - 1);
  double magnitude = 0;
  if (exponent == (1 << exponent_bits) - 1) {
    magnitude = fraction != 0 ? std::nan("") : std::numeric_limits<double>::infinity();
  } else if (exponent == 0) {
    magnitude = std::ldexp(fraction, 1 - bias - fraction_bits);
  } else {
    magnitude = std::ldexp((1 << fraction_bits) + fraction, exponent - bias - fraction_bits);
  }
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

struct Half {
  const char* name;
  int exponent_bits;
  float (*to_float)(uint16_t);
  uint16_t (*from_float)(float);
};
constexpr Half kHalves[] = {{"float16", 5, float_from_f16, f16_from_float},
                            {"bfloat16", 8, float_from_bf16, bf16_from_float}};

TEST(DType, All16BitFloatsDecodeByDefinitionAndReadBack) {
  for (const Half& half : kHalves) {
    for (int i = 0; i < 65536; ++i) {
      const auto bits = static_cast<uint16_t>(i);
      const float value = half.to_float(bits);
      const double expected = value_of(bits, half.exponent_bits);
      if (std::isnan(expected)) {
        ASSERT_TRUE(std::isnan(value)) << half.name << " " << i;
        ASSERT_TRUE(std::isnan(half.to_float(half.from_float(value)))) << half.name << " " << i;
        continue;
      }
      ASSERT_EQ(static_cast<double>(value), expected) << half.name << " " << i;
      ASSERT_EQ(std::signbit(value), i >= 32768) << half.name << " " << i;
      ASSERT_EQ(half.from_float(value), bits) << half.name << " " << i;
    }
  }
}

// Rounding can only change at the midpoint of two neighbours: test there and one float32 to each side.
TEST(DType, RoundsToNearestWithTiesToEvenBetweenAllNeighbours) {
  for (const Half& half : kHalves) {
    const auto infinity = static_cast<uint16_t>(((1 << half.exponent_bits) - 1) << (15 - half.exponent_bits));
    for (uint16_t low = 0; low < infinity; ++low) {
      const auto high = static_cast<uint16_t>(low + 1);
      // Above the largest finite value, the tie is where the next exponent would begin, half a step on.
      const double low_value = value_of(low, half.exponent_bits);
      const double below = low == 0 ? 0 : value_of(static_cast<uint16_t>(low - 1), half.exponent_bits);
      const double high_value = high == infinity ? 2 * low_value - below : value_of(high, half.exponent_bits);
      const auto middle = static_cast<float>((low_value + high_value) / 2);
      const uint16_t even = (low & 1) == 0 ? low : high;
      ASSERT_EQ(half.from_float(middle), even) << half.name << " " << low;
      ASSERT_EQ(half.from_float(std::nextafter(middle, 0.0F)), low) << half.name << " " << low;
      ASSERT_EQ(half.from_float(std::nextafter(middle, HUGE_VALF)), high) << half.name << " " << low;
      ASSERT_EQ(half.from_float(-middle), even | 0x8000) << half.name << " " << low;
      ASSERT_EQ(half.from_float(-std::nextafter(middle, 0.0F)), low | 0x8000) << half.name << " " << low;
    }
    ASSERT_EQ(half.from_float(HUGE_VALF), infinity);
    ASSERT_EQ(half.from_float(-HUGE_VALF), infinity | 0x8000);
    ASSERT_EQ(half.from_float(-0.0F), 0x8000);
  }
  EXPECT_EQ(f16_from_float(std::numeric_limits<float>::max()), 0x7c00);
}

#ifdef __FLT16_MAX__
TEST(DType, Float16AgreesWithTheCompilerOnRandomBits) {
  const CounterRandom random(1);
  for (uint64_t i = 0; i < 200000; ++i) {
    const auto value = std::bit_cast<float>(static_cast<uint32_t>(random.bits(i)));
    if (std::isnan(value)) continue;
    ASSERT_EQ(f16_from_float(value), std::bit_cast<uint16_t>(static_cast<_Float16>(value))) << value;
  }
}
#endif

}  // namespace
}  // namespace quantloom
