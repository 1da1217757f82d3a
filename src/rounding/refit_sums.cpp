#include "rounding/refit_sums.hpp"

#include <algorithm>

#include "algebra/dense.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {

using Numbers = RefitSums::Numbers;

RefitSums::RefitSums(const AdditiveProblem& problem, const AdditiveParts& parts)
    : problem_(problem),
      format_(problem.format),
      parts_(parts),
      g_(format_.in_group),
      og_(format_.out_group),
      dim_(format_.dim()),
      books_(format_.codebooks),
      columns_(problem.columns),
      h_(problem.hessian<float>(visit_order(problem.blocks, 1, false, 0).blocks)),
      values_(static_cast<size_t>(problem.n * columns_)),
      products_(values_.size()) {}

template <class Body>
void RefitSums::each_row_group(const Body& body) const {
  constexpr int64_t kRun = 16;
  parallel_for(ceil_div(problem_.row_groups, kRun), problem_.threads, [&](int64_t run) {
    for (int64_t r = run * kRun; r < std::min((run + 1) * kRun, problem_.row_groups); ++r) body(r);
  });
}

void RefitSums::expand(const Numbers& tables, const Numbers& scales) {
  each_row_group([&](int64_t r) {
    std::vector<double> sum(static_cast<size_t>(dim_));
    for (int64_t block = 0; block < problem_.blocks; ++block) {
      std::ranges::fill(sum, 0.0);
      for (int64_t book = 0; book < books_; ++book) {
        const double* const from = tables.data() + entry(book, codes(r)[block * books_ + book]);
        for (int64_t i = 0; i < dim_; ++i) sum[static_cast<size_t>(i)] += from[i];
      }
      const double own = scales[static_cast<size_t>(problem_.scale_of_block(r, block))];
      for (int64_t i = 0; i < dim_; ++i) {
        values_[static_cast<size_t>((r * og_ + i / g_) * columns_ + block * g_ + i % g_)] =
            static_cast<float>(own * sum[static_cast<size_t>(i)]);
      }
    }
  });
}

void RefitSums::multiply() {
  algebra::gemm_nt(1.0F, {values_.data(), problem_.n, columns_}, {h_.data(), columns_, columns_}, 0.0F,
                   {products_.data(), problem_.n, columns_}, problem_.threads);
}

Numbers RefitSums::row_losses(const Numbers& tables, const Numbers& scales) {
  expand(tables, scales);
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
Numbers RefitSums::sum_by_entry(int64_t size, const Body& body) const {
  const int64_t count = books_ * format_.entries() * size;
  const int64_t parts = std::clamp<int64_t>((int64_t{1} << 23) / count, 1,
                                            std::clamp<int64_t>(problem_.row_groups / 16, 1, 16));
  std::vector<Numbers> partial(static_cast<size_t>(parts));
  parallel_for(parts, problem_.threads, [&](int64_t part) {
    Numbers& sums = partial[static_cast<size_t>(part)];
    sums.assign(static_cast<size_t>(count), 0.0);
    for (int64_t r = problem_.row_groups * part / parts; r < problem_.row_groups * (part + 1) / parts; ++r) {
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

Numbers RefitSums::gather(const Numbers& scales) const {
  return sum_by_entry(dim_, [&](int64_t r, int64_t block, double* sums) {
    const double scale = scales[static_cast<size_t>(problem_.scale_of_block(r, block))];
    for (int64_t a = 0; a < og_; ++a) {
      const float* const from = products_.data() + (r * og_ + a) * columns_ + block * g_;
      for (int64_t i = 0; i < g_; ++i) sums[a * g_ + i] += scale * static_cast<double>(from[i]);
    }
  });
}

Numbers RefitSums::entry_blocks(const Numbers& scales) const {
  return sum_by_entry(g_ * g_, [&](int64_t r, int64_t block, double* sums) {
    const double scale = scales[static_cast<size_t>(problem_.scale_of_block(r, block))];
    for (int64_t i = 0; i < g_; ++i) {
      const float* const h = h_.data() + (block * g_ + i) * columns_ + block * g_;
      for (int64_t j = 0; j <= i; ++j) sums[i * g_ + j] += scale * scale * static_cast<double>(h[j]);
    }
  });
}

Numbers RefitSums::project(const Numbers& tables) const {
  Numbers sums(static_cast<size_t>(problem_.row_groups * problem_.scale_count), 0.0);
  each_row_group([&](int64_t r) {
    for (int64_t block = 0; block < problem_.blocks; ++block) {
      double& sum = sums[static_cast<size_t>(problem_.scale_of_block(r, block))];
      for (int64_t i = 0; i < dim_; ++i) {
        double unit = 0;
        for (int64_t book = 0; book < books_; ++book) {
          unit += tables[entry(book, codes(r)[block * books_ + book]) + static_cast<size_t>(i)];
        }
        sum +=
            unit * static_cast<double>(
                       products_[static_cast<size_t>((r * og_ + i / g_) * columns_ + block * g_ + i % g_)]);
      }
    }
  });
  return sums;
}

}  // namespace quantloom
