// The decoder of the uniform format for tensor cores, compiled as host code: every code at every place, in
// both types, without rounding.
#include "formats/uniform_fragments.cuh"

#include <gtest/gtest.h>

#include <set>
#include <type_traits>
#include <utility>

namespace quantloom::cuda {
namespace {

template <class T>
float to_float(uint16_t bits) {
  if constexpr (std::is_same_v<T, __half>) return float_from_f16(bits);
  return float_from_bf16(bits);
}

template <int kBits, class T, int kStep>
void check_step(const uint8_t (&codes)[fragments::kUnitCodes], const uint32_t (&words)[kBits]) {
  using Decoder = UniformFragments<kBits>;
  uint32_t registers[4] = {};
  Decoder().template fragment<T, kStep>(words, registers);
  for (int reg = 0; reg < 4; ++reg) {
    for (int half = 0; half < 2; ++half) {
      const float fragment = to_float<T>(static_cast<uint16_t>(registers[reg] >> (16 * half)));
      const float code = codes[2 * (4 * kStep + reg) + half];
      ASSERT_EQ(Decoder::kUnit * fragment, code - Decoder::kCenter)
          << "step " << kStep << ", register " << reg << ", half " << half << ", code " << code;
    }
  }
}

// The codes of a row and a step as bytes, in the order of byte_of().
template <int kBits, int kStep, int kHalf>
void check_quad(const uint8_t (&codes)[fragments::kUnitCodes], const uint32_t (&words)[kBits]) {
  using Decoder = UniformFragments<kBits>;
  const uint32_t quad = Decoder::template quad<kStep, kHalf>(words);
  const int up = Decoder::row_position(kHalf) + Decoder::step_position(kStep);
  for (const int pair : {4 * kStep + kHalf, 4 * kStep + 2 + kHalf}) {
    for (int half = 0; half < 2; ++half) {
      const uint32_t byte = quad >> (8 * fragments::byte_of(pair, half)) & 0xFFU;
      ASSERT_EQ(byte, static_cast<uint32_t>(codes[2 * pair + half]) << up)
          << "pair " << pair << ", half " << half;
    }
  }
}

template <int kBits, int kStep>
void check_quads(const uint8_t (&codes)[fragments::kUnitCodes], const uint32_t (&words)[kBits]) {
  if constexpr (UniformFragments<kBits>::kQuads) {
    check_quad<kBits, kStep, 0>(codes, words);
    check_quad<kBits, kStep, 1>(codes, words);
  }
}

template <int kBits, class T>
void check_codes(const uint8_t (&codes)[fragments::kUnitCodes]) {
  uint32_t words[kBits];
  fragments::pack_unit(fragments::CodeOrder::bytes, kBits, codes, words);
  check_step<kBits, T, 0>(codes, words);
  check_step<kBits, T, 1>(codes, words);
  check_step<kBits, T, 2>(codes, words);
  check_step<kBits, T, 3>(codes, words);
  check_quads<kBits, 0>(codes, words);
  check_quads<kBits, 1>(codes, words);
  check_quads<kBits, 2>(codes, words);
  check_quads<kBits, 3>(codes, words);
}

template <int kBits, class T>
void check_width() {
  SCOPED_TRACE(kBits);
  constexpr int kCodes = 1 << kBits;
  emulated::rounded_operations = 0;
  for (int first = 0; first < kCodes; ++first) {
    // Neighbours differ by an odd number, so that each place meets each code, beside others each time.
    for (const int step : {0, 1, 3, 77}) {
      uint8_t codes[fragments::kUnitCodes];
      for (int i = 0; i < fragments::kUnitCodes; ++i) {
        codes[i] = static_cast<uint8_t>((first + step * i) % kCodes);
      }
      check_codes<kBits, T>(codes);
      if (::testing::Test::HasFatalFailure()) return;
    }
  }
  EXPECT_EQ(emulated::rounded_operations, 0);
}

template <class T, int... kIndices>
void check_widths(std::integer_sequence<int, kIndices...>) {
  (check_width<kIndices + 1, T>(), ...);
}

TEST(UniformFragments, DecodeExactlyInFloat16) {
  check_widths<__half>(std::make_integer_sequence<int, 8>());
}

TEST(UniformFragments, DecodeExactlyInBfloat16) {
  check_widths<__nv_bfloat16>(std::make_integer_sequence<int, 8>());
}

TEST(UniformFragments, OnesAndIntegersAreWhatTheirNamesSay) {
  EXPECT_EQ(float_from_f16(HalfPair<__half>::kOne & 0xFFFFU), 1.0F);
  EXPECT_EQ(float_from_bf16(HalfPair<__nv_bfloat16>::kOne & 0xFFFFU), 1.0F);
  EXPECT_EQ(float_from_f16(HalfPair<__half>::kInteger & 0xFFFFU), 1024.0F);
  EXPECT_EQ(float_from_bf16(HalfPair<__nv_bfloat16>::kInteger & 0xFFFFU), 128.0F);
  EXPECT_EQ(float_from_f16((HalfPair<__half>::kInteger + 5) & 0xFFFFU), 1029.0F);
  EXPECT_EQ(float_from_bf16((HalfPair<__nv_bfloat16>::kInteger + 5) & 0xFFFFU), 133.0F);
}

template <int kBits, int kRoom>
void check_field_places() {
  using Bytes = fragments::Bytes<kBits>;
  std::set<int> shifts;
  for (int pair = 0; pair < 16; ++pair) {
    const int quad = fragments::quad_of(pair);
    if (!Bytes::whole(quad)) continue;
    const FieldPlace place = field_place<kBits, kRoom>(pair);
    EXPECT_EQ(place.shift + place.position, 8 * fragments::byte_of(pair, 0) + Bytes::position(quad));
    EXPECT_GE(place.shift, 0);
    EXPECT_GE(place.position, 0);
    EXPECT_LE(place.position + kBits, kRoom);
    shifts.insert(place.shift);
  }
  // As few as there can be: from the first field that is not served yet, each shift serves all in the room.
  int needed = 0;
  int served = 0;
  for (int field = 0; field < 16; field += field % 8 + 2 * kBits <= 8 ? kBits : 8 - field % 8) {
    if (field != 0 && field + kBits <= served) continue;
    ++needed;
    served = field + kRoom;
  }
  EXPECT_EQ(static_cast<int>(shifts.size()), needed) << kBits << " " << kRoom;
}

TEST(UniformFragments, FieldsFitTheMantissaAndShareTheirShifts) {
  check_field_places<2, 10>();
  check_field_places<3, 10>();
  check_field_places<4, 10>();
  check_field_places<5, 10>();
  check_field_places<6, 10>();
  check_field_places<7, 10>();
  check_field_places<8, 10>();
  check_field_places<2, 7>();
  check_field_places<3, 7>();
  check_field_places<4, 7>();
  check_field_places<5, 7>();
  check_field_places<6, 7>();
  check_field_places<7, 7>();
}

}  // namespace
}  // namespace quantloom::cuda
