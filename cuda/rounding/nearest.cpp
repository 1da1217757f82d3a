#include "quantloom/rounding/nearest.hpp"

#include <algorithm>
#include <cstring>

#include "common/device_pointer.hpp"
#include "rounding/rounds.hpp"
#include "rounding/scale_search.hpp"
#include "rounding/trellis_feedback.hpp"

namespace quantloom {
namespace cuda {

const GroupedFormat& require_scalar(const PackedTensor& packed, std::string_view function) {
  if (packed.format == nullptr) throw InvalidArgument("packed", "no format", "a format");
  if (dynamic_cast<const Uniform*>(packed.format.get()) == nullptr &&
      dynamic_cast<const Codebook*>(packed.format.get()) == nullptr) {
    throw Unsupported(text_of(function, ": no CUDA kernel rounds to format ", packed.format->spec(),
                              "; round on the CPU instead"));
  }
  return static_cast<const GroupedFormat&>(*packed.format);
}

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

FittedParameters::FittedParameters(const GroupedFormat& format, int64_t n, int64_t k,
                                   bool rows_next_to_each_other, cudaStream_t stream)
    : per_tensor_(format.group_size == GroupedFormat::kPerTensor),
      groups_(per_tensor_ ? 1 : format.group_count(k)),
      scales_(per_tensor_ ? 1 : checked_mul(n, groups_), stream),
      zeros_(per_tensor_ ? 1 : checked_mul(n, groups_), stream),
      failure_(1, stream) {
  view_.scales = scales_.data();
  view_.zeros = zeros_.data();
  if (!per_tensor_) {
    view_.row_stride = rows_next_to_each_other ? 1 : groups_;
    view_.group_stride = rows_next_to_each_other ? n : 1;
  }
  failure_.fill_bytes(0xff);
}

// Fits the failing group once more with the CPU's encoder, which says what is wrong with it.
void FittedParameters::require_fitted(const FitTask& task, const SearchFactors& search,
                                      const std::shared_ptr<const Format>& format,
                                      cudaStream_t stream) const {
  uint64_t found = 0;
  download(failure_.data(), &found, 1, stream);
  if (found == kNoneFound) return;
  const int64_t k = task.w.cols;
  const int64_t row = per_tensor_ ? 0 : static_cast<int64_t>(found) / groups_;
  const int64_t group = per_tensor_ ? 0 : static_cast<int64_t>(found) % groups_;
  const int64_t first = per_tensor_ ? 0 : task.first_column + (group - task.first_group) * task.group_size;
  const int64_t width = per_tensor_ ? k : std::min(task.group_size, task.end_column - first);
  const int64_t rows = per_tensor_ ? task.w.rows : 1;
  const int64_t element = size_of(task.w.dtype);
  std::vector<std::byte> bytes(static_cast<size_t>(checked_mul(checked_mul(rows, width), element)));
  check_cuda(
      cudaMemcpy2DAsync(bytes.data(), static_cast<size_t>(width * element),
                        static_cast<const std::byte*>(task.w.data) + (row * task.w.stride + first) * element,
                        static_cast<size_t>(task.w.stride * element), static_cast<size_t>(width * element),
                        static_cast<size_t>(rows), cudaMemcpyDeviceToHost, stream),
      "copy from the device");
  std::vector<uint8_t> dead(static_cast<size_t>(width), 0);
  if (task.dead != nullptr) download(task.dead + first, dead.data(), width, stream);
  check_cuda(cudaStreamSynchronize(stream), "work of the stream");
  const FloatMatrix segment(bytes.data(), task.w.dtype, rows, width, width);
  std::vector<float> values(static_cast<size_t>(width));
  std::vector<float> storage(static_cast<size_t>(rows * width));
  const MatrixView<float> columns(storage.data(), width, rows);
  for (int64_t r = 0; r < rows; ++r) {
    segment.read(r, 0, width, values.data());
    for (int64_t c = 0; c < width; ++c) {
      columns(c, r) = dead[static_cast<size_t>(c)] != 0 ? 0.0F : values[static_cast<size_t>(c)];
    }
  }
  const auto encoder = format->column_encoder(format, task.w.rows, k, {});
  encoder->fit(group, row, columns, {});
  for (const float factor : search.host()) {
    encoder->fit(group, row, columns, std::vector<float>(static_cast<size_t>(rows), factor));
  }
  throw NumericError(text_of("scale of row ", row, ", group ", group, ": got a grid that is not finite"));
}

double round_to_nearest(const CudaMatrix& w, const std::shared_ptr<const Format>& shared,
                        PackedTensor& packed, const std::optional<ScaleSearch>& scale_search,
                        const float* weights, cudaStream_t stream) {
  const auto& format = static_cast<const GroupedFormat&>(*shared);
  const DeviceGrid grid(format, stream);
  const SearchFactors search(scale_search, stream);
  const FittedParameters parameters(format, w.rows, w.cols, false, stream);
  FitTask task;
  task.w = w;
  task.end_column = w.cols;
  task.group_size = std::min(format.columns_per_group(w.cols), w.cols);
  task.group_count = parameters.groups();
  task.weights = weights;
  task.grid = grid.view();
  task.parameters = parameters.view();
  task.failure = parameters.failure();
  if (parameters.per_tensor()) {
    fit_whole(task, search, stream);
  } else {
    fit_groups(task, search, stream);
  }
  parameters.require_fitted(task, search, shared, stream);

  store_parameters(format, parameters.view(), packed, stream);
  EncodeTask encode;
  encode.w = w;
  encode.group_size = task.group_size;
  encode.grid = task.grid;
  encode.parameters = parameters.view();
  encode.words = reinterpret_cast<uint32_t*>(packed.planes.at("codes").bytes());
  encode.words_per_row = packed.planes.at("codes").shape()[1];
  const DeviceBuffer<double> squared_error(1, stream);
  encode_and_pack(encode, squared_error.data(), stream);
  double sum = 0;
  download(squared_error.data(), &sum, 1, stream);
  return sum / (static_cast<double>(w.rows) * static_cast<double>(w.cols));
}

}  // namespace cuda

RoundingReport round_nearest_cuda(const CudaMatrix& w, PackedTensor& packed,
                                  const CudaNearestOptions& options, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (const Trellis* trellis = cuda::trellis_of(packed)) {
    return cuda::round_trellis_nearest(w, packed, *trellis, options, cuda_stream);
  }
  cuda::require_scalar(packed, "round_nearest_cuda");
  if (options.scale_search) require_valid(*options.scale_search);
  if (options.hessian != nullptr) cuda::require_hessian(*options.hessian, w.cols, "hessian");
  if (options.held_out != nullptr) cuda::require_hessian(*options.held_out, w.cols, "held_out");
  cuda::require_matrix(w, "w");
  cuda::require_same_shape(w, packed);
  cuda::require_planes(packed);
  if (packed.planes.contains("group_index")) {
    throw InvalidArgument("packed", "a plane group_index", "planes for groups of consecutive columns");
  }
  RoundingReport report;
  report.method = "nearest";
  report.scale_search = options.scale_search.has_value();
  if (options.hessian != nullptr) report.tokens = options.hessian->tokens();
  if (w.rows == 0 || w.cols == 0) {
    const FloatMatrix empty(nullptr, w.dtype, w.rows, w.cols, w.stride);
    cuda::copy_planes(round_nearest(empty, packed.format).tensor, packed, cuda_stream);
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

  cuda::DeviceBuffer<float> weights;
  if (options.hessian != nullptr && options.scale_search) {
    const std::vector<float> host = cuda::column_weights(options.hessian->diagonal(stream));
    weights = cuda::DeviceBuffer<float>(w.cols, cuda_stream);
    weights.upload(host.data(), w.cols);
  }
  report.mean_squared_error =
      cuda::round_to_nearest(w, packed.format, packed, options.scale_search, weights.data(), cuda_stream);
  if (hessians.empty()) return report;
  const cuda::Losses losses = cuda::measure_losses(w, packed, hessians, cuda_stream);
  if (options.hessian != nullptr) report.proxy_loss = losses.proxy_losses.front();
  if (options.held_out != nullptr) report.held_out_loss = losses.proxy_losses.back();
  report.proxy_loss_nearest = report.proxy_loss;
  report.held_out_loss_nearest = report.held_out_loss;
  if (options.scale_search) {
    PackedTensor plain = cuda::scratch_planes(packed.format, w.rows, w.cols, cuda_stream);
    cuda::round_to_nearest(w, plain.format, plain, std::nullopt, nullptr, cuda_stream);
    const cuda::Losses nearest = cuda::measure_losses(w, plain, hessians, cuda_stream);
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
    const int64_t bytes = checked_mul(checked_product(spec.shape), size_of(spec.dtype));
    void* memory = nullptr;
    check_cuda(cudaMalloc(&memory, static_cast<size_t>(std::max<int64_t>(bytes, 1))),
               text_of("device memory, ", bytes, " bytes"));
    const std::shared_ptr<const void> owner(
        memory, [](const void* p) { static_cast<void>(cudaFree(const_cast<void*>(p))); });
    packed.planes.emplace(spec.name, Tensor(spec.dtype, spec.shape, memory, owner, Device::cuda));
  }
  return packed;
}

}  // namespace quantloom
