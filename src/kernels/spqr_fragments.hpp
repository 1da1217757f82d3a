// The scalar reference of scales and zero points of the format "spqr" in fragment order.
#pragma once

#include "kernels/fragment_layout.hpp"
#include "quantloom/formats/outliers.hpp"
#include "quantloom/formats/spqr.hpp"

namespace quantloom {

// The format "spqr" that a format is, or has outliers beside; or null.
inline const Spqr* as_spqr(const Format& format) {
  const auto* outliers = dynamic_cast<const Outliers*>(&format);
  return dynamic_cast<const Spqr*>(outliers != nullptr ? outliers->dense.get() : &format);
}

// From the planes scales, zeros, scale_grids and zero_grids to parameters and grids, and back. Planes to be
// filled are zero.
void prepare_spqr_parameters(const FragmentLayout& layout, const PackedTensor& packed,
                             PreparedPlanes& prepared);
void unprepare_spqr_parameters(const FragmentLayout& layout, const PreparedPlanes& prepared,
                               PackedTensor& packed);

}  // namespace quantloom
