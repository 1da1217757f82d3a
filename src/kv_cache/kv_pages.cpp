#include "quantloom/kv_cache/kv_pages.hpp"

#include <algorithm>

#include "quantloom/checked_math.hpp"
#include "quantloom/error.hpp"

namespace quantloom {

int64_t KVPages::coded_of(KVSide side, int64_t length) const {
  const int64_t tokens = std::max<int64_t>(0, length - format_.first);
  if (layout_.part(side).codec == KVCodec::channel_grid) return tokens - tokens % format_.window;
  return tokens - std::min(tokens, format_.window);
}

int64_t KVPages::pages_of(int64_t tokens) const {
  return ceil_div(std::max<int64_t>(0, tokens - format_.first), layout_.page_tokens);
}

// Those that a sequence writes to while it grows to `length` tokens.
KVPages::Run KVPages::written_pages(const Sequence& sequence, int64_t length) const {
  Run run{std::ssize(sequence.pages), 0};
  for (const KVSide side : {KVSide::keys, KVSide::values}) {
    const int64_t from = coded_of(side, sequence.length);
    const int64_t to = coded_of(side, length);
    if (from >= to) continue;
    run.begin = std::min(run.begin, from / layout_.page_tokens);
    run.end = std::max(run.end, ceil_div(to, layout_.page_tokens));
  }
  return run;
}

bool KVPages::owns(const Sequence& sequence, int64_t page) const {
  return page < std::ssize(sequence.pages) &&
         owners_[static_cast<size_t>(sequence.pages[static_cast<size_t>(page)])] == 1;
}

int64_t KVPages::missing_pages(std::span<const int64_t> lengths) const {
  int64_t wanted = 0;
  for (size_t s = 0; s < lengths.size(); ++s) {
    const Run run = written_pages(sequences_[s], lengths[s]);
    const int64_t held = std::min(run.end, std::ssize(sequences_[s].pages));
    for (int64_t page = run.begin; page < held; ++page) {
      wanted += static_cast<int64_t>(!owns(sequences_[s], page));
    }
    wanted = checked_add(wanted, std::max<int64_t>(0, run.end - std::max(run.begin, held)));
  }
  if (wanted <= std::ssize(free_pages_)) return 0;
  require_numbers(wanted - std::ssize(free_pages_));
  return std::max({wanted - std::ssize(free_pages_), std::ssize(places_) / 2, sequences()});
}

void KVPages::require_numbers(int64_t pages) const {
  const int64_t all = checked_add(std::ssize(places_), pages);
  if (all > INT32_MAX) throw InvalidArgument("capacity", text_of(all, " pages"), "fewer than 2^31");
}

void KVPages::add_slab(int64_t pages) {
  require_numbers(pages);
  const int64_t first = std::ssize(places_);
  for (int64_t i = 0; i < pages; ++i) {
    places_.push_back({static_cast<int32_t>(slabs_), static_cast<int32_t>(i)});
  }
  ++slabs_;
  owners_.resize(places_.size(), 0);
  for (int64_t i = pages; i-- > 0;) free_pages_.push_back(static_cast<int32_t>(first + i));
}

int32_t KVPages::take_page() {
  const int32_t page = free_pages_.back();
  free_pages_.pop_back();
  owners_[static_cast<size_t>(page)] = 1;
  return page;
}

std::vector<KVPages::Change> KVPages::own(std::span<const int64_t> lengths) {
  std::vector<Change> changes;
  for (size_t s = 0; s < lengths.size(); ++s) {
    Sequence& sequence = sequences_[s];
    const Run run = written_pages(sequence, lengths[s]);
    for (int64_t page = run.begin; page < run.end; ++page) {
      if (owns(sequence, page)) continue;
      const auto at = static_cast<size_t>(page);
      const bool held = at < sequence.pages.size();
      changes.push_back({static_cast<int64_t>(s), page, take_page(), held ? sequence.pages[at] : -1});
      // Another one has it still, so that it is not taken before it is copied.
      if (held) --owners_[static_cast<size_t>(sequence.pages[at])];
      if (!held) sequence.pages.push_back(0);
      sequence.pages[at] = changes.back().to;
    }
  }
  return changes;
}

int64_t KVPages::room(int64_t sequence) const {
  const Sequence& it = sequences_[static_cast<size_t>(sequence)];
  const int64_t keys = coded_of(KVSide::keys, it.length);
  const int64_t values = coded_of(KVSide::values, it.length);
  int64_t page = std::min(keys, values) / layout_.page_tokens;
  while (owns(it, page)) ++page;
  const int64_t tokens = page * layout_.page_tokens;  // that have places for their codes
  const auto most = [&](KVSide side, int64_t coded) {
    if (layout_.part(side).codec != KVCodec::channel_grid) return std::max(tokens, coded) + format_.window;
    const int64_t codes = std::max(tokens - tokens % format_.window, coded);
    return codes + format_.window - 1;
  };
  return format_.first + std::min(most(KVSide::keys, keys), most(KVSide::values, values));
}

void KVPages::release(const Sequence& sequence) {
  for (const int32_t page : sequence.pages) {
    if (--owners_[static_cast<size_t>(page)] == 0) free_pages_.push_back(page);
  }
}

void KVPages::reorder(std::span<const int64_t> sources) {
  std::vector<Sequence> sequences;
  sequences.reserve(sources.size());
  for (const int64_t source : sources) sequences.push_back(sequences_[static_cast<size_t>(source)]);
  for (const Sequence& sequence : sequences) {
    for (const int32_t page : sequence.pages) ++owners_[static_cast<size_t>(page)];
  }
  for (const Sequence& sequence : sequences_) release(sequence);
  sequences_ = std::move(sequences);
}

void KVPages::clear() {
  for (Sequence& sequence : sequences_) {
    release(sequence);
    sequence = {};
  }
}

KVUsage KVPages::usage(int64_t kv_heads, DType dtype) const {
  KVUsage usage;
  const int64_t row_bytes = kv_heads * layout_.head_dim * size_of(dtype);
  for (int64_t s = 0; s < sequences(); ++s) {
    usage.tokens += length(s);
    for (const KVSide side : {KVSide::keys, KVSide::values}) {
      const KVPart& part = layout_.part(side);
      const int64_t tokens = coded(side, s);
      (side == KVSide::keys ? usage.coded_keys : usage.coded_values) += tokens;
      int64_t bytes = tokens * part.row_bytes;
      if (part.codec == KVCodec::channel_grid) bytes += tokens / part.group * layout_.head_dim * 4;
      if (part.codec == KVCodec::token_grid) bytes += tokens * part.groups * 4;
      if (part.codec == KVCodec::digits) bytes += tokens * (2 + part.shift_bytes);
      if (part.codec == KVCodec::token_table) bytes += tokens * 4;
      if (part.has_table()) {
        const int64_t page = layout_.page_tokens;
        bytes += (tokens / page * part.outliers_before(page, layout_.head_dim) +
                  part.outliers_before(tokens % page, layout_.head_dim)) *
                 4;
      }
      usage.code_bytes += bytes * kv_heads;
      usage.exact_bytes += (length(s) - tokens) * row_bytes;
    }
  }
  const auto shared = std::count_if(owners_.begin(), owners_.end(), [](int32_t n) { return n > 0; });
  usage.page_bytes = shared * kv_heads * layout_.record_bytes;
  return usage;
}

}  // namespace quantloom
