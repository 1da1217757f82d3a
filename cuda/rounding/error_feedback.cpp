#include <algorithm>
#include <cmath>
#include <limits>

#include "common/device_pointer.hpp"
#include "common/math_handles.hpp"
#include "quantloom/rounding/nearest.hpp"
#include "rounding/rounds.hpp"
#include "rounding/trellis_feedback.hpp"
#include "rounding/upper_factor.hpp"
#include "rounding/walk.hpp"
#include "rounding/walk_block.hpp"

namespace quantloom {
namespace cuda {
namespace {

template <class T>
DeviceBuffer<T> uploaded(const std::vector<T>& values, cudaStream_t stream) {
  DeviceBuffer<T> buffer(static_cast<int64_t>(values.size()), stream);
  buffer.upload(values.data(), static_cast<int64_t>(values.size()));
  return buffer;
}

// The order of the walk and what follows from it, on the host.
struct WalkPlan {
  std::vector<int32_t> order;     // the column at each position
  std::vector<int32_t> position;  // the position of each column
  std::vector<int32_t> group_at;  // the group of each position
  std::vector<int32_t> group_of;  // the group of each column
  std::vector<uint8_t> dead;      // by column
  std::vector<float> weights;     // by column, for the scale search
  int64_t group_size = 0;
  bool fit_on_the_walk = false;

