#include "kernels/trellis_layout.hpp"

#include <algorithm>
#include <limits>

#include "formats/trellis_codes.hpp"
#include "kernels/prepared_planes.hpp"

namespace quantloom {

TrellisLayout trellis_layout(const Trellis& format, int64_t n, int64_t k) {
  if (n < 0 || k < 0) throw InvalidArgument("shape", text_of("[", n, ", ", k, "]"), "sizes of 0 or more");
  if (k > std::numeric_limits<int32_t>::max() / 64 || n > std::numeric_limits<int32_t>::max() - 128) {
    throw Unsupported(
        text_of("no CUDA kernel takes a matrix [", n, ", ", k, "]: expected n < 2^31 - 128, k < 2^25"));
  }
  TrellisLayout layout;
  layout.ring = format.shape();
  layout.code = format.codebook.code;
  layout.multiplier = format.codebook.multiplier;
  layout.rotated = format.rotation > 0;
  layout.fragments = layout.ring.half_bits % 2 == 0;
  layout.n = n;
  layout.k = k;
  layout.row_blocks = 2 * ceil_div(n, 128);
  layout.column_blocks = 2 * ceil_div(k, 128);
  layout.row_tiles = checked_pad(n, format.size_unit()) / trellis::kTileSide;
  layout.column_tiles = checked_pad(k, format.size_unit()) / trellis::kTileSide;
  static_cast<void>(checked_mul(layout.words(), 4));
  return layout;
}

std::vector<PlaneSpec> trellis_planes(const TrellisLayout& layout, const Trellis& format) {
  std::vector<PlaneSpec> specs = format.planes(layout.n, layout.k);
  for (PlaneSpec& spec : specs) {
    if (spec.name != "codes") continue;
    spec.shape = {layout.row_blocks, layout.column_blocks};
    if (layout.fragments) {
      spec.shape.insert(spec.shape.end(), {layout.bits(), 32, 4});
    } else {
      spec.shape.insert(spec.shape.end(), {16, layout.ring.words()});
    }
  }
  return specs;
}

PreparedPlanes prepare_trellis(const PackedTensor& packed) {
  const Trellis& format = *as_trellis(*packed.format);
  const TrellisLayout layout = trellis_layout(format, packed.n, packed.k);
  PreparedPlanes prepared{packed.format, packed.n, packed.k, {}};
  for (const PlaneSpec& spec : trellis_planes(layout, format)) {
    Tensor plane(spec.dtype, spec.shape);
    if (spec.name != "codes") copy_plane(packed.plane(spec.name), plane);
    prepared.planes.emplace(spec.name, std::move(plane));
  }
  const auto from = packed.plane("codes").values<uint32_t>();
  const auto to = prepared.planes.at("codes").values<uint32_t>();
  const int words = layout.ring.words();
  for (size_t i = 0; i < to.size(); ++i) {
    const TrellisWord word =
        trellis_word(layout.fragments, words, layout.column_blocks, static_cast<int64_t>(i));
    const bool inside = word.row_tile < layout.row_tiles && word.column_tile < layout.column_tiles;
    const int64_t at = (word.column_tile * layout.row_tiles + word.row_tile) * words + word.word;
    to[i] = inside ? from[static_cast<size_t>(at)] : 0;
  }
  return prepared;
}

PackedTensor unprepare_trellis(const PreparedPlanes& prepared) {
  const Trellis& format = *as_trellis(*prepared.format);
  const TrellisLayout layout = trellis_layout(format, prepared.n, prepared.k);
  PackedTensor packed{prepared.format, prepared.n, prepared.k, {}};
  for (const PlaneSpec& spec : format.planes(prepared.n, prepared.k)) {
    Tensor plane(spec.dtype, spec.shape);
    if (spec.name != "codes") copy_plane(prepared.plane(spec.name), plane);
    packed.planes.emplace(spec.name, std::move(plane));
  }
  const auto from = prepared.plane("codes").values<uint32_t>();
  const auto to = packed.planes.at("codes").values<uint32_t>();
  const int words = layout.ring.words();
  for (size_t i = 0; i < to.size(); ++i) {
    const auto at = static_cast<int64_t>(i);
    const int64_t tile = at / words;
    to[i] = from[static_cast<size_t>(trellis_place(layout.fragments, words, layout.column_blocks,
                                                   tile % layout.row_tiles, tile / layout.row_tiles,
                                                   static_cast<int>(at % words)))];
  }
  return packed;
}

}  // namespace quantloom
