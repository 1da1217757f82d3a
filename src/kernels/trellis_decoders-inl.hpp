// Decoders of trellises: from the words of a strip (trellis_job.hpp) to states, and from states to weights in
// float32, a vector of tiles at a time. Compiled once per instruction set; included after Highway.
#if defined(QUANTLOOM_KERNELS_TRELLIS_DECODERS_INL_HPP) == defined(HWY_TARGET_TOGGLE)
#ifdef QUANTLOOM_KERNELS_TRELLIS_DECODERS_INL_HPP
#undef QUANTLOOM_KERNELS_TRELLIS_DECODERS_INL_HPP
#else
#define QUANTLOOM_KERNELS_TRELLIS_DECODERS_INL_HPP
#endif

#include <utility>

#include "formats/trellis_codes.hpp"
#include "kernels/decoders-inl.hpp"
#include "kernels/trellis_job.hpp"

HWY_BEFORE_NAMESPACE();
#if QUANTLOOM_VNNI && HWY_COMPILER_GCC_ACTUAL
#pragma GCC target("avx512vnni")  // as in decoders-inl.hpp
#endif
namespace quantloom::kernels::HWY_NAMESPACE {

// ---- Words to states ----

// A piece of a ring: 64 steps of kRate / 2 bits each on average, which are kRate words.
constexpr int kPieceSteps = 64;

constexpr int end_of_step(int rate, int step) {
  return (step + 1) * rate / 2;
}
// The first step of a piece that ends in word `word` or behind it.
constexpr int first_step_of(int rate, int word) {
  int step = 0;
  while (step < kPieceSteps && end_of_step(rate, step) <= 32 * word) ++step;
  return step;
}

// The state of one step, `window` bits that end in `current` and may begin in `previous`. Between words of
// narrow windows, `middle` holds the last half of the one and the first half of the other.
template <int kRate, bool kWide, int kWord, int kStep>
HWY_INLINE void store_state(VU previous, VU current, VU middle, VU mask, uint32_t* HWY_RESTRICT states) {
  constexpr int kBehind = 32 * (kWord + 1) - end_of_step(kRate, kStep);  // bits of the word after the state
  VU state;
  if constexpr (kWide && kBehind > 8) {
    state = hn::Or(hn::ShiftRight<kBehind>(current), hn::ShiftLeft<32 - kBehind>(previous));
  } else if constexpr (kBehind > 16) {
    state = shift_right<kBehind - 16>(middle);
  } else {
    state = shift_right<kBehind>(current);
  }
  hn::Store(hn::And(state, mask), DU(), states + kStep * kLanes);
}

template <int kRate, bool kWide, int kWord, int... kStep>
HWY_INLINE void store_states(VU previous, VU current, VU mask, uint32_t* HWY_RESTRICT states,
                             std::integer_sequence<int, kStep...> /*steps*/) {
  const VU middle = hn::Or(hn::ShiftLeft<16>(previous), hn::ShiftRight<16>(current));
  (store_state<kRate, kWide, kWord, first_step_of(kRate, kWord) + kStep>(previous, current, middle, mask,
                                                                         states),
   ...);
}

template <int kRate, bool kWide, int... kWord>
HWY_INLINE void store_piece(VU previous, const uint32_t* HWY_RESTRICT words, VU mask,
                            uint32_t* HWY_RESTRICT states, std::integer_sequence<int, kWord...> /*words*/) {
  const auto word = [&](auto index) HWY_ATTR {
    constexpr int kIndex = decltype(index)::value;
    constexpr int kSteps = first_step_of(kRate, kIndex + 1) - first_step_of(kRate, kIndex);
    const VU current = hn::LoadU(DU(), words + kIndex * kTrellisLanes);
    store_states<kRate, kWide, kIndex>(previous, current, mask, states,
                                       std::make_integer_sequence<int, kSteps>());
    previous = current;
  };
  (word(std::integral_constant<int, kWord>()), ...);
}

// `words`: of the piece, for the first tile of the part; `before`: the word before them, around the ring.
template <int kRate, bool kWide>
HWY_NOINLINE void piece_states(const uint32_t* words, const uint32_t* before, uint32_t mask,
                               uint32_t* states) {
  store_piece<kRate, kWide>(hn::LoadU(DU(), before), words, hn::Set(DU(), mask), states,
                            std::make_integer_sequence<int, kRate>());
}

using PieceStates = void (*)(const uint32_t* words, const uint32_t* before, uint32_t mask, uint32_t* states);

template <bool kWide, int... kIndex>
PieceStates select_piece(int rate, std::integer_sequence<int, kIndex...> /*rates less 2*/) {
  constexpr PieceStates kTable[] = {&piece_states<kIndex + 2, kWide>...};
  return kTable[rate - 2];
}

// rate: half bits of a step, 2 ... 16.
inline PieceStates piece_states_of(int rate, int window) {
  constexpr auto kRates = std::make_integer_sequence<int, 15>();
  return window > 16 ? select_piece<true>(rate, kRates) : select_piece<false>(rate, kRates);
}

// ---- States to weights ----

// To the nearest float16, ties to even: of numbers whose exponent a float16 has, and of smaller ones that are
// float16 numbers already. Added to 3/2 of 2^13 times its power of two, a number loses the bits that do not
// fit, as float32 has 13 more.
HWY_INLINE VF to_half(VF value) {
  const DF df;
  const VF power = hn::BitCast(df, hn::And(hn::BitCast(DU(), value), hn::Set(DU(), 0x7F800000U)));
  const VF large = hn::Set(df, 12288.0F);
  return hn::NegMulAdd(power, large, hn::MulAdd(power, large, value));
}

// start + the sum of the bytes of each dword, the lowest first, times k0 ... k3.
template <int k0, int k1, int k2, int k3>
HWY_INLINE VI weigh_bytes(VU bytes, int start) {
  const VI sum = hn::Set(DI(), start);
#if QUANTLOOM_VNNI
  constexpr auto kWeights =
      static_cast<int32_t>((k0 & 255U) | (k1 & 255U) << 8 | (k2 & 255U) << 16 | (k3 & 255U) << 24);
  return VI{_mm512_dpbusd_epi32(sum.raw, bytes.raw, _mm512_set1_epi32(kWeights))};
#elif HWY_ARCH_X86 && HWY_TARGET <= HWY_SSSE3
  const hn::Repartition<int16_t, DU> d16;
  if constexpr (k0 == 1 && k1 == 1 && k2 == 1 && k3 == 1) {
    const VI ones = hn::BitCast(DI(), byte_mask(1));
    return hn::Add(sum, madd(maddubs(bytes, ones), hn::Set(d16, 1)));
  } else {
    constexpr auto pair = [](int low, int high) {
      return static_cast<int32_t>((static_cast<uint32_t>(low) & 0xFFFFU) | static_cast<uint32_t>(high) << 16);
    };
    const VU mask = hn::Set(DU(), 0x00FF00FFU);
    const auto even = hn::BitCast(d16, hn::And(bytes, mask));
    const auto odd = hn::BitCast(d16, hn::And(hn::ShiftRight<8>(bytes), mask));
    const VI products = hn::Add(madd(even, hn::BitCast(d16, hn::Set(DI(), pair(k0, k2)))),
                                madd(odd, hn::BitCast(d16, hn::Set(DI(), pair(k1, k3)))));
    return hn::Add(sum, products);
  }
#else
  const VU mask = hn::Set(DU(), 255U);
  const auto times = [](VU byte, int k)
                         HWY_ATTR { return hn::Mul(hn::BitCast(DI(), byte), hn::Set(DI(), k)); };
  const VI low = hn::Add(times(hn::And(bytes, mask), k0), times(hn::And(hn::ShiftRight<8>(bytes), mask), k1));
  const VI high =
      hn::Add(times(hn::And(hn::ShiftRight<16>(bytes), mask), k2), times(hn::ShiftRight<24>(bytes), k3));
  return hn::Add(sum, hn::Add(low, high));
#endif
}

// A code makes kWeights vectors of weights from a vector of states.

// lcg and mcg: the sum of two float16 numbers whose exponents are 12 to 15, in float32 and then rounded.
template <bool kAdd>
struct Halves {
  static constexpr int kWeights = 1;
  explicit Halves(const TrellisMatrix& w)
      : multiplier(hn::Set(DU(), kAdd ? trellis::kLcgMultiplier : w.multiplier)) {}
  // A float16 number in the upper half of a dword, masked and flipped like those of trellis_codes.hpp. An
  // arithmetic shift leaves the sign and moves the rest to where float32 has it; of the exponent two bits are
  // the number's own, the others constant.
  static HWY_INLINE VF number(VU upper) {
    const VU moved = hn::BitCast(DU(), hn::ShiftRight<3>(hn::BitCast(DI(), upper)));
    constexpr uint32_t kMask = 0x81FFE000U;
    constexpr uint32_t kFlip = (0x3B60U & 0x7FFFU) << 13;
    // 112 more than float16's exponent: no carry leaves the constant bits.
    constexpr uint32_t kBias = 112U << 23;
    static_assert(((kFlip & 0x0E000000U) + kBias) % 0x02000000U == 0);
    const VU masked = hn::And(moved, hn::Set(DU(), kMask));
    return hn::BitCast(DF(), hn::Xor(masked, hn::Set(DU(), kFlip + kBias)));
  }
  HWY_INLINE void operator()(VU states, VF (&weights)[1]) const {
    VU hash = hn::Mul(states, multiplier);
    if constexpr (kAdd) hash = hn::Add(hash, hn::Set(DU(), trellis::kLcgAddend));
    weights[0] = to_half(hn::Add(number(hash), number(hn::ShiftLeft<16>(hash))));
  }
  VU multiplier;
};

struct Mul1 {
  static constexpr int kWeights = 1;
  explicit Mul1(const TrellisMatrix& w) : multiplier(hn::Set(DU(), w.multiplier)) {}
  HWY_INLINE void operator()(VU states, VF (&weights)[1]) const {
    const DF df;
    const VF sum = hn::ConvertTo(df, weigh_bytes<1, 1, 1, 1>(hn::Mul(states, multiplier), 0));
    // Exact in units of 2^-18: the slope is 1774 of them, and fewer than 2^24 in all.
    constexpr float kSlope = 1774 * 0x1p-18F;
    constexpr float kOffset = 1024 * kSlope - 10.3828125F;
    weights[0] = to_half(hn::MulAdd(sum, hn::Set(df, kSlope), hn::Set(df, kOffset)));
  }
  VU multiplier;
};

struct OneMad {
  static constexpr int kWeights = 1;
  explicit OneMad(const TrellisMatrix& /*w*/) {}
  HWY_INLINE void operator()(VU states, VF (&weights)[1]) const {
    const DF df;
    const VU hash = hn::Add(hn::Mul(states, hn::Set(DU(), trellis::kOneMadMultiplier)),
                            hn::Set(DU(), trellis::kOneMadAddend));
    const VF sum = hn::ConvertTo(df, weigh_bytes<1, 1, 1, 1>(hash, -510));
    // The reciprocal in place of a division: the same float16 number for each of the 1021 sums.
    weights[0] = to_half(hn::Mul(sum, hn::Set(df, static_cast<float>(1 / 147.800537109375))));
  }
};

struct Octagon {
  static constexpr int kWeights = 2;
  explicit Octagon(const TrellisMatrix& w) : multiplier(hn::Set(DU(), w.multiplier)) {}
  template <int kWhich>
  static HWY_INLINE VF weight(VU hash) {
    constexpr int kAxis = trellis::kOctagonAxis;
    constexpr int kDiagonal = trellis::kOctagonDiagonal;
    constexpr int kFalling = kWhich == 0 ? kDiagonal : -kDiagonal;
    constexpr int kSum = kAxis + kDiagonal + kFalling;
    constexpr float kUnit = trellis::kOctagonSlope * 0x1p-22F;
    const DF df;
    const VI weighed = weigh_bytes < kWhich == 0 ? kAxis : 0, kWhich == 0 ? 0 : kAxis, kDiagonal,
             kFalling > (hash, 0);
    const VF steps = hn::ConvertTo(df, weighed);
    // Exact: odd multiples of the unit, fewer than 2^24 of its 203rd parts.
    return to_half(hn::MulAdd(steps, hn::Set(df, 2 * kUnit), hn::Set(df, -255 * kSum * kUnit)));
  }
  HWY_INLINE void operator()(VU states, VF (&weights)[2]) const {
    const VU hash = hn::Mul(states, multiplier);
    weights[0] = weight<0>(hash);
    weights[1] = weight<1>(hash);
  }
  VU multiplier;
};

// Both numbers of pairs of float16 ones, fetched at once.
HWY_INLINE void split_pairs(VU pairs, VF (&weights)[2]) {
  const DF df;
  const hn::Rebind<uint16_t, DF> d16;
  const hn::Rebind<hwy::float16_t, DF> half;
  const VU low = hn::And(pairs, hn::Set(DU(), 0xFFFFU));
  weights[0] = hn::PromoteTo(df, hn::BitCast(half, hn::TruncateTo(d16, low)));
  weights[1] = hn::PromoteTo(df, hn::BitCast(half, hn::TruncateTo(d16, hn::ShiftRight<16>(pairs))));
}

struct Hyb {
  static constexpr int kWeights = 2;
  explicit Hyb(const TrellisMatrix& w) : pairs(w.pairs) {}
  HWY_INLINE void operator()(VU states, VF (&weights)[2]) const {
    const VU hash = hn::Add(hn::Mul(states, states), states);
    const VU entry = hn::And(hn::ShiftRight<6>(hash), hn::Set(DU(), 511U));
    const VU sign = hn::And(hash, hn::Set(DU(), 0x8000U));
    const VU found = hn::GatherIndex(DU(), pairs, hn::BitCast(DI(), entry));
    split_pairs(hn::Xor(found, sign), weights);
  }
  const uint32_t* pairs;
};

struct Table {
  static constexpr int kWeights = 1;
  explicit Table(const TrellisMatrix& w) : table(w.table) {}
  HWY_INLINE void operator()(VU states, VF (&weights)[1]) const {
    weights[0] = hn::GatherIndex(DF(), table, hn::BitCast(DI(), states));
  }
  const float* table;
};

struct Pairs {
  static constexpr int kWeights = 2;
  explicit Pairs(const TrellisMatrix& w) : pairs(w.pairs) {}
  HWY_INLINE void operator()(VU states, VF (&weights)[2]) const {
    split_pairs(hn::GatherIndex(DU(), pairs, hn::BitCast(DI(), states)), weights);
  }
  const uint32_t* pairs;
};

// ---- Both ----

// Calls use(piece, states) for the pieces of kLanes rings, whose first words are at `words`, in order.
template <int kPieces, class Use>
HWY_INLINE void for_each_piece(const TrellisMatrix& w, PieceStates states_of, const uint32_t* words,
                               const Use& use) {
  const int piece_words = w.ring.words() / kPieces;
  const uint32_t mask = (uint32_t{1} << w.ring.window) - 1;
  const uint32_t* before = words + (w.ring.words() - 1) * kTrellisLanes;
  for (int piece = 0; piece < kPieces; ++piece) {
    use(piece, [&](uint32_t* states) { states_of(words, before, mask, states); });
    words += piece_words * kTrellisLanes;
    before = words - kTrellisLanes;
  }
}

// The weights [256, kLanes] of kLanes rings.
template <class Code>
HWY_NOINLINE void decode_rings(const TrellisMatrix& w, const Code& code, PieceStates states_of,
                               const uint32_t* HWY_RESTRICT words, float* HWY_RESTRICT weights) {
  constexpr int kPieces = trellis::kRingLength / Code::kWeights / kPieceSteps;
  HWY_ALIGN uint32_t states[kPieceSteps * kLanes];
  for_each_piece<kPieces>(w, states_of, words, [&](int /*piece*/, const auto& read) HWY_ATTR {
    read(states);
    HWY_UNROLL(4)
    for (int step = 0; step < kPieceSteps; ++step) {
      VF values[Code::kWeights];
      code(hn::Load(DU(), states + step * kLanes), values);
      for (int i = 0; i < Code::kWeights; ++i) {
        hn::Store(values[i], DF(), weights);
        weights += kLanes;
      }
    }
  });
}

// Sums [tokens, 16, kTrellisLanes] to the outputs of the job, in order.
inline void store_outputs(const TrellisJob& job, const float* sums) {
  for (int64_t token = 0; token < job.tokens; ++token) {
    const float* from = sums + token * kTrellisOutputs;
    float* to = job.y + token * job.y_stride;
    for (int lane = 0; lane < kTrellisLanes; ++lane) {
      for (int output = 0; output < 16; ++output) {
        float& y = to[lane * 16 + output];
        const float sum = from[output * kTrellisLanes + lane];
        y = job.add ? y + sum : sum;
      }
    }
  }
}

}  // namespace quantloom::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
