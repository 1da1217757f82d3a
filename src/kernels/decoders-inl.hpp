// Decoders: from the words of a strip (prepared_strips.hpp) to int8 codes or float32 values in registers.
// Compiled once per instruction set; included by the sources with loops, after Highway.
//
// A decoder of a container width is a struct Codes<bits> with
//   kColumns    columns of a step
//   Words       the vectors of one step for one part of a strip (kLanes of its 16 rows)
//   load(p)     reads them
//   bytes<f>    the codes of columns 4f ... 4f+3 in the bytes of each dword
//   index<c>    the code of column c in the low bits of each dword; bits above the code are arbitrary
#if defined(QUANTLOOM_KERNELS_DECODERS_INL_HPP) == defined(HWY_TARGET_TOGGLE)
#ifdef QUANTLOOM_KERNELS_DECODERS_INL_HPP
#undef QUANTLOOM_KERNELS_DECODERS_INL_HPP
#else
#define QUANTLOOM_KERNELS_DECODERS_INL_HPP
#endif

#include <utility>

#include "kernels/strip_job.hpp"

#undef QUANTLOOM_AVX512
#undef QUANTLOOM_VNNI
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3 && HWY_MAX_BYTES == 64
#define QUANTLOOM_AVX512 1
#else
#define QUANTLOOM_AVX512 0
#endif
#if QUANTLOOM_AVX512 && HWY_TARGET <= HWY_AVX3_DL && \
    (HWY_COMPILER_GCC_ACTUAL || HWY_MAJOR * 100 + HWY_MINOR >= 101)
#define QUANTLOOM_VNNI 1
#else
#define QUANTLOOM_VNNI 0
#endif

HWY_BEFORE_NAMESPACE();
#if QUANTLOOM_VNNI && HWY_COMPILER_GCC_ACTUAL
#pragma GCC target("avx512vnni")  // early versions of Highway check for it but do not ask the compiler for it
#endif
namespace quantloom::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DU = hn::CappedTag<uint32_t, 16>;
using DI = hn::RebindToSigned<DU>;
using DF = hn::RebindToFloat<DU>;
using VU = hn::VFromD<DU>;
using VI = hn::VFromD<DI>;
using VF = hn::VFromD<DF>;

constexpr int kLanes = static_cast<int>(hn::MaxLanes(DU()));
// Vectors that the 16 rows of a strip take.
constexpr int kParts = static_cast<int>(kStripRows) / kLanes;

// p points at the words of a vector of 16 dwords, for the rows of the first lane.
HWY_INLINE VU load_words(const uint8_t* HWY_RESTRICT p) {
  return hn::LoadU(DU(), reinterpret_cast<const uint32_t*>(p));
}

HWY_INLINE VU byte_mask(uint32_t mask) {
  return hn::Set(DU(), mask * 0x01010101U);
}

template <int kShift>
HWY_INLINE VU shift_right(VU v) {
  if constexpr (kShift == 0) {
    return v;
  } else {
    return hn::ShiftRight<kShift>(v);
  }
}

// Bit by bit: mask ? yes : no.
HWY_INLINE VU select_bits(VU mask, VU yes, VU no) {
#if QUANTLOOM_AVX512
  return VU{_mm512_ternarylogic_epi32(mask.raw, yes.raw, no.raw, 0xca)};
#else
  return hn::Or(hn::And(mask, yes), hn::AndNot(mask, no));
#endif
}

template <int kBits>
struct Codes;

template <>
struct Codes<8> {
  static constexpr int kColumns = 16;
  struct Words {
    VU v0, v1, v2, v3;
  };
  static HWY_INLINE Words load(const uint8_t* HWY_RESTRICT p) {
    return {load_words(p), load_words(p + 64), load_words(p + 128), load_words(p + 192)};
  }
  template <int kField>
  static HWY_INLINE VU bytes(const Words& w) {
    if constexpr (kField == 0)
      return w.v0;
    else if constexpr (kField == 1)
      return w.v1;
    else if constexpr (kField == 2)
      return w.v2;
    else
      return w.v3;
  }
  template <int kColumn>
  static HWY_INLINE VU index(const Words& w) {
    return shift_right<8 * (kColumn % 4)>(bytes<kColumn / 4>(w));
  }
};

