// What calibration finds for the kind kvquant: one set for each layer.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "quantloom/kv_cache/kv_format.hpp"

namespace quantloom {

// Which of 2^bits values a normalized element takes: code c where c of the bounds are below it.
struct KVTable {
  std::vector<float> bounds;  // [2^bits - 1], rising or equal
  std::vector<float> values;  // [2^bits], numbers of float16
};

// Rotary embeddings: channels i and i + rotated / 2 of a key turn together, for i < rotated / 2, by the angle
// that the token's position in its sequence has for them.
struct KVRotation {
  int64_t rotated = 0;
  std::vector<float> cosines;  // [positions, rotated / 2]
  std::vector<float> sines;    // likewise

  int64_t positions() const {
    return rotated == 0 ? 0 : static_cast<int64_t>(cosines.size()) / (rotated / 2);
  }
};

struct KVTables {
  KVTable keys;
  KVTable values;
  // Of the keys of each channel, [kv_heads, head_dim]: half of the range that codes cover and its middle,
  // numbers of float16; scales are above 0.
  std::vector<float> key_scale;
  std::vector<float> key_middle;
  // Taken off keys before they are stored and put on again when they are read; null: none.
  std::shared_ptr<const KVRotation> rotation;
};

// Throws InvalidArgument naming the member whose size or values are not those of a kvquant format with this
// shape.
void require_valid(const KVTables& tables, const KVFormat& format, int64_t kv_heads, int64_t head_dim);

}  // namespace quantloom
