// The rows of the kernel table that multiply on a CUDA device, cut into cells that tests tick off.
#pragma once

#include <algorithm>
#include <cctype>
#include <limits>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "quantloom/error.hpp"
#include "quantloom/kernels/kernel_table.hpp"
#include "quantloom/packed_tensor.hpp"

namespace quantloom {

// One kernel at one width and dtype, for `first` to `last` tokens.
struct KernelCell {
  std::string format;
  int bits = 0;
  DType dtype = DType::f16;
  std::string kernel;
  int64_t first = 1;
  int64_t last = std::numeric_limits<int64_t>::max();

  bool takes(int64_t m) const { return m >= first && m <= last; }
  auto key() const { return std::tuple(format, bits, dtype, kernel, first, last); }
  bool operator<(const KernelCell& other) const { return key() < other.key(); }
  std::string text() const {
    return text_of(kernel, " for ", format, ", ", bits, " bits, ", name_of(dtype), ", from ", first,
                   " tokens");
  }
};

struct Range {
  int64_t first = 1;
  int64_t last = std::numeric_limits<int64_t>::max();
};

// "1-16", "8", "any", "17-", ">= 17", "from 17", "> 16", "above 16". Throws where it cannot tell.
inline Range range_from(const std::string& text) {
  std::vector<int64_t> numbers;
  for (size_t i = 0; i < text.size();) {
    if (std::isdigit(static_cast<unsigned char>(text[i])) == 0) {
      ++i;
      continue;
    }
    size_t used = 0;
    numbers.push_back(std::stoll(text.substr(i), &used));
    i += used;
  }
  const auto says = [&](const char* word) { return text.find(word) != std::string::npos; };
  if (numbers.empty() && says("any")) return {};
  if (numbers.size() == 2) return {numbers[0], numbers[1]};
  if (numbers.size() == 1) {
    if (says(">=") || says("from") || says("+") || text.back() == '-') return {.first = numbers[0]};
    if (says(">") || says("above")) return {.first = numbers[0] + 1};
    if (says("<=") || says("up to")) return {1, numbers[0]};
    if (std::all_of(text.begin(), text.end(), [](unsigned char c) { return std::isdigit(c) != 0; })) {
      return {numbers[0], numbers[0]};
    }
  }
  throw std::invalid_argument("not understood in the kernel table: " + text);
}

// "float16", "float16, bfloat16", "f16/bf16", "any".
inline std::set<DType> dtypes_from(const std::string& text) {
  std::set<DType> found;
  std::string word;
  for (const char c : text + " ") {
    if (std::isalnum(static_cast<unsigned char>(c)) != 0) {
      word += c;
      continue;
    }
    if (word == "float16" || word == "f16" || word == "half" || word == "any") found.insert(DType::f16);
    if (word == "bfloat16" || word == "bf16" || word == "any") found.insert(DType::bf16);
    if (word == "float32" || word == "f32") found.insert(DType::f32);
    word.clear();
  }
  if (found.empty()) throw std::invalid_argument("not understood in the kernel table: " + text);
  return found;
}

inline std::vector<KernelCell> matmul_cells() {
  std::vector<KernelCell> cells;
  for (const KernelEntry& row : kernel_table()) {
    if (row.device != "cuda" || row.operation != "matmul") continue;
    // The others have tests of their own.
    if (row.format != "uniform" && row.format != "codebook") continue;
    if (row.activations == "integers") continue;
    const Range bits = range_from(row.bits);
    const Range tokens = range_from(row.tokens);
    for (int64_t b = bits.first; b <= std::min<int64_t>(bits.last, 8); ++b) {
      for (const DType dtype : dtypes_from(row.activations)) {
        cells.push_back({row.format, static_cast<int>(b), dtype, row.kernel, tokens.first, tokens.last});
      }
    }
  }
  return cells;
}

}  // namespace quantloom
