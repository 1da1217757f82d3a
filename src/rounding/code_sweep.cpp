#include "rounding/code_sweep.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <tuple>

#include "algebra/dense_tiles.hpp"
#include "quantloom/parallel.hpp"
#include "rounding/code_scores.hpp"

namespace quantloom {
namespace {

constexpr int64_t kSlabRows = 64;  // rows whose search runs on one thread
constexpr int64_t kBlockColumns =
    64;  // columns whose products with the errors are brought up to date at once

void multiply_transposed(int64_t m, int64_t n, int64_t k, const float* a, const float* b, float* c) {
  algebra::tiles().gemm_nt_f32(m, n, k, 1.0F, a, k, b, k, c, n);
}
void multiply_transposed(int64_t m, int64_t n, int64_t k, const double* a, const double* b, double* c) {
  algebra::tiles().gemm_nt_f64(m, n, k, 1.0, a, k, b, k, c, n);
}

// What all threads read.
template <class Real>
struct Sweep {
  Sweep(const AdditiveProblem& problem_given, const AdditiveParts& parts, const CodeSearchOptions& options)
      : problem(problem_given),
        format(problem.format),
        beam(options.beam),
        dim(format.dim()),
        padded(checked_pad(format.entries(), kScorePadding)),
        order(visit_order(problem.blocks, format.codebooks, options.shuffled, options.seed)),
        h(problem.hessian<Real>(order.blocks)),
        scales(problem.scales<Real>(parts)),
        tables(static_cast<size_t>(checked_mul(format.codebooks * dim, padded)), Real{0}) {
    const int64_t entries = format.entries();
    for (int64_t book = 0; book < format.codebooks; ++book) {
      for (int64_t entry = 0; entry < entries; ++entry) {
        for (int64_t i = 0; i < dim; ++i) {
          tables[static_cast<size_t>((book * dim + i) * padded + entry)] =
              static_cast<Real>(parts.tables[static_cast<size_t>((book * entries + entry) * dim + i)]);
        }
      }
    }
    if (options.code_penalties.empty() && padded == entries) return;
    penalties.assign(static_cast<size_t>(format.codebooks * padded), std::numeric_limits<Real>::infinity());
    for (int64_t book = 0; book < format.codebooks; ++book) {
      for (int64_t entry = 0; entry < entries; ++entry) {
        const double penalty =
            options.code_penalties.empty()
                ? 0.0
                : static_cast<double>(options.code_penalties[static_cast<size_t>(book * entries + entry)]);
        penalties[static_cast<size_t>(book * padded + entry)] =
            static_cast<Real>(penalty / problem.loss_unit());
      }
    }
  }

  // Elements of an entry: `element` times `padded` apart.
  const Real* entry(int64_t book, int64_t code) const { return tables.data() + book * dim * padded + code; }

  const AdditiveProblem& problem;
  const Additive& format;
  int64_t beam;
  int64_t dim;
  int64_t padded;
  VisitOrder order;
  std::vector<Real> h;  // [columns, columns], blocks in their order
  std::vector<Real> scales;
  std::vector<Real> tables;     // [codebooks, dim, padded]
  std::vector<Real> penalties;  // [codebooks, padded], or empty
};

struct Candidate {
  double loss;  // beyond that of the start
  int64_t hypothesis;
  int32_t code;
};

// Some groups of rows on their way through all blocks. Arrays of hypotheses are [hypothesis][group of rows].
template <class Real>
class Slab {
 public:
  Slab(const Sweep<Real>& sweep, AdditiveParts& parts, std::span<const int64_t> row_groups)
      : sweep_(sweep),
        parts_(parts),
        format_(sweep.format),
        row_groups_(row_groups),
        count_(std::ssize(row_groups)),
        og_(format_.out_group),
        g_(format_.in_group),
        books_(format_.codebooks),
        columns_(sweep.problem.columns),
        row_codes_(sweep.problem.blocks * books_),
        block_groups_(std::max<int64_t>(kBlockColumns / g_, 1)),
        width_(std::min(block_groups_, sweep.problem.blocks) * g_) {
    const auto states = static_cast<size_t>(sweep.beam * count_);
    errors_.resize(states * static_cast<size_t>(og_ * columns_));
    products_.resize(states * static_cast<size_t>(og_ * width_));
    codes_.resize(states * static_cast<size_t>(row_codes_));
    if (sweep.beam > 1) {
      new_errors_.resize(errors_.size());
      new_products_.resize(products_.size());
      new_codes_.resize(codes_.size());
      new_run_codes_.resize(states * static_cast<size_t>(block_groups_ * books_));
    }
    run_codes_.resize(states * static_cast<size_t>(block_groups_ * books_));
    losses_.assign(states, 0.0);
    new_losses_.resize(states);
    origins_.resize(states);
    new_origins_.resize(states);
    factors_.resize(states * static_cast<size_t>(sweep.dim));
    squares_.resize(states);
    bases_.resize(states);
    scores_.resize(states * static_cast<size_t>(sweep.beam));
    found_.resize(scores_.size());
    norms_.resize(static_cast<size_t>(sweep.padded));
    change_.resize(static_cast<size_t>(g_));
  }

