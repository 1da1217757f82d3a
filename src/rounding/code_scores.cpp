#include "rounding/code_scores.hpp"

#include <algorithm>
#include <bit>
#include <limits>
#include <utility>

#include "simd_targets.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "rounding/code_scores.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h, which sets the target.
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace quantloom::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

template <class Real>
using Tag = hn::CappedTag<Real, 16>;
template <class Real>
using Vec = hn::VFromD<Tag<Real>>;

constexpr int kPair = 2;  // vectors of entries that share the broadcasts of factors

// Scores of two vectors of entries for kRows targets from `row` on.
template <class Real, int kRows>
HWY_INLINE void score_pair(const ScoreJob<Real>& job, int64_t row, int64_t at,
                           Vec<Real> (&score)[kRows][kPair]) {
  const Tag<Real> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int v = 0; v < kPair; ++v) {
    const Vec<Real> norm = hn::LoadU(d, job.norms + at + v * lanes);
    for (int r = 0; r < kRows; ++r) score[r][v] = hn::Mul(hn::Set(d, job.squares[row + r]), norm);
    if (job.penalties != nullptr) {
      const Vec<Real> penalty = hn::LoadU(d, job.penalties + at + v * lanes);
      for (int r = 0; r < kRows; ++r) score[r][v] = hn::Add(score[r][v], penalty);
    }
  }
  for (int64_t i = 0; i < job.dim; ++i) {
    const Real* const element = job.table + i * job.padded + at;
    const Vec<Real> first = hn::LoadU(d, element);
    const Vec<Real> second = hn::LoadU(d, element + lanes);
    for (int r = 0; r < kRows; ++r) {
      const Vec<Real> factor = hn::Set(d, job.factors[(row + r) * job.dim + i]);
      score[r][0] = hn::MulAdd(factor, first, score[r][0]);
      score[r][1] = hn::MulAdd(factor, second, score[r][1]);
    }
  }
}

