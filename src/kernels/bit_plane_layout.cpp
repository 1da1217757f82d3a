#include "kernels/bit_plane_layout.hpp"

#include <algorithm>
#include <limits>

#include "kernels/prepared_planes.hpp"

namespace quantloom {
namespace {

// Calls visit(row, group, parameter, place) with the place in the prepared plane "scales".
template <class Visit>
void for_each_parameter(const BitPlaneLayout& layout, const Visit& visit) {
  for (int64_t row = 0; row < layout.n; ++row) {
    for (int64_t group = 0; group < layout.group_count; ++group) {
      const int64_t first = (row / bit_planes::kBlockRows * layout.group_count + group) * layout.parameters();
      const int place = fragments::parameter_in_block(static_cast<int>(row % bit_planes::kBlockRows));
      for (int i = 0; i < layout.parameters(); ++i) visit(row, group, i, (first + i) * 64 + place);
    }
  }
}

// Calls visit(word of the prepared plane, bit of it, plane, row, column) for all signs.
template <class Visit>
void for_each_sign(const BitPlaneLayout& layout, std::span<const int32_t> source, const Visit& visit) {
  for (int64_t place = 0; place < layout.padded_k(); ++place) {
    const int64_t column = layout.gathered ? source[static_cast<size_t>(place)] : place;
    if (column < 0 || column >= layout.k) continue;
    const auto in_block = static_cast<int>(place % bit_planes::kBlockColumns);
    for (int64_t row = 0; row < layout.n; ++row) {
      const int64_t block =
          row / bit_planes::kBlockRows * layout.column_blocks + place / bit_planes::kBlockColumns;
      const int word = bit_planes::word_of(static_cast<int>(row % bit_planes::kBlockRows), in_block);
      for (int plane = 0; plane < layout.planes; ++plane) {
        visit((block * layout.planes + plane) * bit_planes::kPlaneWords + word,
              in_block % bit_planes::kWordColumns, plane, row, column);
      }
    }
  }
}

std::span<const int32_t> source_of(const BitPlaneLayout& layout, const PreparedPlanes& prepared) {
  return layout.gathered ? prepared.plane("source").values<int32_t>() : std::span<const int32_t>{};
}

}  // namespace

BitPlaneLayout bit_plane_layout(const Bcq& format, int64_t n, int64_t k, bool with_group_index) {
  if (n < 0 || k < 0) throw InvalidArgument("shape", text_of("[", n, ", ", k, "]"), "sizes of 0 or more");
  if (k > std::numeric_limits<int32_t>::max() / 64 || n > std::numeric_limits<int32_t>::max()) {
    throw Unsupported(
        text_of("no CUDA kernel takes a matrix [", n, ", ", k, "]: expected n < 2^31, k < 2^25"));
  }
  BitPlaneLayout layout;
  layout.planes = format.bits;
  layout.offset = format.offset;
  layout.scale_dtype = format.scale_dtype;
  layout.n = n;
  layout.k = k;
  layout.group_count = std::max<int64_t>(format.group_count(k), 1);
  layout.format_columns = format.columns_per_group(k);
  const bool many = layout.group_count > 1;
  const int64_t padded_group = checked_pad(layout.format_columns, bit_planes::kWordColumns);
  layout.gathered = many && (with_group_index || layout.format_columns != padded_group);
  const int64_t columns = layout.gathered ? checked_mul(layout.group_count, padded_group) : k;
  layout.row_blocks = std::max<int64_t>(ceil_div(n, bit_planes::kBlockRows), 1);
  layout.column_blocks = ceil_div(columns, bit_planes::kBlockColumns);
  layout.group_columns =
      many ? padded_group : std::max<int64_t>(layout.padded_k(), bit_planes::kBlockColumns);
  static_cast<void>(checked_mul(layout.words(), 4));
  return layout;
}

std::vector<PlaneSpec> bit_plane_planes(const BitPlaneLayout& layout, bool with_group_index) {
  std::vector<PlaneSpec> specs;
  specs.push_back({"signs", DType::i32, {layout.row_blocks, layout.column_blocks, layout.planes, 2, 32, 4}});
  specs.push_back(
      {"scales", layout.scale_dtype, {layout.row_blocks, layout.group_count, layout.parameters(), 8, 8}});
  if (layout.gathered) specs.push_back({"source", DType::i32, {layout.padded_k()}});
  if (with_group_index) specs.push_back({"group_index", DType::i32, {layout.k}});
  return specs;
}

PreparedPlanes prepare_bit_planes(const PackedTensor& packed) {
  const bool indexed = packed.planes.contains("group_index");
  const BitPlaneLayout layout = bit_plane_layout(*as_bcq(*packed.format), packed.n, packed.k, indexed);
  PreparedPlanes prepared{packed.format, packed.n, packed.k, {}};
  for (const PlaneSpec& spec : bit_plane_planes(layout, indexed)) {
    prepared.planes.emplace(spec.name, Tensor(spec.dtype, spec.shape));
  }
  const auto source = fragment_source(*packed.format, packed.k, group_index_of(packed.planes));
  if (layout.gathered) std::ranges::copy(source, prepared.planes.at("source").values<int32_t>().begin());
  if (indexed) copy_plane(packed.plane("group_index"), prepared.planes.at("group_index"));
  if (packed.k == 0) return prepared;
  const auto signs = packed.plane("signs").values<uint32_t>();
  const auto words = prepared.planes.at("signs").values<uint32_t>();
  const int64_t row_words = ceil_div(layout.k, 32);
  for_each_sign(layout, source, [&](int64_t word, int bit, int plane, int64_t row, int64_t column) {
    const uint32_t from = signs[static_cast<size_t>((plane * layout.n + row) * row_words + column / 32)];
    words[static_cast<size_t>(word)] |= (from >> (column % 32) & 1U) << bit;
  });
  for_each_parameter(layout, [&](int64_t row, int64_t group, int i, int64_t place) {
    const bool is_offset = i == layout.planes;
    const int64_t at = ((is_offset ? 0 : i) * layout.n + row) * layout.group_count + group;
    copy_element(packed.plane(is_offset ? "offsets" : "scales"), at, prepared.planes.at("scales"), place);
  });
  return prepared;
}

PackedTensor unprepare_bit_planes(const PreparedPlanes& prepared) {
  const bool indexed = prepared.has("group_index");
  const BitPlaneLayout layout = bit_plane_layout(*as_bcq(*prepared.format), prepared.n, prepared.k, indexed);
  PackedTensor packed{prepared.format, prepared.n, prepared.k, {}};
  for (const PlaneSpec& spec : prepared.format->planes(prepared.n, prepared.k)) {
    if (!spec.optional || prepared.has(spec.name)) {
      packed.planes.emplace(spec.name, Tensor(spec.dtype, spec.shape));
    }
  }
  if (indexed) copy_plane(prepared.plane("group_index"), packed.planes.at("group_index"));
  if (packed.k == 0) return packed;
  const auto words = prepared.plane("signs").values<uint32_t>();
  const auto signs = packed.planes.at("signs").values<uint32_t>();
  const int64_t row_words = ceil_div(layout.k, 32);
  for_each_sign(layout, source_of(layout, prepared),
                [&](int64_t word, int bit, int plane, int64_t row, int64_t column) {
                  signs[static_cast<size_t>((plane * layout.n + row) * row_words + column / 32)] |=
                      (words[static_cast<size_t>(word)] >> bit & 1U) << (column % 32);
                });
  for_each_parameter(layout, [&](int64_t row, int64_t group, int i, int64_t place) {
    const bool is_offset = i == layout.planes;
    const int64_t at = ((is_offset ? 0 : i) * layout.n + row) * layout.group_count + group;
    copy_element(prepared.plane("scales"), place, packed.planes.at(is_offset ? "offsets" : "scales"), at);
  });
  return packed;
}

}  // namespace quantloom
