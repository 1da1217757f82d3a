#include "formats/additive_levels.hpp"

#include <algorithm>

#include "formats/additive_encoder.hpp"
#include "formats/grouped.hpp"
#include "quantloom/fit/lloyd_max.hpp"
#include "quantloom/formats/bit_packing.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {
namespace {

float rounded(DType dtype, float value) {
  if (dtype == DType::f16) value = float_from_f16(f16_from_float(value));
  if (dtype == DType::bf16) value = float_from_bf16(bf16_from_float(value));
  return value + 0.0F;  // -0 becomes 0
}

// Of equal levels the first.
size_t place_of(std::span<const float> levels, float number) {
  auto at = static_cast<size_t>(std::ranges::lower_bound(levels, number) - levels.begin());
  if (at == levels.size()) {
    --at;
  } else if (at > 0) {
    const double under = static_cast<double>(number) - static_cast<double>(levels[at - 1]);
    const double over = static_cast<double>(levels[at]) - static_cast<double>(number);
    if (under <= over) --at;
  }
  return static_cast<size_t>(std::ranges::lower_bound(levels, levels[at]) - levels.begin());
}

void fit_levels(const std::vector<float>& numbers, std::span<const float> start, DType dtype,
                std::span<float> levels) {
  constexpr int64_t kMostSweeps = 200;
  std::vector<float> distinct = numbers;
  std::ranges::sort(distinct);
  distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
  if (distinct.size() > levels.size()) {
    LloydMaxOptions options;
    options.start = start.empty() ? TableStart::quantile : TableStart::given;
    options.centroids.assign(start.begin(), start.end());
    options.threshold = 0;
    options.max_sweeps = kMostSweeps;
    distinct = lloyd_max(SortedValues(numbers, {}, 1), std::ssize(levels), options).centroids;
  }
  std::ranges::transform(distinct, levels.begin(), [&](float value) { return rounded(dtype, value); });
  std::fill(levels.begin() + std::ssize(distinct), levels.end(), levels[distinct.size() - 1]);
}

// member(run, i): where number i of a run stands in `numbers`.
template <class Member>
LeveledNumbers level(std::span<const float> numbers, int64_t runs, int64_t length, int bits, DType dtype,
                     std::span<const float> start, int threads, const Member& member) {
  const int64_t count = int64_t{1} << bits;
  LeveledNumbers found;
  found.levels.resize(static_cast<size_t>(checked_mul(runs, count)));
  found.places.resize(numbers.size());
  parallel_for(runs, threads, [&](int64_t run) {
    std::vector<float> own(static_cast<size_t>(length));
    for (int64_t i = 0; i < length; ++i) own[static_cast<size_t>(i)] = numbers[member(run, i)];
    const std::span<float> levels(found.levels.data() + run * count, static_cast<size_t>(count));
    fit_levels(own, start.empty() ? start : start.subspan(static_cast<size_t>(run * count), levels.size()),
               dtype, levels);
    for (int64_t i = 0; i < length; ++i) {
      found.places[member(run, i)] =
          run * count + static_cast<int64_t>(place_of(levels, own[static_cast<size_t>(i)]));
    }
  });
  return found;
}

// Codes of rows of equal length, as streams; `places` count levels from the first of the first row.
void write_codes(std::span<const int64_t> places, int bits, Tensor& plane, int threads) {
  const int64_t rows = plane.shape()[0];
  const int64_t words = plane.shape()[1];
  if (rows == 0) return;
  const int64_t length = std::ssize(places) / rows;
  uint32_t* const to = plane.values<uint32_t>().data();
  parallel_for(rows, threads, [&](int64_t row) {
    std::vector<uint16_t> codes(static_cast<size_t>(length));
    for (int64_t i = 0; i < length; ++i) {
      codes[static_cast<size_t>(i)] =
          static_cast<uint16_t>(places[static_cast<size_t>(row * length + i)] % (int64_t{1} << bits));
    }
    pack_wide_bits(codes, bits, {to + row * words, static_cast<size_t>(words)});
  });
}

void store_all(std::span<const float> numbers, Tensor& plane) {
  for (size_t i = 0; i < numbers.size(); ++i) store_scale(plane, static_cast<int64_t>(i), numbers[i]);
}

}  // namespace

std::vector<float> LeveledNumbers::numbers() const {
  std::vector<float> all;
  all.reserve(places.size());
  for (const int64_t place : places) all.push_back(levels[static_cast<size_t>(place)]);
  return all;
}