  void run() {
    const int64_t blocks = sweep_.problem.blocks;
    load();
    for (int64_t first = 0; first < blocks; first += block_groups_) {
      const int64_t last = std::min(first + block_groups_, blocks);
      begin_block(first, last);
      for (int64_t block = first; block < last; ++block) {
        for (int64_t t = 0; t < books_; ++t) {
          visit(block, sweep_.order.tables[static_cast<size_t>(block * books_ + t)], last);
        }
      }
      end_block(first, last);
    }
    store();
  }

 private:
  int64_t state(int64_t hypothesis, int64_t r) const { return hypothesis * count_ + r; }
  Real* errors(int64_t state) { return errors_.data() + state * og_ * columns_; }
  Real* products(int64_t state) { return products_.data() + state * og_ * width_; }
  // Codes by position in the order of blocks, and by table.
  uint16_t* codes(int64_t state) { return codes_.data() + state * row_codes_; }
  int64_t run_length() const { return width_ / g_ * books_; }
  // Those of the present run.
  uint16_t* run_codes(int64_t state) { return run_codes_.data() + state * run_length(); }
  // The place of a code in them.
  int64_t place(int64_t block, int64_t book) const { return (block - first_column_ / g_) * books_ + book; }
  Real scale(int64_t r, int64_t block) const {
    return sweep_.scales[static_cast<size_t>(sweep_.problem.scale_of_block(
        row_groups_[static_cast<size_t>(r)], sweep_.order.blocks[static_cast<size_t>(block)]))];
  }

  void load() {
    live_ = 1;
    for (int64_t r = 0; r < count_; ++r) {
      const uint16_t* const from = parts_.codes.data() + row_groups_[static_cast<size_t>(r)] * row_codes_;
      for (int64_t block = 0; block < sweep_.problem.blocks; ++block) {
        std::copy_n(from + sweep_.order.blocks[static_cast<size_t>(block)] * books_, books_,
                    codes(r) + block * books_);
      }
      for (int64_t block = 0; block < sweep_.problem.blocks; ++block) find_errors(r, r, block);
    }
  }

  // The errors of one block under the codes of a state.
  void find_errors(int64_t state, int64_t r, int64_t block) {
    const int64_t padded = sweep_.padded;
    const int64_t first = sweep_.order.blocks[static_cast<size_t>(block)] * g_;
    const Real factor = scale(r, block);
    for (int64_t a = 0; a < og_; ++a) {
      const int64_t row = row_groups_[static_cast<size_t>(r)] * og_ + a;
      for (int64_t i = 0; i < g_; ++i) {
        Real sum = 0;
        for (int64_t book = 0; book < books_; ++book) {
          sum += sweep_.entry(book, codes(state)[block * books_ + book])[(a * g_ + i) * padded];
        }
        errors(state)[a * columns_ + block * g_ + i] =
            static_cast<Real>(sweep_.problem.weights()(row, first + i)) - factor * sum;
      }
    }
  }

  void begin_block(int64_t first, int64_t last) {
    width_ = (last - first) * g_;
    first_column_ = first * g_;
    const int64_t rows = live_ * count_ * og_;
    std::fill_n(products_.data(), rows * width_, Real{0});
    multiply_transposed(rows, width_, columns_, errors_.data(), sweep_.h.data() + first_column_ * columns_,
                        products_.data());
    for (int64_t b = 0; b < live_; ++b) {
      for (int64_t r = 0; r < count_; ++r) {
        const int64_t s = state(b, r);
        origins_[static_cast<size_t>(s)] = b;
        std::copy_n(codes(s) + first * books_, run_length(), run_codes(s));
      }
    }
  }

  // H between the rows of a block and the columns of this run from `column` on.
  const Real* hessian(int64_t block, int64_t column) const {
    return sweep_.h.data() + block * g_ * columns_ + column;
  }

