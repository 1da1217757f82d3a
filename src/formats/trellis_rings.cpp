// Encoding, decoding, packing and unpacking of rings.
#include <algorithm>
#include <cmath>
#include <memory>
#include <mutex>

#include "formats/description.hpp"
#include "formats/trellis_codes.hpp"
#include "formats/trellis_search.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/error.hpp"
#include "quantloom/formats/trellis.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {
namespace {

constexpr int64_t kRingsPerPiece = 64;  // of decoding

void require_shape(const TrellisShape& shape) {
  if (shape.window < 1 || shape.window > 24) {
    throw InvalidArgument("shape.window", text_of(shape.window), "1 to 24 bits");
  }
  if (shape.half_bits < 2 || shape.half_bits > 16) {
    throw InvalidArgument("shape.half_bits", text_of(shape.half_bits), "2 to 16: 1 to 8 bits a weight");
  }
  if (shape.weights_per_step != 1 && shape.weights_per_step != 2) {
    throw InvalidArgument("shape.weights_per_step", text_of(shape.weights_per_step), "1 or 2");
  }
  if (shape.length < 2 || shape.length > 65536 || shape.length % (2 * shape.weights_per_step) != 0) {
    throw InvalidArgument("shape.length", text_of(shape.length),
                          text_of("2 to 65536 weights, a multiple of ", 2 * shape.weights_per_step));
  }
  if (shape.ring_bits() < shape.window) {
    throw InvalidArgument("shape.length", text_of(shape.length, " weights of ", shape.ring_bits(), " bits"),
                          text_of("at least the window's ", shape.window, " bits"));
  }
}

void require_fit(const TrellisCodebook& codebook, const TrellisShape& shape) {
  require_shape(shape);
  if (shape.window != codebook.window) {
    throw InvalidArgument("shape.window", text_of(shape.window),
                          text_of(codebook.window, " bits, as the codebook has"));
  }
  if (shape.weights_per_step != codebook.weights_per_step) {
    throw InvalidArgument("shape.weights_per_step", text_of(shape.weights_per_step),
                          text_of(codebook.weights_per_step, ", as the codebook has"));
  }
  const size_t entries = codebook.code == TrellisCode::hyb ? size_t{trellis::kHybEntries} * 2
                         : codebook.code == TrellisCode::table
                             ? (size_t{1} << codebook.window) * static_cast<size_t>(codebook.weights_per_step)
                             : 0;
  if (codebook.table.size() != entries) {
    throw InvalidArgument("codebook.table", text_of(codebook.table.size(), " numbers"), text_of(entries));
  }
  for (const uint16_t bits : codebook.table) {
    if ((bits >> 10 & 31U) == 31) {
      throw InvalidArgument("codebook.table", "a number that is not finite", "finite float16 numbers");
    }
  }
}

// Fresh bits that a search can take: choices are kept in a byte, and each state needs one to come from.
void require_search(const TrellisShape& shape) {
  const int most = std::max(shape.step_bits(0), shape.step_bits(1));
  if (most > 8 || most > shape.window) {
    throw InvalidArgument("shape.half_bits", text_of(most, " fresh bits in a step"),
                          text_of("at most ", std::min(8, shape.window)));
  }
}

void require_matrix(std::string_view argument, int64_t rows, int64_t cols, int64_t expected_rows,
                    int64_t expected_cols) {
  if (rows != expected_rows || cols != expected_cols) {
    throw InvalidArgument(argument, text_of("[", rows, ", ", cols, "]"),
                          text_of("[", expected_rows, ", ", expected_cols, "]"));
  }
}

// Memory that searches hand on to each other.
class MemoryPool {
 public:
  std::unique_ptr<trellis::SearchMemory> take() {
    const std::scoped_lock lock(mutex_);
    if (free_.empty()) return std::make_unique<trellis::SearchMemory>();
    std::unique_ptr<trellis::SearchMemory> memory = std::move(free_.back());
    free_.pop_back();
    return memory;
  }
  void give(std::unique_ptr<trellis::SearchMemory> memory) {
    const std::scoped_lock lock(mutex_);
    free_.push_back(std::move(memory));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<trellis::SearchMemory>> free_;
};

}  // namespace

TrellisSearch trellis_search_from_name(std::string_view name) {
  for (const TrellisSearch search : {TrellisSearch::fast, TrellisSearch::normal, TrellisSearch::best}) {
    if (name == name_of(search)) return search;
  }
  throw InvalidArgument("search", printable(name), "fast, normal or best");
}

std::string_view name_of(TrellisSearch search) {
  return search == TrellisSearch::fast ? "fast" : search == TrellisSearch::normal ? "normal" : "best";
}

void encode_rings(const TrellisCodebook& codebook, const TrellisShape& shape, MatrixView<const float> targets,
                  MatrixView<uint32_t> states, const TrellisEncodeOptions& options) {
  require_fit(codebook, shape);
  require_search(shape);
  const int64_t rings = targets.rows();
  require_matrix("targets", rings, targets.cols(), rings, shape.length);
  require_matrix("states", states.rows(), states.cols(), rings, shape.steps());
  static_cast<void>(resolve_threads(options.threads));
  require_finite(targets, "targets", options.threads);
  if (rings == 0) return;
  const trellis::SearchTable table(codebook, shape);
  MemoryPool pool;
  const int64_t at_once = shape.window > 18 ? 1 : trellis::kRingsAtOnce;  // bounds the memory of costs
  parallel_for(ceil_div(rings, at_once), options.threads, [&](int64_t piece) {
    const int64_t first = piece * at_once;
    const int64_t count = std::min(at_once, rings - first);
    std::unique_ptr<trellis::SearchMemory> memory = pool.take();
    trellis::search_rings(table, options.search, targets.block(first, 0, count, shape.length),
                          states.block(first, 0, count, shape.steps()), *memory);
    pool.give(std::move(memory));
  });
}

void decode_rings(const TrellisCodebook& codebook, const TrellisShape& shape,
                  MatrixView<const uint32_t> states, MatrixView<float> weights, int threads) {
  require_fit(codebook, shape);
  const int64_t rings = states.rows();
  require_matrix("states", rings, states.cols(), rings, shape.steps());
  require_matrix("weights", weights.rows(), weights.cols(), rings, shape.length);
  for (int64_t r = 0; r < rings; ++r) {
    for (int64_t i = 0; i < states.cols(); ++i) {
      if (states(r, i) >> shape.window != 0) {
        throw InvalidArgument("states", text_of(states(r, i), " at ring ", r, ", step ", i),
                              text_of("states of ", shape.window, " bits"));
      }
    }
  }
  if (rings == 0) return;
  const std::vector<float> values = codebook.values();
  const int64_t per_step = shape.weights_per_step;
  parallel_for(ceil_div(rings, kRingsPerPiece), threads, [&](int64_t piece) {
    for (int64_t r = piece * kRingsPerPiece; r < std::min(rings, (piece + 1) * kRingsPerPiece); ++r) {
      for (int64_t i = 0; i < states.cols(); ++i) {
        const float* from = values.data() + int64_t{states(r, i)} * per_step;
        std::copy_n(from, per_step, weights.row(r) + i * per_step);
      }
    }
  });
}

void pack_rings(const TrellisShape& shape, MatrixView<const uint32_t> states, MatrixView<uint32_t> words) {
  require_shape(shape);
  const int64_t rings = states.rows();
  require_matrix("states", rings, states.cols(), rings, shape.steps());
  require_matrix("words", words.rows(), words.cols(), rings, shape.words());
  const uint32_t mask = (uint32_t{1} << shape.window) - 1;
  for (int64_t r = 0; r < rings; ++r) {
    uint32_t before = states(r, states.cols() - 1);
    for (int step = 0; step < shape.steps(); ++step) {
      const int bits = shape.step_bits(step);
      const uint32_t state = states(r, step);
      if (((before << bits) & mask) != (state & ~((uint32_t{1} << bits) - 1)) || state > mask) {
        throw InvalidArgument("states", text_of(state, " at ring ", r, ", step ", step, " after ", before),
                              "states that continue each other around the ring");
      }
      before = state;
    }
  }
  for (int64_t r = 0; r < rings; ++r) {
    std::fill_n(words.row(r), words.cols(), 0U);
    for (int step = 0; step < shape.steps(); ++step) {
      trellis::put_bits(words.row(r), shape.first_bit(step), shape.step_bits(step), states(r, step));
    }
  }
}

void unpack_rings(const TrellisShape& shape, MatrixView<const uint32_t> words, MatrixView<uint32_t> states) {
  require_shape(shape);
  const int64_t rings = words.rows();
  require_matrix("words", rings, words.cols(), rings, shape.words());
  require_matrix("states", states.rows(), states.cols(), rings, shape.steps());
  const uint64_t mask = (uint64_t{1} << shape.window) - 1;
  const int ring_bits = shape.ring_bits();
  for (int64_t r = 0; r < rings; ++r) {
    uint64_t state = trellis::state_at(words.row(r), ring_bits, ring_bits, shape.window);
    for (int step = 0; step < shape.steps(); ++step) {
      for (int bit = shape.first_bit(step); bit < shape.first_bit(step + 1); ++bit) {
        state = state << 1 | (words(r, bit >> 5) >> (31 - (bit & 31)) & 1U);
      }
      states(r, step) = static_cast<uint32_t>(state & mask);
    }
  }
}

}  // namespace quantloom