template <>
struct Codes<4> {
  static constexpr int kColumns = 16;
  struct Words {
    VU v0, v1;
  };
  static HWY_INLINE Words load(const uint8_t* HWY_RESTRICT p) { return {load_words(p), load_words(p + 64)}; }
  template <int kField>
  static HWY_INLINE VU bytes(const Words& w) {
    return hn::And(shift_right<4 * (kField % 2)>(kField < 2 ? w.v0 : w.v1), byte_mask(0x0f));
  }
  template <int kColumn>
  static HWY_INLINE VU index(const Words& w) {
    return shift_right<8 * (kColumn % 4) + 4 * (kColumn / 4 % 2)>(kColumn < 8 ? w.v0 : w.v1);
  }
};

template <>
struct Codes<2> {
  static constexpr int kColumns = 16;
  struct Words {
    VU v0;
  };
  static HWY_INLINE Words load(const uint8_t* HWY_RESTRICT p) { return {load_words(p)}; }
  template <int kField>
  static HWY_INLINE VU bytes(const Words& w) {
    return hn::And(shift_right<2 * kField>(w.v0), byte_mask(0x03));
  }
  template <int kColumn>
  static HWY_INLINE VU index(const Words& w) {
    return shift_right<8 * (kColumn % 4) + 2 * (kColumn / 4)>(w.v0);
  }
};

template <>
struct Codes<3> {
  static constexpr int kColumns = 32;
  struct Words {
    VU v0, v1, high;
  };
  static HWY_INLINE Words load(const uint8_t* HWY_RESTRICT p) {
    return {load_words(p), load_words(p + 64), load_words(p + 128)};
  }
  // Moves bit kBit to bit 2.
  template <int kBit>
  static HWY_INLINE VU bit_to_2(VU v) {
    if constexpr (kBit < 2) {
      return hn::ShiftLeft<2 - kBit>(v);
    } else {
      return shift_right<kBit - 2>(v);
    }
  }
  template <int kField>
  static HWY_INLINE VU bytes(const Words& w) {
    const VU low = shift_right<2 * (kField % 4)>(kField < 4 ? w.v0 : w.v1);
    return hn::And(select_bits(byte_mask(0x04), bit_to_2<kField>(w.high), low), byte_mask(0x07));
  }
  template <int kColumn>
  static HWY_INLINE VU index(const Words& w) {
    constexpr int kField = kColumn / 4;
    const VU low = shift_right<8 * (kColumn % 4) + 2 * (kField % 4)>(kField < 4 ? w.v0 : w.v1);
    const VU high = bit_to_2<8 * (kColumn % 4) + kField>(w.high);
    return select_bits(hn::Set(DU(), 4U), high, low);
  }
};

// Asks for the words of a later step: hardware prefetchers stop at page borders. 4 KiB ahead reached 92% of
// the read floor where none reached 78% (8 bits, Zen 5). May point behind the stream, which is harmless.
template <int kBits>
HWY_INLINE void prefetch_step(const uint8_t* HWY_RESTRICT p) {
  constexpr uintptr_t kAhead = 4096;
  HWY_UNROLL(4)
  for (uintptr_t i = 0; i < 2 * kBits * Codes<kBits>::kColumns; i += 64) {
    // As an integer: a pointer past the stream's end would be undefined.
    // NOLINTNEXTLINE(performance-no-int-to-ptr)
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + kAhead + i));
  }
}

// Turns an index into the value code - center.
template <int kBits>
class ToFloat {
 public:
  explicit HWY_INLINE ToFloat(const StripMatrix& w) {
    const float center = w.center;
#if QUANTLOOM_AVX512 || HWY_TARGET == HWY_AVX2
    if constexpr (kTable) {
      HWY_ALIGN float table[16];
      for (int i = 0; i < 16; ++i) table[i] = static_cast<float>(i & ((1 << kBits) - 1)) - center;
      value_ = hn::Load(DF(), table);
      return;
    }
#endif
    value_ = hn::Set(DF(), center);
  }

