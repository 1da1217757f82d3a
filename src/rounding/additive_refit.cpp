#include "rounding/additive_refit.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "algebra/dense.hpp"
#include "formats/grouped_encoder.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {
namespace {

using Numbers = std::vector<double>;

double dot(const Numbers& a, const Numbers& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

// In place, a [size, size] = L L^T; false if a pivot is not positive.
bool factorize(double* a, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      double sum = a[i * size + j];
      for (int64_t t = 0; t < j; ++t) sum -= a[i * size + t] * a[j * size + t];
      if (i != j) {
        a[i * size + j] = sum / a[j * size + j];
        continue;
      }
      if (!(sum > 0)) return false;
      a[i * size + i] = std::sqrt(sum);
    }
  }
  return true;
}

void solve(const double* l, int64_t size, double* x) {
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t t = 0; t < i; ++t) x[i] -= l[i * size + t] * x[t];
    x[i] /= l[i * size + i];
  }
  for (int64_t i = size - 1; i >= 0; --i) {
    for (int64_t t = i + 1; t < size; ++t) x[i] -= l[t * size + i] * x[t];
    x[i] /= l[i * size + i];
  }
}

class Refit {
 public:
  Refit(const AdditiveProblem& problem, AdditiveParts& parts)
      : problem_(problem),
        format_(problem.format),
        parts_(parts),
        g_(format_.in_group),
        og_(format_.out_group),
        dim_(format_.dim()),
        books_(format_.codebooks),
        columns_(problem.columns),
        order_(visit_order(problem.blocks, 1, false, 0).blocks),
        h_(problem.hessian<float>(order_)),
        scales_(problem.scales<double>(parts)),
        values_(static_cast<size_t>(problem.n * columns_)),
        products_(values_.size()) {}

  void tables(int steps) {
    const double before = total(row_losses(tables_now()));
    // E and E H are there: the right-hand side is what the errors ask of the tables.
    Numbers residual = gather();
    Numbers x = tables_now();
    const Numbers blocks = preconditioner();
    Numbers z = precondition(blocks, residual);
    Numbers direction = z;
    double size = dot(residual, z);
    const double start = size;
    for (int step = 0; step < steps && size > 1e-24 * start && size > 0; ++step) {
      expand(direction);
      multiply();
      const Numbers image = gather();
      const double curvature = dot(direction, image);
      if (!(curvature > 0)) break;
      const double length = size / curvature;
      for (size_t i = 0; i < x.size(); ++i) {
        x[i] += length * direction[i];
        residual[i] -= length * image[i];
      }
      z = precondition(blocks, residual);
      const double next = dot(residual, z);
      for (size_t i = 0; i < x.size(); ++i) direction[i] = z[i] + next / size * direction[i];
      size = next;
    }
    std::vector<float> rounded;
    rounded.reserve(x.size());
    for (const double value : x) {
      rounded.push_back(
          float_from_f16(f16_from_float(static_cast<float>(std::clamp(value, -65504.0, 65504.0)))) + 0.0F);
    }
    std::swap(parts_.tables, rounded);
    if (!(total(row_losses(tables_now())) < before)) std::swap(parts_.tables, rounded);
  }

  void scales(int steps) {
    const int64_t count = problem_.scale_count;
    const Numbers before = row_losses(tables_now());
    Numbers residual = project();
    Numbers x = scales_;
    Numbers direction = residual;
    Numbers sizes = row_dots(residual, residual);
    for (int64_t step = 0; step < std::min<int64_t>(steps, count); ++step) {
      expand_scales(direction);
      multiply();
      const Numbers image = project();
      const Numbers curvatures = row_dots(direction, image);
      std::vector<bool> moves(sizes.size());
      for (size_t i = 0; i < x.size(); ++i) {
        const size_t row = i / static_cast<size_t>(count);
        if (!(curvatures[row] > 0)) continue;
        moves[row] = true;
        x[i] += sizes[row] / curvatures[row] * direction[i];
        residual[i] -= sizes[row] / curvatures[row] * image[i];
      }
      const Numbers next = row_dots(residual, residual);
      for (size_t i = 0; i < x.size(); ++i) {
        const size_t row = i / static_cast<size_t>(count);
        direction[i] = moves[row] && sizes[row] > 0 ? residual[i] + next[row] / sizes[row] * direction[i] : 0;
      }
      sizes = next;
    }
    const std::vector<float> old_scales = parts_.scales;
    const Numbers old_numbers = scales_;
    for (size_t i = 0; i < x.size(); ++i) {
      const float stored = stored_scale(format_.scale_dtype, std::max(x[i], 0.0) * problem_.weight_unit());
      if (std::isfinite(stored)) parts_.scales[i] = stored;
    }
    scales_ = problem_.scales<double>(parts_);
    const Numbers after = row_losses(tables_now());
    for (size_t i = 0; i < x.size(); ++i) {
      const size_t row = i / static_cast<size_t>(count);
      if (after[row] < before[row]) continue;
      parts_.scales[i] = old_scales[i];
      scales_[i] = old_numbers[i];
    }
  }

