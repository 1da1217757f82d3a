#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>

#include "additive/rounding.hpp"
#include "common/device_pointer.hpp"
#include "common/math_handles.hpp"
#include "quantloom/formats/outliers.hpp"
#include "quantloom/formats/spqr.hpp"
#include "quantloom/rounding/nearest.hpp"
#include "rounding/outlier_search.hpp"
#include "rounding/outliers.hpp"
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

struct Groups {
  int64_t count;  // in a row; 1 for a whole matrix
  int64_t size;
};

Groups groups_of(const Format& format, int64_t k) {
  if (const auto* scaled = dynamic_cast<const ScaledFormat*>(&format)) {
    const bool whole = scaled->group_size == ScaledFormat::kPerTensor;
    return {whole ? 1 : scaled->group_count(k), scaled->columns_per_group(k)};
  }
  if (const auto* spqr = dynamic_cast<const Spqr*>(&format)) {
    return {spqr->group_count(k), spqr->columns_per_group(k)};
  }
  return {1, std::max<int64_t>(k, 1)};
}

// The order of the walk and what follows from it, on the host.
struct WalkPlan {
  std::vector<int32_t> order;     // the column at each position
  std::vector<int32_t> position;  // the position of each column
  std::vector<int32_t> group_at;  // the group of each position
  std::vector<int32_t> group_of;  // the group of each column
  std::vector<uint8_t> dead;      // by column
  int64_t group_size = 0;
  bool fit_on_the_walk = false;
  FitMetric metric;

  bool groups_are_consecutive() const {
    for (size_t c = 0; c < group_of.size(); ++c) {
      if (group_of[c] != static_cast<int64_t>(c) / group_size) return false;
    }
    return true;
  }
};

WalkPlan plan_walk(int64_t group_size, const CudaHessian& hessian, const std::vector<double>& diagonal,
                   bool act_order, bool fit_on_the_walk, cudaStream_t stream) {
  const auto k = static_cast<int64_t>(diagonal.size());
  WalkPlan plan;
  plan.metric = FitMetric(hessian, diagonal, stream);
  plan.fit_on_the_walk = fit_on_the_walk;
  plan.group_size = std::min(group_size, k);
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
  return plan;
}

// A matrix on its walk: codes and parameters, and what becomes of them.
class Walk {
 public:
  Walk(const CudaMatrix& w, const std::shared_ptr<const Format>& format, const WalkPlan& plan,
       const UpperFactor& factor, const CudaErrorFeedbackOptions& options, cudaStream_t stream)
      : w_(w),
        plan_(plan),
        factor_(factor),
        options_(options),
        stream_(stream),
        order_(uploaded(plan.order, stream)),
        position_(uploaded(plan.position, stream)),
        group_at_(uploaded(plan.group_at, stream)),
        group_of_(uploaded(plan.group_of, stream)),
        dead_(uploaded(plan.dead, stream)),
        search_(options.scale_search, stream),
        encoder_(make_device_encoder(format, w.rows, w.cols, true, stream)),
        working_(checked_mul(w.rows, factor.stride()), stream),
        errors_(checked_mul(w.rows, kWalkBlock), stream),
        codes_(checked_mul(w.rows, w.cols), stream) {
    std::vector<float> weights = plan.metric.weights;
    if (plan.fit_on_the_walk) {
      for (size_t p = 0; p < weights.size(); ++p) {
        weights[p] = plan.metric.weights[static_cast<size_t>(plan.order[p])];
      }
    }
    weights_ = uploaded(weights, stream);
    check_cuda(cudaStreamSynchronize(stream), "copy to the device");
  }

  // Chooses all codes; with a search for outliers until it has found as many as `budget` allows.
  void run(const Format& format, int64_t budget, RoundingReport& report) {
    if (!options_.outliers) return static_cast<void>(run(0));
    code_bits_ = scalar_bits(format);
    prepare_outliers();
    const auto count = [&](double threshold, bool) { return run(threshold); };
    if (options_.outliers->threshold) {
      report.outlier_threshold = *options_.outliers->threshold;
      static_cast<void>(run(report.outlier_threshold));
    } else {
      report.outlier_threshold = find_threshold(budget, 1.0, count);
    }
    require_no_overflow(overflow_.data(), w_.cols, plan_.order, stream_);
  }