  HWY_INLINE VF operator()(VU index) const {
#if QUANTLOOM_AVX512
    if constexpr (kTable) return VF{_mm512_permutexvar_ps(index.raw, value_.raw)};
#elif HWY_TARGET == HWY_AVX2
    if constexpr (kTable) return VF{_mm256_permutevar8x32_ps(value_.raw, index.raw)};
#endif
    const VU code = hn::And(index, hn::Set(DU(), (1U << kBits) - 1U));
    return hn::Sub(hn::ConvertTo(DF(), hn::BitCast(DI(), code)), value_);
  }

 private:
  // The permutations look at the low log2(kLanes) bits of an index.
  static constexpr bool kTable = (1 << kBits) <= kLanes && (QUANTLOOM_AVX512 || HWY_TARGET == HWY_AVX2);
  VF value_;
};

// Turns an index into its entry of a codebook.
template <int kBits>
class FromTable {
 public:
  explicit HWY_INLINE FromTable(const StripMatrix& w) : table_(w.table) {
    if constexpr (kRegisters > 0) {
      HWY_ALIGN float entries[2 * kLanes];
      for (int i = 0; i < 2 * kLanes; ++i) entries[i] = w.table[i & ((1 << kBits) - 1)];
      low_ = hn::Load(DF(), entries);
      high_ = hn::Load(DF(), entries + kLanes);
    }
  }

  HWY_INLINE VF operator()(VU index) const {
#if QUANTLOOM_AVX512
    if constexpr (kRegisters == 1) return VF{_mm512_permutexvar_ps(index.raw, low_.raw)};
#elif HWY_TARGET == HWY_AVX2
    if constexpr (kRegisters > 0) {
      const VF low{_mm256_permutevar8x32_ps(low_.raw, index.raw)};
      if constexpr (kRegisters == 1) return low;
      const VF high{_mm256_permutevar8x32_ps(high_.raw, index.raw)};
      // By the sign, to which the code's highest bit moves.
      return VF{_mm256_blendv_ps(low.raw, high.raw, hn::BitCast(DF(), hn::ShiftLeft<28>(index)).raw)};
    }
#endif
    const VU code = hn::And(index, hn::Set(DU(), (1U << kBits) - 1U));
    return hn::GatherIndex(DF(), table_, hn::BitCast(DI(), code));
  }

 private:
  // Registers that hold the table, for permutations that look at the low log2(kLanes) bits of an index; 0 if
  // entries are gathered from memory.
  static constexpr int kRegisters = QUANTLOOM_AVX512 ? ((1 << kBits) <= kLanes ? 1 : 0)
                                    : HWY_TARGET == HWY_AVX2
                                        ? ((1 << kBits) <= kLanes ? 1 : (kBits == 4 ? 2 : 0))
                                        : 0;
  const float* table_;
  VF low_;
  VF high_;
};

#if HWY_ARCH_X86 && HWY_TARGET <= HWY_SSSE3 && !QUANTLOOM_VNNI
using VI16 = hn::VFromD<hn::Repartition<int16_t, DU>>;
#if QUANTLOOM_AVX512
HWY_INLINE VI16 maddubs(VU codes, VI x) {
  return VI16{_mm512_maddubs_epi16(codes.raw, x.raw)};
}
HWY_INLINE VI madd(VI16 a, VI16 b) {
  return VI{_mm512_madd_epi16(a.raw, b.raw)};
}
#elif HWY_TARGET <= HWY_AVX2
HWY_INLINE VI16 maddubs(VU codes, VI x) {
  return VI16{_mm256_maddubs_epi16(codes.raw, x.raw)};
}
HWY_INLINE VI madd(VI16 a, VI16 b) {
  return VI{_mm256_madd_epi16(a.raw, b.raw)};
}
#else
HWY_INLINE VI16 maddubs(VU codes, VI x) {
  return VI16{_mm_maddubs_epi16(codes.raw, x.raw)};
}
HWY_INLINE VI madd(VI16 a, VI16 b) {
  return VI{_mm_madd_epi16(a.raw, b.raw)};
}
#endif
#endif

