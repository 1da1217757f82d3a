#include "quantloom/formats/elements.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "element_rounding.hpp"
#include "formats/code_layout.hpp"
#include "formats/element_runs.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {
namespace {

using element_rounding::kRun;

constexpr int64_t kPiece = 64 * kRun;  // elements of a piece of work

void require_count(int64_t count, int64_t least, int64_t most) {
  if (count < least || count > most) {
    throw InvalidArgument("count", text_of(count), text_of(least, " to ", most));
  }
}

// Calls body(row, col, count) for runs of at most kRun elements of a matrix, in parallel.
template <class Body>
void for_runs(int64_t rows, int64_t cols, int threads, const Body& body) {
  if (rows == 0 || cols == 0) return;
  const int64_t row_pieces = ceil_div(cols, kPiece);
  const int64_t rows_each = row_pieces > 1 ? 1 : std::max<int64_t>(1, kPiece / cols);
  parallel_for(ceil_div(rows, rows_each) * row_pieces, threads, [&](int64_t piece) {
    const int64_t first_row = piece / row_pieces * rows_each;
    const int64_t last_row = std::min(rows, first_row + rows_each);
    const int64_t first_col = piece % row_pieces * kPiece;
    const int64_t last_col = std::min(cols, first_col + kPiece);
    for (int64_t row = first_row; row < last_row; ++row) {
      for (int64_t col = first_col; col < last_col; col += kRun) {
        body(row, col, static_cast<int>(std::min<int64_t>(kRun, last_col - col)));
      }
    }
  });
}

// The scales of the elements of a run, one for each.
class RunScales {
 public:
  RunScales(const BlockScales& scaling, int64_t cols)
      : scaling_(scaling), blocks_(ceil_div(cols, scaling.grid.col_block)) {}
  bool empty() const { return scaling_.scales.empty(); }
  float factor() const { return scaling_.factor; }
  void read(int64_t row, int64_t col, int count, float* out) const {
    const int64_t col_block = scaling_.grid.col_block;
    const float* of_row = scaling_.scales.data() + row / scaling_.grid.row_block * blocks_;
    int64_t block = col / col_block;
    for (int i = 0; i < count; ++block) {
      const int64_t end = std::min<int64_t>(count, (block + 1) * col_block - col);
      const float scale = of_row[block];
      for (; i < end; ++i) out[i] = scale;
    }
  }