 private:
  static double total(const Numbers& losses) { return std::accumulate(losses.begin(), losses.end(), 0.0); }
  Numbers tables_now() const { return {parts_.tables.begin(), parts_.tables.end()}; }
  const uint16_t* codes(int64_t row_group) const {
    return parts_.codes.data() + row_group * problem_.blocks * books_;
  }
  size_t entry(int64_t book, int64_t code) const {
    return static_cast<size_t>((book * format_.entries() + code) * dim_);
  }
  template <class Body>
  void each_row_group(const Body& body) const {
    constexpr int64_t kRun = 16;
    parallel_for(ceil_div(problem_.row_groups, kRun), problem_.threads, [&](int64_t run) {
      for (int64_t r = run * kRun; r < std::min((run + 1) * kRun, problem_.row_groups); ++r) body(r);
    });
  }

  // values = factor * the sums of entries of `tables`.
  template <class Factor>
  void expand(const Numbers& tables, const Factor& factor) {
    each_row_group([&](int64_t r) {
      std::vector<double> sum(static_cast<size_t>(dim_));
      for (int64_t block = 0; block < problem_.blocks; ++block) {
        std::ranges::fill(sum, 0.0);
        for (int64_t book = 0; book < books_; ++book) {
          const double* const from = tables.data() + entry(book, codes(r)[block * books_ + book]);
          for (int64_t i = 0; i < dim_; ++i) sum[static_cast<size_t>(i)] += from[i];
        }
        const double own = factor(problem_.scale_of_block(r, block));
        for (int64_t i = 0; i < dim_; ++i) {
          values_[static_cast<size_t>((r * og_ + i / g_) * columns_ + block * g_ + i % g_)] =
              static_cast<float>(own * sum[static_cast<size_t>(i)]);
        }
      }
    });
  }
  void expand(const Numbers& tables) {
    expand(tables, [&](int64_t i) { return scales_[static_cast<size_t>(i)]; });
  }
  void expand_scales(const Numbers& scales) {
    expand(tables_now(), [&](int64_t i) { return scales[static_cast<size_t>(i)]; });
  }

  // products = values * H
  void multiply() {
    algebra::gemm_nt(1.0F, {values_.data(), problem_.n, columns_}, {h_.data(), columns_, columns_}, 0.0F,
                     {products_.data(), problem_.n, columns_}, problem_.threads);
  }

  // Sets values to the errors, products to theirs with H; e^T H e for each group of rows.
  Numbers row_losses(const Numbers& tables) {
    expand(tables);
    const MatrixView<const float> w = problem_.weights();
    each_row_group([&](int64_t r) {
      for (int64_t i = r * og_ * columns_; i < (r + 1) * og_ * columns_; ++i) {
        values_[static_cast<size_t>(i)] = w.data()[i] - values_[static_cast<size_t>(i)];
      }
    });
    multiply();
    Numbers losses(static_cast<size_t>(problem_.row_groups));
    each_row_group([&](int64_t r) {
      double sum = 0;
      for (int64_t i = r * og_ * columns_; i < (r + 1) * og_ * columns_; ++i) {
        sum += static_cast<double>(values_[static_cast<size_t>(i)]) *
               static_cast<double>(products_[static_cast<size_t>(i)]);
      }
      losses[static_cast<size_t>(r)] = sum;
    });
    return losses;
  }

  // Sums over the places of each entry, of `size` numbers each, in parts that depend on sizes alone.
  template <class Body>
  Numbers sum_by_entry(int64_t size, const Body& body) const {
    const int64_t count = books_ * format_.entries() * size;
    const int64_t parts = std::clamp<int64_t>((int64_t{1} << 23) / count, 1,
                                              std::clamp<int64_t>(problem_.row_groups / 16, 1, 16));
    std::vector<Numbers> partial(static_cast<size_t>(parts));
    parallel_for(parts, problem_.threads, [&](int64_t part) {
      Numbers& sums = partial[static_cast<size_t>(part)];
      sums.assign(static_cast<size_t>(count), 0.0);
      for (int64_t r = problem_.row_groups * part / parts; r < problem_.row_groups * (part + 1) / parts;
           ++r) {
        for (int64_t block = 0; block < problem_.blocks; ++block) {
          for (int64_t book = 0; book < books_; ++book) {
            body(r, block, sums.data() + (book * format_.entries() + codes(r)[block * books_ + book]) * size);
          }
        }
      }
    });
    for (int64_t part = 1; part < parts; ++part) {
      for (size_t i = 0; i < partial[0].size(); ++i) partial[0][i] += partial[static_cast<size_t>(part)][i];
    }
    return std::move(partial[0]);
  }

