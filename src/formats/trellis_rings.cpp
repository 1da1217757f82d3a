// Encoding, decoding, packing and unpacking of rings.
#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>

#include "formats/description.hpp"
#include "formats/trellis_codes.hpp"
#include "formats/trellis_search.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/error.hpp"
#include "quantloom/formats/trellis.hpp"
#include "quantloom/parallel.hpp"
#include "quantloom/random.hpp"

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

const TrellisShape& checked_shape(const TrellisCodebook& codebook, const TrellisShape& shape) {
  require_fit(codebook, shape);
  require_search(shape);
  return shape;
}

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

namespace trellis {

RingEncoder::RingEncoder(const TrellisCodebook& codebook, const TrellisShape& shape)
    : table_(codebook, checked_shape(codebook, shape)) {}

void RingEncoder::encode(MatrixView<const float> targets, MatrixView<uint32_t> states, TrellisSearch search,
                         int threads) {
  const int64_t at_once = shape().window > 18 ? 1 : kRingsAtOnce;  // bounds the memory of costs
  parallel_for(ceil_div(targets.rows(), at_once), threads, [&](int64_t piece) {
    const int64_t first = piece * at_once;
    const int64_t count = std::min(at_once, targets.rows() - first);
    std::unique_ptr<SearchMemory> memory;
    {
      const std::scoped_lock lock(mutex_);
      if (!free_.empty()) {
        memory = std::move(free_.back());
        free_.pop_back();
      }
    }
    if (memory == nullptr) memory = std::make_unique<SearchMemory>();
    search_rings(table_, search, targets.block(first, 0, count, shape().length),
                 states.block(first, 0, count, shape().steps()), *memory);
    const std::scoped_lock lock(mutex_);
    free_.push_back(std::move(memory));
  });
}

void unpack_ring(const TrellisShape& shape, const uint32_t* words, uint32_t* states) {
  const uint64_t mask = (uint64_t{1} << shape.window) - 1;
  const int ring_bits = shape.ring_bits();
  uint64_t state = state_at(words, ring_bits, ring_bits, shape.window);
  for (int step = 0; step < shape.steps(); ++step) {
    const int first = shape.first_bit(step);
    const int count = shape.step_bits(step);
    // The fresh bits, at most 16, of this word and the next.
    const int word = first >> 5;
    const bool straddles = (first & 31) + count > 32;
    const uint64_t pair = uint64_t{words[word]} << 32 | (straddles ? words[word + 1] : 0U);
    const uint64_t fresh = pair >> (64 - (first & 31) - count) & ((uint64_t{1} << count) - 1);
    state = (state << count | fresh) & mask;
    states[step] = static_cast<uint32_t>(state);
  }
}

void pack_ring(const TrellisShape& shape, const uint32_t* states, uint32_t* words) {
  std::fill_n(words, shape.words(), 0U);
  for (int step = 0; step < shape.steps(); ++step) {
    put_bits(words, shape.first_bit(step), shape.step_bits(step), states[step]);
  }
}

}  // namespace trellis

void encode_rings(const TrellisCodebook& codebook, const TrellisShape& shape, MatrixView<const float> targets,
                  MatrixView<uint32_t> states, const TrellisEncodeOptions& options) {
  static_cast<void>(checked_shape(codebook, shape));
  const int64_t rings = targets.rows();
  require_matrix("targets", rings, targets.cols(), rings, shape.length);
  require_matrix("states", states.rows(), states.cols(), rings, shape.steps());
  static_cast<void>(resolve_threads(options.threads));
  require_finite(targets, "targets", options.threads);
  if (rings == 0) return;
  trellis::RingEncoder(codebook, shape).encode(targets, states, options.search, options.threads);
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
  for (int64_t r = 0; r < rings; ++r) trellis::pack_ring(shape, states.row(r), words.row(r));
}

void unpack_rings(const TrellisShape& shape, MatrixView<const uint32_t> words, MatrixView<uint32_t> states) {
  require_shape(shape);
  const int64_t rings = words.rows();
  require_matrix("words", rings, words.cols(), rings, shape.words());
  require_matrix("states", states.rows(), states.cols(), rings, shape.steps());
  for (int64_t r = 0; r < rings; ++r) trellis::unpack_ring(shape, words.row(r), states.row(r));
}

double trellis_distortion(const TrellisCodebook& codebook, int half_bits, double ratio, int64_t rings,
                          uint64_t seed, const TrellisEncodeOptions& options) {
  const TrellisShape shape{codebook.window, half_bits, codebook.weights_per_step, trellis::kRingLength};
  if (!(ratio > 0 && ratio <= 1000))
    throw InvalidArgument("ratio", text_of(ratio), "a number above 0, at most 1000");
  if (rings < 1) throw InvalidArgument("rings", text_of(rings), "1 or more");
  static_cast<void>(resolve_threads(options.threads));
  trellis::RingEncoder encoder(codebook, checked_shape(codebook, shape));
  const std::vector<float> values = codebook.values();
  const double scale = ratio * codebook.rms();
  const CounterRandom random(seed);
  std::vector<double> errors(static_cast<size_t>(ceil_div(rings, kRingsPerPiece)), 0.0);
  std::vector<double> energies(errors.size(), 0.0);
  // Pieces of a fixed size, so that the sum does not depend on the threads.
  parallel_for(std::ssize(errors), options.threads, [&](int64_t piece) {
    const int64_t first = piece * kRingsPerPiece;
    const int64_t count = std::min(kRingsPerPiece, rings - first);
    std::vector<float> targets(static_cast<size_t>(count * shape.length));
    std::vector<uint32_t> states(static_cast<size_t>(count * shape.steps()));
    for (size_t i = 0; i < targets.size(); ++i) {
      targets[i] = static_cast<float>(scale * random.normal(static_cast<uint64_t>(first * shape.length) + i));
    }
    encoder.encode({targets.data(), count, shape.length}, {states.data(), count, shape.steps()},
                   options.search, 1);
    const auto per_step = static_cast<size_t>(shape.weights_per_step);
    for (size_t i = 0; i < targets.size(); ++i) {
      const double error =
          double{values[states[i / per_step] * per_step + i % per_step]} - double{targets[i]};
      errors[static_cast<size_t>(piece)] += error * error;
      energies[static_cast<size_t>(piece)] += double{targets[i]} * double{targets[i]};
    }
  });
  const double error = std::accumulate(errors.begin(), errors.end(), 0.0);
  return error / std::accumulate(energies.begin(), energies.end(), 0.0);
}

}  // namespace quantloom
