#include "kv_cache/kv_codes.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "quantloom/checked_math.hpp"
#include "quantloom/dtype.hpp"

namespace quantloom::kv_cache {
namespace {

constexpr float kSmallestScale = 0x1p-24F;

struct Grid {
  float scale = 0;
  float least = 0;
};

// A number as float16 has it, stored at `to`.
float store_half(float x, std::byte* to) {
  const uint16_t half = f16_from_float(x);
  std::memcpy(to, &half, sizeof half);
  return float_from_f16(half);
}

float load_half(const std::byte* from) {
  uint16_t half = 0;
  std::memcpy(&half, from, sizeof half);
  return float_from_f16(half);
}

// The grid of values from low to high, as float16 has it.
Grid store_grid(float low, float high, int bits, std::byte* scale, std::byte* least) {
  const float step = std::max((high - low) / static_cast<float>((1 << bits) - 1), kSmallestScale);
  return {store_half(step, scale), store_half(low, least)};
}

uint8_t code_of(float x, const Grid& grid, int bits) {
  const float steps = std::nearbyint((x - grid.least) / grid.scale);
  return static_cast<uint8_t>(std::clamp(steps, 0.0F, static_cast<float>((1 << bits) - 1)));
}

// Writes `count` codes as a dense stream of `bytes` bytes.
void pack_row(const uint8_t* codes, int64_t count, int bits, std::byte* row, int64_t bytes) {
  std::memset(row, 0, static_cast<size_t>(bytes));
  uint32_t held = 0;
  int filled = 0;
  for (int64_t i = 0; i < count; ++i) {
    held |= static_cast<uint32_t>(codes[i] & ((1U << bits) - 1)) << filled;
    filled += bits;
    for (; filled >= 8; filled -= 8, held >>= 8) *row++ = static_cast<std::byte>(held & 0xffU);
  }
  if (filled > 0) *row = static_cast<std::byte>(held);
}

uint8_t code_at(const std::byte* row, int64_t i, int bits) {
  const int64_t bit = i * bits;
  auto word = static_cast<uint32_t>(row[bit / 8]);
  if (bit % 8 + bits > 8) word |= static_cast<uint32_t>(row[bit / 8 + 1]) << 8;
  return static_cast<uint8_t>((word >> (bit % 8)) & ((1U << bits) - 1));
}

// Significant digits of integers (formats/sdr.hpp) behind a shift for each group.
void encode_digits(const KVPart& part, int64_t head_dim, const float* x, int64_t slot, std::byte* record,
                   uint8_t* codes) {
  float largest = 0;
  for (int64_t d = 0; d < head_dim; ++d) largest = std::max(largest, std::abs(x[d]));
  const uint16_t stored =
      largest == 0 ? f16_from_float(1.0F) : f16_from_float(std::max(largest / 127.0F, kSmallestScale));
  std::memcpy(record + part.parameters + slot * 2, &stored, sizeof stored);
  const float scale = float_from_f16(stored);
  const int half = 1 << (part.bits - 1);
  std::vector<uint8_t> shifts(static_cast<size_t>(part.groups));
  for (int64_t g = 0; g < part.groups; ++g) {
    const int64_t end = std::min((g + 1) * part.group, head_dim);
    const auto integer = [&](int64_t d) { return std::clamp(std::nearbyint(x[d] / scale), -127.0F, 127.0F); };
    int most = 0;
    for (int64_t d = g * part.group; d < end; ++d)
      most = std::max(most, static_cast<int>(std::abs(integer(d))));
    const int shift =
        std::max(0, static_cast<int>(std::bit_width(static_cast<unsigned>(most))) - (part.bits - 1));
    shifts[static_cast<size_t>(g)] = static_cast<uint8_t>(shift);
    for (int64_t d = g * part.group; d < end; ++d) {
      const float cut = std::nearbyint(integer(d) / static_cast<float>(1 << shift));
      codes[d] = static_cast<uint8_t>(
          static_cast<int>(std::clamp(cut, static_cast<float>(-half), static_cast<float>(half - 1))));
    }
  }
  pack_row(shifts.data(), part.groups, part.shift_bits, record + part.shifts + slot * part.shift_bytes,
           part.shift_bytes);
}

void decode_digits(const KVPart& part, int64_t head_dim, const std::byte* record, int64_t slot, float* out) {
  uint16_t stored = 0;
  std::memcpy(&stored, record + part.parameters + slot * 2, sizeof stored);
  const float scale = float_from_f16(stored);
  const std::byte* row = record + part.codes + slot * part.row_bytes;
  const std::byte* shifts = record + part.shifts + slot * part.shift_bytes;
  const int half = 1 << (part.bits - 1);
  for (int64_t d = 0; d < head_dim; ++d) {
    const int code = (code_at(row, d, part.bits) ^ half) - half;
    out[d] = scale * static_cast<float>(code * (1 << code_at(shifts, d / part.group, part.shift_bits)));
  }
}

// The range of a token that is least when `count` elements are left out, at either end.
Grid least_range(const float* x, int64_t head_dim, int64_t count) {
  std::array<float, 1024> sorted{};
  std::copy_n(x, head_dim, sorted.begin());
  std::sort(sorted.begin(), sorted.begin() + head_dim);
  const auto at = [&](int64_t i) { return sorted[static_cast<size_t>(i)]; };
  count = std::min(count, head_dim - 1);
  int64_t best = 0;
  for (int64_t below = 1; below <= count; ++below) {
    if (at(head_dim - 1 - count + below) - at(below) < at(head_dim - 1 - count + best) - at(best))
      best = below;
  }
  const float low = at(best);
  const float high = at(head_dim - 1 - count + best);
  const float half = std::max((high - low) / 2, kSmallestScale);
  // The sum of -0 and -0 would depend on how equal values are sorted.
  const float middle = (high + low) / 2 + 0.0F;
  return {float_from_f16(f16_from_float(half)), float_from_f16(f16_from_float(middle))};
}

// Codes of a table, and the elements that they miss most, the lower channel first among equals.
void encode_by_table(const KVPart& part, int64_t head_dim, const float* x, int64_t slot, std::byte* record,
                     const HeadTables& tables, uint8_t* codes) {
  const int64_t first = part.outliers_before(slot, head_dim);
  const int64_t count = part.outliers_before(slot + 1, head_dim) - first;
  Grid range;
  if (part.codec == KVCodec::token_table) {
    range = least_range(x, head_dim, count);
    const std::array<uint16_t, 2> pair = {f16_from_float(range.scale), f16_from_float(range.least)};
    std::memcpy(record + part.parameters + slot * 4, pair.data(), sizeof pair);
  }
  const int bounds = (1 << part.bits) - 1;
  std::array<float, 1024> missing{};
  for (int64_t d = 0; d < head_dim; ++d) {
    if (part.codec == KVCodec::channel_table) range = {tables.scale[d], tables.middle[d]};
    const float normalized = (x[d] - range.least) / range.scale;
    int code = 0;
    while (code < bounds && tables.bounds[code] < normalized) ++code;
    codes[d] = static_cast<uint8_t>(code);
    missing[static_cast<size_t>(d)] = x[d] - (tables.values[code] * range.scale + range.least);
  }
  std::array<int16_t, 1024> order{};
  for (int64_t d = 0; d < head_dim; ++d) order[static_cast<size_t>(d)] = static_cast<int16_t>(d);
  const auto error = [&](int16_t d) { return std::abs(missing[static_cast<size_t>(d)]); };
  std::partial_sort(order.begin(), order.begin() + count, order.begin() + head_dim,
                    [&](int16_t a, int16_t b) { return error(a) != error(b) ? error(a) > error(b) : a < b; });
  std::sort(order.begin(), order.begin() + count);
  for (int64_t i = 0; i < count; ++i) {
    const int16_t d = order[static_cast<size_t>(i)];
    const std::array<uint16_t, 2> entry = {static_cast<uint16_t>(slot * head_dim + d),
                                           f16_from_float(missing[static_cast<size_t>(d)])};
    std::memcpy(record + part.outliers + (first + i) * 4, entry.data(), sizeof entry);
  }
}

}  // namespace

void add_outliers(const KVPart& part, int64_t head_dim, const std::byte* record, int64_t slot, int64_t count,
                  float* out) {
  const int64_t end = part.outliers_before(slot + count, head_dim);
  for (int64_t i = part.outliers_before(slot, head_dim); i < end; ++i) {
    std::array<uint16_t, 2> entry{};
    std::memcpy(entry.data(), record + part.outliers + i * 4, sizeof entry);
    out[entry[0] - slot * head_dim] += float_from_f16(entry[1]);
  }
}

void encode_channels(const KVPart& part, int64_t head_dim, const float* x, int64_t group, std::byte* record) {
  std::vector<Grid> grids(static_cast<size_t>(head_dim));
  for (int64_t d = 0; d < head_dim; ++d) {
    float low = x[d];
    float high = x[d];
    for (int64_t t = 1; t < part.group; ++t) {
      low = std::min(low, x[t * head_dim + d]);
      high = std::max(high, x[t * head_dim + d]);
    }
    std::byte* grid = record + part.parameters + group * head_dim * 4;
    const ChannelPlace place(part.bits, head_dim, static_cast<int>(d));
    grids[static_cast<size_t>(d)] = store_grid(low, high, part.bits, grid + place.scale, grid + place.least);
  }
  std::vector<uint8_t> codes(static_cast<size_t>(head_dim));
  for (int64_t t = 0; t < part.group; ++t) {
    for (int64_t d = 0; d < head_dim; ++d) {
      codes[static_cast<size_t>(d)] = code_of(x[t * head_dim + d], grids[static_cast<size_t>(d)], part.bits);
    }
    pack_row(codes.data(), head_dim, part.bits,
             record + part.codes + (group * part.group + t) * part.row_bytes, part.row_bytes);
  }
}

void encode_token(const KVPart& part, int64_t head_dim, const float* x, int64_t slot, std::byte* record,
                  const HeadTables& tables) {
  std::array<uint8_t, 1024> codes{};
  if (part.codec == KVCodec::digits) {
    encode_digits(part, head_dim, x, slot, record, codes.data());
  } else if (part.has_table()) {
    encode_by_table(part, head_dim, x, slot, record, tables, codes.data());
  } else {
    for (int64_t g = 0; g < part.groups; ++g) {
      const int64_t begin = g * part.group;
      const int64_t end = std::min(begin + part.group, head_dim);
      const auto [low, high] = std::minmax_element(x + begin, x + end);
      std::byte* pair = record + part.parameters + (slot * part.groups + g) * 4;
      const Grid grid = store_grid(*low, *high, part.bits, pair, pair + 2);
      for (int64_t d = begin; d < end; ++d) codes[static_cast<size_t>(d)] = code_of(x[d], grid, part.bits);
    }
  }
  pack_row(codes.data(), head_dim, part.bits, record + part.codes + slot * part.row_bytes, part.row_bytes);
}

void decode_reference(const KVPart& part, int64_t head_dim, const std::byte* record, int64_t slot,
                      int64_t count, float* out, const HeadTables& tables) {
  float* row_out = out;
  for (int64_t t = slot; t < slot + count; ++t, row_out += head_dim) {
    if (part.codec == KVCodec::digits) {
      decode_digits(part, head_dim, record, t, row_out);
      continue;
    }
    const std::byte* row = record + part.codes + t * part.row_bytes;
    for (int64_t d = 0; d < head_dim; ++d) {
      const uint8_t code = code_at(row, d, part.bits);
      if (part.codec == KVCodec::channel_table) {
        row_out[d] = tables.values[code] * tables.scale[d] + tables.middle[d];
        continue;
      }
      const std::byte* from = record + part.parameters;
      if (part.codec == KVCodec::channel_grid) {
        const ChannelPlace place(part.bits, head_dim, static_cast<int>(d));
        from += t / part.group * head_dim * 4;
        row_out[d] = load_half(from + place.scale) * static_cast<float>(code) + load_half(from + place.least);
        continue;
      }
      from += (part.codec == KVCodec::token_grid ? t * part.groups + d / part.group : t) * 4;
      row_out[d] = load_half(from) * (part.has_table() ? tables.values[code] : static_cast<float>(code)) +
                   load_half(from + 2);
    }
  }
  if (part.has_table()) add_outliers(part, head_dim, record, slot, count, out);
}

}  // namespace quantloom::kv_cache
