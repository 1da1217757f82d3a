#include "quantloom/kv_cache/kv_cache.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kv_cache/kv_codes.hpp"
#include "kv_cache/kv_rotation.hpp"
#include "kv_cache/kv_rows.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/error.hpp"
#include "quantloom/matrix_view.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {
namespace {

// Below this many values, another thread costs more than it brings.
constexpr int64_t kValuesPerThread = int64_t{1} << 14;

constexpr size_t index_of(KVSide side) {
  return side == KVSide::keys ? 0 : 1;
}

std::string shape_of(const KVTokens& x) {
  return text_of("[", x.sequences, ", ", x.heads, ", ", x.tokens, ", ", x.head_dim, "]");
}

void require_tokens(const char* name, const KVTokens& x, const KVShape& shape, int64_t tokens) {
  if (x.dtype != shape.dtype) throw TypeMismatch(name, name_of(x.dtype), name_of(shape.dtype));
  if (x.sequences != shape.sequences || x.heads != shape.kv_heads || x.head_dim != shape.head_dim ||
      x.tokens < 0 || x.tokens != tokens) {
    throw InvalidArgument(name, text_of("shape ", shape_of(x)),
                          text_of("[", shape.sequences, ", ", shape.kv_heads, ", ",
                                  std::max<int64_t>(tokens, 0), ", ", shape.head_dim, "]"));
  }
  if (x.data == nullptr && x.sequences * x.heads * x.tokens > 0) {
    throw InvalidArgument(name, "a null pointer", "values");
  }
}

void require_values(const char* name, const KVTokens& x, std::span<const int64_t> starts, int threads) {
  parallel_for(x.sequences * x.heads, threads, [&](int64_t pair) {
    const int64_t s = pair / x.heads;
    const int64_t h = pair % x.heads;
    std::vector<float> row(static_cast<size_t>(x.head_dim));
    for (int64_t t = starts.empty() ? 0 : starts[static_cast<size_t>(s)]; t < x.tokens; ++t) {
      kv_cache::widen_row(x.dtype, x.row(s, h, t), x.head_dim, row.data());
      for (size_t d = 0; d < row.size(); ++d) {
        if (std::abs(row[d]) <= kv_cache::kLargestValue) continue;
        throw NumericError(text_of(name, ": got ", row[d], " for sequence ", s, ", head ", h, ", token ", t,
                                   ", channel ", d, ", expected finite values up to ",
                                   kv_cache::kLargestValue));
      }
    }
  });
}

}  // namespace

KVCache::KVCache(KVFormat format, KVShape shape, int64_t capacity, std::shared_ptr<const KVTables> tables)
    : format_(format), shape_(shape), layout_(kv_layout(format, shape.head_dim)), tables_(std::move(tables)) {
  if (!is_float16_or_32(shape.dtype)) {
    throw TypeMismatch("dtype", name_of(shape.dtype), "float32, float16 or bfloat16");
  }
  if (shape.sequences < 0) throw InvalidArgument("sequences", text_of(shape.sequences), "0 or more");
  if (shape.kv_heads < 1) throw InvalidArgument("kv_heads", text_of(shape.kv_heads), "1 or more");
  if ((tables_ != nullptr) != layout_.keys.has_table()) {
    throw InvalidArgument(
        "tables", tables_ == nullptr ? "none" : "some",
        tables_ == nullptr ? "those of a calibration" : text_of("none for ", format.spec()));
  }
  if (tables_ != nullptr) require_valid(*tables_, format, shape.kv_heads, shape.head_dim);
  if (capacity < 0) throw InvalidArgument("capacity", text_of(capacity), "0 or more tokens");
  sequences_.resize(static_cast<size_t>(shape.sequences));
  for (Tensor& exact : exact_) {
    exact = Tensor(shape.dtype, {shape.sequences, shape.kv_heads, checked_add(format.first, format.window),
                                 shape.head_dim});
  }
  const int64_t coded = std::max<int64_t>(0, capacity - format.first);
  const int64_t pages = ceil_div(coded, layout_.page_tokens);
  for (Sequence& sequence : sequences_) sequence.pages.reserve(static_cast<size_t>(pages));
  add_slab(checked_mul(shape.sequences, pages));
}

