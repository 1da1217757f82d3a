#include "kernels/spqr_fragments.hpp"

#include <algorithm>
#include <vector>

#include "formats/bilevel_order.hpp"
#include "formats/grouped.hpp"
#include "quantloom/formats/bit_packing.hpp"

namespace quantloom {
namespace {

// Place of the codes of the lanes of `row` in a group.
size_t parameters_at(const FragmentLayout& layout, int64_t row, int64_t group) {
  const int64_t lane = (row / fragments::kBlockRows * layout.group_count + group) * 8 + row % 8;
  return static_cast<size_t>(lane * layout.parameter_bytes);
}

// One of the planes of codes, and whether it is that of the zero points.
struct CodePlane {
  const char* name;
  int bits;
  bool zero;
};

std::vector<CodePlane> code_planes(const Spqr& format) {
  return {{"scales", format.scale_bits, false}, {"zeros", format.zero_bits, true}};
}

// Calls visit(element of the canonical plane, element of the plane "grids", whether zero points).
template <class Visit>
void for_each_grid_number(const FragmentLayout& layout, const Visit& visit) {
  for (int64_t block = 0; block < layout.grid_count; ++block) {
    for (int64_t g = 0; g < layout.group_count; ++g) {
      for (int64_t i = 0; i < 4; ++i) {
        visit(static_cast<size_t>((g * layout.grid_count + block) * 2 + i % 2),
              static_cast<size_t>((block * layout.group_count + g) * 4 + i), i >= 2);
      }
    }
  }
}

}  // namespace

void prepare_spqr_parameters(const FragmentLayout& layout, const PackedTensor& packed,
                             PreparedPlanes& prepared) {
  if (layout.k == 0) return;
  const auto out = prepared.planes.at("parameters").values<uint8_t>();
  std::vector<uint8_t> codes(static_cast<size_t>(layout.n));
  for (const CodePlane& plane : code_planes(*as_spqr(*packed.format))) {
    for (int64_t g = 0; g < layout.group_count; ++g) {
      unpack_bits(packed_row(packed.plane(plane.name), g), plane.bits, 0, codes);
      for (int64_t row = 0; row < layout.n; ++row) {
        const auto field = fragments::bilevel_field(layout.parameter_bytes, plane.zero,
                                                    static_cast<int>(row % fragments::kBlockRows / 8));
        uint8_t& byte = out[parameters_at(layout, row, g) + static_cast<size_t>(field.byte)];
        byte = static_cast<uint8_t>(byte | codes[static_cast<size_t>(row)] << field.bit);
      }
    }
  }
  const auto grids = prepared.planes.at("grids").values<uint16_t>();
  const auto scale_grids = packed.plane("scale_grids").values<uint16_t>();
  const auto zero_grids = packed.plane("zero_grids").values<uint16_t>();
  for_each_grid_number(layout, [&](size_t canonical, size_t own, bool zero) {
    grids[own] = (zero ? zero_grids : scale_grids)[canonical];
  });
}

void unprepare_spqr_parameters(const FragmentLayout& layout, const PreparedPlanes& prepared,
                               PackedTensor& packed) {
  if (layout.k == 0) return;
  const auto in = prepared.plane("parameters").values<uint8_t>();
  std::vector<uint8_t> codes(static_cast<size_t>(layout.n));
  for (const CodePlane& plane : code_planes(*as_spqr(*packed.format))) {
    Tensor& out = packed.planes.at(plane.name);
    const auto words = static_cast<size_t>(out.shape()[1]);
    for (int64_t g = 0; g < layout.group_count; ++g) {
      for (int64_t row = 0; row < layout.n; ++row) {
        const auto field = fragments::bilevel_field(layout.parameter_bytes, plane.zero,
                                                    static_cast<int>(row % fragments::kBlockRows / 8));
        const uint8_t byte = in[parameters_at(layout, row, g) + static_cast<size_t>(field.byte)];
        codes[static_cast<size_t>(row)] = static_cast<uint8_t>(byte >> field.bit & ((1U << plane.bits) - 1U));
      }
      pack_bits(codes, plane.bits, out.values<uint32_t>().subspan(static_cast<size_t>(g) * words, words));
    }
  }
  const auto grids = prepared.plane("grids").values<uint16_t>();
  const auto scale_grids = packed.planes.at("scale_grids").values<uint16_t>();
  const auto zero_grids = packed.planes.at("zero_grids").values<uint16_t>();
  for_each_grid_number(layout, [&](size_t canonical, size_t own, bool zero) {
    (zero ? zero_grids : scale_grids)[canonical] = grids[own];
  });
}

}  // namespace quantloom