  // products, times scales, by entry.
  Numbers gather() const {
    return sum_by_entry(dim_, [&](int64_t r, int64_t block, double* sums) {
      const double scale = scales_[static_cast<size_t>(problem_.scale_of_block(r, block))];
      for (int64_t a = 0; a < og_; ++a) {
        const float* const from = products_.data() + (r * og_ + a) * columns_ + block * g_;
        for (int64_t i = 0; i < g_; ++i) sums[a * g_ + i] += scale * static_cast<double>(from[i]);
      }
    });
  }

  // For each entry, the factor of the block of the normal equations that is its own.
  Numbers preconditioner() const {
    const int64_t size = g_ * g_;
    Numbers blocks = sum_by_entry(size, [&](int64_t r, int64_t block, double* sums) {
      const double scale = scales_[static_cast<size_t>(problem_.scale_of_block(r, block))];
      for (int64_t i = 0; i < g_; ++i) {
        const float* const h = h_.data() + (block * g_ + i) * columns_ + block * g_;
        for (int64_t j = 0; j <= i; ++j) sums[i * g_ + j] += scale * scale * static_cast<double>(h[j]);
      }
    });
    parallel_for(books_ * format_.entries(), problem_.threads, [&](int64_t e) {
      double* const own = blocks.data() + e * size;
      double trace = 0;
      for (int64_t i = 0; i < g_; ++i) trace += own[i * g_ + i];
      for (int64_t i = 0; i < g_; ++i) own[i * g_ + i] += 1e-6 * trace;
      if (!factorize(own, g_)) own[0] = 0;  // an entry without weight stays as it is
    });
    return blocks;
  }

  Numbers precondition(const Numbers& blocks, const Numbers& residual) const {
    Numbers z = residual;
    parallel_for(books_ * format_.entries(), problem_.threads, [&](int64_t e) {
      const double* const factor = blocks.data() + e * g_ * g_;
      for (int64_t a = 0; a < og_; ++a) {
        double* const own = z.data() + e * dim_ + a * g_;
        if (factor[0] > 0) {
          solve(factor, g_, own);
        } else {
          std::fill_n(own, g_, 0.0);
        }
      }
    });
    return z;
  }

  // products, times what one unit of a scale makes, by scale.
  Numbers project() {
    Numbers sums(scales_.size(), 0.0);
    each_row_group([&](int64_t r) {
      for (int64_t block = 0; block < problem_.blocks; ++block) {
        double& sum = sums[static_cast<size_t>(problem_.scale_of_block(r, block))];
        for (int64_t i = 0; i < dim_; ++i) {
          double unit = 0;
          for (int64_t book = 0; book < books_; ++book) {
            unit += static_cast<double>(
                parts_.tables[entry(book, codes(r)[block * books_ + book]) + static_cast<size_t>(i)]);
          }
          sum +=
              unit * static_cast<double>(
                         products_[static_cast<size_t>((r * og_ + i / g_) * columns_ + block * g_ + i % g_)]);
        }
      }
    });
    return sums;
  }

  Numbers row_dots(const Numbers& a, const Numbers& b) const {
    const auto count = static_cast<size_t>(problem_.scale_count);
    Numbers sums(static_cast<size_t>(problem_.row_groups), 0.0);
    for (size_t i = 0; i < a.size(); ++i) sums[i / count] += a[i] * b[i];
    return sums;
  }

  const AdditiveProblem& problem_;
  const Additive& format_;
  AdditiveParts& parts_;
  int64_t g_;
  int64_t og_;
  int64_t dim_;
  int64_t books_;
  int64_t columns_;
  std::vector<int32_t> order_;
  std::vector<float> h_;         // [columns, columns]
  Numbers scales_;               // in units of the weights
  std::vector<float> values_;    // [n, columns]
  std::vector<float> products_;  // [n, columns]
};

}  // namespace

void refit_parts(const AdditiveProblem& problem, AdditiveParts& parts, const RefitOptions& options) {
  if (problem.row_groups == 0 || problem.blocks == 0 || options.steps == 0) return;
  Refit refit(problem, parts);
  if (options.tables) refit.tables(options.steps);
  if (options.scales) refit.scales(options.steps);
}

}  // namespace quantloom
