#include <cstdint>

#include "fuzz/targets.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  quantloom::fuzz::entropy(std::as_bytes(std::span(data, size)));
  return 0;
}