  bool groups_are_consecutive() const {
    for (size_t c = 0; c < group_of.size(); ++c) {
      if (group_of[c] != static_cast<int64_t>(c) / group_size) return false;
    }
    return true;
  }
};

WalkPlan plan_walk(const GroupedFormat& format, const std::vector<double>& diagonal, bool act_order,
                   bool fit_on_the_walk) {
  const auto k = static_cast<int64_t>(diagonal.size());
  WalkPlan plan;
  plan.fit_on_the_walk = fit_on_the_walk;
  plan.group_size = std::min(format.columns_per_group(k), k);
  for (const int64_t column : walk_order(diagonal, 1, act_order)) {
    plan.order.push_back(static_cast<int32_t>(column));
  }
  plan.position.resize(plan.order.size());
  plan.group_of.resize(plan.order.size());
  for (size_t p = 0; p < plan.order.size(); ++p) {
    const auto column = static_cast<size_t>(plan.order[p]);
    const auto group =
        static_cast<int32_t>(static_cast<int64_t>(fit_on_the_walk ? p : column) / plan.group_size);
    plan.position[column] = static_cast<int32_t>(p);
    plan.group_at.push_back(group);
    plan.group_of[column] = group;
  }
  for (const double entry : diagonal) plan.dead.push_back(entry == 0 ? 1 : 0);
  plan.weights = column_weights(diagonal);
  return plan;
}

// Chooses all codes. Nothing of `packed` is written before every fit has passed.
void walk(const CudaMatrix& w, PackedTensor& packed, const WalkPlan& plan, const UpperFactor& factor,
          const CudaErrorFeedbackOptions& options, cudaStream_t stream) {
  const auto& format = static_cast<const GroupedFormat&>(*packed.format);
  const int64_t n = w.rows;
  const int64_t k = w.cols;
  const int64_t stride = factor.stride();
  const BlasScope blas(stream);
  const DeviceBuffer<int32_t> order = uploaded(plan.order, stream);
  const DeviceBuffer<int32_t> position = uploaded(plan.position, stream);
  const DeviceBuffer<int32_t> group_at = uploaded(plan.group_at, stream);
  const DeviceBuffer<uint8_t> dead = uploaded(plan.dead, stream);
  std::vector<float> host_weights = plan.weights;
  if (plan.fit_on_the_walk) {
    for (size_t p = 0; p < host_weights.size(); ++p) {
      host_weights[p] = plan.weights[static_cast<size_t>(plan.order[p])];
    }
  }
  const DeviceBuffer<float> weights = uploaded(host_weights, stream);
  const DeviceGrid grid(format, stream);
  const SearchFactors search(options.scale_search, stream);
  const FittedParameters parameters(format, n, k, true, stream);
  const DeviceBuffer<float> working(checked_mul(n, stride), stream);
  const DeviceBuffer<float> errors(checked_mul(n, kWalkBlock), stream);
  const DeviceBuffer<uint8_t> codes(checked_mul(n, k), stream);
  gather_columns(w, order.data(), dead.data(), working.data(), stride, stream);

  FitTask fit;
  fit.w = plan.fit_on_the_walk ? CudaMatrix{working.data(), DType::f32, n, k, stride} : w;
  fit.end_column = k;
  fit.group_size = plan.group_size;
  fit.group_count = parameters.groups();
  fit.dead = plan.fit_on_the_walk ? nullptr : dead.data();  // the working copy holds zeros there
  fit.weights = weights.data();
  fit.grid = grid.view();
  fit.parameters = parameters.view();
  fit.failure = parameters.failure();
  if (!plan.fit_on_the_walk) {
    if (parameters.per_tensor()) {
      fit_whole(fit, search, stream);
    } else {
      fit_groups(fit, search, stream);
    }
    parameters.require_fitted(fit, search, packed.format, stream);
  }

  WalkTask task;
  task.working = working.data();
  task.stride = stride;
  task.n = n;
  task.upper = factor.upper();
  task.upper_stride = stride;
  task.group_at = group_at.data();
  task.parameters = parameters.view();
  task.grid = fit.grid;
  task.codes = codes.data();
  task.k = k;
  task.errors = errors.data();
  const int64_t block = std::min<int64_t>(options.block, kWalkBlock);
  const float one = 1.0F;
  const float minus_one = -1.0F;
  for (int64_t begin = 0; begin < k;) {
    int64_t end = std::min(k, begin + block);
    if (plan.fit_on_the_walk) {
      // All columns of a group are up to date when it is fitted, because blocks end where groups do.
      const int64_t group = begin / plan.group_size;
      end = std::min(end, (group + 1) * plan.group_size);
      if (begin % plan.group_size == 0) {
        fit.first_group = group;
        fit.first_column = begin;
        fit.end_column = std::min(k, begin + plan.group_size);
        fit_groups(fit, search, stream);
        parameters.require_fitted(fit, search, packed.format, stream);
      }
    }
    const int64_t width = end - begin;
    walk_block(task, begin, static_cast<int>(width), stream);
    if (end < k) {
      // Column-major: remainder^T -= U[block, remainder]^T errors^T.
      check_cublas(cublas().sgemm(blas.handle(), kOpN, kOpN, static_cast<int>(k - end), static_cast<int>(n),
                                  static_cast<int>(width), &minus_one, factor.upper() + begin * stride + end,
                                  static_cast<int>(stride), errors.data(), kWalkBlock, &one,
                                  working.data() + end, static_cast<int>(stride)),
                   "update of the remaining columns");
    }
    begin = end;
  }

  Tensor& plane = packed.planes.at("codes");
  pack_codes(codes.data(), position.data(), n, k, format.bits, reinterpret_cast<uint32_t*>(plane.bytes()),
             plane.shape()[1], stream);
  store_parameters(format, parameters.view(), packed, stream);
  check_cuda(cudaStreamSynchronize(stream), "work of the stream");
}

// Writes the plane group_index, or drops it if it would say nothing.
void store_group_index(const WalkPlan& plan, PackedTensor& packed, cudaStream_t stream) {
  const auto found = packed.planes.find("group_index");
  if (found == packed.planes.end()) return;
  if (plan.group_of.empty() || plan.groups_are_consecutive()) {
    packed.planes.erase(found);
    return;
  }
  check_cuda(cudaMemcpyAsync(found->second.bytes(), plan.group_of.data(),
                             plan.group_of.size() * sizeof(int32_t), cudaMemcpyHostToDevice, stream),
             "copy to the device");
  check_cuda(cudaStreamSynchronize(stream), "copy to the device");
}

void measure(const CudaMatrix& w, const PackedTensor& packed, const CudaHessian& hessian,
             const std::vector<float>& column_weights, const CudaErrorFeedbackOptions& options,
             RoundingReport& report, cudaStream_t stream) {
  std::vector<const CudaHessian*> hessians;
  if (options.measure_losses) {
    hessians.push_back(&hessian);
    if (options.held_out != nullptr) hessians.push_back(options.held_out);
  }
  const Losses own = measure_losses(w, packed, hessians, stream);
  report.mean_squared_error = own.mean_squared_error;
  if (!options.measure_losses) return;
  PackedTensor plain = scratch_planes(packed.format, w.rows, w.cols, stream);
  const DeviceBuffer<float> weights = uploaded(column_weights, stream);
  round_to_nearest(w, plain.format, plain, options.scale_search, weights.data(), stream);
  const Losses nearest = measure_losses(w, plain, hessians, stream);
  report.proxy_loss = own.proxy_losses[0];
  report.proxy_loss_nearest = nearest.proxy_losses[0];
  if (options.held_out != nullptr) {
    report.held_out_loss = own.proxy_losses[1];
    report.held_out_loss_nearest = nearest.proxy_losses[1];
  }
}

}  // namespace
}  // namespace cuda

bool walk_needs_group_index(const Format& format, int64_t k, bool act_order, bool static_groups) {
  const auto* grouped = dynamic_cast<const GroupedFormat*>(&format);
  return grouped != nullptr && act_order && !static_groups &&
         grouped->group_size != GroupedFormat::kPerTensor && grouped->group_count(k) > 1;
}

RoundingReport round_error_feedback_cuda(const CudaMatrix& w, PackedTensor& packed,
                                         const CudaHessian& hessian, const CudaErrorFeedbackOptions& options,
                                         void* stream) {
  if (cuda::trellis_of(packed) != nullptr) {
    return round_trellis_feedback_cuda(w, packed, hessian, options, {}, stream);
  }
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const GroupedFormat& format = cuda::require_scalar(packed, "round_error_feedback_cuda");
  if (options.output_hessian != nullptr) {
    throw InvalidArgument("output_hessian", text_of("one for ", format.spec()),
                          "none: feedback along rows is for a trellis with its rotation");
  }
  ErrorFeedbackOptions checked;
  checked.damping = options.damping;
  checked.damping_ladder = options.damping_ladder;
  checked.block = options.block;
  checked.scale_search = options.scale_search;
  require_valid(checked);
  const int64_t n = w.rows;
  const int64_t k = w.cols;
  cuda::require_matrix(w, "w");
  cuda::require_same_shape(w, packed);
  cuda::require_planes(packed);
  const bool indexed = packed.planes.contains("group_index");
  if (indexed != walk_needs_group_index(format, k, options.act_order, options.static_groups)) {
    throw InvalidArgument(
        "packed", indexed ? "a plane group_index" : "no plane group_index",
        indexed ? "none: the groups are of consecutive columns" : "one: the groups are fitted on the walk");
  }
  cuda::require_hessian(hessian, k, "hessian");
  if (options.held_out != nullptr) cuda::require_hessian(*options.held_out, k, "held_out");
  if (k > std::numeric_limits<int>::max() - 31) {
    throw InvalidArgument("w", text_of(k, " columns"), "fewer than 2^31");
  }
  const std::vector<double> diagonal = hessian.diagonal(stream);
  cuda::require_usable(hessian, diagonal, cuda_stream);
  if (options.held_out != nullptr) static_cast<void>(options.held_out->sum(stream));
  cuda::require_finite_cuda(w, "w", cuda_stream);

  const bool fit_on_the_walk =
      !options.static_groups && format.group_size != GroupedFormat::kPerTensor && format.group_count(k) > 1;
  RoundingReport report;
  report.method = "gptq";
  report.scale_search = options.scale_search.has_value();
  report.act_order = options.act_order;
  report.static_groups = !fit_on_the_walk;
  report.tokens = hessian.tokens();
  report.dead_columns = std::count(diagonal.begin(), diagonal.end(), 0.0);

  const cuda::WalkPlan plan = cuda::plan_walk(format, diagonal, options.act_order, fit_on_the_walk);
  {
    const cuda::DeviceBuffer<int32_t> order = cuda::uploaded(plan.order, cuda_stream);
    const cuda::UpperFactor factor(hessian, diagonal, order.data(), options.damping, options.damping_ladder,
                                   cuda_stream);
    report.damping_tried = factor.damping_tried();
    report.damping = report.damping_tried.back();
    if (n > 0 && k > 0) cuda::walk(w, packed, plan, factor, options, cuda_stream);
  }
  cuda::store_group_index(plan, packed, cuda_stream);
  if (n > 0 && k > 0) {
    cuda::measure(w, packed, hessian, plan.weights, options, report, cuda_stream);
    return report;
  }
  const FloatMatrix empty(nullptr, w.dtype, n, k, w.stride);
  cuda::copy_planes(round_nearest(empty, packed.format).tensor, packed, cuda_stream);
  if (options.measure_losses) report.proxy_loss = report.proxy_loss_nearest = 0;
  if (options.measure_losses && options.held_out != nullptr) {
    report.held_out_loss = report.held_out_loss_nearest = 0;
  }
  return report;
}

}  // namespace quantloom