  // Chooses all codes, and outliers at this threshold; returns their number.
  int64_t run(double threshold) {
    const int64_t n = w_.rows;
    const int64_t k = w_.cols;
    const int64_t stride = factor_.stride();
    const BlasScope blas(stream_);
    gather_columns(w_, order_.data(), dead_.data(), working_.data(), stride, stream_);
    FitTask fit;
    fit.w = plan_.fit_on_the_walk ? CudaMatrix{working_.data(), DType::f32, n, k, stride} : w_;
    fit.end_column = k;
    fit.group_size = plan_.group_size;
    fit.dead = plan_.fit_on_the_walk ? nullptr : dead_.data();  // the working copy holds zeros there
    fit.weights = weights_.data();
    OutputMetric metric = plan_.metric.output;
    if (plan_.fit_on_the_walk) metric.column_at = order_.data();
    if (!plan_.fit_on_the_walk) fit_task(fit, metric, threshold);

    WalkTask task;
    task.working = working_.data();
    task.stride = stride;
    task.n = n;
    task.upper = factor_.upper();
    task.upper_stride = stride;
    task.group_at = group_at_.data();
    task.codes = codes_.data();
    task.k = k;
    task.errors = errors_.data();
    if (options_.outliers) {
      missing_.fill_bytes(0xff);
      outlier_count_.fill_bytes(0);
      overflow_.fill_bytes(0xff);
      task.missing = missing_.data();
      task.largest = static_cast<float>(std::sqrt(threshold * unit_));
      task.dead_at = dead_at_.data();
      task.outlier_count = outlier_count_.data();
      task.overflow = overflow_.data();
    }
    const int64_t block = std::min<int64_t>(options_.block, kWalkBlock);
    const float one = 1.0F;
    const float minus_one = -1.0F;
    for (int64_t begin = 0; begin < k;) {
      int64_t end = std::min(k, begin + block);
      if (plan_.fit_on_the_walk) {
        // All columns of a group are up to date when it is fitted, because blocks end where groups do.
        const int64_t group = begin / plan_.group_size;
        end = std::min(end, (group + 1) * plan_.group_size);
        if (begin % plan_.group_size == 0) {
          fit.first_group = group;
          fit.first_column = begin;
          fit.end_column = std::min(k, begin + plan_.group_size);
          fit_task(fit, metric, threshold);
        }
      }
      const int64_t width = end - begin;
      walk_block(task, encoder_->rounder(), begin, static_cast<int>(width), stream_);
      if (end < k) {
        // Column-major: remainder^T -= U[block, remainder]^T errors^T.
        check_cublas(
            cublas().sgemm(blas.handle(), kOpN, kOpN, static_cast<int>(k - end), static_cast<int>(n),
                           static_cast<int>(width), &minus_one, factor_.upper() + begin * stride + end,
                           static_cast<int>(stride), errors_.data(), kWalkBlock, &one, working_.data() + end,
                           static_cast<int>(stride)),
            "update of the remaining columns");
      }
      begin = end;
    }
    unsigned long long found = 0;
    if (options_.outliers) download(outlier_count_.data(), &found, 1, stream_);
    return static_cast<int64_t>(found);
  }

  // Writes the planes of codes and parameters; waits for the stream.
  void store(PackedTensor& packed) {
    encoder_->store_codes(codes_.data(), position_.data(), packed);
    encoder_->store_parameters(packed);
    if (options_.outliers) store_outliers(packed);
    check_cuda(cudaStreamSynchronize(stream_), "work of the stream");
  }

