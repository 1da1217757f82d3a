#include "quantloom/formats/additive.hpp"
#include "quantloom/formats/bcq.hpp"
#include "quantloom/formats/codebook.hpp"
#include "quantloom/formats/outliers.hpp"
#include "quantloom/formats/spqr.hpp"
#include "quantloom/formats/trellis.hpp"
#include "quantloom/formats/uniform.hpp"
#include "quantloom/rounding/cuda.hpp"

namespace quantloom {

bool rounds_columns_on_cuda(const Format& format) {
  return dynamic_cast<const Uniform*>(&format) != nullptr ||
         dynamic_cast<const Codebook*>(&format) != nullptr || dynamic_cast<const Bcq*>(&format) != nullptr ||
         dynamic_cast<const Spqr*>(&format) != nullptr;
}

bool rounds_on_cuda(const Format& format) {
  if (const auto* trellis = dynamic_cast<const Trellis*>(&format)) {
    return trellis->rotation > 0 && trellis->codebook.window == 16;
  }
  if (const auto* additive = dynamic_cast<const Additive*>(&format)) {
    return additive->levels == AdditiveLevels();
  }
  const auto* outliers = dynamic_cast<const Outliers*>(&format);
  return rounds_columns_on_cuda(outliers != nullptr ? *outliers->dense : format);
}

}  // namespace quantloom