 private:
  const BlockScales& scaling_;
  int64_t blocks_;
};

void require_scales(const BlockScales& scaling, int64_t rows, int64_t cols) {
  const auto& [scales, grid, factor] = scaling;
  if (!(factor > 0) || !std::isfinite(factor)) {
    throw InvalidArgument("factor", text_of(factor), "a finite number > 0");
  }
  if (grid.row_block < 1 || grid.col_block < 1) {
    throw InvalidArgument("block", text_of(grid.row_block, " x ", grid.col_block), "positive sizes");
  }
  if (scales.empty()) return;
  const int64_t expected = checked_mul(ceil_div(rows, grid.row_block), ceil_div(cols, grid.col_block));
  if (static_cast<int64_t>(scales.size()) != expected) {
    throw InvalidArgument("scales", text_of(scales.size(), " values"), text_of(expected));
  }
}

void store(const float* values, int count, void* out, DType dtype, int64_t first) {
  if (dtype == DType::f32) {
    std::copy_n(values, count, static_cast<float*>(out) + first);
  } else if (dtype == DType::bf16) {
    auto* target = static_cast<uint16_t*>(out) + first;
    for (int i = 0; i < count; ++i) target[i] = bf16_from_float(values[i]);
  } else {
    auto* target = static_cast<uint16_t*>(out) + first;
    for (int i = 0; i < count; ++i) target[i] = f16_from_float(values[i]);
  }
}

// Calls body(rounder) with what rounds runs to the set.
template <class Body>
void with_rounder(const Elements& elements, const Body& body) {
  using element_rounding::OneByOne;
  if (const auto* table = std::get_if<TableElements>(&elements)) {
    if (static_cast<int64_t>(table->boundaries.size()) <= element_runs::BoundaryTable::kMostBoundaries) {
      return body(element_runs::BoundaryTable(*table));
    }
    return body(OneByOne<element_rounding::TableRounder>{element_rounding::TableRounder(*table)});
  }
  if (const auto* floats = std::get_if<FloatElements>(&elements)) {
    const element_rounding::FloatRounder rounder(*floats);
    if (floats->exponent_bits > 7) return body(OneByOne<element_rounding::FloatRounder>{rounder});
    return body(element_runs::FloatRuns{rounder.mantissa_bits, rounder.bias, rounder.rounding,
                                        rounder.has_sign, rounder.largest_code, rounder.zero_code,
                                        static_cast<float>(rounder.largest)});
  }
  if (const auto* ints = std::get_if<IntElements>(&elements)) {
    const element_rounding::IntRounder rounder(*ints);
    if (ints->count > int64_t{1} << 31) return body(OneByOne<element_rounding::IntRounder>{rounder});
    return body(element_runs::IntRuns{rounder.offset, rounder.lowest, rounder.top});
  }
  const element_rounding::PowerRounder rounder(std::get<PowerElements>(elements));
  body(OneByOne<element_rounding::PowerRounder>{rounder});
}

// Whole vectors for `count` elements of a run; those after `count` are zeros.
template <class T>
int fill_vector(T* run, int count) {
  const auto padded = static_cast<int>(ceil_div(count, element_runs::kRunVector) * element_runs::kRunVector);
  std::fill(run + count, run + padded, T{0});
  return padded;
}
static_assert(kRun % element_runs::kRunVector == 0);

// The buffers of a run. Only what a step writes is set.
struct Run {
  float x[kRun];
  float scales[kRun];
  float values[kRun];
  uint32_t codes[kRun];
  const float* scale;  // `scales`, or null for none
  int padded;

  void read_scales(const RunScales& run_scales, int64_t row, int64_t col, int count) {
    scale = run_scales.empty() ? nullptr : scales;
    if (scale == nullptr) return;
    run_scales.read(row, col, count, scales);
    fill_vector(scales, count);
  }
  // x divided by its scales, in `x`.
  void divide(const FloatMatrix& matrix, const RunScales& run_scales, int64_t row, int64_t col, int count) {
    matrix.read(row, col, count, x);
    padded = fill_vector(x, count);
    read_scales(run_scales, row, col, count);
    element_runs::divide_run(x, scale, run_scales.factor(), padded);
  }
  // `values` of `codes`.
  template <class Rounder>
  void decode(const Rounder& rounder, const RunScales& run_scales, int64_t row, int64_t col, int count) {
    padded = fill_vector(codes, count);
    rounder.values(codes, padded, values);
    read_scales(run_scales, row, col, count);
    element_runs::multiply_run(values, values, scale, run_scales.factor(), padded);
  }
};

void require_bytes(const CodeLayout& layout, int64_t codes, size_t bytes) {
  const int64_t expected = checked_mul(layout.words(codes), 8);
  if (static_cast<int64_t>(bytes) != expected) {
    throw InvalidArgument("bytes", text_of(bytes, " bytes"), text_of(expected));
  }
}

// Calls body(begin, end) for pieces of codes that fill whole words, in parallel.
template <class Body>
void for_pieces(const CodeLayout& layout, int64_t total, int threads, const Body& body) {
  const int64_t codes = layout.piece_codes();
  parallel_for(ceil_div(total, codes), threads,
               [&](int64_t piece) { body(piece * codes, std::min(total, (piece + 1) * codes)); });
}

// Calls body(row, col, count, first) for the runs of elements [begin, end) in row-major order.
template <class Body>
void for_runs_between(int64_t begin, int64_t end, int64_t cols, const Body& body) {
  for (int64_t first = begin; first < end;) {
    const int64_t row = first / cols;
    const int64_t col = first - row * cols;
    const auto count = static_cast<int>(std::min({int64_t{kRun}, cols - col, end - first}));
    body(row, col, count, first);
    first += count;
  }
}

}  // namespace

