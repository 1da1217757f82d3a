// The decoder of codebooks for tensor cores, compiled as host code: every entry at every place, in both types
// and every lane's copy of the table.
#include "formats/codebook_fragments.cuh"

#include <gtest/gtest.h>

#include <type_traits>
#include <utility>
#include <vector>

namespace quantloom::cuda {
namespace {

template <class T>
uint16_t rounded(float value) {
  if constexpr (std::is_same_v<T, __half>) return f16_from_float(value);
  return bf16_from_float(value);
}

template <int kBits, class T, int kStep>
void check_step(const CodebookFragments<kBits>& decoder, const std::vector<float>& table,
                const uint8_t (&codes)[fragments::kUnitCodes], const uint32_t (&words)[kBits]) {
  uint32_t registers[4] = {};
  decoder.template fragment<T, kStep>(words, registers);
  for (int reg = 0; reg < 4; ++reg) {
    for (int half = 0; half < 2; ++half) {
      const int code = codes[2 * (4 * kStep + reg) + half];
      const float value = code < static_cast<int>(table.size()) ? table[static_cast<size_t>(code)] : 0.0F;
      ASSERT_EQ(static_cast<uint16_t>(registers[reg] >> (16 * half)), rounded<T>(value))
          << "step " << kStep << ", register " << reg << ", half " << half << ", code " << code;
    }
  }
}

template <int kBits, class T>
void check_width(int entries) {
  SCOPED_TRACE(kBits);
  constexpr int kCodes = 1 << kBits;
  constexpr int kLanes = 32;
  std::vector<float> table;
  std::vector<__half> halves;
  for (int i = 0; i < entries; ++i) {
    halves.push_back({f16_from_float(static_cast<float>(i * i) * 0.37F - 5.0F)});
    table.push_back(float_from_f16(halves.back().bits));
  }
  std::vector<uint32_t> shared(CodebookFragments<kBits>::kSharedBytes / 4, 0xDEADBEEFU);
  std::vector<CodebookFragments<kBits>> decoders(kLanes);
  blockDim.x = kLanes;
  for (threadIdx.x = 0; threadIdx.x < kLanes; ++threadIdx.x) {
    decoders[threadIdx.x].template prepare<T>(halves.data(), entries, shared.data());
  }
  threadIdx.x = 0;
  for (int first = 0; first < kCodes; ++first) {
    for (const int step : {0, 1, 3, 77}) {
      uint8_t codes[fragments::kUnitCodes];
      for (int i = 0; i < fragments::kUnitCodes; ++i) {
        codes[i] = static_cast<uint8_t>((first + step * i) % kCodes);
      }
      uint32_t words[kBits];
      fragments::pack_unit(fragments::CodeOrder::dense, kBits, codes, words);
      const auto& decoder = decoders[static_cast<size_t>((first + step) % kLanes)];
      check_step<kBits, T, 0>(decoder, table, codes, words);
      check_step<kBits, T, 1>(decoder, table, codes, words);
      check_step<kBits, T, 2>(decoder, table, codes, words);
      check_step<kBits, T, 3>(decoder, table, codes, words);
      if (::testing::Test::HasFatalFailure()) return;
    }
  }
}

template <class T, int... kIndices>
void check_widths(std::integer_sequence<int, kIndices...>) {
  (check_width<kIndices + 1, T>(1 << (kIndices + 1)), ...);
  (check_width<kIndices + 1, T>(2 + (1 << (kIndices + 1)) / 2 - 1), ...);
}

TEST(CodebookFragments, LookUpEveryEntryInFloat16) {
  check_widths<__half>(std::make_integer_sequence<int, 8>());
}

TEST(CodebookFragments, LookUpEveryEntryInBfloat16) {
  check_widths<__nv_bfloat16>(std::make_integer_sequence<int, 8>());
}

}  // namespace
}  // namespace quantloom::cuda
