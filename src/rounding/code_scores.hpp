// Scores of all entries of a table for many targets at once, of which only the least few are kept.
#pragma once

#include <cstdint>

namespace quantloom {

inline constexpr int64_t kScorePadding = 32;  // entries that tables are padded to a multiple of
inline constexpr int kMostBeam = 8;

template <class Real>
struct ScoreJob {
  const Real* table = nullptr;      // [dim][padded]
  const Real* norms = nullptr;      // [padded]
  const Real* penalties = nullptr;  // [padded], or null; infinite for padding, if there is any
  int64_t padded = 0;
  int64_t dim = 0;
  int64_t rows = 0;
  const Real* factors = nullptr;  // [rows][dim]
  const Real* squares = nullptr;  // [rows]
  int beam = 1;                   // up to kMostBeam
  // [rows][beam]: the least of square * norm + penalty + factors . entry, rising, and their codes. Of equal
  // ones the lower codes, first.
  Real* scores = nullptr;
  int32_t* codes = nullptr;
};

void find_least_scores(const ScoreJob<float>& job);
void find_least_scores(const ScoreJob<double>& job);

// norms[c] = sum over a of entry_a^T h entry_a, for entries [out_group][in_group] in a table [dim][padded]
// and h [in_group, in_group], symmetric, with a stride between rows.
template <class Real>
struct NormJob {
  const Real* table = nullptr;
  int64_t padded = 0;
  int64_t out_group = 1;
  int64_t in_group = 1;
  const Real* h = nullptr;
  int64_t stride = 0;
  Real* norms = nullptr;
};

void weigh_entries(const NormJob<float>& job);
void weigh_entries(const NormJob<double>& job);

// d[0, count) -= sum over i < rows of delta[i] * h[i * stride, ... + count)
template <class Real>
struct PushJob {
  const Real* delta = nullptr;
  int64_t rows = 0;
  const Real* h = nullptr;
  int64_t stride = 0;
  int64_t count = 0;
  Real* d = nullptr;
};

void push_change(const PushJob<float>& job);
void push_change(const PushJob<double>& job);

}  // namespace quantloom
