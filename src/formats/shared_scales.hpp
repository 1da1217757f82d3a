// Encoders in which rows share a scale.
#pragma once

namespace quantloom {

class SharedScales {
 public:
  virtual ~SharedScales() = default;
  // Whether the rows of each step of ColumnEncoder::rows_per_step() have one scale for a group of columns;
  // fit() then takes the mean of their factors.
  virtual bool shares_scales() const = 0;
};

// The same of an encoder, which need not be one of these.
template <class Encoder>
bool shares_scales(const Encoder& encoder) {
  const auto* const shared = dynamic_cast<const SharedScales*>(&encoder);
  return shared != nullptr && shared->shares_scales();
}

}  // namespace quantloom