LeveledNumbers level_scales(const Additive& format, std::span<const float> scales, int64_t k, DType dtype,
                            std::span<const float> start, int threads) {
  const int64_t count = format.scale_count(k);
  return level(scales, std::ssize(scales) / count, count, format.levels.scale_bits, dtype, start, threads,
               [=](int64_t run, int64_t i) { return static_cast<size_t>(run * count + i); });
}

LeveledNumbers level_tables(const Additive& format, std::span<const float> tables, DType dtype,
                            std::span<const float> start, int threads) {
  const int64_t dim = format.dim();
  const int64_t length = format.entries() / format.levels.table_groups;
  const int64_t runs = format.codebooks * format.levels.table_groups * dim;
  // Runs follow each other by group of entries, and in it by place.
  return level(tables, runs, length, format.levels.table_bits, dtype, start, threads,
               [=](int64_t run, int64_t i) {
                 return static_cast<size_t>((run / dim * length + i) * dim + run % dim);
               });
}

float nearest_level(std::span<const float> levels, float number) {
  return levels[place_of(levels, number)];
}

std::vector<float> read_tables(const Additive& format, const PackedTensor& packed) {
  std::vector<float> tables(static_cast<size_t>(format.codebooks * format.entries() * format.dim()));
  if (!format.has_table_levels()) {
    std::ranges::transform(packed.plane("codebook").values<uint16_t>(), tables.begin(), float_from_f16);
    return tables;
  }
  const auto levels = packed.plane("codebook_levels").values<uint16_t>();
  const int64_t dim = format.dim();
  const int64_t values = format.entries() * dim;
  const int64_t of_group = values / format.levels.table_groups;
  std::vector<uint16_t> codes(static_cast<size_t>(values));
  for (int64_t book = 0; book < format.codebooks; ++book) {
    unpack_wide_bits(packed_row(packed.plane("codebook_codes"), book), format.levels.table_bits, 0, codes);
    for (int64_t i = 0; i < values; ++i) {
      const int64_t run = (book * format.levels.table_groups + i / of_group) * dim + i % dim;
      tables[static_cast<size_t>(book * values + i)] = float_from_f16(
          levels[static_cast<size_t>((run << format.levels.table_bits) + codes[static_cast<size_t>(i)])]);
    }
  }
  return tables;
}

void read_scales(const Additive& format, const PackedTensor& packed, int64_t row_group,
                 std::span<float> scales) {
  const auto count = std::ssize(scales);
  if (!format.has_scale_levels(packed.k)) {
    for (int64_t i = 0; i < count; ++i) {
      scales[static_cast<size_t>(i)] = scale_at(packed.plane("scales"), row_group * count + i);
    }
    return;
  }
  std::vector<uint16_t> codes(scales.size());
  unpack_wide_bits(packed_row(packed.plane("scale_codes"), row_group), format.levels.scale_bits, 0, codes);
  for (size_t i = 0; i < scales.size(); ++i) {
    scales[i] = scale_at(packed.plane("scale_levels"), (row_group << format.levels.scale_bits) + codes[i]);
  }
}

void write_tables(const Additive& format, std::span<const float> tables, PackedTensor& packed, int threads) {
  if (!format.has_table_levels()) return store_all(tables, packed.planes.at("codebook"));
  const LeveledNumbers leveled = level_tables(format, tables, DType::f16, {}, threads);
  store_all(leveled.levels, packed.planes.at("codebook_levels"));
  write_codes(leveled.places, format.levels.table_bits, packed.planes.at("codebook_codes"), threads);
}

void write_scales(const Additive& format, std::span<const float> scales, PackedTensor& packed, int threads) {
  if (!format.has_scale_levels(packed.k)) return store_all(scales, packed.planes.at("scales"));
  const LeveledNumbers leveled = level_scales(format, scales, packed.k, format.scale_dtype, {}, threads);
  store_all(leveled.levels, packed.planes.at("scale_levels"));
  write_codes(leveled.places, format.levels.scale_bits, packed.planes.at("scale_codes"), threads);
}

PackedTensor with_levels(const PackedTensor& packed, const AdditiveLevels& levels) {
  const auto* const format = dynamic_cast<const Additive*>(packed.format.get());
  if (format == nullptr) {
    throw InvalidArgument("packed", packed.format == nullptr ? "no format" : packed.format->spec(),
                          "a packed tensor of the format additive");
  }
  for (const auto& [name, plane] : packed.planes) {
    if (plane.device() != Device::cpu) throw Unsupported(text_of("plane ", name, " is on a CUDA device"));
  }
  validate(packed);
  const Additive other(format->codebooks, format->bits, format->in_group, format->out_group,
                       format->scale_group, format->scale_dtype, {}, levels);
  return pack_additive(other, unpack_additive(*format, packed), packed.n, packed.k, 0);
}

}  // namespace quantloom
