// What calibration found, and matrices of Hadamard, in memory of the current device.
#pragma once

#include <memory>

#include "kv_cache/append.hpp"
#include "kv_cache/device_memory.hpp"
#include "quantloom/kv_cache/kv_tables.hpp"

namespace quantloom::kv_cache {

class TableMemory {
 public:
  // tables may be null.
  TableMemory(const KVFormat& format, const KVLayout& layout, const KVTables* tables);

  // Sets the members of `view` that belong to tables.
  void describe(KVView& view) const;
  const KVBasis& basis() const { return basis_; }
  bool rotated() const { return rotation_ != nullptr; }
  int64_t bytes() const { return memory_.bytes(); }

 private:
  struct Rotation;
  static std::shared_ptr<const Rotation> shared_rotation(const std::shared_ptr<const KVRotation>& rotation);

  DeviceMemory memory_;
  KVView parts_;  // those members
  KVBasis basis_;
  // Rotary embeddings are large, and the same for all layers of a model.
  std::shared_ptr<const Rotation> rotation_;
};

}  // namespace quantloom::kv_cache