// sum[i] + the dot product of the four codes (unsigned) and the four activations (signed) in dword i. Exact:
// nothing saturates.
template <int kBits>
HWY_INLINE VI dot_bytes(VI sum, VU codes, VI x) {
#if QUANTLOOM_VNNI
  return VI{_mm512_dpbusd_epi32(sum.raw, codes.raw, x.raw)};
#elif HWY_ARCH_X86 && HWY_TARGET <= HWY_SSSE3
  // maddubs adds pairs of products in 16 bits: 2 * 127 * 127 fits, twice 255 * 127 does not, so that the top
  // bit of 8-bit codes goes separately, with its weight of 128 in the second step.
  const hn::Repartition<int16_t, DU> d16;
  if constexpr (kBits == 8) {
    const VU low = hn::And(codes, byte_mask(0x7f));
    const VU high = hn::And(shift_right<7>(codes), byte_mask(0x01));
    return hn::Add(
        sum, hn::Add(madd(maddubs(low, x), hn::Set(d16, 1)), madd(maddubs(high, x), hn::Set(d16, 128))));
  } else {
    return hn::Add(sum, madd(maddubs(codes, x), hn::Set(d16, 1)));
  }
#else
  const VU mask = hn::Set(DU(), 0xffU);
  const VI c0 = hn::BitCast(DI(), hn::And(codes, mask));
  const VI c1 = hn::BitCast(DI(), hn::And(shift_right<8>(codes), mask));
  const VI c2 = hn::BitCast(DI(), hn::And(shift_right<16>(codes), mask));
  const VI c3 = hn::BitCast(DI(), shift_right<24>(codes));
  const VI p0 = hn::Mul(c0, hn::ShiftRight<24>(hn::ShiftLeft<24>(x)));
  const VI p1 = hn::Mul(c1, hn::ShiftRight<24>(hn::ShiftLeft<16>(x)));
  const VI p2 = hn::Mul(c2, hn::ShiftRight<24>(hn::ShiftLeft<8>(x)));
  const VI p3 = hn::Mul(c3, hn::ShiftRight<24>(x));
  return hn::Add(sum, hn::Add(hn::Add(p0, p1), hn::Add(p2, p3)));
#endif
}

// Scales of the rows of part `part`, from the header of a group.
HWY_INLINE VF load_scales(const uint8_t* HWY_RESTRICT header, DType dtype, int part) {
  const DF df;
  if (dtype == DType::f16) {
    const hn::Rebind<hwy::float16_t, DF> d16;
    return hn::PromoteTo(df, hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(header) + part * kLanes));
  }
  if (dtype == DType::bf16) {
    const hn::Rebind<uint16_t, DU> d16;
    const auto bits = hn::LoadU(d16, reinterpret_cast<const uint16_t*>(header) + part * kLanes);
    return hn::BitCast(df, hn::ShiftLeft<16>(hn::PromoteTo(DU(), bits)));
  }
  return hn::LoadU(df, reinterpret_cast<const float*>(header) + part * kLanes);
}

HWY_INLINE VF load_zeros(const uint8_t* HWY_RESTRICT zeros, bool real, int part) {
  if (real) return hn::LoadU(DF(), reinterpret_cast<const float*>(zeros) + part * kLanes);
  const hn::Rebind<uint8_t, DU> d8;
  return hn::ConvertTo(DF(), hn::PromoteTo(DI(), hn::LoadU(d8, zeros + part * kLanes)));
}

// Writes rows [first_row, first_row + 16) of one token, those that exist.
HWY_INLINE void store_rows(const VF (&sum)[kParts], float* HWY_RESTRICT y, int64_t first_row, int64_t rows) {
  const DF df;
  if (first_row + kStripRows <= rows) {
    for (int part = 0; part < kParts; ++part) hn::StoreU(sum[part], df, y + first_row + part * kLanes);
    return;
  }
  HWY_ALIGN float strip[kStripRows];
  for (int part = 0; part < kParts; ++part) hn::Store(sum[part], df, strip + part * kLanes);
  for (int64_t r = first_row; r < rows; ++r) y[r] = strip[r - first_row];
}

}  // namespace quantloom::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // include guard per target
