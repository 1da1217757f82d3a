// What the GPU benchmarks have around their measurements: options, the report, errors.
#pragma once

#include <exception>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace quantloom::bench {

// main() of a benchmark that takes --quick and --json FILE. run(quick) prints tables and returns the report.
template <class Run>
int run_program(std::string_view name, int argc, char** argv, Run run) {
  bool quick = false;
  std::string json_path;
  for (int i = 1; i < argc; ++i) {
    const std::string_view option = argv[i];
    if (option == "--quick") {
      quick = true;
    } else if (option == "--json" && i + 1 < argc) {
      json_path = argv[++i];
    } else {
      std::cerr << "usage: " << name << " [--quick] [--json FILE]\n";
      return 2;
    }
  }
  try {
    const nlohmann::json report = run(quick);
    if (json_path.empty()) return 0;
    std::ofstream file(json_path);
    file << report.dump(2) << '\n';
    file.close();
    if (file) return 0;
    std::cerr << name << ": cannot write " << json_path << '\n';
  } catch (const std::exception& error) {
    std::cerr << name << ": " << error.what() << '\n';
  }
  return 1;
}

}  // namespace quantloom::bench