TableElements::TableElements(std::vector<float> table) : values(std::move(table)) {
  require_count(static_cast<int64_t>(values.size()), 1, int64_t{1} << 24);
  for (size_t i = 0; i < values.size(); ++i) {
    if (!std::isfinite(values[i]) || (i > 0 && values[i] < values[i - 1])) {
      throw InvalidArgument("values", text_of(values[i], " at place ", i), "finite values that ascend");
    }
  }
  for (size_t i = 1; i < values.size(); ++i) {
    const float sum = values[i] + values[i - 1];
    boundaries.push_back(std::isfinite(sum) ? sum / 2 : values[i] / 2 + values[i - 1] / 2);
  }
}

FloatRounding float_rounding_from_name(std::string_view name) {
  if (name == "nearest") return FloatRounding::nearest;
  if (name == "to_zero") return FloatRounding::to_zero;
  if (name == "to_inf") return FloatRounding::to_inf;
  throw InvalidArgument("rounding", name, "nearest, to_zero or to_inf");
}

FloatElements::FloatElements(int exponent_bits, int mantissa_bits, FloatRounding rounding, bool has_sign)
    : exponent_bits(exponent_bits), mantissa_bits(mantissa_bits), rounding(rounding), has_sign(has_sign) {
  if (exponent_bits < 2 || exponent_bits > 8) {
    throw InvalidArgument("exponent_bits", text_of(exponent_bits), "2 to 8");
  }
  if (mantissa_bits < 0 || mantissa_bits > 23) {
    throw InvalidArgument("mantissa_bits", text_of(mantissa_bits), "0 to 23");
  }
}

IntElements::IntElements(int64_t count, bool symmetric) : count(count), symmetric(symmetric) {
  require_count(count, 1, int64_t{1} << 32);
}

PowerElements::PowerElements(int64_t count) : count(count) {
  require_count(count, 2, 256);
}

uint64_t code_count(const Elements& elements) {
  struct Count {
    uint64_t operator()(const TableElements& e) const { return e.values.size(); }
    uint64_t operator()(const FloatElements& e) const {
      const uint64_t magnitudes = uint64_t{1} << (e.exponent_bits + e.mantissa_bits);
      return e.has_sign ? 2 * magnitudes - 1 : magnitudes;
    }
    uint64_t operator()(const IntElements& e) const { return static_cast<uint64_t>(e.count); }
    uint64_t operator()(const PowerElements& e) const { return static_cast<uint64_t>(e.count); }
  };
  return std::visit(Count(), elements);
}

int64_t BlockGrid::rows(const FloatMatrix& x) const {
  require_scales({.grid = *this}, x.rows(), x.cols());
  return ceil_div(x.rows(), row_block);
}

int64_t BlockGrid::cols(const FloatMatrix& x) const {
  require_scales({.grid = *this}, x.rows(), x.cols());
  return ceil_div(x.cols(), col_block);
}

void round_elements(const Elements& elements, const FloatMatrix& x, const BlockScales& scaling,
                    RoundedElements out, int threads) {
  require_scales(scaling, x.rows(), x.cols());
  const RunScales run_scales(scaling, x.cols());
  with_rounder(elements, [&](const auto& rounder) {
    for_runs(x.rows(), x.cols(), threads, [&](int64_t row, int64_t col, int count) {
      Run run;
      run.divide(x, run_scales, row, col, count);
      rounder.codes(run.x, run.padded, run.codes);
      const int64_t first = row * x.cols() + col;
      if (out.codes != nullptr) std::copy_n(run.codes, count, out.codes + first);
      if (out.values == nullptr) return;
      rounder.values(run.codes, run.padded, run.values);
      element_runs::multiply_run(run.values, run.x, run.scale, scaling.factor, run.padded);
      store(run.values, count, out.values, x.dtype(), first);
    });
  });
}

