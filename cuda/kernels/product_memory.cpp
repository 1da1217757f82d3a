#include "kernels/product_memory.hpp"

#include <limits>

namespace quantloom {

void require_aligned(const void* pointer, const char* argument, int64_t bytes) {
  if (!aligned(pointer, bytes)) {
    throw InvalidArgument(argument, text_of("an address that is not a multiple of ", bytes),
                          "an aligned address");
  }
}

void require_arguments(const PreparedPlanes& w, const CudaMatmulArguments& a) {
  if (a.m < 0) throw InvalidArgument("m", text_of(a.m), "0 or more tokens");
  if (a.m > std::numeric_limits<int32_t>::max()) {
    throw Unsupported(text_of("matmul_cuda: no kernel for ", a.m, " tokens"));
  }
  if (a.m > 1 && a.x_stride < w.k)
    throw InvalidArgument("x_stride", text_of(a.x_stride), text_of("at least k = ", w.k));
  if (a.m > 1 && a.y_stride < w.n)
    throw InvalidArgument("y_stride", text_of(a.y_stride), text_of("at least n = ", w.n));
  static_cast<void>(checked_mul(checked_mul(a.m, std::max(a.x_stride, w.k)), 4));
  static_cast<void>(checked_mul(checked_mul(a.m, std::max(a.y_stride, w.n)), 4));
}

void require_planes(const PreparedPlanes& w, int device) {
  for (const auto& [name, plane] : w.planes) {
    static_cast<void>(device_plane(plane, "w." + name, device));
    require_aligned(plane.bytes(), ("w." + name).c_str(), name == "group_index" ? 4 : 16);
  }
}

void require_memory(const PreparedPlanes& w, const CudaMatmulArguments& a, int64_t workspace, int device) {
  require_planes(w, device);
  const auto require = [&](const void* pointer, const char* argument, int64_t alignment) {
    if (pointer == nullptr)
      throw InvalidArgument(argument, "a null pointer", "memory of the current CUDA device");
    require_aligned(pointer, argument, alignment);
    require_on_device(pointer, argument, device);
  };
  if (w.k > 0) require(a.x, "x", size_of(a.dtype));
  require(a.y, "y", size_of(a.dtype));
  if (a.bias != nullptr) require(a.bias, "bias", size_of(a.dtype));
  if (a.workspace_bytes < workspace) {
    throw InvalidArgument("workspace", text_of(a.workspace_bytes, " bytes"), text_of("at least ", workspace));
  }
  if (workspace > 0) require(a.workspace, "workspace", 256);
}

void require_same_matrix(const PackedTensor& packed, const PreparedPlanes& prepared) {
  if (packed.n != prepared.n || packed.k != prepared.k ||
      packed.format->to_json() != prepared.format->to_json()) {
    throw InvalidArgument("prepared",
                          text_of(prepared.format->spec(), " [", prepared.n, ", ", prepared.k, "]"),
                          text_of(packed.format->spec(), " [", packed.n, ", ", packed.k, "]"));
  }
  if (packed.planes.contains("group_index") != prepared.has("group_index")) {
    throw InvalidArgument("prepared", "planes with group_index in one order only", "it in both");
  }
  const int device = current_device().index;
  for (const auto& [name, plane] : packed.planes) {
    static_cast<void>(device_plane(plane, "packed." + name, device));
  }
  for (const auto& [name, plane] : prepared.planes) {
    static_cast<void>(device_plane(plane, "prepared." + name, device));
  }
}

}  // namespace quantloom