KVCache KVCache::clone() const {
  KVCache copy(*this);
  const auto renew = [](Tensor& tensor) {
    Tensor own(tensor.dtype(), tensor.shape());
    std::memcpy(own.bytes(), tensor.bytes(), static_cast<size_t>(tensor.byte_count()));
    tensor = std::move(own);
  };
  for (Tensor& tensor : copy.exact_) renew(tensor);
  for (Tensor& tensor : copy.slabs_) renew(tensor);
  return copy;
}

void KVCache::add_slab(int64_t pages) {
  if (pages == 0) return;
  const int64_t first = std::ssize(places_);
  if (checked_add(first, pages) > INT32_MAX) {
    throw InvalidArgument("capacity", text_of(first + pages, " pages"), "fewer than 2^31");
  }
  const int64_t page_bytes = checked_mul(shape_.kv_heads, layout_.record_bytes);
  slabs_.emplace_back(
      DType::u8, std::vector<int64_t>{checked_add(checked_mul(pages, page_bytes), kv_cache::kRecordPadding)});
  for (int64_t i = 0; i < pages; ++i) {
    places_.push_back({static_cast<int32_t>(std::ssize(slabs_) - 1), static_cast<int32_t>(i)});
  }
  owners_.resize(places_.size(), 0);
  for (int64_t i = pages; i-- > 0;) free_pages_.push_back(static_cast<int32_t>(first + i));
}

std::byte* KVCache::page_data(int32_t page) const {
  const PagePlace place = places_[static_cast<size_t>(page)];
  const auto* slab = slabs_[static_cast<size_t>(place.slab)].bytes();
  return const_cast<std::byte*>(slab) + place.index * shape_.kv_heads * layout_.record_bytes;
}

int32_t KVCache::take_page() {
  if (free_pages_.empty()) add_slab(std::max<int64_t>(std::ssize(places_) / 2, shape_.sequences));
  const int32_t page = free_pages_.back();
  free_pages_.pop_back();
  owners_[static_cast<size_t>(page)] = 1;
  std::memset(page_data(page), 0, static_cast<size_t>(shape_.kv_heads * layout_.record_bytes));
  return page;
}

void KVCache::release_page(int32_t page) {
  if (--owners_[static_cast<size_t>(page)] == 0) free_pages_.push_back(page);
}

void KVCache::own_page(Sequence& sequence, int64_t page) {
  while (std::ssize(sequence.pages) <= page) sequence.pages.push_back(take_page());
  int32_t& held = sequence.pages[static_cast<size_t>(page)];
  if (owners_[static_cast<size_t>(held)] == 1) return;
  const int32_t copy = take_page();
  std::memcpy(page_data(copy), page_data(held), static_cast<size_t>(shape_.kv_heads * layout_.record_bytes));
  release_page(held);
  held = copy;
}

int64_t KVCache::coded_of(KVSide side, int64_t length) const {
  const int64_t tokens = std::max<int64_t>(0, length - format_.first);
  if (layout_.part(side).codec == KVCodec::channel_grid) return tokens - tokens % format_.window;
  return tokens - std::min(tokens, format_.window);
}

int64_t KVCache::coded(KVSide side, int64_t sequence) const {
  return coded_of(side, length(sequence));
}

kv_cache::HeadTables KVCache::head_tables(KVSide side, int64_t head) const {
  if (tables_ == nullptr) return {};
  const KVTable& table = side == KVSide::keys ? tables_->keys : tables_->values;
  return {table.bounds.data(), table.values.data(), tables_->key_scale.data() + head * shape_.head_dim,
          tables_->key_middle.data() + head * shape_.head_dim};
}

std::byte* KVCache::exact_row(KVSide side, int64_t sequence, int64_t head, int64_t slot) const {
  const Tensor& exact = exact_[index_of(side)];
  const int64_t row = (sequence * shape_.kv_heads + head) * (format_.first + format_.window) + slot;
  return const_cast<std::byte*>(exact.bytes()) + row * shape_.head_dim * size_of(shape_.dtype);
}

