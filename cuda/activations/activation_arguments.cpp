#include "activations/activation_arguments.hpp"

#include <algorithm>
#include <string>

#include "quantloom/checked_math.hpp"

namespace quantloom::cuda {

WorkspacePlan::WorkspacePlan(const ActivationFormat& format, int64_t m, int64_t k) {
  const auto take = [&](int64_t count) {
    const int64_t begin = bytes;
    bytes = checked_add(begin, checked_mul(ceil_div(count, int64_t{4}), int64_t{16}));
    return begin;
  };
  if (format.has_shifts()) scales = take(std::max<int64_t>(m, 1));
  if (format.has_outliers() && !format.static_outliers) outliers = take(outlier_index_words(k, k));
}

void require_scratch(const CudaActivationScratch& scratch, const ActivationFormat& format, int64_t bytes,
                     int64_t k, bool needs_index) {
  if (scratch.workspace == nullptr || scratch.workspace_bytes < bytes ||
      reinterpret_cast<uintptr_t>(scratch.workspace) % 16 != 0) {
    throw InvalidArgument("workspace",
                          scratch.workspace == nullptr
                              ? std::string("a null pointer")
                              : text_of(scratch.workspace_bytes, " bytes at ", scratch.workspace),
                          text_of("at least ", bytes, " bytes at a multiple of 16"));
  }
  require_device_memory(scratch.workspace, "workspace");
  if (!needs_index || k == 0) return;
  if (scratch.outlier_index == nullptr) {
    throw InvalidArgument("outlier_index", "a null pointer", text_of("the columns of ", format.spec()));
  }
  require_device_memory(scratch.outlier_index, "outlier_index");
}

void require_activation_planes(const QuantizedActivations& x, int64_t m, int64_t k) {
  if (x.m < 0 || x.k < 0) {
    throw InvalidArgument("activations", text_of("shape [", x.m, ", ", x.k, "]"), "sizes of 0 and more");
  }
  if (x.m != m || x.k != k) {
    throw InvalidArgument("out", text_of("planes for [", x.m, ", ", x.k, "]"),
                          text_of("for [", m, ", ", k, "], as x"));
  }
  int64_t outliers = 0;
  if (const auto found = x.planes.find("outlier_columns"); found != x.planes.end()) {
    outliers = found->second.element_count();
  }
  const std::vector<PlaneSpec> expected = activation_planes(x.format, x.m, x.k, outliers);
  for (const PlaneSpec& spec : expected) {
    const auto found = x.planes.find(spec.name);
    if (found == x.planes.end() || found->second.dtype() != spec.dtype ||
        found->second.shape() != spec.shape || found->second.device() != Device::cuda) {
      throw InvalidArgument("plane " + spec.name, "another dtype, shape or device, or none",
                            text_of("that of ", x.format.spec(), " for [", x.m, ", ", x.k, "] on a device"));
    }
    if (found->second.element_count() > 0) require_device_memory(found->second.bytes(), "plane " + spec.name);
  }
  if (x.format.outlier_columns && outliers != std::ssize(*x.format.outlier_columns)) {
    throw InvalidArgument("plane outlier_columns", text_of(outliers, " columns"),
                          text_of(x.format.outlier_columns->size(), " columns, as the format"));
  }
  if (x.planes.size() != expected.size()) {
    throw InvalidArgument("planes", text_of(x.planes.size(), " planes"), text_of(expected.size(), " planes"));
  }
}

void require_batch(const CudaMatrix& x, const ActivationFormat& format) {
  require_matrix(x, "x");
  require_calibrated(format, x.cols);
}

}  // namespace quantloom::cuda
