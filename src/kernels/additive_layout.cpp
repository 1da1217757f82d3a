#include "kernels/additive_layout.hpp"

#include <algorithm>
#include <limits>

#include "formats/sum_order.hpp"
#include "kernels/prepared_planes.hpp"
#include "quantloom/formats/bit_packing.hpp"

namespace quantloom {
namespace {

using additive::kSliceBlocks;
using additive::PartEntry;
using additive::PartList;

constexpr int64_t kValueBytes = 2;

// One table that is larger than a part of it, of vectors that lie in a row.
bool is_in_parts(const Additive& format) {
  return format.codebooks == 1 && format.out_group == 1 && (format.in_group == 8 || format.in_group == 16) &&
         format.scale_group == Additive::kPerChannel &&
         format.entries() * format.dim() * kValueBytes > additive::kPartBytes;
}

// The entries of a row and slice: 16 bits of each and 8 of each.
struct EntryPlanes {
  std::span<uint16_t> low;
  std::span<uint8_t> high;
};

EntryPlanes entries_of(const AdditiveLayout& layout, Tensor& codes, Tensor& places, int64_t slice,
                       int64_t row) {
  const auto first = static_cast<size_t>((slice * layout.n + row) * layout.capacity);
  const auto count = static_cast<size_t>(layout.capacity);
  // The plane's words are pairs of them, the first in the low half.
  return {{reinterpret_cast<uint16_t*>(codes.bytes()) + first, count},
          places.values<uint8_t>().subspan(first, count)};
}

bool is_level_plane(std::string_view name) {
  return name.ends_with("_codes") || name.ends_with("_levels");
}

void copy_tables(const std::map<std::string, Tensor>& from, std::map<std::string, Tensor>& to) {
  for (const char* name : {"codebook", "scales"}) copy_plane(from.at(name), to.at(name));
}

}  // namespace

bool is_in_fragment_order(const Additive& format) {
  if (format.out_group != 1 || !fragments::is_vector_dim(format.in_group) || is_in_parts(format))
    return false;
  const auto dim = static_cast<int>(format.in_group);
  if (format.codebooks > 1) return fragments::sum_bits(dim, format.codebooks * format.bits) > 0;
  return dim > 2 || fragments::vector_bits(dim, format.bits) <= 6;
}

const Additive* as_additive(const Format& format) {
  const auto* additive = dynamic_cast<const Additive*>(&format);
  return additive == nullptr || is_in_fragment_order(*additive) ? nullptr : additive;
}

AdditiveLayout additive_layout(const Additive& format, int64_t n, int64_t k) {
  if (n < 0 || k < 0) throw InvalidArgument("shape", text_of("[", n, ", ", k, "]"), "sizes of 0 or more");
  if (k > std::numeric_limits<int32_t>::max() / 64 || n > std::numeric_limits<int32_t>::max()) {
    throw Unsupported(
        text_of("no CUDA kernel takes a matrix [", n, ", ", k, "]: expected n < 2^31, k < 2^25"));
  }
  AdditiveLayout layout;
  layout.codebooks = format.codebooks;
  layout.bits = format.bits;
  layout.in_group = static_cast<int>(format.in_group);
  layout.out_group = static_cast<int>(format.out_group);
  layout.scale_dtype = format.scale_dtype;
  layout.n = n;
  layout.k = k;
  layout.row_groups = format.row_groups(n);
  layout.blocks = format.blocks(k);
  layout.row_words = packed_words(format.code_count(k), format.bits);
  layout.scale_columns = format.scale_columns(k);
  layout.scale_count = k > 0 ? format.scale_count(k) : 0;
  if (is_in_parts(format)) {
    layout.parts = 1 << (format.bits - additive::part_bits(layout.in_group));
    layout.slices = ceil_div(layout.blocks, kSliceBlocks);
    // Each list is padded to whole pieces.
    layout.capacity = checked_pad(
        std::min<int64_t>(layout.blocks, kSliceBlocks) + (additive::kPieceEntries - 1) * layout.parts, 8);
    static_cast<void>(checked_mul(checked_mul(layout.slices, n), 2 * layout.capacity));
  }
  return layout;
}

std::vector<PlaneSpec> additive_planes(const AdditiveLayout& layout) {
  std::vector<PlaneSpec> specs;
  if (layout.in_parts()) {
    specs.push_back({"codes", DType::i32, {layout.slices, layout.n, layout.capacity / 2}});
    specs.push_back({"places", DType::u8, {layout.slices, layout.n, layout.capacity}});
    specs.push_back({"lists", DType::i32, {layout.slices, layout.n, layout.parts}});
  } else {
    specs.push_back({"codes", DType::i32, {layout.row_groups, layout.row_words}});
  }
  specs.push_back({"codebook",
                   DType::f16,
                   {layout.codebooks, int64_t{1} << layout.bits, layout.out_group, layout.in_group}});
  specs.push_back({"scales", layout.scale_dtype, {layout.row_groups, layout.scale_count}});
  return specs;
}

std::vector<PlaneSpec> level_planes(const Format& format, int64_t n, int64_t k) {
  if (dynamic_cast<const Additive*>(&format) == nullptr) return {};
  std::vector<PlaneSpec> specs = format.planes(n, k);
  std::erase_if(specs, [](const PlaneSpec& spec) { return !is_level_plane(spec.name); });
  return specs;
}

std::shared_ptr<const Additive> without_levels(const Additive& format) {
  return std::make_shared<const Additive>(format.codebooks, format.bits, format.in_group, format.out_group,
                                          format.scale_group, format.scale_dtype);
}

PreparedPlanes without_levels(const PreparedPlanes& prepared) {
  PreparedPlanes plain = prepared;
  plain.format = without_levels(dynamic_cast<const Additive&>(*prepared.format));
  std::erase_if(plain.planes, [](const auto& plane) { return is_level_plane(plane.first); });
  return plain;
}

PreparedPlanes prepare_additive(const PackedTensor& packed) {
  const AdditiveLayout layout = additive_layout(*as_additive(*packed.format), packed.n, packed.k);
  PreparedPlanes prepared{packed.format, packed.n, packed.k, {}};
  for (const PlaneSpec& spec : additive_planes(layout)) {
    prepared.planes.emplace(spec.name, Tensor(spec.dtype, spec.shape));
  }
  copy_tables(packed.planes, prepared.planes);
  if (!layout.in_parts()) {
    copy_plane(packed.plane("codes"), prepared.planes.at("codes"));
    return prepared;
  }
  const int bits = additive::part_bits(layout.in_group);
  const auto words = packed.plane("codes").values<uint32_t>();
  const auto lists = prepared.planes.at("lists").values<uint32_t>();
  std::vector<uint16_t> codes(static_cast<size_t>(layout.blocks));
  std::vector<additive::Octet> octets(additive::kMostOctets);
  for (int64_t row = 0; row < layout.n && layout.blocks > 0; ++row) {
    unpack_wide_bits(
        words.subspan(static_cast<size_t>(row * layout.row_words), static_cast<size_t>(layout.row_words)),
        layout.bits, 0, codes);
    for (int64_t slice = 0; slice < layout.slices; ++slice) {
      const int64_t first = slice * kSliceBlocks;
      const auto count = static_cast<int>(std::min<int64_t>(layout.blocks - first, kSliceBlocks));
      const EntryPlanes entries =
          entries_of(layout, prepared.planes.at("codes"), prepared.planes.at("places"), slice, row);
      int next = 0;
      for (int part = 0; part < layout.parts; ++part) {
        const auto in_part = [&](int place) {
          return static_cast<int>(codes[static_cast<size_t>(first + place)] >> bits) == part;
        };
        PartList list{next, 0};
        for (int place = 0; place < count; ++place) list.count += in_part(place) ? 1 : 0;
        std::ranges::fill(octets, additive::Octet{0});
        for (int place = 0; place < count; ++place) {
          if (!in_part(place)) continue;
          const uint32_t code = codes[static_cast<size_t>(first + place)] & ((1U << bits) - 1U);
          const PartEntry entry{code, static_cast<uint32_t>(place)};
          const int dealt =
              additive::deal_entry([&](int i) -> additive::Octet& { return octets[static_cast<size_t>(i)]; },
                                   list.count, bits, entry);
          const auto at = static_cast<size_t>(list.first + dealt);
          entries.low[at] = static_cast<uint16_t>(entry.low(bits));
          entries.high[at] = static_cast<uint8_t>(entry.high(bits));
        }
        lists[static_cast<size_t>((slice * layout.n + row) * layout.parts + part)] = list.packed();
        next += static_cast<int>(checked_pad(list.count, additive::kPieceEntries));
      }
    }
  }
  return prepared;
}

PackedTensor unprepare_additive(const PreparedPlanes& prepared) {
  const AdditiveLayout layout = additive_layout(*as_additive(*prepared.format), prepared.n, prepared.k);
  PackedTensor packed{prepared.format, prepared.n, prepared.k, {}};
  for (const PlaneSpec& spec : prepared.format->planes(prepared.n, prepared.k)) {
    packed.planes.emplace(spec.name, Tensor(spec.dtype, spec.shape));
  }
  copy_tables(prepared.planes, packed.planes);
  if (!layout.in_parts()) {
    copy_plane(prepared.plane("codes"), packed.planes.at("codes"));
    return packed;
  }
  const int bits = additive::part_bits(layout.in_group);
  const auto* const low = reinterpret_cast<const uint16_t*>(prepared.plane("codes").bytes());
  const auto high = prepared.plane("places").values<uint8_t>();
  const auto lists = prepared.plane("lists").values<uint32_t>();
  const auto words = packed.planes.at("codes").values<uint32_t>();
  std::vector<uint16_t> codes(static_cast<size_t>(layout.blocks));
  for (int64_t row = 0; row < layout.n && layout.blocks > 0; ++row) {
    for (int64_t slice = 0; slice < layout.slices; ++slice) {
      const int64_t of_row = slice * layout.n + row;
      for (int part = 0; part < layout.parts; ++part) {
        const PartList list = PartList::from(lists[static_cast<size_t>(of_row * layout.parts + part)]);
        for (int i = 0; i < list.count; ++i) {
          const int64_t at = of_row * layout.capacity + list.first + i;
          if (list.first + i >= layout.capacity) break;
          const PartEntry entry = PartEntry::from(bits, low[at], high[static_cast<size_t>(at)]);
          const int64_t block = slice * kSliceBlocks + entry.place;
          if (block >= layout.blocks) continue;
          codes[static_cast<size_t>(block)] =
              static_cast<uint16_t>(entry.code | static_cast<uint32_t>(part) << bits);
        }
      }
    }
    pack_wide_bits(
        codes, layout.bits,
        words.subspan(static_cast<size_t>(row * layout.row_words), static_cast<size_t>(layout.row_words)));
  }
  return packed;
}

}  // namespace quantloom
