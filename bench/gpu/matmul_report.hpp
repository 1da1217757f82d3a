// What bench_matmul measured, as lines, JSON and tables for RESULTS.md.
#pragma once

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "quantloom/error.hpp"

namespace quantloom::bench {

struct Shape {
  int64_t n = 0;
  int64_t k = 0;
  auto operator<=>(const Shape&) const = default;
  std::string text() const { return std::to_string(n) + "×" + std::to_string(k); }
};

struct Row {
  std::string what = {};    // a format, "floor 4 bit", "cuBLAS float16"
  std::string kernel = {};  // "" for what the table picks
  std::string picked = {};  // by the table, if known
  Shape shape = {};
  int64_t m = 0;
  int splits = 0;  // 0: chosen by shape
  bool overlap = false;
  double seconds = 0;
  int64_t bytes = 0;  // of the weights, as read
  int launches = 0;   // in a graph
  double spread = 0;
  double floor_seconds = 0;   // of the same number of bits per code; 0: none
  double cublas_seconds = 0;  // same shape and m; 0: none
  double error = 0;           // relative, of the checked launch
  std::string failure = {};   // why there is no time

  std::string name() const {
    std::string text = what;
    if (!kernel.empty()) text += text_of(" ", kernel);
    if (splits > 0) text += text_of(" splits=", splits);
    if (overlap) text += " overlapped";
    return text;
  }
};

class Report {
 public:
  nlohmann::json facts;
  double copy_rate = 0;
  std::vector<Row> rows;

  void add(Row row) {
    print(row);
    rows.push_back(std::move(row));
  }

  int failures() const {
    int count = 0;
    for (const Row& row : rows) count += row.failure.empty() ? 0 : 1;
    return count;
  }

  double percent_of_copy(const Row& row) const {
    return 100.0 * static_cast<double>(row.bytes) / row.seconds / copy_rate;
  }

  nlohmann::json json() const {
    nlohmann::json result = facts;
    result["copy_bytes_per_second"] = copy_rate;
    result["rows"] = nlohmann::json::array();
    for (const Row& row : rows) {
      nlohmann::json entry = {{"what", row.what},         {"kernel", row.kernel},   {"picked", row.picked},
                              {"n", row.shape.n},         {"k", row.shape.k},       {"m", row.m},
                              {"splits", row.splits},     {"overlap", row.overlap}, {"bytes", row.bytes},
                              {"launches", row.launches}, {"spread", row.spread}};
      if (row.failure.empty()) {
        entry["seconds"] = row.seconds;
        entry["percent_of_copy"] = percent_of_copy(row);
        entry["relative_error"] = row.error;
        if (row.floor_seconds > 0) entry["times_floor"] = row.seconds / row.floor_seconds;
        if (row.cublas_seconds > 0) entry["speedup_over_cublas"] = row.cublas_seconds / row.seconds;
      } else {
        entry["failure"] = row.failure;
      }
      result["rows"].push_back(std::move(entry));
    }
    return result;
  }

  // Nothing if `path` is empty.
  void write(const std::string& path) const {
    if (path.empty()) return;
    std::ofstream file(path);
    file << json().dump(1) << '\n';
    if (!file.flush()) throw IoError("cannot write " + path);
  }

  // One table for each m, a column for each shape: µs · GB/s · % of copy · × floor · speed-up over cuBLAS.
  std::string markdown() const {
    std::vector<int64_t> counts;
    std::vector<Shape> shapes;
    for (const Row& row : rows) {
      if (row.m > 0) add_once(counts, row.m);
      add_once(shapes, row.shape);
    }
    std::string text;
    for (const int64_t m : counts) {
      text += text_of("#### M = ", m, "\n\n| |");
      for (const Shape& shape : shapes) text += text_of(" ", shape.text(), " |");
      text += "\n| --- |";
      for (size_t i = 0; i < shapes.size(); ++i) text += " --- |";
      text += "\n";
      std::vector<std::string> names;
      for (const Row& row : rows) {
        if (row.m == m || (row.m == 0 && m == counts.front())) add_once(names, row.name());
      }
      for (const std::string& name : names) {
        text += text_of("| ", name, " |");
        for (const Shape& shape : shapes) text += text_of(" ", cell(name, shape, m), " |");
        text += "\n";
      }
      text += "\n";
    }
    return text;
  }