const std::byte* KVCache::record(int64_t sequence, int64_t page, int64_t head) const {
  const auto& pages = sequences_[static_cast<size_t>(sequence)].pages;
  return page_data(pages[static_cast<size_t>(page)]) + head * layout_.record_bytes;
}

void KVCache::append(const KVTokens& keys, const KVTokens& values, std::span<const int64_t> starts,
                     int threads) {
  require_tokens("keys", keys, shape_, keys.tokens);
  require_tokens("values", values, shape_, keys.tokens);
  if (!starts.empty() && std::ssize(starts) != shape_.sequences) {
    throw InvalidArgument("starts", text_of(starts.size()), text_of(shape_.sequences, " numbers"));
  }
  for (const int64_t start : starts) {
    if (start < 0 || start > keys.tokens) {
      throw InvalidArgument("starts", text_of(start), text_of("0 to ", keys.tokens));
    }
  }
  const int64_t rows = checked_mul(shape_.sequences * shape_.kv_heads, keys.tokens);
  const int64_t pieces = std::max<int64_t>(1, checked_mul(rows, shape_.head_dim) / kValuesPerThread);
  const int team = static_cast<int>(std::min<int64_t>(resolve_threads(threads), pieces));
  Tensor rotated;
  KVTokens stored = keys;
  require_values("keys", keys, starts, team);
  require_values("values", values, starts, team);
  const KVRotation* rotation = tables_ == nullptr ? nullptr : tables_->rotation.get();
  const bool turned = rotation != nullptr;
  std::vector<int64_t> positions;  // of the first token of each sequence
  for (size_t s = 0; s < sequences_.size() && turned; ++s) {
    positions.push_back(sequences_[s].length - (starts.empty() ? 0 : starts[s]));
    if (positions[s] + keys.tokens <= rotation->positions()) continue;
    throw InvalidArgument("keys", text_of("token ", positions[s] + keys.tokens - 1, " of sequence ", s),
                          text_of("tokens below ", rotation->positions(), ", the positions of the tables"));
  }
  if (format_.hadamard || turned) {
    rotated = turned ? kv_cache::turn_back(keys, *rotation, positions) : kv_cache::rotate_tokens(keys, false);
    stored = kv_cache::view_of(rotated);
    require_values("rotated keys", stored, starts, team);
  }
  for (size_t s = 0; s < sequences_.size(); ++s) {
    const int64_t before = sequences_[s].length;
    const int64_t after = before + keys.tokens - (starts.empty() ? 0 : starts[s]);
    for (const KVSide side : {KVSide::keys, KVSide::values}) {
      const int64_t from = coded_of(side, before);
      const int64_t to = coded_of(side, after);
      for (int64_t page = from / layout_.page_tokens; page * layout_.page_tokens < to && from < to; ++page) {
        own_page(sequences_[s], page);
      }
    }
  }
  parallel_for(shape_.sequences * shape_.kv_heads, team, [&](int64_t pair) {
    const int64_t s = pair / shape_.kv_heads;
    const int64_t h = pair % shape_.kv_heads;
    const int64_t start = starts.empty() ? 0 : starts[static_cast<size_t>(s)];
    append_head(stored, KVSide::keys, s, h, start);
    append_head(values, KVSide::values, s, h, start);
  });
  for (size_t s = 0; s < sequences_.size(); ++s) {
    sequences_[s].length += keys.tokens - (starts.empty() ? 0 : starts[s]);
  }
}

