#include "quantloom/rounding/nearest.hpp"

#include <algorithm>
#include <cstring>

#include "additive/rounding.hpp"
#include "common/device_pointer.hpp"
#include "quantloom/formats/outliers.hpp"
#include "rounding/outliers.hpp"
#include "rounding/rounds.hpp"
#include "rounding/scale_search.hpp"
#include "rounding/trellis_feedback.hpp"

namespace quantloom {
namespace cuda {

void require_same_shape(const CudaMatrix& w, const PackedTensor& packed) {
  if (packed.n == w.rows && packed.k == w.cols) return;
  throw InvalidArgument("packed", text_of("shape [", packed.n, ", ", packed.k, "]"),
                        text_of("the shape of w, [", w.rows, ", ", w.cols, "]"));
}

void require_hessian(const CudaHessian& hessian, int64_t k, std::string_view argument) {
  if (hessian.k() != k) {
    throw InvalidArgument(argument, text_of(hessian.k(), " inputs"), text_of(k, " inputs, as in w"));
  }
  if (hessian.tokens() <= 0) throw InvalidArgument(argument, "0 tokens", "a Hessian of at least one token");
  int current = 0;
  check_cuda(cudaGetDevice(&current), "current CUDA device");
  if (hessian.device() != current) {
    throw TypeMismatch(argument, text_of("a Hessian on CUDA device ", hessian.device()),
                       text_of("one on the current device, ", current));
  }
}

std::vector<float> column_weights(const std::vector<double>& diagonal) {
  const double largest = diagonal.empty() ? 0.0 : *std::max_element(diagonal.begin(), diagonal.end());
  std::vector<float> weights(diagonal.size());
  for (size_t j = 0; j < diagonal.size(); ++j) {
    weights[j] = largest > 0 ? static_cast<float>(std::max(diagonal[j], 0.0) / largest) : 1.0F;
  }
  return weights;
}

void copy_planes(const PackedTensor& from, PackedTensor& to, cudaStream_t stream) {
  for (auto& [name, plane] : to.planes) {
    if (plane.byte_count() == 0 || name == "group_index") continue;  // which its rounding writes
    const Tensor& source = from.plane(name);
    check_cuda(cudaMemcpyAsync(plane.bytes(), source.bytes(), static_cast<size_t>(plane.byte_count()),
                               cudaMemcpyDefault, stream),
               "copy of planes");
  }
  check_cuda(cudaStreamSynchronize(stream), "copy of planes");
}

Tensor new_plane(const PlaneSpec& spec) {
  const int64_t bytes = checked_mul(checked_product(spec.shape), size_of(spec.dtype));
  void* memory = nullptr;
  check_cuda(cudaMalloc(&memory, static_cast<size_t>(std::max<int64_t>(bytes, 1))),
             text_of("device memory, ", bytes, " bytes"));
  const std::shared_ptr<const void> owner(
      memory, [](const void* p) { static_cast<void>(cudaFree(const_cast<void*>(p))); });
  return {spec.dtype, spec.shape, memory, owner, Device::cuda};
}

FitMetric::FitMetric(const CudaHessian& hessian, const std::vector<double>& diagonal, cudaStream_t stream)
    : weights(column_weights(diagonal)) {
  const double largest = diagonal.empty() ? 0.0 : *std::max_element(diagonal.begin(), diagonal.end());
  output = {hessian.sum(stream), hessian.k(), largest > 0 ? 1 / largest : 1, nullptr};
}

void require_search(const std::optional<ScaleSearch>& search, const Format& format, bool with_hessian) {
  if (!search || !search->output_error) return;
  if (!with_hessian) {
    throw InvalidArgument("scale_search", "a search by output error without a Hessian", "a Hessian");
  }
  const auto* outliers = dynamic_cast<const Outliers*>(&format);
  const auto* grouped =
      dynamic_cast<const GroupedFormat*>(outliers != nullptr ? outliers->dense.get() : &format);
  if (grouped != nullptr && grouped->group_size == GroupedFormat::kPerTensor) {
    throw Unsupported(
        text_of("scale_search: a search by output error for ", format.spec(), " runs on the CPU only"));
  }
}

void fit_groups(DeviceEncoder& encoder, const FitTask& task, const SearchFactors& search,
                const OutputMetric& metric, cudaStream_t stream) {
  if (search.by_output_error()) {
    fit_by_output_error(encoder, task, search, metric, stream);
  } else {
    encoder.fit(task, search);
  }
}

NearestRounding::NearestRounding(const CudaMatrix& w, const std::shared_ptr<const Format>& format,
                                 PackedTensor* packed, const std::optional<ScaleSearch>& search,
                                 const FitMetric& metric, cudaStream_t stream)
    : w_(w), packed_(packed), stream_(stream) {
  const auto* const outliers = dynamic_cast<const Outliers*>(format.get());
  encoder_ =
      make_device_encoder(outliers != nullptr ? outliers->dense : format, w.rows, w.cols, false, stream);
  const int64_t count = checked_mul(w.rows, w.cols);
  CudaMatrix dense = w;
  DeviceBuffer<float> masked;
  if (outliers != nullptr) {
    masked = DeviceBuffer<float>(count, stream);
    missing_ = DeviceBuffer<uint16_t>(count, stream);
    mask_largest(w, outliers->entry_count(w.rows, w.cols), masked.data(), missing_.data(), stream);
    dense = {masked.data(), DType::f32, w.rows, w.cols, w.cols};
  }
  const SearchFactors factors(search, stream);
  DeviceBuffer<float> weights;
  if (!metric.weights.empty() && (search || encoder_->weighs_columns())) {
    weights = DeviceBuffer<float>(w.cols, stream);
    weights.upload(metric.weights.data(), w.cols);
  }
  FitTask task;
  task.w = dense;
  task.missing = missing_.data();
  task.original = w;
  task.end_column = w.cols;
  task.group_size = encoder_->group_size();
  task.weights = weights.data();
  fit_groups(*encoder_, task, factors, metric.output, stream);
  encoder_->require_fitted(task, factors);

  const auto* const scalar = std::get_if<ScalarRounder>(&encoder_->rounder());
  if (packed != nullptr && scalar != nullptr && outliers == nullptr) {
    encoder_->store_parameters(*packed);
    EncodeTask encode;
    encode.w = w;
    encode.group_size = task.group_size;
    encode.grid = scalar->grid;
    encode.parameters = scalar->parameters;
    encode.words = reinterpret_cast<uint32_t*>(packed->planes.at("codes").bytes());
    encode.words_per_row = packed->planes.at("codes").shape()[1];
    const DeviceBuffer<double> squared_error(1, stream);
    encode_and_pack(encode, squared_error.data(), stream);
    double sum = 0;
    download(squared_error.data(), &sum, 1, stream);
    mean_squared_error_ = sum / (static_cast<double>(w.rows) * static_cast<double>(w.cols));
    return;
  }
  packed_ = nullptr;
  codes_ = DeviceBuffer<uint8_t>(count, stream);
  encode_codes(dense, encoder_->rounder(), task.group_size, codes_.data(), stream);
  if (outliers != nullptr) {
    DeviceBuffer<unsigned long long> overflow(1, stream);
    overflow.fill_bytes(0xff);
    measure_missing(w, code_matrix(), missing_.data(), overflow.data(), stream);
    require_no_overflow(overflow.data(), w.cols, {}, stream);
  }
  if (packed == nullptr) return;
  encoder_->store_codes(codes_.data(), nullptr, *packed);
  encoder_->store_parameters(*packed);
  if (outliers != nullptr) {
    const std::vector<int32_t> counts = count_outliers(missing_.data(), w.rows, w.cols, stream);
    store_outliers(missing_.data(), nullptr, counts, *packed, stream);
    packed->format = std::make_shared<const Outliers>(outliers->dense, outliers->entry_count(w.rows, w.cols));
  }
  mean_squared_error_ = losses({}).mean_squared_error;
}

CodeMatrix NearestRounding::code_matrix() const {
  CodeMatrix matrix;
  matrix.rounder = &encoder_->rounder();
  matrix.codes = codes_.data();
  matrix.group_size = encoder_->group_size();
  return matrix;
}

Losses NearestRounding::losses(std::span<const CudaHessian* const> hessians,
                               const float* input_scales) const {
  if (packed_ != nullptr) return measure_losses(w_, *packed_, hessians, stream_);
  CodeMatrix matrix = code_matrix();
  matrix.missing = missing_.data();
  matrix.input_scales = input_scales;
  const auto errors_of = [&](int64_t first_row, int64_t rows, double* errors, double* partial) {
    measure_code_errors(w_, matrix, first_row, rows, errors, partial, stream_);
  };
  return measure_losses(w_.rows, w_.cols, errors_of, hessians, stream_);
}

}  // namespace cuda

RoundingReport round_nearest_cuda(const CudaMatrix& w, PackedTensor& packed,
                                  const CudaNearestOptions& options, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (const Trellis* trellis = cuda::trellis_of(packed)) {
    return cuda::round_trellis_nearest(w, packed, *trellis, options, cuda_stream);
  }
  if (const Additive* additive = cuda::additive_of(packed)) {
    return cuda::round_additive_nearest(w, packed, *additive, options, cuda_stream);
  }
  if (packed.format == nullptr) throw InvalidArgument("packed", "no format", "a format");
  const auto* const outliers = dynamic_cast<const Outliers*>(packed.format.get());
  cuda::require_columns_format(outliers != nullptr ? *outliers->dense : *packed.format, "round_nearest_cuda");
  if (options.scale_search) require_valid(*options.scale_search);
  cuda::require_search(options.scale_search, *packed.format, options.hessian != nullptr);
  if (options.hessian != nullptr) cuda::require_hessian(*options.hessian, w.cols, "hessian");
  if (options.held_out != nullptr) cuda::require_hessian(*options.held_out, w.cols, "held_out");
  cuda::require_matrix(w, "w");
  cuda::require_same_shape(w, packed);
  cuda::require_planes(packed);
  if (outliers != nullptr && !outliers->percent) {
    throw InvalidArgument("format", packed.format->spec() + ", with a count", "a percentage of outliers");
  }
  if (packed.planes.contains("group_index")) {
    throw InvalidArgument("packed", "a plane group_index", "planes for groups of consecutive columns");
  }
  RoundingReport report;
  report.method = "nearest";
  report.scale_search = options.scale_search.has_value();
  if (options.hessian != nullptr) report.tokens = options.hessian->tokens();
  if (w.rows == 0 || w.cols == 0) {
    const FloatMatrix empty(nullptr, w.dtype, w.rows, w.cols, w.stride);
    const PackedTensor result = round_nearest(empty, packed.format).tensor;
    cuda::copy_planes(result, packed, cuda_stream);
    packed.format = result.format;
    if (options.hessian != nullptr) report.proxy_loss = report.proxy_loss_nearest = 0;
    if (options.held_out != nullptr) report.held_out_loss = report.held_out_loss_nearest = 0;
    return report;
  }
  cuda::require_finite_cuda(w, "w", cuda_stream);
  std::vector<const CudaHessian*> hessians;
  if (options.hessian != nullptr) hessians.push_back(options.hessian);
  if (options.held_out != nullptr) hessians.push_back(options.held_out);
  // Before any plane is written: a Hessian whose tokens held a NaN throws here.
  for (const CudaHessian* hessian : hessians) static_cast<void>(hessian->sum(stream));

  cuda::FitMetric metric;
  if (options.hessian != nullptr) {
    metric = cuda::FitMetric(*options.hessian, options.hessian->diagonal(stream), cuda_stream);
  }
  const std::shared_ptr<const Format> format = packed.format;
  const cuda::NearestRounding rounding(w, format, &packed, options.scale_search, metric, cuda_stream);
  report.mean_squared_error = rounding.mean_squared_error();
  if (hessians.empty()) return report;
  const cuda::Losses losses = rounding.losses(hessians);
  if (options.hessian != nullptr) report.proxy_loss = losses.proxy_losses.front();
  if (options.held_out != nullptr) report.held_out_loss = losses.proxy_losses.back();
  report.proxy_loss_nearest = report.proxy_loss;
  report.held_out_loss_nearest = report.held_out_loss;
  if (options.scale_search) {
    const cuda::NearestRounding plain(w, format, nullptr, std::nullopt, metric, cuda_stream);
    const cuda::Losses nearest = plain.losses(hessians);
    if (options.hessian != nullptr) report.proxy_loss_nearest = nearest.proxy_losses.front();
    if (options.held_out != nullptr) report.held_out_loss_nearest = nearest.proxy_losses.back();
  }
  return report;
}

PackedTensor empty_packed_cuda(std::shared_ptr<const Format> format, int64_t n, int64_t k,
                               bool with_group_index) {
  if (format == nullptr) throw InvalidArgument("format", "null", "a format");
  PackedTensor packed{std::move(format), n, k, {}};
  for (const PlaneSpec& spec : packed.format->planes(n, k)) {
    if (spec.optional && !(with_group_index && spec.name == "group_index")) continue;
    packed.planes.emplace(spec.name, cuda::new_plane(spec));
  }
  return packed;
}

}  // namespace quantloom
