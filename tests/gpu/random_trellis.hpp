// Random trellis matrices.
#pragma once

#include <algorithm>
#include <memory>

#include "quantloom/formats/trellis.hpp"
#include "quantloom/packed_tensor.hpp"

namespace quantloom {

// Any bits are rings. Scales of both signs, or ones if `exact`; a table as the format has it.
template <class Draws>
PackedTensor random_trellis(std::shared_ptr<const Format> format, int64_t n, int64_t k, bool exact,
                            Draws& draws) {
  PackedTensor packed{format, n, k, {}};
  for (const PlaneSpec& spec : format->planes(n, k)) {
    Tensor plane(spec.dtype, spec.shape);
    if (spec.name == "codes") {
      for (uint32_t& word : plane.values<uint32_t>()) word = static_cast<uint32_t>(draws.word() >> 32);
    } else if (spec.name == "table") {
      const auto& table = dynamic_cast<const Trellis&>(*format).codebook.table;
      std::ranges::copy(table, plane.values<uint16_t>().begin());
    } else {
      for (uint16_t& scale : plane.values<uint16_t>()) {
        const float size = exact ? 1.0F : 0.125F + 0.125F * draws.uniform();
        scale = f16_from_float(!exact && draws.below(2) == 0 ? -size : size);
      }
    }
    packed.planes.emplace(spec.name, std::move(plane));
  }
  return packed;
}

}  // namespace quantloom
