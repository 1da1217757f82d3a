#include "kv_cache/table_memory.hpp"

#include <cmath>
#include <complex>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#include "quantloom/checked_math.hpp"
#include "quantloom/transforms/hadamard.hpp"

namespace quantloom::kv_cache {
namespace {

// Arrays next to each other, each at a multiple of 16 bytes.
class Packing {
 public:
  template <class T>
  int64_t add(const std::vector<T>& values) {
    const auto at = static_cast<int64_t>(bytes_.size());
    bytes_.resize(
        static_cast<size_t>(checked_pad(at + std::ssize(values) * static_cast<int64_t>(sizeof(T)), 16)));
    if (!values.empty()) std::memcpy(bytes_.data() + at, values.data(), values.size() * sizeof(T));
    return at;
  }
  DeviceMemory upload() const {
    DeviceMemory memory(std::ssize(bytes_));
    check_cuda(cudaMemcpy(memory.data(), bytes_.data(), bytes_.size(), cudaMemcpyHostToDevice),
               "copy to the device");
    return memory;
  }

 private:
  std::vector<std::byte> bytes_;
};

// Whether the rotation of each position is, nearly, that of the 32nd before it turned on by the distance: so
// it is if angles are products of positions and frequencies, but for their rounding to float32.
bool composes(const KVRotation& rotation) {
  constexpr int64_t kRun = 32;
  constexpr double kTolerance = 1.0 / 64;
  constexpr double kLargest = 16;  // of a scale, and its inverse
  using Turn = std::complex<double>;
  const int64_t half = rotation.rotated / 2;
  if (rotation.positions() < kRun) return false;
  const auto at = [&](int64_t position, int64_t i) {
    const auto from = static_cast<size_t>(position * half + i);
    return Turn(static_cast<double>(rotation.cosines[from]), static_cast<double>(rotation.sines[from]));
  };
  for (int64_t i = 0; i < half; ++i) {
    const double scale = std::abs(at(0, i));
    if (!(scale <= kLargest && scale * kLargest >= 1)) return false;
  }
  for (int64_t position = kRun; position < rotation.positions(); ++position) {
    for (int64_t i = 0; i < half; ++i) {
      const Turn composed = at(position / kRun * kRun, i) * at(position % kRun, i) / at(0, i);
      if (!(std::abs(composed - at(position, i)) <= kTolerance * std::abs(at(0, i)))) return false;
    }
  }
  return true;
}

}  // namespace

struct TableMemory::Rotation {
  std::shared_ptr<const KVRotation> source;  // so that its address stays its own
  DeviceMemory memory;
  int64_t sines = 0;
  bool composes = false;
};

std::shared_ptr<const TableMemory::Rotation> TableMemory::shared_rotation(
    const std::shared_ptr<const KVRotation>& rotation) {
  static std::mutex mutex;
  static std::map<std::pair<int, const KVRotation*>, std::weak_ptr<const Rotation>> kept;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "current CUDA device");
  const std::lock_guard lock(mutex);
  std::erase_if(kept, [](const auto& entry) { return entry.second.expired(); });
  auto& place = kept[{device, rotation.get()}];
  if (auto found = place.lock()) return found;
  Packing packing;
  packing.add(rotation->cosines);
  const int64_t sines = packing.add(rotation->sines);
  auto made =
      std::make_shared<const Rotation>(Rotation{rotation, packing.upload(), sines, composes(*rotation)});
  place = made;
  return made;
}

TableMemory::TableMemory(const KVFormat& format, const KVLayout& layout, const KVTables* tables) {
  if (format.hadamard) {
    const HadamardSize size = hadamard_size(layout.head_dim).value();
    basis_.order = static_cast<int>(size.order);
    basis_.power = size.power;
    basis_.factor = static_cast<float>(1 / std::sqrt(static_cast<double>(layout.head_dim)));
    if (size.order > 1) {
      Packing packing;
      packing.add(hadamard_base(size.order));
      memory_ = packing.upload();
      basis_.base = reinterpret_cast<const int8_t*>(memory_.data());
    }
  }
  if (tables == nullptr) return;
  std::vector<uint16_t> ranges;
  for (size_t i = 0; i < tables->key_scale.size(); ++i) {
    ranges.push_back(f16_from_float(tables->key_scale[i]));
    ranges.push_back(f16_from_float(tables->key_middle[i]));
  }
  Packing packing;
  const int64_t key_bounds = packing.add(tables->keys.bounds);
  const int64_t key_values = packing.add(tables->keys.values);
  const int64_t value_bounds = packing.add(tables->values.bounds);
  const int64_t value_values = packing.add(tables->values.values);
  const int64_t key_ranges = packing.add(ranges);
  memory_ = packing.upload();
  const auto floats = [&](int64_t at) { return reinterpret_cast<const float*>(memory_.data() + at); };
  parts_.key_bounds = floats(key_bounds);
  parts_.key_values = floats(key_values);
  parts_.value_bounds = floats(value_bounds);
  parts_.value_values = floats(value_values);
  parts_.key_ranges = reinterpret_cast<const __half2*>(memory_.data() + key_ranges);
  if (tables->rotation == nullptr) return;
  rotation_ = shared_rotation(tables->rotation);
  parts_.cosines = reinterpret_cast<const float*>(rotation_->memory.data());
  parts_.sines = reinterpret_cast<const float*>(rotation_->memory.data() + rotation_->sines);
  parts_.rotated = tables->rotation->rotated;
  parts_.positions = tables->rotation->positions();
  parts_.composes = rotation_->composes;
}

void TableMemory::describe(KVView& view) const {
  view.key_bounds = parts_.key_bounds;
  view.key_values = parts_.key_values;
  view.value_bounds = parts_.value_bounds;
  view.value_values = parts_.value_values;
  view.key_ranges = parts_.key_ranges;
  view.cosines = parts_.cosines;
  view.sines = parts_.sines;
  view.rotated = parts_.rotated;
  view.positions = parts_.positions;
  view.composes = parts_.composes;
}

}  // namespace quantloom::kv_cache