  void visit(int64_t block, int64_t book, int64_t last) {
    const int64_t states = live_ * count_;
    const NormJob<Real> norms = {.table = sweep_.entry(book, 0),
                                 .padded = sweep_.padded,
                                 .out_group = og_,
                                 .in_group = g_,
                                 .h = hessian(block, block * g_),
                                 .stride = columns_,
                                 .norms = norms_.data()};
    weigh_entries(norms);
    for (int64_t s = 0; s < states; ++s) find_target(s, block, book);
    const ScoreJob<Real> job = {
        .table = sweep_.entry(book, 0),
        .norms = norms_.data(),
        .penalties = sweep_.penalties.empty() ? nullptr : sweep_.penalties.data() + book * sweep_.padded,
        .padded = sweep_.padded,
        .dim = sweep_.dim,
        .rows = states,
        .factors = factors_.data(),
        .squares = squares_.data(),
        .beam = static_cast<int>(sweep_.beam),
        .scores = scores_.data(),
        .codes = found_.data()};
    find_least_scores(job);
    if (sweep_.beam == 1) {
      for (int64_t r = 0; r < count_; ++r) {
        take(products(r), run_codes(r), r, block, book, found_[static_cast<size_t>(r)], last);
      }
      return;
    }
    for (int64_t r = 0; r < count_; ++r) select(r, block, book, last);
    live_ = std::min(live_ * sweep_.beam, sweep_.beam);
    std::swap(products_, new_products_);
    std::swap(run_codes_, new_run_codes_);
    std::swap(losses_, new_losses_);
    std::swap(origins_, new_origins_);
  }

  // What the score of an entry is made of, and the score of the present one: with s the scale, c the entry
  // and T the product of H and the errors without the present entry, the loss is s^2 c^T H c - 2 s <c, T> and
  // what does not depend on c.
  void find_target(int64_t s, int64_t block, int64_t book) {
    const int64_t r = s % count_;
    const Real factor = scale(r, block);
    const int64_t code = run_codes(s)[place(block, book)];
    const Real* const entry = sweep_.entry(book, code);
    std::array<Real, Additive::kMostWeights> present;
    for (int64_t i = 0; i < sweep_.dim; ++i) present[static_cast<size_t>(i)] = entry[i * sweep_.padded];
    const Real* const h = hessian(block, block * g_);
    Real dot = 0;
    for (int64_t a = 0; a < og_; ++a) {
      const Real* const product = products(s) + a * width_ + (block * g_ - first_column_);
      const Real* const own = present.data() + a * g_;
      std::array<Real, Additive::kMostWeights> target{};
      for (int64_t j = 0; j < g_; ++j) {
        for (int64_t i = 0; i < g_; ++i) target[static_cast<size_t>(i)] += own[j] * h[j * columns_ + i];
      }
      for (int64_t i = 0; i < g_; ++i) {
        const Real wanted = product[i] + factor * target[static_cast<size_t>(i)];
        factors_[static_cast<size_t>(s * sweep_.dim + a * g_ + i)] = -2 * factor * wanted;
        dot += own[i] * wanted;
      }
    }
    squares_[static_cast<size_t>(s)] = factor * factor;
    Real base = factor * factor * norms_[static_cast<size_t>(code)] - 2 * factor * dot;
    if (!sweep_.penalties.empty()) base += sweep_.penalties[static_cast<size_t>(book * sweep_.padded + code)];
    bases_[static_cast<size_t>(s)] = static_cast<double>(base);
  }

  // Puts a code among those of a state's run, and its change in the products of this and later blocks of the
  // run.
  void take(Real* product, uint16_t* run_codes, int64_t r, int64_t block, int64_t book, int64_t code,
            int64_t last) {
    uint16_t& present = run_codes[place(block, book)];
    if (present == code) return;
    const Real factor = scale(r, block);
    const Real* const before = sweep_.entry(book, present);
    const Real* const after = sweep_.entry(book, code);
    present = static_cast<uint16_t>(code);
    for (int64_t a = 0; a < og_; ++a) {
      for (int64_t i = 0; i < g_; ++i) {
        const int64_t at = (a * g_ + i) * sweep_.padded;
        change_[static_cast<size_t>(i)] = factor * (after[at] - before[at]);
      }
      push_change(PushJob<Real>{.delta = change_.data(),
                                .rows = g_,
                                .h = hessian(block, block * g_),
                                .stride = columns_,
                                .count = (last - block) * g_,
                                .d = product + a * width_ + (block * g_ - first_column_)});
    }
  }

