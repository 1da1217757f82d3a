#include "quantloom/fit/lloyd_max.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string>
#include <unordered_set>
#include <utility>

#include "quantloom/error.hpp"
#include "quantloom/fit/scale_search.hpp"
#include "quantloom/random.hpp"

namespace quantloom {
namespace {

constexpr std::array<std::pair<TableStart, std::string_view>, 7> kStarts = {{
    {TableStart::given, "given"},
    {TableStart::quantile, "quantile"},
    {TableStart::kmeans_plus_plus, "kmeans++"},
    {TableStart::cube_root, "cuberoot"},
    {TableStart::uniform_minmax, "uniform_minmax"},
    {TableStart::uniform_rms, "uniform_rms"},
    {TableStart::random, "random"},
}};

float value_at(const SortedValues& sample, int64_t i) {
  return sample.values()[static_cast<size_t>(i)];
}

// The first place p in [begin, end) with grows(p + 1) > target, where grows rises from 0 at begin; the last
// place if there is none.
template <class Grows>
int64_t place_of(int64_t begin, int64_t end, double target, const Grows& grows) {
  int64_t low = begin;
  int64_t high = end - 1;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (grows(middle + 1) > target) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

std::vector<float> evenly_spaced(double low, double high, int64_t count) {
  std::vector<float> table;
  for (int64_t i = 0; i < count; ++i) {
    const double part = count == 1 ? 0.5 : static_cast<double>(i) / static_cast<double>(count - 1);
    const double value = low + (high - low) * part;
    constexpr double kLargest = std::numeric_limits<float>::max();
    table.push_back(static_cast<float>(std::clamp(value, -kLargest, kLargest)));
  }
  return table;
}

std::vector<float> quantiles(const SortedValues& sample, int64_t count) {
  const double total = sample.total().weight;
  std::vector<float> table;
  for (int64_t i = 0; i < count; ++i) {
    const double target = total * (static_cast<double>(i) + 0.5) / static_cast<double>(count);
    table.push_back(value_at(sample, place_of(0, sample.count(), target,
                                              [&](int64_t end) { return sample.sums(0, end).weight; })));
  }
  return table;
}

// A gap between neighbours is the inverse of the density there, so that the density's cube root integrates to
// the sum of gap^(2/3), times the cube root of the weight.
std::vector<float> cube_root_density(const SortedValues& sample, int64_t count) {
  const std::span<const float> values = sample.values();
  std::vector<double> running(values.size());
  for (size_t i = 1; i < values.size(); ++i) {
    const double gap = static_cast<double>(values[i]) - static_cast<double>(values[i - 1]);
    double mass = gap * gap;
    if (sample.weighted()) {
      mass *= (static_cast<double>(sample.weights()[i]) + static_cast<double>(sample.weights()[i - 1])) / 2;
    }
    running[i] = running[i - 1] + std::cbrt(mass);
  }
  std::vector<float> table;
  for (int64_t i = 0; i < count; ++i) {
    const double target = running.back() * (static_cast<double>(i) + 0.5) / static_cast<double>(count);
    const auto place = std::upper_bound(running.begin(), running.end(), target) - running.begin();
    table.push_back(values[static_cast<size_t>(std::min<int64_t>(place, sample.count() - 1))]);
  }
  return table;
}

std::vector<float> random_values(const SortedValues& sample, int64_t count, uint64_t seed) {
  const CounterRandom random(seed);
  std::unordered_set<int64_t> places;
  std::vector<float> table;
  // Floyd's way to draw a subset: the last of the first j + 1 places stands in for one drawn twice.
  for (int64_t j = std::max<int64_t>(sample.count() - count, 0); j < sample.count(); ++j) {
    auto place = static_cast<int64_t>(random.below(static_cast<uint64_t>(j), static_cast<uint64_t>(j) + 1));
    if (!places.insert(place).second) {
      place = j;
      places.insert(j);
    }
    table.push_back(value_at(sample, place));
  }
  table.resize(static_cast<size_t>(count), value_at(sample, 0));
  std::sort(table.begin(), table.end());
  return table;
}

// Cells of an ascending table that grows by one centroid at a time, with the error of each.
class GrowingTable {
 public:
  GrowingTable(const SortedValues& sample, float first) : sample_(sample) {
    cells_.push_back({first, sample.count(), 0});
    measure(0);
  }

  std::vector<float> centroids() const {
    std::vector<float> table;
    for (const Cell& cell : cells_) table.push_back(cell.centroid);
    return table;
  }

  double error() const {
    double sum = 0;
    for (const Cell& cell : cells_) sum += cell.error;
    return sum;
  }

  // The value at which the running error of the cells, in order, passes `target`.
  float value_of_error(double target) const {
    size_t cell = 0;
    while (cell + 1 < cells_.size() && !(cells_[cell].error > target)) target -= cells_[cell++].error;
    const double centroid = cells_[cell].centroid;
    const int64_t begin = begin_of(cell);
    return value_at(sample_, place_of(begin, cells_[cell].end, target, [&](int64_t end) {
                      return sample_.sums(begin, end).squared_error(centroid);
                    }));
  }

  // False if the table has this value already.
  bool insert(float value) {
    const auto at = std::lower_bound(cells_.begin(), cells_.end(), value,
                                     [](const Cell& cell, float v) { return cell.centroid < v; });
    if (at != cells_.end() && at->centroid == value) return false;
    const auto index = static_cast<size_t>(at - cells_.begin());
    cells_.insert(at, {value, index < cells_.size() ? 0 : sample_.count(), 0});
    for (size_t i = index == 0 ? 0 : index - 1; i <= index && i + 1 < cells_.size(); ++i) {
      const std::array<float, 2> pair = {cells_[i].centroid, cells_[i + 1].centroid};
      cells_[i].end = cell_ends(sample_, pair).front();
    }
    for (size_t i = index == 0 ? 0 : index - 1; i <= index + 1 && i < cells_.size(); ++i) measure(i);
    return true;
  }

 private:
  struct Cell {
    float centroid = 0;
    int64_t end = 0;
    double error = 0;
  };

  int64_t begin_of(size_t i) const { return i == 0 ? 0 : cells_[i - 1].end; }
  void measure(size_t i) {
    cells_[i].error = begin_of(i) < cells_[i].end
                          ? sample_.sums(begin_of(i), cells_[i].end).squared_error(cells_[i].centroid)
                          : 0;
  }

  const SortedValues& sample_;
  std::vector<Cell> cells_;
};

std::vector<float> kmeans_plus_plus(const SortedValues& sample, int64_t count, uint64_t seed) {
  constexpr int kAttempts = 16;  // a draw can hit a value of the table where errors are all but 0
  const CounterRandom random(seed);
  uint64_t draw = 0;
  const double first = random.uniform(draw++) * sample.total().weight;
  GrowingTable table(sample, value_at(sample, place_of(0, sample.count(), first, [&](int64_t end) {
                                        return sample.sums(0, end).weight;
                                      })));
  for (int64_t i = 1; i < count; ++i) {
    const double error = table.error();
    bool grown = false;
    for (int attempt = 0; attempt < kAttempts && !grown && error > 0; ++attempt) {
      grown = table.insert(table.value_of_error(random.uniform(draw++) * error));
    }
    if (!grown) break;
  }
  std::vector<float> centroids = table.centroids();
  centroids.resize(static_cast<size_t>(count), centroids.back());
  return centroids;
}

void require_options(const SortedValues& sample, int64_t count, const LloydMaxOptions& options) {
  if (count < 1 || count > 65536) throw InvalidArgument("count", text_of(count), "1 to 65536 centroids");
  if (!(options.threshold >= 0 && options.threshold <= 1)) {
    throw InvalidArgument("threshold", text_of(options.threshold), "a fraction in [0, 1]");
  }
  if (options.max_sweeps < 0) throw InvalidArgument("max_sweeps", text_of(options.max_sweeps), "0 or more");
  if (options.start == TableStart::uniform_rms && !(std::isfinite(options.width) && options.width > 0)) {
    throw InvalidArgument("width", text_of(options.width), "a finite number > 0");
  }
  if (options.start == TableStart::given) {
    if (static_cast<int64_t>(options.centroids.size()) != count) {
      throw InvalidArgument("centroids", text_of(options.centroids.size(), " of them"), text_of(count));
    }
    // Also checks that they ascend and are finite.
    static_cast<void>(cell_ends(sample, options.centroids));
  } else if (sample.count() == 0) {
    throw InvalidArgument("values", "none", "at least one");
  }
}

std::vector<float> make_start(const SortedValues& sample, int64_t count, const LloydMaxOptions& options) {
  switch (options.start) {
    case TableStart::given:
      return options.centroids;
    case TableStart::quantile:
      return quantiles(sample, count);
    case TableStart::kmeans_plus_plus:
      return kmeans_plus_plus(sample, count, options.seed);
    case TableStart::cube_root:
      return cube_root_density(sample, count);
    case TableStart::uniform_minmax:
      return evenly_spaced(sample.values().front(), sample.values().back(), count);
    case TableStart::uniform_rms: {
      const Moments total = sample.total();
      const double weight = total.weight > 0 ? total.weight : 1;
      const double mean = total.first / weight;
      const double deviation = std::sqrt(total.squared_error(mean) / weight);
      return evenly_spaced(mean - options.width * deviation, mean + options.width * deviation, count);
    }
    default:
      return random_values(sample, count, options.seed);
  }
}

// How many values have another code under `after` than under `before`, both ends of cells.
int64_t count_changes(const std::vector<int64_t>& before, const std::vector<int64_t>& after) {
  int64_t same = 0;
  for (size_t i = 0; i < before.size(); ++i) {
    const int64_t begin = i == 0 ? 0 : std::max(before[i - 1], after[i - 1]);
    same += std::max<int64_t>(0, std::min(before[i], after[i]) - begin);
  }
  return before.back() - same;
}

}  // namespace

std::string_view name_of(TableStart start) {
  for (const auto& [value, name] : kStarts) {
    if (value == start) return name;
  }
  throw InvalidArgument("start", text_of(static_cast<int>(start)), "a TableStart");
}

TableStart table_start_from_name(std::string_view name) {
  std::string names;
  for (const auto& [value, known] : kStarts) {
    if (known == name) return value;
    names += (names.empty() ? "" : ", ") + std::string(known);
  }
  throw InvalidArgument("start", name, "one of " + names);
}

std::vector<float> start_table(const SortedValues& sample, int64_t count, const LloydMaxOptions& options) {
  require_options(sample, count, options);
  return make_start(sample, count, options);
}

LloydMaxResult lloyd_max(const SortedValues& sample, int64_t count, const LloydMaxOptions& options) {
  LloydMaxResult result;
  result.centroids = start_table(sample, count, options);
  std::vector<float>& centroids = result.centroids;
  std::vector<int64_t> ends = cell_ends(sample, centroids);
  while (result.sweeps < options.max_sweeps && !result.converged) {
    int64_t begin = 0;
    for (size_t i = 0; i < centroids.size(); ++i) {
      const int64_t end = ends[i];
      if (end > begin) {
        const Moments sums = sample.sums(begin, end);
        if (sums.weight > 0) {
          // Differences of running sums can leave the cell by a rounding.
          centroids[i] = std::clamp(static_cast<float>(sums.first / sums.weight), value_at(sample, begin),
                                    value_at(sample, end - 1));
        }
      }
      // A cell without weight kept its place, which a neighbour may have passed.
      if (i > 0) centroids[i] = std::max(centroids[i], centroids[i - 1]);
      begin = end;
    }
    std::vector<int64_t> next = cell_ends(sample, centroids);
    const int64_t changes = count_changes(ends, next);
    result.changed = static_cast<double>(changes) / static_cast<double>(std::max<int64_t>(sample.count(), 1));
    result.converged = result.changed <= options.threshold;
    ends = std::move(next);
    ++result.sweeps;
  }
  int64_t begin = 0;
  for (size_t i = 0; i < centroids.size(); ++i) {
    if (ends[i] > begin) result.squared_error += sample.sums(begin, ends[i]).squared_error(centroids[i]);
    begin = ends[i];
  }
  return result;
}

}  // namespace quantloom
