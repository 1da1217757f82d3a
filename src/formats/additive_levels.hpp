// Numbers of the format "additive" that are codes into a few levels.
#pragma once

#include "quantloom/formats/additive.hpp"

namespace quantloom {

// Numbers in runs; each is one of the levels of its run: numbers[i] = levels[places[i]].
struct LeveledNumbers {
  std::vector<float> levels;  // [runs, count], ascending in each run; the last fill a run that needs fewer
  std::vector<int64_t> places;

  std::vector<float> numbers() const;
};

// The levels of the scales [N, S] of a matrix of k columns, and of tables: as many as the format has, rounded
// to `dtype`. A run of no more different numbers keeps them; of others levels are found by Lloyd's algorithm
// from their quantiles, or from `start` (levels of an earlier fit) if given; a number between two takes the
// lower one.
LeveledNumbers level_scales(const Additive& format, std::span<const float> scales, int64_t k, DType dtype,
                            std::span<const float> start, int threads);
LeveledNumbers level_tables(const Additive& format, std::span<const float> tables, DType dtype,
                            std::span<const float> start, int threads);

// The level nearest to a number.
float nearest_level(std::span<const float> levels, float number);

// The planes of scales and tables of a tensor on the CPU, as numbers and back; what is not one of a few
// levels becomes one where they are codes.
std::vector<float> read_tables(const Additive& format, const PackedTensor& packed);
void read_scales(const Additive& format, const PackedTensor& packed, int64_t row_group,
                 std::span<float> scales);
void write_tables(const Additive& format, std::span<const float> tables, PackedTensor& packed, int threads);
void write_scales(const Additive& format, std::span<const float> scales, PackedTensor& packed, int threads);

}  // namespace quantloom