  Losses losses(std::span<const CudaHessian* const> hessians) const {
    CodeMatrix matrix;
    matrix.rounder = &encoder_->rounder();
    matrix.codes = codes_.data();
    matrix.position = position_.data();
    matrix.group_of = group_of_.data();
    matrix.missing = missing_.data();
    const auto errors_of = [&](int64_t first_row, int64_t rows, double* errors, double* partial) {
      measure_code_errors(w_, matrix, first_row, rows, errors, partial, stream_);
    };
    return measure_losses(w_.rows, w_.cols, errors_of, hessians, stream_);
  }

  // Drops what only the walk needs.
  void release_walk() {
    working_.release();
    errors_.release();
  }

 private:
  // Thresholds are in units of the mean over live columns of (mean w^2) / U_jj^2.
  void prepare_outliers() {
    const int64_t n = w_.rows;
    const int64_t k = w_.cols;
    std::vector<float> pivots(static_cast<size_t>(k));
    const size_t pitch = static_cast<size_t>(factor_.stride() + 1) * sizeof(float);
    check_cuda(cudaMemcpy2DAsync(pivots.data(), sizeof(float), factor_.upper(), pitch, sizeof(float),
                                 static_cast<size_t>(k), cudaMemcpyDeviceToHost, stream_),
               "copy from the device");
    const DeviceBuffer<double> energies(k, stream_);
    column_energies(w_, energies.data(), stream_);
    std::vector<double> energy(static_cast<size_t>(k));
    download(energies.data(), energy.data(), k, stream_);
    std::vector<float> inverse(static_cast<size_t>(k));
    std::vector<uint8_t> dead_at;
    int64_t live = 0;
    for (size_t p = 0; p < pivots.size(); ++p) {
      const auto column = static_cast<size_t>(plan_.order[p]);
      const bool dead = plan_.dead[column] != 0;
      inverse[column] = dead ? 0.0F : 1 / (pivots[p] * pivots[p]);
      dead_at.push_back(dead ? 1 : 0);
      live += dead ? 0 : 1;
    }
    double sum = 0;
    for (size_t j = 0; j < energy.size(); ++j) sum += energy[j] * double{inverse[j]};
    unit_ = sum / (static_cast<double>(n) * static_cast<double>(live));
    dead_at_ = uploaded(dead_at, stream_);
    if (plan_.fit_on_the_walk) {
      std::vector<float> by_column = inverse;
      for (size_t p = 0; p < inverse.size(); ++p) {
        inverse[p] = by_column[static_cast<size_t>(plan_.order[p])];
      }
      // An error in a column costs what is left of it when the columns to come make up for it.
      if (options_.scale_search && !options_.scale_search->output_error) {
        const float largest = *std::max_element(inverse.begin(), inverse.end());
        std::vector<float> weights = inverse;
        for (float& weight : weights) weight /= largest;
        weights_.upload(weights.data(), k);
        check_cuda(cudaStreamSynchronize(stream_), "copy to the device");
      }
    }
    inverse_pivots_ = uploaded(inverse, stream_);
    check_cuda(cudaStreamSynchronize(stream_), "copy to the device");
    missing_ = DeviceBuffer<uint16_t>(checked_mul(n, k), stream_);
    kept_ = DeviceBuffer<float>(checked_mul(n, plan_.fit_on_the_walk ? plan_.group_size : k), stream_);
    outlier_count_ = DeviceBuffer<unsigned long long>(1, stream_);
    overflow_ = DeviceBuffer<unsigned long long>(1, stream_);
  }

  // Fits the groups of a task, but for outliers beyond the threshold.
  void fit_task(FitTask task, OutputMetric metric, double threshold) {
    if (options_.outliers) {
      const int64_t first = task.first_column;
      const int64_t width = task.end_column - first;
      leave_outliers_out(task, inverse_pivots_.data(), code_bits_, threshold * unit_, kept_.data(), stream_);
      task.w = {kept_.data(), DType::f32, w_.rows, width, width};
      task.first_column = 0;
      task.end_column = width;
      task.dead = nullptr;
      task.weights += first;
      if (metric.column_at != nullptr) metric.column_at += first;
    }
    fit_groups(*encoder_, task, search_, metric, stream_);
    encoder_->require_fitted(task, search_);
  }