  // The best candidates of all hypotheses of one group of rows.
  void select(int64_t r, int64_t block, int64_t book, int64_t last) {
    candidates_.clear();
    for (int64_t b = 0; b < live_; ++b) {
      const auto s = static_cast<size_t>(state(b, r));
      for (int64_t i = 0; i < sweep_.beam; ++i) {
        const auto at = s * static_cast<size_t>(sweep_.beam) + static_cast<size_t>(i);
        candidates_.push_back({losses_[s] + (static_cast<double>(scores_[at]) - bases_[s]), b, found_[at]});
      }
    }
    std::partial_sort(candidates_.begin(), candidates_.begin() + sweep_.beam, candidates_.end(),
                      [](const Candidate& a, const Candidate& b) {
                        return std::tie(a.loss, a.hypothesis, a.code) <
                               std::tie(b.loss, b.hypothesis, b.code);
                      });
    const int64_t size = og_ * width_;
    for (int64_t b = 0; b < sweep_.beam; ++b) {
      const Candidate& best = candidates_[static_cast<size_t>(b)];
      const int64_t from = state(best.hypothesis, r);
      const int64_t to = state(b, r);
      Real* const product = new_products_.data() + to * size;
      uint16_t* const own_codes = new_run_codes_.data() + to * run_length();
      std::copy_n(products(from), size, product);
      std::copy_n(run_codes(from), run_length(), own_codes);
      new_losses_[static_cast<size_t>(to)] = best.loss;
      new_origins_[static_cast<size_t>(to)] = origins_[static_cast<size_t>(from)];
      take(product, own_codes, r, block, book, best.code, last);
    }
  }

  // Brings the errors up to date: those of ancestors, with this run's blocks anew.
  void end_block(int64_t first, int64_t last) {
    if (sweep_.beam > 1) {
      for (int64_t b = 0; b < live_; ++b) {
        for (int64_t r = 0; r < count_; ++r) {
          const int64_t to = state(b, r);
          std::copy_n(errors(state(origins_[static_cast<size_t>(to)], r)), og_ * columns_,
                      new_errors_.data() + to * og_ * columns_);
          std::copy_n(codes(state(origins_[static_cast<size_t>(to)], r)), row_codes_,
                      new_codes_.data() + to * row_codes_);
        }
      }
      std::swap(errors_, new_errors_);
      std::swap(codes_, new_codes_);
    }
    for (int64_t s = 0; s < live_ * count_; ++s) {
      std::copy_n(run_codes(s), run_length(), codes(s) + first * books_);
      for (int64_t block = first; block < last; ++block) find_errors(s, s % count_, block);
    }
  }

  void store() {
    for (int64_t r = 0; r < count_; ++r) {
      uint16_t* const to = parts_.codes.data() + row_groups_[static_cast<size_t>(r)] * row_codes_;
      for (int64_t block = 0; block < sweep_.problem.blocks; ++block) {
        std::copy_n(codes(r) + block * books_, books_,
                    to + sweep_.order.blocks[static_cast<size_t>(block)] * books_);
      }
    }
  }

  const Sweep<Real>& sweep_;
  AdditiveParts& parts_;
  const Additive& format_;
  std::span<const int64_t> row_groups_;
  int64_t count_;  // groups of rows
  int64_t og_;
  int64_t g_;
  int64_t books_;
  int64_t columns_;
  int64_t row_codes_;
  int64_t block_groups_;  // blocks of a run
  int64_t width_;         // columns of the present run
  int64_t first_column_ = 0;
  int64_t live_ = 1;                           // hypotheses
  std::vector<Real> errors_, new_errors_;      // [state][og][columns]
  std::vector<Real> products_, new_products_;  // [state][og][width]: errors * H, in the present run
  std::vector<uint16_t> codes_, new_codes_;    // [state][blocks][codebooks]
  std::vector<uint16_t> run_codes_, new_run_codes_;
  std::vector<double> losses_, new_losses_;     // beyond that of the start
  std::vector<int64_t> origins_, new_origins_;  // the hypothesis that a state had when the run began
  std::vector<Real> factors_, squares_, scores_, norms_, change_;
  std::vector<double> bases_;
  std::vector<int32_t> found_;
  std::vector<Candidate> candidates_;
};

template <class Real>
void sweep_with(const AdditiveProblem& problem, AdditiveParts& parts, const CodeSearchOptions& options,
                std::span<const int64_t> row_groups) {
  const Sweep<Real> sweep(problem, parts, options);
  const int64_t slab = std::max<int64_t>(kSlabRows / problem.format.out_group, 1);
  parallel_for(ceil_div(std::ssize(row_groups), slab), problem.threads, [&](int64_t i) {
    const int64_t first = i * slab;
    Slab<Real>(sweep, parts,
               row_groups.subspan(static_cast<size_t>(first),
                                  static_cast<size_t>(std::min(slab, std::ssize(row_groups) - first))))
        .run();
  });
}

}  // namespace

void sweep_codes(const AdditiveProblem& problem, AdditiveParts& parts, const CodeSearchOptions& options,
                 std::span<const int64_t> row_groups) {
  if (problem.row_groups == 0 || problem.blocks == 0) return;
  std::vector<int64_t> all;
  if (row_groups.empty()) {
    for (int64_t r = 0; r < problem.row_groups; ++r) all.push_back(r);
    row_groups = all;
  }
  if (options.float64) {
    sweep_with<double>(problem, parts, options, row_groups);
  } else {
    sweep_with<float>(problem, parts, options, row_groups);
  }
}

}  // namespace quantloom
