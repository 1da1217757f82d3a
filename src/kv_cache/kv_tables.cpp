#include "quantloom/kv_cache/kv_tables.hpp"

#include <cmath>
#include <string>

#include "quantloom/checked_math.hpp"
#include "quantloom/dtype.hpp"
#include "quantloom/error.hpp"

namespace quantloom {
namespace {

void require_size(std::string_view name, const std::vector<float>& values, int64_t expected) {
  if (std::ssize(values) != expected)
    throw InvalidArgument(name, text_of(values.size(), " numbers"), text_of(expected));
  for (const float value : values) {
    if (!std::isfinite(value)) throw InvalidArgument(name, text_of(value), "finite numbers");
  }
}

void require_halves(std::string_view name, const std::vector<float>& values) {
  for (const float value : values) {
    if (float_from_f16(f16_from_float(value)) != value)
      throw InvalidArgument(name, text_of(value), "numbers of float16");
  }
}

void require_table(std::string_view side, const KVTable& table, int bits) {
  const std::string bounds = text_of(side, "_bounds");
  const std::string values = text_of(side, "_values");
  require_size(bounds, table.bounds, (int64_t{1} << bits) - 1);
  require_size(values, table.values, int64_t{1} << bits);
  require_halves(values, table.values);
  for (size_t i = 1; i < table.bounds.size(); ++i) {
    if (table.bounds[i] < table.bounds[i - 1]) {
      throw InvalidArgument(bounds, text_of(table.bounds[i], " after ", table.bounds[i - 1]),
                            "rising numbers");
    }
  }
}

}  // namespace

void require_valid(const KVTables& tables, const KVFormat& format, int64_t kv_heads, int64_t head_dim) {
  require_table("key", tables.keys, format.key_bits);
  require_table("value", tables.values, format.value_bits);
  require_size("key_scale", tables.key_scale, checked_mul(kv_heads, head_dim));
  require_size("key_middle", tables.key_middle, checked_mul(kv_heads, head_dim));
  require_halves("key_scale", tables.key_scale);
  require_halves("key_middle", tables.key_middle);
  for (const float scale : tables.key_scale) {
    if (!(scale > 0)) throw InvalidArgument("key_scale", text_of(scale), "numbers above 0");
  }
  if (tables.rotation == nullptr) return;
  const KVRotation& rotation = *tables.rotation;
  if (rotation.rotated < 2 || rotation.rotated > head_dim || rotation.rotated % 2 != 0) {
    throw InvalidArgument("rotated", text_of(rotation.rotated),
                          text_of("an even number from 2 to ", head_dim));
  }
  const int64_t half = rotation.rotated / 2;
  if (rotation.cosines.size() != rotation.sines.size() || std::ssize(rotation.cosines) % half != 0) {
    throw InvalidArgument("cosines", text_of(rotation.cosines.size(), " numbers"),
                          text_of("as many as sines, a multiple of ", half));
  }
  require_size("cosines", rotation.cosines, std::ssize(rotation.cosines));
  require_size("sines", rotation.sines, std::ssize(rotation.sines));
}

}  // namespace quantloom
