// Keys, values and queries for the tests of caches.
#pragma once

#include <cmath>
#include <cstring>
#include <memory>

#include "quantloom/kv_cache/kv_cache.hpp"
#include "test_matrices.hpp"

namespace quantloom::testing {

// Random vectors [sequences, heads, tokens, head_dim] in memory of their own.
struct RandomTokens {
  RandomTokens(const KVShape& shape, int64_t tokens, uint64_t seed)
      : shape(shape),
        tokens(tokens),
        memory(shape.dtype, {shape.sequences, shape.kv_heads, tokens, shape.head_dim}) {
    std::vector<float> values = normal_values(memory.element_count(), seed);
    for (size_t i = 0; i < values.size(); ++i) {
      // Some channels are large, some tokens small.
      const auto channel = static_cast<int64_t>(i) % shape.head_dim;
      const int64_t token = static_cast<int64_t>(i) / shape.head_dim % std::max<int64_t>(tokens, 1);
      if (channel == shape.head_dim / 3) values[i] = values[i] * 8 + 5;
      if (token % 11 == 3) values[i] *= 0.125F;
      set(static_cast<int64_t>(i), values[i]);
    }
  }

  void set(int64_t i, float value) {
    const auto at = static_cast<size_t>(i);
    if (shape.dtype == DType::f32) memory.values<float>()[at] = value;
    if (shape.dtype == DType::f16) memory.values<uint16_t>()[at] = f16_from_float(value);
    if (shape.dtype == DType::bf16) memory.values<uint16_t>()[at] = bf16_from_float(value);
  }

  // The tokens [first, first + count) of the sequences [sequence, sequence + sequences).
  KVTokens view(int64_t first, int64_t count, int64_t sequence = 0, int64_t sequences = -1) const {
    const int64_t row = shape.head_dim;
    KVTokens view{
        memory.bytes(), shape.dtype, sequences < 0 ? shape.sequences : sequences,       shape.kv_heads,
        count,          row,         {shape.kv_heads * tokens * row, tokens * row, row}};
    view.data = view.row(sequence, 0, first);
    return view;
  }
  KVTokens all() const { return view(0, tokens); }

  KVShape shape;
  int64_t tokens;
  Tensor memory;
};

// Tables as a calibration could give them; keys turn in `rotated` channels, 3/4 of them if that is negative.
inline std::shared_ptr<const KVTables> random_tables(const KVFormat& format, const KVShape& shape,
                                                     int64_t rotated = -1) {
  auto tables = std::make_shared<KVTables>();
  const auto table = [](int bits, uint64_t seed) {
    KVTable result;
    result.values = random_table(size_t{1} << bits, seed);
    for (size_t i = 1; i < result.values.size(); ++i) {
      result.bounds.push_back((result.values[i - 1] + result.values[i]) / 2);
    }
    return result;
  };
  tables->keys = table(format.key_bits, 901);
  tables->values = table(format.value_bits, 902);
  const CounterRandom random(903);
  for (int64_t i = 0; i < shape.kv_heads * shape.head_dim; ++i) {
    const auto at = static_cast<uint64_t>(i);
    tables->key_scale.push_back(
        float_from_f16(f16_from_float(static_cast<float>(1 + 2 * random.uniform(at)))));
    tables->key_middle.push_back(float_from_f16(f16_from_float(static_cast<float>(random.normal(at)))));
  }
  if (rotated == 0) return tables;
  auto rotation = std::make_shared<KVRotation>();
  rotation->rotated = rotated < 0 ? shape.head_dim * 3 / 4 : rotated;
  for (int64_t t = 0; t < 1200; ++t) {
    for (int64_t i = 0; i < rotation->rotated / 2; ++i) {
      const double angle = static_cast<double>(t) * std::pow(100.0, -static_cast<double>(i) / 10);
      rotation->cosines.push_back(static_cast<float>(std::cos(angle)));
      rotation->sines.push_back(static_cast<float>(std::sin(angle)));
    }
  }
  tables->rotation = rotation;
  return tables;
}

inline KVCache make_cache(const KVFormat& format, const KVShape& shape, int64_t capacity = 0) {
  return KVCache(format, shape, capacity,
                 format.kind == KVKind::kvquant ? random_tables(format, shape) : nullptr);
}

// Everything that two caches hold for a sequence of each is the same, bit for bit.
inline bool same_sequence(const KVCache& a, int64_t s, const KVCache& b, int64_t t) {
  if (a.length(s) != b.length(t) || !(a.format() == b.format())) return false;
  const KVLayout& layout = a.layout();
  for (int64_t h = 0; h < a.shape().kv_heads; ++h) {
    const int64_t coded = std::max(a.coded(KVSide::keys, s), a.coded(KVSide::values, s));
    for (int64_t page = 0; page * layout.page_tokens < coded; ++page) {
      if (std::memcmp(a.record(s, page, h), b.record(t, page, h), static_cast<size_t>(layout.record_bytes)) !=
          0) {
        return false;
      }
    }
    const auto count = static_cast<size_t>(a.length(s) * a.shape().head_dim);
    std::vector<float> x(count + 16);
    std::vector<float> y(count + 16);
    for (const KVSide side : {KVSide::keys, KVSide::values}) {
      if (a.coded(side, s) != b.coded(side, t)) return false;
      a.read(side, s, h, 0, a.length(s), x.data());
      b.read(side, t, h, 0, b.length(t), y.data());
      if (std::memcmp(x.data(), y.data(), count * sizeof(float)) != 0) return false;
    }
  }
  return true;
}

}  // namespace quantloom::testing