template <class Real, int kRows>
void find_least(const ScoreJob<Real>& job, int64_t row) {
  const Tag<Real> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  Vec<Real> least[kRows];
  Vec<Real> where[kRows];
  for (int r = 0; r < kRows; ++r) {
    least[r] = hn::Set(d, std::numeric_limits<Real>::infinity());
    where[r] = hn::Zero(d);
  }
  for (int64_t at = 0; at < job.padded; at += kPair * lanes) {
    Vec<Real> score[kRows][kPair];
    score_pair<Real, kRows>(job, row, at, score);
    for (int v = 0; v < kPair; ++v) {
      const Vec<Real> start = hn::Set(d, static_cast<Real>(at + v * lanes));
      for (int r = 0; r < kRows; ++r) {
        const auto less = hn::Lt(score[r][v], least[r]);
        least[r] = hn::IfThenElse(less, score[r][v], least[r]);
        where[r] = hn::IfThenElse(less, start, where[r]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    Real scores[16];
    Real starts[16];
    hn::StoreU(least[r], d, scores);
    hn::StoreU(where[r], d, starts);
    Real best = scores[0];
    auto code = static_cast<int64_t>(starts[0]);
    for (int64_t lane = 1; lane < lanes; ++lane) {
      const int64_t own = static_cast<int64_t>(starts[lane]) + lane;
      if (scores[lane] < best || (scores[lane] == best && own < code)) {
        best = scores[lane];
        code = own;
      }
    }
    job.scores[row + r] = best;
    job.codes[row + r] = static_cast<int32_t>(code);
  }
}

// A score and its code as one number, or one pair: of equal scores that of the lower code is the lesser.
inline uint64_t key_of(float score, int64_t code) {
  const auto bits = std::bit_cast<uint32_t>(score + 0.0F);  // -0 becomes 0
  const uint32_t rising = bits ^ ((bits >> 31) != 0 ? 0xffffffffU : 0x80000000U);
  return static_cast<uint64_t>(rising) << 32 | static_cast<uint32_t>(code);
}
inline std::pair<double, int64_t> key_of(double score, int64_t code) {
  return {score, code};
}

inline int32_t code_of(uint64_t key) {
  return static_cast<int32_t>(key & 0xffffffffU);
}
inline int32_t code_of(const std::pair<double, int64_t>& key) {
  return static_cast<int32_t>(key.second);
}

inline float score_of(uint64_t key) {
  const auto rising = static_cast<uint32_t>(key >> 32);
  return std::bit_cast<float>(rising ^ ((rising >> 31) != 0 ? 0x80000000U : 0xffffffffU));
}
inline double score_of(const std::pair<double, int64_t>& key) {
  return key.first;
}

// Entries whose scores are held until it is known which of them can be among the least.
constexpr int64_t kHeldEntries = 1024;

// An upper bound of the `beam`-th least of numbers of which `count` are here.
template <class Real>
Real bound_of(const Real* some, int64_t count, int beam) {
  Real least[kMostBeam];
  std::fill_n(least, kMostBeam, std::numeric_limits<Real>::infinity());
  for (int64_t i = 0; i < count; ++i) {
    Real value = some[i];
    for (int b = 0; b < beam; ++b) {
      const Real lower = std::min(least[b], value);
      value = std::max(least[b], value);
      least[b] = lower;
    }
  }
  return least[beam - 1];
}

template <class Real, int kRows>
void find_least_few(const ScoreJob<Real>& job, int64_t row) {
  using Key = decltype(key_of(Real(), 0));
  const Tag<Real> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
  Key best[kRows][kMostBeam];
  for (auto& of_row : best) std::fill_n(of_row, kMostBeam, key_of(kInfinity, 0));
  Real held[kRows][kHeldEntries];
  for (int64_t begin = 0; begin < job.padded; begin += kHeldEntries) {
    const int64_t end = std::min(begin + kHeldEntries, job.padded);
    // The least score of each lane: the `beam`-th least of them bounds that of all.
    Vec<Real> least[kRows][kPair];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kPair; ++v) least[r][v] = hn::Set(d, kInfinity);
    }
    for (int64_t at = begin; at < end; at += kPair * lanes) {
      Vec<Real> score[kRows][kPair];
      score_pair<Real, kRows>(job, row, at, score);
      for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kPair; ++v) {
          hn::StoreU(score[r][v], d, held[r] + (at - begin) + v * lanes);
          least[r][v] = hn::Min(least[r][v], score[r][v]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      // Half as many numbers, each of twice as many entries, do where lanes are many.
      Real lane_least[kPair * 16] = {};
      const bool folded = 2 * lanes > 16;
      if (folded) {
        hn::StoreU(hn::Min(least[r][0], least[r][1]), d, lane_least);
      } else {
        for (int v = 0; v < kPair; ++v) hn::StoreU(least[r][v], d, lane_least + v * lanes);
      }
      const Real bound = std::min(bound_of(lane_least, folded ? lanes : 2 * lanes, job.beam),
                                  score_of(best[r][job.beam - 1]));
      // Candidates first, then their order: few branches that depend on scores.
      const hn::RebindToSigned<Tag<Real>> di;
      using Index = hn::TFromD<decltype(di)>;
      Index candidates[kHeldEntries + 16];
      size_t count = 0;
      for (int64_t at = 0; at < end - begin; at += lanes) {
        const auto within = hn::Le(hn::LoadU(d, held[r] + at), hn::Set(d, bound));
        const auto mask = hn::RebindMask(di, within);
        // Not CompressStore(), which some processors take a hundred cycles for.
        hn::StoreU(hn::Compress(hn::Iota(di, static_cast<Index>(at)), mask), di, candidates + count);
        count += hn::CountTrue(di, mask);
      }
      for (size_t c = 0; c < count; ++c) {
        Key key = key_of(held[r][candidates[c]], begin + static_cast<int64_t>(candidates[c]));
        for (int i = 0; i < job.beam; ++i) {
          const Key lower = std::min(best[r][i], key);
          key = std::max(best[r][i], key);
          best[r][i] = lower;
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < job.beam; ++i) {
      job.scores[(row + r) * job.beam + i] = score_of(best[r][i]);
      job.codes[(row + r) * job.beam + i] = code_of(best[r][i]);
    }
  }
}

template <class Real>
void find_scores(const ScoreJob<Real>& job) {
  constexpr int kRows = HWY_MAX_BYTES == 64 || HWY_ARCH_ARM_A64 ? 4 : 2;
  int64_t row = 0;
  for (; row + kRows <= job.rows; row += kRows) {
    if (job.beam == 1) {
      find_least<Real, kRows>(job, row);
    } else {
      find_least_few<Real, kRows>(job, row);
    }
  }
  for (; row < job.rows; ++row) {
    if (job.beam == 1) {
      find_least<Real, 1>(job, row);
    } else {
      find_least_few<Real, 1>(job, row);
    }
  }
}

template <class Real>
void weigh(const NormJob<Real>& job) {
  const Tag<Real> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t at = 0; at < job.padded; at += lanes) {
    Vec<Real> sum = hn::Zero(d);
    for (int64_t a = 0; a < job.out_group; ++a) {
      const Real* const row = job.table + a * job.in_group * job.padded + at;
      for (int64_t i = 0; i < job.in_group; ++i) {
        const Real* const h = job.h + i * job.stride;
        const Vec<Real> own = hn::LoadU(d, row + i * job.padded);
        Vec<Real> inner = hn::Zero(d);
        for (int64_t j = 0; j < i; ++j) {
          inner = hn::MulAdd(hn::Set(d, h[j]), hn::LoadU(d, row + j * job.padded), inner);
        }
        inner = hn::MulAdd(hn::Set(d, h[i]), own, hn::Add(inner, inner));
        sum = hn::MulAdd(own, inner, sum);
      }
    }
    hn::StoreU(sum, d, job.norms + at);
  }
}

template <class Real>
void push(const PushJob<Real>& job) {
  const Tag<Real> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t at = 0;
  for (; at + lanes <= job.count; at += lanes) {
    Vec<Real> value = hn::LoadU(d, job.d + at);
    for (int64_t i = 0; i < job.rows; ++i) {
      value = hn::NegMulAdd(hn::Set(d, job.delta[i]), hn::LoadU(d, job.h + i * job.stride + at), value);
    }
    hn::StoreU(value, d, job.d + at);
  }
  for (; at < job.count; ++at) {
    for (int64_t i = 0; i < job.rows; ++i) job.d[at] -= job.delta[i] * job.h[i * job.stride + at];
  }
}

void find_scores_f32(const ScoreJob<float>& job) {
  find_scores(job);
}
void find_scores_f64(const ScoreJob<double>& job) {
  find_scores(job);
}
void weigh_f32(const NormJob<float>& job) {
  weigh(job);
}
void weigh_f64(const NormJob<double>& job) {
  weigh(job);
}
void push_f32(const PushJob<float>& job) {
  push(job);
}
void push_f64(const PushJob<double>& job) {
  push(job);
}

}  // namespace quantloom::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace quantloom {

HWY_EXPORT(find_scores_f32);
HWY_EXPORT(find_scores_f64);
HWY_EXPORT(weigh_f32);
HWY_EXPORT(weigh_f64);
HWY_EXPORT(push_f32);
HWY_EXPORT(push_f64);

void find_least_scores(const ScoreJob<float>& job) {
  HWY_DYNAMIC_DISPATCH(find_scores_f32)(job);
}
void find_least_scores(const ScoreJob<double>& job) {
  HWY_DYNAMIC_DISPATCH(find_scores_f64)(job);
}
void weigh_entries(const NormJob<float>& job) {
  HWY_DYNAMIC_DISPATCH(weigh_f32)(job);
}
void weigh_entries(const NormJob<double>& job) {
  HWY_DYNAMIC_DISPATCH(weigh_f64)(job);
}
void push_change(const PushJob<float>& job) {
  HWY_DYNAMIC_DISPATCH(push_f32)(job);
}
void push_change(const PushJob<double>& job) {
  HWY_DYNAMIC_DISPATCH(push_f64)(job);
}

}  // namespace quantloom
#endif  // HWY_ONCE
