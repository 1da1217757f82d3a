// Matrices in register order (register_order.hpp), on the CPU.
#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "formats/grouped.hpp"
#include "kernels/integer_layout.hpp"
#include "quantloom/formats/bit_packing.hpp"

namespace quantloom {
namespace {

using registers::CodePlace;

// Zero points of a row, one for each group; the center of a symmetric grid.
std::vector<int> zeros_of_row(const IntegerLayout& layout, const std::map<std::string, Tensor>& planes,
                              int64_t row) {
  const int64_t groups = layout.grouped() ? ceil_div(layout.k, layout.group_columns) : 1;
  std::vector<int> zeros(static_cast<size_t>(groups), layout.center());
  if (!layout.asymmetric || layout.k == 0) return zeros;
  for (int64_t group = 0; group < groups; ++group) {
    uint8_t zero = 0;
    unpack_bits(packed_row(planes.at("zeros"), group), layout.bits, layout.per_tensor ? 0 : row, {&zero, 1});
    zeros[static_cast<size_t>(group)] = zero;
  }
  return zeros;
}

struct Place {
  size_t byte;
  int shift;
};

Place place_of(const IntegerLayout& layout, int64_t row, int64_t column) {
  const CodePlace place =
      registers::place_of_code(static_cast<int>(row % registers::kRows),
                               static_cast<int>(column % registers::kColumns), layout.nibbles());
  const int64_t record = row / registers::kRows * layout.blocks + column / registers::kColumns;
  return {static_cast<size_t>(record * layout.record_bytes() + place.byte), place.shift};
}

int stored_offset(const IntegerLayout& layout, int zero) {
  return layout.zeros_in_codes() ? zero : layout.stored_center();
}

}  // namespace

void require_consecutive(const IntegerLayout& layout, const std::map<std::string, Tensor>& planes) {
  if (layout.grouped() && planes.contains("group_index")) {
    throw Unsupported("integer products take groups of consecutive columns, not those of a group_index");
  }
}

void fill_records(const IntegerLayout& layout, const PackedTensor& packed, IntegerPlanes& prepared) {
  const auto bytes = prepared.planes.at("integers").values<int8_t>();
  const auto rows = prepared.planes.at("rows").values<int32_t>();
  const int mask = layout.nibbles() ? 15 : 255;
  std::vector<uint8_t> codes(static_cast<size_t>(layout.k));
  for (int64_t row = 0; row < layout.n; ++row) {
    unpack_bits(packed_row(packed.plane("codes"), row), layout.bits, 0, codes);
    const std::vector<int> zeros = zeros_of_row(layout, packed.planes, row);
    const auto zero_at = [&](int64_t column) {
      return zeros[static_cast<size_t>(layout.grouped() ? column / layout.group_columns : 0)];
    };
    int32_t sum = 0;
    for (int64_t c = 0; c < layout.k; ++c) {
      const int value = codes[static_cast<size_t>(c)] - stored_offset(layout, zero_at(c));
      const Place place = place_of(layout, row, c);
      auto& byte = bytes[place.byte];
      byte = static_cast<int8_t>(static_cast<uint8_t>(byte) | (value & mask) << place.shift);
      sum += value;
    }
    int32_t* const terms = rows.data() + 4 * row;
    if (!layout.grouped()) {
      const bool scaled = layout.k > 0 || layout.per_tensor;
      const float scale = scaled ? scale_at(packed.plane("scales"), layout.per_tensor ? 0 : row) : 0.0F;
      terms[0] = std::bit_cast<int32_t>(scale);
      terms[1] = sum;
      terms[2] = layout.k > 0 ? zeros[0] - layout.center() : 0;
      continue;
    }
    const int64_t groups = std::ssize(zeros);
    double total = 0;
    for (int64_t first = 0; first < layout.k; first += layout.step_columns) {
      const int64_t group = first / layout.group_columns;
      const float scale = scale_at(packed.plane("scales"), row * groups + group);
      int32_t own = 0;
      for (int64_t c = first; c < std::min(first + layout.step_columns, layout.k); ++c) {
        own += codes[static_cast<size_t>(c)] - zero_at(c);
      }
      total += static_cast<double>(scale) * own;
      const int place =
          registers::place_of_term(static_cast<int>(row % registers::kRows),
                                   static_cast<int>(first % registers::kColumns / layout.step_columns),
                                   layout.nibbles(), layout.pairs());
      const int64_t record = row / registers::kRows * layout.blocks + first / registers::kColumns;
      int8_t* const at = bytes.data() + record * layout.record_bytes() + place;
      const bool shifted = layout.nibbles() && !layout.pairs();  // codes come multiplied by 16
      const float stored = shifted ? scale * 0.0625F : scale;
      std::memcpy(at, &stored, 4);
      if (!layout.pairs()) continue;
      const int zero = zeros[static_cast<size_t>(group)];
      const uint32_t word = layout.nibbles()
                                ? 0x01010101U * static_cast<uint32_t>(zero)
                                : std::bit_cast<uint32_t>(static_cast<float>(layout.center() - zero));
      std::memcpy(at + 4, &word, 4);
    }
    terms[0] = std::bit_cast<int32_t>(layout.k > 0 ? 1.0F : 0.0F);
    terms[1] = std::bit_cast<int32_t>(static_cast<float>(total));
  }
}

void codes_of_records(const IntegerLayout& layout, const IntegerPlanes& prepared, PackedTensor& packed) {
  const auto bytes = prepared.plane("integers").values<int8_t>();
  Tensor& plane = packed.planes.at("codes");
  std::vector<uint8_t> codes(static_cast<size_t>(layout.k));
  for (int64_t row = 0; row < layout.n; ++row) {
    const std::vector<int> zeros = zeros_of_row(layout, prepared.planes, row);
    for (int64_t c = 0; c < layout.k; ++c) {
      const Place place = place_of(layout, row, c);
      const int zero = zeros[static_cast<size_t>(layout.grouped() ? c / layout.group_columns : 0)];
      const int value = bytes[place.byte] >> place.shift;
      codes[static_cast<size_t>(c)] =
          static_cast<uint8_t>((value + stored_offset(layout, zero)) & ((1 << layout.bits) - 1));
    }
    const auto words = static_cast<size_t>(plane.shape()[1]);
    pack_bits(codes, layout.bits, plane.values<uint32_t>().subspan(static_cast<size_t>(row) * words, words));
  }
}

}  // namespace quantloom