  void store_outliers(PackedTensor& packed) {
    const std::vector<int32_t> counts = count_outliers(missing_.data(), w_.rows, w_.cols, stream_);
    const int64_t count = std::accumulate(counts.begin(), counts.end(), int64_t{0});
    packed.format = std::make_shared<const Outliers>(packed.format, count);
    for (const PlaneSpec& spec : packed.format->planes(w_.rows, w_.cols)) {
      if (spec.name.starts_with("outlier_")) packed.planes.emplace(spec.name, new_plane(spec));
    }
    cuda::store_outliers(missing_.data(), position_.data(), counts, packed, stream_);
  }

  CudaMatrix w_;
  const WalkPlan& plan_;
  const UpperFactor& factor_;
  const CudaErrorFeedbackOptions& options_;
  cudaStream_t stream_;
  DeviceBuffer<int32_t> order_;
  DeviceBuffer<int32_t> position_;
  DeviceBuffer<int32_t> group_at_;
  DeviceBuffer<int32_t> group_of_;
  DeviceBuffer<uint8_t> dead_;
  DeviceBuffer<float> weights_;
  SearchFactors search_;
  std::unique_ptr<DeviceEncoder> encoder_;
  DeviceBuffer<float> working_;
  DeviceBuffer<float> errors_;
  DeviceBuffer<uint8_t> codes_;  // columns in the order of the walk
  // With a search for outliers:
  int code_bits_ = 0;
  double unit_ = 0;
  DeviceBuffer<uint8_t> dead_at_;  // by position
  DeviceBuffer<float>
      inverse_pivots_;              // [k]: 1 / U_jj^2, 0 for dead columns; by position for fits on the walk
  DeviceBuffer<float> kept_;        // what a fit sees
  DeviceBuffer<uint16_t> missing_;  // as WalkTask has it
  DeviceBuffer<unsigned long long> outlier_count_;
  DeviceBuffer<unsigned long long> overflow_;
};

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

void measure(const CudaMatrix& w, const PackedTensor& packed, const Walk& walk, const CudaHessian& hessian,
             const FitMetric& metric, const CudaErrorFeedbackOptions& options, RoundingReport& report,
             cudaStream_t stream) {
  std::vector<const CudaHessian*> hessians;
  if (options.measure_losses) {
    hessians.push_back(&hessian);
    if (options.held_out != nullptr) hessians.push_back(options.held_out);
  }
  // From the planes where there is a decoder of them.
  const bool scalar = dynamic_cast<const GroupedFormat*>(packed.format.get()) != nullptr;
  const Losses own = scalar ? measure_losses(w, packed, hessians, stream) : walk.losses(hessians);
  report.mean_squared_error = own.mean_squared_error;
  if (!options.measure_losses) return;
  std::shared_ptr<const Format> format = packed.format;
  if (const auto* outliers = dynamic_cast<const Outliers*>(format.get())) {
    const double weights = static_cast<double>(w.rows) * static_cast<double>(w.cols);
    const double percent = 100 * static_cast<double>(outliers->count) / weights;
    format = outliers->dense;
    if (percent > 0 && percent < 100) format = std::make_shared<const Outliers>(format, percent);
  }
  const Losses nearest =
      NearestRounding(w, format, nullptr, options.scale_search, metric, stream).losses(hessians);
  report.proxy_loss = own.proxy_losses[0];
  report.proxy_loss_nearest = nearest.proxy_losses[0];
  if (options.held_out != nullptr) {
    report.held_out_loss = own.proxy_losses[1];
    report.held_out_loss_nearest = nearest.proxy_losses[1];
  }
}

// Of a matrix without weights.
void add_no_outliers(PackedTensor& packed, cudaStream_t stream) {
  packed.format = std::make_shared<const Outliers>(packed.format, int64_t{0});
  for (const PlaneSpec& spec : packed.format->planes(packed.n, packed.k)) {
    if (!spec.name.starts_with("outlier_")) continue;
    Tensor plane = new_plane(spec);
    check_cuda(cudaMemsetAsync(plane.bytes(), 0, static_cast<size_t>(plane.byte_count()), stream),
               "fill of device memory");
    packed.planes.emplace(spec.name, std::move(plane));
  }
  check_cuda(cudaStreamSynchronize(stream), "work of the stream");
}

}  // namespace
}  // namespace cuda