void KVCache::append_head(const KVTokens& x, KVSide side, int64_t sequence, int64_t head, int64_t start) {
  const KVPart& part = layout_.part(side);
  const int64_t dim = shape_.head_dim;
  const int64_t window = format_.window;
  const auto row_bytes = static_cast<size_t>(dim * size_of(shape_.dtype));
  const bool by_channel = part.codec == KVCodec::channel_grid;
  const kv_cache::HeadTables tables = head_tables(side, head);
  std::vector<float> wide(static_cast<size_t>((by_channel ? part.group : 1) * dim));
  const auto encode = [&](const std::byte* row, int64_t token) {
    kv_cache::widen_row(shape_.dtype, row, dim, wide.data());
    const int64_t page = token / layout_.page_tokens;
    auto* to = const_cast<std::byte*>(record(sequence, page, head));
    kv_cache::encode_token(part, dim, wide.data(), token % layout_.page_tokens, to, tables);
  };
  int64_t t = length(sequence) - format_.first;  // counted from the first token that is not kept
  for (int64_t i = start; i < x.tokens; ++i, ++t) {
    const std::byte* row = x.row(sequence, head, i);
    if (t < 0) {
      std::memcpy(exact_row(side, sequence, head, t + format_.first), row, row_bytes);
      continue;
    }
    if (window == 0) {
      encode(row, t);
      continue;
    }
    std::byte* slot = exact_row(side, sequence, head, format_.first + t % window);
    if (!by_channel && t >= window) encode(slot, t - window);
    std::memcpy(slot, row, row_bytes);
    if (!by_channel || (t + 1) % window != 0) continue;
    for (int64_t first = t + 1 - window; first <= t; first += part.group) {
      for (int64_t j = 0; j < part.group; ++j) {
        const std::byte* held = exact_row(side, sequence, head, format_.first + (first + j) % window);
        kv_cache::widen_row(shape_.dtype, held, dim, wide.data() + j * dim);
      }
      auto* to = const_cast<std::byte*>(record(sequence, first / layout_.page_tokens, head));
      kv_cache::encode_channels(part, dim, wide.data(), first % layout_.page_tokens / part.group, to);
    }
  }
}

void KVCache::reorder(std::span<const int64_t> sources) {
  for (const int64_t source : sources) {
    if (source < 0 || source >= shape_.sequences) {
      throw InvalidArgument("sources", text_of(source), text_of("0 to ", shape_.sequences - 1));
    }
  }
  std::array<Tensor, 2> exact;
  const auto bytes = static_cast<size_t>(shape_.kv_heads * (format_.first + format_.window) *
                                         shape_.head_dim * size_of(shape_.dtype));
  for (size_t side = 0; side < 2; ++side) {
    std::vector<int64_t> shape = exact_[side].shape();
    shape[0] = std::ssize(sources);
    exact[side] = Tensor(shape_.dtype, std::move(shape));
    for (size_t s = 0; s < sources.size() && bytes > 0; ++s) {
      std::memcpy(exact[side].bytes() + s * bytes,
                  exact_[side].bytes() + static_cast<size_t>(sources[s]) * bytes, bytes);
    }
  }
  std::vector<Sequence> sequences;
  sequences.reserve(sources.size());
  for (const int64_t source : sources) sequences.push_back(sequences_[static_cast<size_t>(source)]);
  for (const Sequence& sequence : sequences) {
    for (const int32_t page : sequence.pages) ++owners_[static_cast<size_t>(page)];
  }
  for (const Sequence& sequence : sequences_) {
    for (const int32_t page : sequence.pages) release_page(page);
  }
  sequences_ = std::move(sequences);
  exact_ = std::move(exact);
  shape_.sequences = std::ssize(sources);
}

void KVCache::clear() {
  for (Sequence& sequence : sequences_) {
    for (const int32_t page : sequence.pages) release_page(page);
    sequence = {};
  }
}

