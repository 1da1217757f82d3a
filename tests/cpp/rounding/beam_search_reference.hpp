// The search for additive codes by its definition: every candidate's loss from the whole matrix anew.
#pragma once

#include <algorithm>
#include <vector>

#include "formats/additive_encoder.hpp"
#include "quantloom/calibration/hessian.hpp"
#include "rounding/additive_problem.hpp"

namespace quantloom::testing {

struct LiteralSearch {
  const Additive& format;
  const std::vector<float>& w;  // [n, k]
  int64_t n;
  int64_t k;
  const std::vector<float>& tables;
  const std::vector<float>& scales;
  const Hessian& hessian;
  std::vector<float> penalties;
  double damping = 0;

  double h(int64_t i, int64_t j) const {
    double shift = 0;
    if (i == j) {
      for (const double value : hessian.diagonal()) shift += damping * value / static_cast<double>(k);
    }
    return hessian.sum()(i, j) / static_cast<double>(hessian.tokens()) + shift;
  }

  // tr(E H E^T) of a group of rows, and what its codes cost.
  double loss(int64_t row_group, const std::vector<uint16_t>& codes) const {
    double sum = 0;
    for (int64_t a = 0; a < format.out_group; ++a) {
      std::vector<double> error(static_cast<size_t>(k));
      for (int64_t c = 0; c < k; ++c) {
        const int64_t block = c / format.in_group;
        double value = 0;
        for (int64_t book = 0; book < format.codebooks; ++book) {
          const int64_t code = codes[static_cast<size_t>(block * format.codebooks + book)];
          value += static_cast<double>(tables[static_cast<size_t>(
              (book * format.entries() + code) * format.dim() + a * format.in_group + c % format.in_group)]);
        }
        const double scale =
            scales[static_cast<size_t>(row_group * format.scale_count(k) + c / format.scale_columns(k))];
        error[static_cast<size_t>(c)] =
            static_cast<double>(w[static_cast<size_t>((row_group * format.out_group + a) * k + c)]) -
            scale * value;
      }
      for (int64_t i = 0; i < k; ++i) {
        for (int64_t j = 0; j < k; ++j)
          sum += error[static_cast<size_t>(i)] * h(i, j) * error[static_cast<size_t>(j)];
      }
    }
    for (size_t i = 0; i < codes.size() && !penalties.empty(); ++i) {
      sum += static_cast<double>(
          penalties[i % static_cast<size_t>(format.codebooks) * static_cast<size_t>(format.entries()) +
                    codes[i]]);
    }
    return sum;
  }

  struct Hypothesis {
    std::vector<uint16_t> codes;
    double loss;
  };

  // The codes of one group of rows after a sweep. `losses`: of the best hypothesis after each step.
  std::vector<uint16_t> sweep(int64_t row_group, std::vector<uint16_t> start, int beam, bool shuffled,
                              uint64_t seed, std::vector<double>* losses = nullptr) const {
    std::vector<Hypothesis> hypotheses = {{start, loss(row_group, start)}};
    const VisitOrder order = visit_order(format.blocks(k), format.codebooks, shuffled, seed);
    for (size_t position = 0; position < order.blocks.size(); ++position) {
      for (int t = 0; t < format.codebooks; ++t) {
        const int64_t book =
            order.tables[position * static_cast<size_t>(format.codebooks) + static_cast<size_t>(t)];
        std::vector<Hypothesis> survivors;
        for (const Hypothesis& parent : hypotheses) {
          std::vector<Hypothesis> own;
          for (int64_t code = 0; code < format.entries(); ++code) {
            Hypothesis next = parent;
            next.codes[static_cast<size_t>(order.blocks[position] * format.codebooks + book)] =
                static_cast<uint16_t>(code);
            next.loss = loss(row_group, next.codes);
            own.push_back(std::move(next));
          }
          std::ranges::stable_sort(own, {}, &Hypothesis::loss);
          own.resize(static_cast<size_t>(beam));
          survivors.insert(survivors.end(), own.begin(), own.end());
        }
        std::ranges::stable_sort(survivors, {}, &Hypothesis::loss);
        survivors.resize(static_cast<size_t>(beam));
        hypotheses = std::move(survivors);
        if (losses != nullptr) losses->push_back(hypotheses.front().loss);
      }
    }
    return hypotheses.front().codes;
  }
};

}  // namespace quantloom::testing