bool walk_needs_group_index(const Format& format, int64_t k, bool act_order, bool static_groups) {
  return act_order && !static_groups && cuda::groups_of(format, k).count > 1;
}

RoundingReport round_error_feedback_cuda(const CudaMatrix& w, PackedTensor& packed,
                                         const CudaHessian& hessian, const CudaErrorFeedbackOptions& options,
                                         void* stream) {
  if (cuda::trellis_of(packed) != nullptr) {
    return round_trellis_feedback_cuda(w, packed, hessian, options, {}, stream);
  }
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (const Additive* additive = cuda::additive_of(packed)) {
    return cuda::round_additive_feedback(w, packed, *additive, hessian, options, cuda_stream);
  }
  if (packed.format == nullptr) throw InvalidArgument("packed", "no format", "a format");
  cuda::require_columns_format(*packed.format, "round_error_feedback_cuda");
  const std::shared_ptr<const Format> shared = packed.format;
  const Format& format = *shared;
  if (options.output_hessian != nullptr) {
    throw InvalidArgument("output_hessian", text_of("one for ", format.spec()),
                          "none: feedback along rows is for a trellis with its rotation");
  }
  ErrorFeedbackOptions checked;
  checked.damping = options.damping;
  checked.damping_ladder = options.damping_ladder;
  checked.block = options.block;
  checked.scale_search = options.scale_search;
  checked.outliers = options.outliers;
  require_valid(checked);
  if (options.outliers) static_cast<void>(scalar_bits(format));
  cuda::require_search(options.scale_search, format, true);
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

  const cuda::Groups groups = cuda::groups_of(format, k);
  const bool fit_on_the_walk = !options.static_groups && groups.count > 1;
  const int64_t budget =
      options.outliers ? outlier_budget(*options.outliers, format, n, k, fit_on_the_walk && options.act_order)
                       : 0;
  RoundingReport report;
  report.method = "gptq";
  report.scale_search = options.scale_search.has_value();
  report.act_order = options.act_order;
  report.static_groups = !fit_on_the_walk;
  report.tokens = hessian.tokens();
  report.dead_columns = std::count(diagonal.begin(), diagonal.end(), 0.0);

  const cuda::WalkPlan plan =
      cuda::plan_walk(groups.size, hessian, diagonal, options.act_order, fit_on_the_walk, cuda_stream);
  const bool any = n > 0 && k > 0;
  std::optional<cuda::Walk> walk;
  {
    const cuda::DeviceBuffer<int32_t> order = cuda::uploaded(plan.order, cuda_stream);
    const cuda::UpperFactor factor(hessian, diagonal, order.data(), options.damping, options.damping_ladder,
                                   cuda_stream);
    report.damping_tried = factor.damping_tried();
    report.damping = report.damping_tried.back();
    if (any) {
      walk.emplace(w, packed.format, plan, factor, options, cuda_stream);
      walk->run(format, budget, report);
      walk->store(packed);
      walk->release_walk();
    }
  }
  cuda::store_group_index(plan, packed, cuda_stream);
  if (any) {
    if (const auto* outliers = dynamic_cast<const Outliers*>(packed.format.get())) {
      report.outliers = outliers->count;
    }
    cuda::measure(w, packed, *walk, hessian, plan.metric, options, report, cuda_stream);
    return report;
  }
  const FloatMatrix empty(nullptr, w.dtype, n, k, w.stride);
  cuda::copy_planes(round_nearest(empty, packed.format).tensor, packed, cuda_stream);
  if (options.outliers) cuda::add_no_outliers(packed, cuda_stream);
  if (options.measure_losses) report.proxy_loss = report.proxy_loss_nearest = 0;
  if (options.measure_losses && options.held_out != nullptr) {
    report.held_out_loss = report.held_out_loss_nearest = 0;
  }
  return report;
}

}  // namespace quantloom
