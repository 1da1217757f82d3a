// The loops of products by look-up tables.
#include "kernels/hwy_targets.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/matmul_lookups.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h, which sets the target.
#include <hwy/highway.h>

#include "kernels/prepared_lookups.hpp"

HWY_BEFORE_NAMESPACE();
namespace quantloom::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using Floats = hn::CappedTag<float, 16>;
using Indices = hn::RebindToSigned<Floats>;
using Bytes = hn::Rebind<uint8_t, Floats>;

template <int kLanes>
void add_chunk(const LookupJob& job) {
  const Floats df;
  const Indices di;
  const Bytes du;
  constexpr int64_t kRows = static_cast<int64_t>(hn::MaxLanes(Floats()));
  for (int64_t strip = 0; strip < job.strips; ++strip) {
    const uint8_t* const codes = job.codes + strip * job.fields * kLookupStripRows;
    for (int64_t row = 0; row < kLookupStripRows; row += kRows) {
      hn::VFromD<Floats> sum[kLanes];
      for (auto& lane : sum) lane = hn::Zero(df);
      for (int64_t field = 0; field < job.fields; ++field) {
        const auto index = hn::PromoteTo(di, hn::LoadU(du, codes + field * kLookupStripRows + row));
        const float* const table = job.tables + field * kLookupEntries;
        for (int lane = 0; lane < kLanes; ++lane) {
          sum[lane] = hn::Add(sum[lane], hn::GatherIndex(df, table + lane * job.table_stride, index));
        }
      }
      const int64_t at = strip * kLookupStripRows + row;
      const auto scale = hn::LoadU(df, job.scales + at);
      for (int lane = 0; lane < kLanes; ++lane) {
        float* const to = job.sums + lane * kLookupPieceStrips * kLookupStripRows + at;
        hn::StoreU(hn::MulAdd(scale, sum[lane], hn::LoadU(df, to)), df, to);
      }
    }
  }
}

void add_lookup_chunk(const LookupJob& job) {
  if (job.lanes == 4) {
    add_chunk<4>(job);
  } else if (job.lanes == 2) {
    add_chunk<2>(job);
  } else {
    add_chunk<1>(job);
  }
}

void multiply_table(const EntryJob& job) {
  const Floats df;
  const auto lanes = static_cast<int64_t>(hn::Lanes(df));
  for (int64_t at = 0; at < job.stride; at += lanes) {
    auto sum = hn::Zero(df);
    for (int64_t i = 0; i < job.dim; ++i) {
      sum = hn::MulAdd(hn::Set(df, job.x[i]), hn::LoadU(df, job.table + i * job.stride + at), sum);
    }
    hn::StoreU(sum, df, job.products + at);
  }
}

}  // namespace quantloom::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace quantloom::kernels {

HWY_EXPORT(add_lookup_chunk);
HWY_EXPORT(multiply_table);

void add_lookups(const LookupJob& job) {
  HWY_DYNAMIC_DISPATCH(add_lookup_chunk)(job);
}
void multiply_entries(const EntryJob& job) {
  HWY_DYNAMIC_DISPATCH(multiply_table)(job);
}

}  // namespace quantloom::kernels
#endif  // HWY_ONCE