void decode_elements(const Elements& elements, std::span<const uint32_t> codes, const BlockScales& scaling,
                     void* out, DType dtype, int64_t rows, int64_t cols, int threads) {
  require_scales(scaling, rows, cols);
  if (!is_float16_or_32(dtype)) throw TypeMismatch("dtype", name_of(dtype), "a float of 16 or 32 bits");
  if (static_cast<int64_t>(codes.size()) != checked_mul(rows, cols)) {
    throw InvalidArgument("codes", text_of(codes.size()), text_of(rows, " x ", cols));
  }
  const RunScales run_scales(scaling, cols);
  const uint64_t count_of_codes = code_count(elements);
  with_rounder(elements, [&](const auto& rounder) {
    for_runs(rows, cols, threads, [&](int64_t row, int64_t col, int count) {
      Run run;
      const int64_t first = row * cols + col;
      const uint32_t* from = codes.data() + first;
      const uint32_t highest = *std::max_element(from, from + count);
      if (highest >= count_of_codes) {
        throw InvalidArgument("codes", text_of(highest), text_of("less than ", count_of_codes));
      }
      std::copy_n(from, count, run.codes);
      run.decode(rounder, run_scales, row, col, count);
      store(run.values, count, out, dtype, first);
    });
  });
}

void encode_elements(const Elements& elements, const FloatMatrix& x, const BlockScales& scaling,
                     std::span<uint8_t> bytes, int threads) {
  require_scales(scaling, x.rows(), x.cols());
  const RunScales run_scales(scaling, x.cols());
  const CodeLayout layout(code_count(elements));
  const int64_t total = checked_mul(x.rows(), x.cols());
  require_bytes(layout, total, bytes.size());
  with_rounder(elements, [&](const auto& rounder) {
    for_pieces(layout, total, threads, [&](int64_t begin, int64_t end) {
      uint32_t codes[CodeLayout::kPieceCodes];
      for_runs_between(begin, end, x.cols(), [&](int64_t row, int64_t col, int count, int64_t first) {
        Run run;
        run.divide(x, run_scales, row, col, count);
        rounder.codes(run.x, run.padded, run.codes);
        std::copy_n(run.codes, count, codes + (first - begin));
      });
      layout.pack(codes, end - begin, bytes.data() + 8 * layout.words(begin));
    });
  });
}

void decode_packed_elements(const Elements& elements, std::span<const uint8_t> bytes,
                            const BlockScales& scaling, void* out, DType dtype, int64_t rows, int64_t cols,
                            int threads) {
  require_scales(scaling, rows, cols);
  if (!is_float16_or_32(dtype)) throw TypeMismatch("dtype", name_of(dtype), "a float of 16 or 32 bits");
  const RunScales run_scales(scaling, cols);
  const uint64_t count_of_codes = code_count(elements);
  const CodeLayout layout(count_of_codes);
  const int64_t total = checked_mul(rows, cols);
  require_bytes(layout, total, bytes.size());
  with_rounder(elements, [&](const auto& rounder) {
    for_pieces(layout, total, threads, [&](int64_t begin, int64_t end) {
      uint32_t codes[CodeLayout::kPieceCodes];
      if (!layout.unpack(bytes.data() + 8 * layout.words(begin), end - begin, codes)) {
        throw InvalidArgument("codes", "one that is too large", text_of("codes below ", count_of_codes));
      }
      for_runs_between(begin, end, cols, [&](int64_t row, int64_t col, int count, int64_t first) {
        Run run;
        std::copy_n(codes + (first - begin), count, run.codes);
        run.decode(rounder, run_scales, row, col, count);
        store(run.values, count, out, dtype, first);
      });
    });
  });
}

}  // namespace quantloom