void KVCache::read_with(bool reference, KVSide side, int64_t sequence, int64_t head, int64_t first,
                        int64_t count, float* out) const {
  if (sequence < 0 || sequence >= shape_.sequences) {
    throw InvalidArgument("sequence", text_of(sequence), text_of("0 to ", shape_.sequences - 1));
  }
  if (head < 0 || head >= shape_.kv_heads) {
    throw InvalidArgument("head", text_of(head), text_of("0 to ", shape_.kv_heads - 1));
  }
  if (first < 0 || count < 0 || first > length(sequence) - count) {
    throw InvalidArgument("tokens", text_of(first, " to ", first + count - 1),
                          text_of("tokens below ", length(sequence)));
  }
  const KVPart& part = layout_.part(side);
  const int64_t dim = shape_.head_dim;
  const int64_t coded_end = coded(side, sequence);
  for (int64_t t = first - format_.first, end = t + count; t < end;) {
    int64_t run = 0;
    if (t >= 0 && t < coded_end) {
      const int64_t slot = t % layout_.page_tokens;
      run = std::min({end - t, coded_end - t, layout_.page_tokens - slot});
      const std::byte* from = record(sequence, t / layout_.page_tokens, head);
      const auto decode = reference ? kv_cache::decode_reference : kv_cache::decode_rows;
      decode(part, dim, from, slot, run, out, head_tables(side, head));
    } else {
      const bool kept = t < 0;
      const int64_t slot = kept ? t + format_.first : format_.first + t % format_.window;
      run = std::min(end - t, format_.first + (kept ? 0 : format_.window) - slot);
      const std::byte* from = exact_row(side, sequence, head, slot);
      if (reference) {
        FloatMatrix(from, shape_.dtype, 1, run * dim, run * dim).read(0, 0, run * dim, out);
      } else {
        kv_cache::widen_row(shape_.dtype, from, run * dim, out);
      }
    }
    t += run;
    out += run * dim;
  }
  if (side == KVSide::values || tables_ == nullptr || tables_->rotation == nullptr) return;
  const KVRotation& rotation = *tables_->rotation;
  const int64_t half = rotation.rotated / 2;
  const auto rotate = reference ? kv_cache::rotate_reference : kv_cache::rotate_rows;
  rotate(out - count * dim, count, dim, rotation.cosines.data() + first * half,
         rotation.sines.data() + first * half, half);
}

void KVCache::read(KVSide side, int64_t sequence, int64_t head, int64_t first, int64_t count,
                   float* out) const {
  read_with(false, side, sequence, head, first, count, out);
}

void KVCache::read_reference(KVSide side, int64_t sequence, int64_t head, int64_t first, int64_t count,
                             float* out) const {
  read_with(true, side, sequence, head, first, count, out);
}

KVUsage KVCache::usage() const {
  KVUsage usage;
  const int64_t row_bytes = shape_.kv_heads * shape_.head_dim * size_of(shape_.dtype);
  for (int64_t s = 0; s < shape_.sequences; ++s) {
    usage.tokens += length(s);
    for (const KVSide side : {KVSide::keys, KVSide::values}) {
      const KVPart& part = layout_.part(side);
      const int64_t tokens = coded(side, s);
      (side == KVSide::keys ? usage.coded_keys : usage.coded_values) += tokens;
      int64_t bytes = tokens * part.row_bytes;
      if (part.codec == KVCodec::channel_grid) bytes += tokens / part.group * shape_.head_dim * 4;
      if (part.codec == KVCodec::token_grid) bytes += tokens * part.groups * 4;
      if (part.codec == KVCodec::digits) bytes += tokens * (2 + part.shift_bytes);
      if (part.codec == KVCodec::token_table) bytes += tokens * 4;
      if (part.has_table()) {
        const int64_t page = layout_.page_tokens;
        bytes += (tokens / page * part.outliers_before(page, shape_.head_dim) +
                  part.outliers_before(tokens % page, shape_.head_dim)) *
                 4;
      }
      usage.code_bytes += bytes * shape_.kv_heads;
      usage.exact_bytes += (length(s) - tokens) * row_bytes;
    }
  }
  const auto shared = std::count_if(owners_.begin(), owners_.end(), [](int32_t n) { return n > 0; });
  usage.page_bytes = shared * shape_.kv_heads * layout_.record_bytes;
  for (const Tensor& slab : slabs_) usage.reserved_bytes += slab.byte_count();
  for (const Tensor& exact : exact_) usage.reserved_bytes += exact.byte_count();
  return usage;
}

}  // namespace quantloom
