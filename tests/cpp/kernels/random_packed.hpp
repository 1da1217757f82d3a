// Random packed tensors for the tests of kernels: planes drawn directly, so that no rounding is involved.
#pragma once

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "quantloom/formats/bit_packing.hpp"
#include "quantloom/formats/codebook.hpp"
#include "quantloom/formats/uniform.hpp"
#include "quantloom/random.hpp"

namespace quantloom::testing {

inline void store_scale(Tensor& scales, int64_t i, float value) {
  const auto at = static_cast<size_t>(i);
  if (scales.dtype() == DType::f16) {
    scales.values<uint16_t>()[at] = f16_from_float(value);
  } else if (scales.dtype() == DType::bf16) {
    scales.values<uint16_t>()[at] = bf16_from_float(value);
  } else {
    scales.values<float>()[at] = value;
  }
}

inline float scale_at(const Tensor& scales, int64_t i) {
  const auto at = static_cast<size_t>(i);
  if (scales.dtype() == DType::f16) return float_from_f16(scales.values<uint16_t>()[at]);
  if (scales.dtype() == DType::bf16) return float_from_bf16(scales.values<uint16_t>()[at]);
  return scales.values<float>()[at];
}

// Codes, zero points and (if asked) the groups of columns at random; scales in [0.01, 0.02).
inline PackedTensor random_packed(int64_t n, int64_t k, const std::shared_ptr<const GroupedFormat>& shared,
                                  uint64_t seed, bool group_index) {
  const GroupedFormat& format = *shared;
  const auto* codebook = dynamic_cast<const Codebook*>(&format);
  const uint64_t code_count = codebook != nullptr ? codebook->table.size() : uint64_t{1} << format.bits;
  const CounterRandom random(seed);
  uint64_t at = 0;
  PackedTensor packed;
  packed.format = shared;
  packed.n = n;
  packed.k = k;
  const auto fill_rows = [&](Tensor& plane, int64_t rows, int64_t count) {
    const int64_t words = packed_words(count, format.bits);
    std::vector<uint8_t> codes(static_cast<size_t>(count));
    for (int64_t r = 0; r < rows; ++r) {
      for (uint8_t& code : codes) code = static_cast<uint8_t>(random.below(at++, code_count));
      pack_bits(codes, format.bits,
                plane.values<uint32_t>().subspan(static_cast<size_t>(r * words), static_cast<size_t>(words)));
    }
  };
  for (const PlaneSpec& spec : format.planes(n, k)) {
    if (spec.optional && !group_index) continue;
    Tensor plane(spec.dtype, spec.shape);
    if (spec.name == "codes") {
      fill_rows(plane, n, k);
    } else if (spec.name == "scales") {
      for (int64_t i = 0; i < plane.element_count(); ++i) {
        store_scale(plane, i, static_cast<float>(0.01 + 0.01 * random.uniform(at++)));
      }
    } else if (spec.name == "codebook") {
      const auto table = plane.values<uint16_t>();
      std::transform(codebook->table.begin(), codebook->table.end(), table.begin(), f16_from_float);
    } else if (spec.name == "zeros") {
      fill_rows(plane, spec.shape[0], format.group_size == Uniform::kPerTensor ? 1 : n);
    } else if (spec.name == "group_index") {
      std::vector<int32_t> order(static_cast<size_t>(k));
      std::iota(order.begin(), order.end(), 0);
      for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.below(at++, i)]);
      for (int64_t c = 0; c < k; ++c) {
        plane.values<int32_t>()[static_cast<size_t>(order[static_cast<size_t>(c)])] =
            static_cast<int32_t>(c / format.columns_per_group(k));
      }
    }
    packed.planes.emplace(spec.name, std::move(plane));
  }
  return packed;
}

inline PackedTensor random_packed(int64_t n, int64_t k, const Uniform& format, uint64_t seed,
                                  bool group_index) {
  return random_packed(n, k, std::make_shared<const Uniform>(format), seed, group_index);
}

inline PackedTensor random_packed(int64_t n, int64_t k, const Codebook& format, uint64_t seed,
                                  bool group_index) {
  return random_packed(n, k, std::make_shared<const Codebook>(format), seed, group_index);
}

// What the planes of a uniform tensor say, element by element: the slow way.
struct Unpacked {
  std::vector<uint8_t> codes;   // [n, k]
  std::vector<float> scales;    // [n, G]
  std::vector<float> zeros;     // [n, G]; the constant of a symmetric grid
  std::vector<int32_t> groups;  // [k]
  int64_t group_count = 0;
};

inline Unpacked unpack(const PackedTensor& packed) {
  const auto& format = dynamic_cast<const Uniform&>(*packed.format);
  const int64_t n = packed.n;
  const int64_t k = packed.k;
  const bool per_tensor = format.group_size == Uniform::kPerTensor;
  Unpacked out;
  out.group_count = format.group_count(k);
  out.codes.resize(static_cast<size_t>(n * k));
  const int64_t words = packed_words(k, format.bits);
  for (int64_t r = 0; r < n; ++r) {
    unpack_bits(packed.plane("codes").values<uint32_t>().subspan(static_cast<size_t>(r * words),
                                                                 static_cast<size_t>(words)),
                format.bits, 0,
                std::span(out.codes).subspan(static_cast<size_t>(r * k), static_cast<size_t>(k)));
  }
  const int64_t zero_words = packed_words(per_tensor ? 1 : n, format.bits);
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t g = 0; g < out.group_count; ++g) {
      out.scales.push_back(scale_at(packed.plane("scales"), per_tensor ? 0 : r * out.group_count + g));
      float zero = format.symmetric_zero_point();
      if (!format.symmetric) {
        uint8_t code = 0;
        unpack_bits(
            packed.plane("zeros").values<uint32_t>().subspan(
                per_tensor ? 0 : static_cast<size_t>(g * zero_words), static_cast<size_t>(zero_words)),
            format.bits, per_tensor ? 0 : r, {&code, 1});
        zero = static_cast<float>(code);
      }
      out.zeros.push_back(zero);
    }
  }
  for (int64_t c = 0; c < k; ++c) {
    out.groups.push_back(packed.planes.contains("group_index")
                             ? packed.plane("group_index").values<int32_t>()[static_cast<size_t>(c)]
                             : static_cast<int32_t>(c / format.columns_per_group(k)));
  }
  return out;
}

}  // namespace quantloom::testing