  // For each format and shape the fastest kernel by m.
  std::string crossover() const {
    std::map<std::string, std::map<int64_t, std::vector<const Row*>>> cases;
    std::vector<std::string> order;
    for (const Row& row : rows) {
      if (row.m == 0 || row.kernel.empty() || !row.failure.empty()) continue;
      const std::string key = row.what + " " + row.shape.text();
      add_once(order, key);
      cases[key][row.m].push_back(&row);
    }
    std::string text;
    for (const std::string& key : order) {
      text += "\n" + key + "\n";
      for (const auto& [m, candidates] : cases[key]) {
        const Row* best = candidates.front();
        for (const Row* row : candidates) {
          if (row->seconds < best->seconds) best = row;
        }
        text += format("  m %5lld  %-28s %9.2f us ", static_cast<long long>(m), label(*best).c_str(),
                       best->seconds * 1e6);
        for (const Row* row : candidates) {
          if (row == best) continue;
          text += format(" | %s %.2fx", label(*row).c_str(), row->seconds / best->seconds);
        }
        text += "\n";
      }
    }
    return text;
  }

 private:
  template <class... Arguments>
  static std::string format(const char* pattern, Arguments... arguments) {
    char buffer[512];
    std::snprintf(buffer, sizeof buffer, pattern, arguments...);
    return buffer;
  }

  template <class T>
  static void add_once(std::vector<T>& list, const T& value) {
    for (const T& present : list) {
      if (present == value) return;
    }
    list.push_back(value);
  }

  static std::string label(const Row& row) {
    const std::string splits = row.splits > 0 ? text_of("/", row.splits) : std::string();
    return text_of(row.kernel, splits, row.overlap ? " overlapped" : "");
  }

  std::string cell(const std::string& name, const Shape& shape, int64_t m) const {
    for (const Row& row : rows) {
      if (row.name() != name || row.shape != shape || (row.m != m && row.m != 0)) continue;
      if (!row.failure.empty()) return "failed";
      std::string text = format("%.2f · %.0f · %.0f%%", row.seconds * 1e6,
                                static_cast<double>(row.bytes) / row.seconds * 1e-9, percent_of_copy(row));
      if (row.floor_seconds > 0) text += format(" · %.2f×fl", row.seconds / row.floor_seconds);
      if (row.cublas_seconds > 0) text += format(" · %.2f×", row.cublas_seconds / row.seconds);
      return text;
    }
    return "";
  }

  void print(const Row& row) const {
    std::string line = format("%-34s %6lld x %-6lld", row.name().c_str(), static_cast<long long>(row.shape.n),
                              static_cast<long long>(row.shape.k));
    line += row.m > 0 ? format(" m %5lld", static_cast<long long>(row.m)) : std::string("        ");
    if (!row.failure.empty()) {
      std::printf("%s  FAILED: %s\n", line.c_str(), row.failure.c_str());
    } else {
      line += format(" %10.2f us %6.0f GB/s %5.1f%% copy", row.seconds * 1e6,
                     static_cast<double>(row.bytes) / row.seconds * 1e-9, percent_of_copy(row));
      if (row.floor_seconds > 0) line += format(" %6.2fx floor", row.seconds / row.floor_seconds);
      if (row.cublas_seconds > 0) line += format(" %6.2fx cuBLAS", row.cublas_seconds / row.seconds);
      if (row.error > 0) line += format("  err %.1e", row.error);
      if (row.spread > 1.05) line += format("  spread %.2f", row.spread);
      if (!row.picked.empty()) line += "  " + row.picked;
      std::printf("%s\n", line.c_str());
    }
    std::fflush(stdout);
  }
};

}  // namespace quantloom::bench
