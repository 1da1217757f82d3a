#include "kernels/vector_fragments.hpp"

#include <array>

#include "formats/sum_order.hpp"
#include "quantloom/formats/bit_packing.hpp"

namespace quantloom {
namespace {

using fragments::kBlockColumns;
using fragments::kBlockRows;
using fragments::kLanes;
using fragments::kUnits;

// Calls visit(place of the unit's first word, unit, lane, field, row, vector) for each vector of the matrix.
template <class Visit>
void for_each_vector(const FragmentLayout& layout, std::span<const int32_t> source, const Visit& visit) {
  const int dim = layout.dim;
  for (int64_t block = 0; block < layout.row_blocks * layout.column_blocks; ++block) {
    const int64_t first_row = block / layout.column_blocks * kBlockRows;
    const int64_t first_column = block % layout.column_blocks * kBlockColumns;
    for (int unit = 0; unit < kUnits; ++unit) {
      for (int lane = 0; lane < kLanes; ++lane) {
        for (int field = 0; field < fragments::kUnitCodes / dim; ++field) {
          const int64_t row = first_row + unit * 16 + fragments::vector_row(dim, lane, field);
          int64_t column = first_column + fragments::vector_column(dim, lane, field);
          if (layout.gathered) column = source[static_cast<size_t>(column)];
          if (row >= layout.n || column < 0 || column >= layout.k) continue;
          visit(block, unit, lane, field, row, column / dim);
        }
      }
    }
  }
}

size_t word_at(const FragmentLayout& layout, int64_t block, int unit, int word, int lane) {
  return static_cast<size_t>(block * layout.bits * 128 +
                             fragments::word_in_block(layout.bits, unit, word, lane));
}

// The words of a unit's lane, gathered and put back.
using UnitWords = std::array<uint32_t, 9>;

}  // namespace

void prepare_vector_codes(const FragmentLayout& layout, std::span<const uint32_t> codes,
                          std::span<const int32_t> source, std::span<uint32_t> words) {
  const auto row_words = static_cast<size_t>(packed_words(ceil_div(layout.k, layout.dim), layout.code_bits));
  const int bits = layout.code_bits / layout.tables;
  std::vector<uint16_t> of_vector(static_cast<size_t>(layout.tables));
  for_each_vector(layout, source,
                  [&](int64_t block, int unit, int lane, int field, int64_t row, int64_t vector) {
                    unpack_wide_bits(codes.subspan(static_cast<size_t>(row) * row_words, row_words), bits,
                                     vector * layout.tables, of_vector);
                    uint32_t code = 0;
                    for (int t = 0; t < layout.tables; ++t) {
                      code |= static_cast<uint32_t>(of_vector[static_cast<size_t>(t)]) << (t * bits);
                    }
                    UnitWords unit_words{};
                    fragments::put_field(unit_words.data(), layout.dim * layout.bits, field, code);
                    for (int w = 0; w < layout.bits; ++w) {
                      words[word_at(layout, block, unit, w, lane)] |= unit_words[static_cast<size_t>(w)];
                    }
                  });
}

void unprepare_vector_codes(const FragmentLayout& layout, std::span<const uint32_t> words,
                            std::span<const int32_t> source, std::span<uint32_t> codes) {
  const int64_t vectors = ceil_div(layout.k, layout.dim);
  const int bits = layout.code_bits / layout.tables;
  const int64_t row_codes = vectors * layout.tables;
  std::vector<uint16_t> all(static_cast<size_t>(checked_mul(layout.n, row_codes)));
  for_each_vector(
      layout, source, [&](int64_t block, int unit, int lane, int field, int64_t row, int64_t vector) {
        UnitWords unit_words{};
        for (int w = 0; w < layout.bits; ++w) {
          unit_words[static_cast<size_t>(w)] = words[word_at(layout, block, unit, w, lane)];
        }
        const uint32_t code = fragments::wide_field_of(unit_words.data(), layout.dim * layout.bits, field);
        for (int t = 0; t < layout.tables; ++t) {
          all[static_cast<size_t>(row * row_codes + vector * layout.tables + t)] =
              static_cast<uint16_t>(code >> (t * bits) & ((1U << bits) - 1U));
        }
      });
  const auto row_words = static_cast<size_t>(packed_words(vectors, layout.code_bits));
  for (int64_t row = 0; row < layout.n; ++row) {
    pack_wide_bits(
        std::span(all).subspan(static_cast<size_t>(row * row_codes), static_cast<size_t>(row_codes)), bits,
        codes.subspan(static_cast<size_t>(row) * row_words, row_words));
  }
}

}  // namespace quantloom
