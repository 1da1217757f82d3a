#include "quantloom/kv_cache/kv_cache.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kv_cache/kv_checks.hpp"
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

std::shared_ptr<const KVTables> required(const KVFormat& format, const KVLayout& layout, const KVShape& shape,
                                         int64_t capacity, std::shared_ptr<const KVTables> tables) {
  kv_cache::require_cache(format, layout, shape, capacity, tables.get());
  return tables;
}

void require_values(const char* name, const KVTokens& x, std::span<const int64_t> starts, int threads) {
  parallel_for(x.sequences * x.heads, threads, [&](int64_t pair) {
    const int64_t s = pair / x.heads;
    const int64_t h = pair % x.heads;
    std::vector<float> row(static_cast<size_t>(x.head_dim));
    for (int64_t t = kv_cache::start_of(starts, s); t < x.tokens; ++t) {
      kv_cache::widen_row(x.dtype, x.row(s, h, t), x.head_dim, row.data());
      kv_cache::require_row(name, row, s, h, t);
    }
  });
}

}  // namespace

KVCache::KVCache(KVFormat format, KVShape shape, int64_t capacity, std::shared_ptr<const KVTables> tables)
    : format_(format),
      shape_(shape),
      layout_(kv_layout(format, shape.head_dim)),
      tables_(required(format, layout_, shape, capacity, std::move(tables))),
      pages_(format, layout_, shape.sequences) {
  for (Tensor& exact : exact_) {
    exact = Tensor(shape.dtype, {shape.sequences, shape.kv_heads, checked_add(format.first, format.window),
                                 shape.head_dim});
  }
  add_slab(checked_mul(shape.sequences, pages_.pages_of(capacity)));
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
  const int64_t page_bytes = checked_mul(shape_.kv_heads, layout_.record_bytes);
  Tensor slab(DType::u8, {checked_add(checked_mul(pages, page_bytes), kv_cache::kRecordPadding)});
  pages_.add_slab(pages);
  slabs_.push_back(std::move(slab));
}

void KVCache::reserve(int64_t tokens) {
  if (tokens < 0) throw InvalidArgument("tokens", text_of(tokens), "0 or more");
  std::vector<int64_t> lengths;
  for (int64_t s = 0; s < shape_.sequences; ++s) lengths.push_back(std::max(tokens, length(s)));
  add_slab(pages_.missing_pages(lengths));
}

std::byte* KVCache::page_data(int32_t page) const {
  const KVPages::Place place = pages_.place(page);
  const auto* slab = slabs_[static_cast<size_t>(place.slab)].bytes();
  return const_cast<std::byte*>(slab) + place.index * shape_.kv_heads * layout_.record_bytes;
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
  return page_data(pages_.page(sequence, page)) + head * layout_.record_bytes;
}

void KVCache::append(const KVTokens& keys, const KVTokens& values, std::span<const int64_t> starts,
                     int threads) {
  kv_cache::require_append(shape_, keys, values, starts);
  const int64_t rows = checked_mul(shape_.sequences * shape_.kv_heads, keys.tokens);
  const int64_t pieces = std::max<int64_t>(1, checked_mul(rows, shape_.head_dim) / kValuesPerThread);
  const int team = static_cast<int>(std::min<int64_t>(resolve_threads(threads), pieces));
  Tensor rotated;
  KVTokens stored = keys;
  require_values("keys", keys, starts, team);
  require_values("values", values, starts, team);
  const KVRotation* rotation = tables_ == nullptr ? nullptr : tables_->rotation.get();
  const bool turned = rotation != nullptr;
  std::vector<int64_t> positions;
  if (turned) positions = kv_cache::require_positions(*rotation, pages_, keys.tokens, starts);
  if (format_.hadamard || turned) {
    rotated = turned ? kv_cache::turn_back(keys, *rotation, positions) : kv_cache::rotate_tokens(keys, false);
    stored = kv_cache::view_of(rotated);
    require_values("rotated keys", stored, starts, team);
  }
  const std::vector<int64_t> lengths = kv_cache::lengths_after(pages_, keys.tokens, starts);
  add_slab(pages_.missing_pages(lengths));
  const auto page_bytes = static_cast<size_t>(shape_.kv_heads * layout_.record_bytes);
  for (const KVPages::Change& change : pages_.own(lengths)) {
    if (change.from < 0) {
      std::memset(page_data(change.to), 0, page_bytes);
    } else {
      std::memcpy(page_data(change.to), page_data(change.from), page_bytes);
    }
  }
  parallel_for(shape_.sequences * shape_.kv_heads, team, [&](int64_t pair) {
    const int64_t s = pair / shape_.kv_heads;
    const int64_t h = pair % shape_.kv_heads;
    const int64_t start = kv_cache::start_of(starts, s);
    append_head(stored, KVSide::keys, s, h, start);
    append_head(values, KVSide::values, s, h, start);
  });
  for (int64_t s = 0; s < shape_.sequences; ++s) pages_.set_length(s, lengths[static_cast<size_t>(s)]);
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
  kv_cache::require_sources(shape_, sources);
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
  pages_.reorder(sources);
  exact_ = std::move(exact);
  shape_.sequences = std::ssize(sources);
}

void KVCache::clear() {
  pages_.clear();
}

void KVCache::read_with(bool reference, KVSide side, int64_t sequence, int64_t head, int64_t first,
                        int64_t count, float* out) const {
  kv_cache::require_run(shape_, pages_, sequence, first, count);
  if (head < 0 || head >= shape_.kv_heads) {
    throw InvalidArgument("head", text_of(head), text_of("0 to ", shape_.kv_heads - 1));
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
  KVUsage usage = pages_.usage(shape_.kv_heads, shape_.dtype);
  for (const Tensor& slab : slabs_) usage.reserved_bytes += slab.byte_count();
  for (const Tensor& exact : exact_) usage.reserved_bytes += exact.byte_count();
  return usage;
}

}  // namespace quantloom
