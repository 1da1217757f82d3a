#include "quantloom/transforms/hadamard.hpp"

#include <algorithm>
#include <cmath>

#include "quantloom/checked_math.hpp"
#include "quantloom/parallel.hpp"
#include "quantloom/random.hpp"
#include "transforms/hadamard_rows.hpp"

namespace quantloom {
namespace {

// Elements that one task works on, if blocks are small: much less than a cache holds, much more than a task
// costs.
constexpr int64_t kSpan = 8192;
constexpr int64_t kTaskElements = int64_t{1} << 16;

// M or its transpose, as BlockPlan::base wants it.
std::vector<float> base_entries(int64_t order, bool transposed) {
  const std::vector<int8_t> base = hadamard_base(order);
  std::vector<float> entries(base.size());
  for (int64_t row = 0; row < order; ++row) {
    for (int64_t j = 0; j < order; ++j) {
      const int8_t entry = base[static_cast<size_t>(transposed ? j * order + row : row * order + j)];
      entries[static_cast<size_t>((row / 4 * order + j) * 4 + row % 4)] = static_cast<float>(entry);
    }
  }
  return entries;
}

void check_overlap(const FloatMatrix& x, const void* out, int64_t out_stride) {
  const auto begin_x = reinterpret_cast<uintptr_t>(x.data());
  const auto begin_out = reinterpret_cast<uintptr_t>(out);
  if (begin_x == begin_out && (x.rows() <= 1 || x.stride() == out_stride)) return;
  const int64_t size = size_of(x.dtype());
  const auto bytes = [&](int64_t stride) {
    return static_cast<uintptr_t>(
        checked_mul(checked_add(checked_mul(x.rows() - 1, stride), x.cols()), size));
  };
  if (begin_x < begin_out + bytes(out_stride) && begin_out < begin_x + bytes(x.stride())) {
    throw InvalidArgument("out", "memory that overlaps x", "x itself, or memory apart from it");
  }
}

}  // namespace

std::vector<uint8_t> random_signs(int64_t cols, uint64_t seed) {
  if (cols < 0) throw InvalidArgument("cols", text_of(cols), "0 or more");
  std::vector<uint8_t> signs(static_cast<size_t>(sign_bytes(cols)));
  const CounterRandom random(seed);
  for (size_t i = 0; i < signs.size(); ++i) {
    signs[i] = static_cast<uint8_t>(random.bits(i / 8) >> (8 * (i % 8)));
  }
  if (cols % 8 != 0) signs.back() &= static_cast<uint8_t>((1 << (cols % 8)) - 1);
  return signs;
}

void hadamard(const FloatMatrix& x, void* out, int64_t out_stride, const HadamardOptions& options) {
  const int64_t rows = x.rows();
  const int64_t cols = x.cols();
  if (options.block < 0) throw InvalidArgument("block", text_of(options.block), "0 (whole rows) or more");
  if (!std::isfinite(options.scale))
    throw InvalidArgument("scale", text_of(options.scale), "a finite number");
  if (!options.signs.empty() && static_cast<int64_t>(options.signs.size()) != sign_bytes(cols)) {
    throw InvalidArgument("signs", text_of(options.signs.size(), " bytes"),
                          text_of(sign_bytes(cols), " for ", cols, " columns"));
  }
  if (!options.channel_scale.empty() && static_cast<int64_t>(options.channel_scale.size()) != cols) {
    throw InvalidArgument("channel_scale", text_of(options.channel_scale.size(), " values"),
                          text_of(cols, ", one for each column"));
  }
  if (out_stride < cols) throw InvalidArgument("out_stride", text_of(out_stride), text_of("at least ", cols));
  if (cols == 0) return;
  const HadamardSize size = require_hadamard_block(cols, options.block);
  if (rows == 0) return;
  if (out == nullptr) throw InvalidArgument("out", "a null pointer", text_of("memory for ", rows, " rows"));
  check_overlap(x, out, out_stride);

  const int64_t block = size.order << size.power;
  std::vector<float> entries;
  if (size.order > 1) entries = base_entries(size.order, options.inverse);
  transforms::BlockPlan plan;
  plan.order = size.order;
  plan.power = size.power;
  plan.base = entries.empty() ? nullptr : entries.data();
  plan.factor =
      static_cast<float>(static_cast<double>(options.scale) / std::sqrt(static_cast<double>(block)));
  plan.inverse = options.inverse;
  std::vector<uint32_t> signs;
  if (!options.signs.empty()) {
    signs.resize(static_cast<size_t>(cols));
    for (int64_t i = 0; i < cols; ++i) {
      const uint32_t bit = (static_cast<uint32_t>(options.signs[static_cast<size_t>(i / 8)]) >> (i % 8)) & 1U;
      signs[static_cast<size_t>(i)] = bit << 31;
    }
  }

  // Spans of whole blocks; tasks of several spans.
  const int64_t span = block * std::max<int64_t>(1, std::min(kSpan, cols) / block);
  const int64_t spans_per_row = ceil_div(cols, span);
  const int64_t spans = checked_mul(rows, spans_per_row);
  const int64_t spans_per_task = std::max<int64_t>(1, kTaskElements / span);
  const int64_t element = size_of(x.dtype());
  checked_mul(checked_mul(rows, std::max(x.stride(), out_stride)), element);
  parallel_for(ceil_div(spans, spans_per_task), options.threads, [&](int64_t task) {
    const auto floats = static_cast<size_t>(span + transforms::kBufferPadding);
    std::vector<float> buffer(floats);
    std::vector<float> second(plan.base == nullptr ? 0 : floats);
    const int64_t last = std::min(spans, (task + 1) * spans_per_task);
    for (int64_t i = task * spans_per_task; i < last; ++i) {
      const int64_t row = i / spans_per_row;
      const int64_t begin = i % spans_per_row * span;
      transforms::RowSpan piece;
      piece.x = static_cast<const std::byte*>(x.data()) + (row * x.stride() + begin) * element;
      piece.out = static_cast<std::byte*>(out) + (row * out_stride + begin) * element;
      piece.dtype = x.dtype();
      piece.count = std::min(span, cols - begin);
      piece.signs = signs.empty() ? nullptr : signs.data() + begin;
      piece.scales = options.channel_scale.empty() ? nullptr : options.channel_scale.data() + begin;
      transforms::transform_span(piece, plan, buffer.data(), second.data());
    }
  });
}

}  // namespace quantloom
