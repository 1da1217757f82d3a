// What moves planes between the packed order and those of the kernels, on the CPU.
#pragma once

#include <algorithm>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "quantloom/kernels/matmul_cuda.hpp"
#include "quantloom/tensor.hpp"

namespace quantloom {

inline void copy_element(const Tensor& from, int64_t i, Tensor& to, int64_t j) {
  const int64_t size = size_of(from.dtype());
  std::copy_n(from.bytes() + i * size, size, to.bytes() + j * size);
}

inline void copy_plane(const Tensor& from, Tensor& to) {
  std::copy_n(from.bytes(), from.byte_count(), to.bytes());
}

// Empty if groups are of consecutive columns.
inline std::span<const int32_t> group_index_of(const std::map<std::string, Tensor>& planes) {
  const auto found = planes.find("group_index");
  return found == planes.end() ? std::span<const int32_t>{} : found->second.values<int32_t>();
}

// Throws InvalidArgument / TypeMismatch naming the plane unless the planes are those of `specs`.
void require_prepared_planes(const PreparedPlanes& prepared, const std::vector<PlaneSpec>& specs);

}  // namespace quantloom
