#include "rounding/device_encoder.hpp"

#include <algorithm>

#include "formats/weighted_fit.hpp"
#include "quantloom/formats/bcq.hpp"
#include "quantloom/formats/spqr.hpp"
#include "rounding/rounds.hpp"
#include "rounding/scale_search.hpp"

namespace quantloom::cuda {
namespace {

// Uniform grids and codebooks.
class ScalarDeviceEncoder final : public DeviceEncoder {
 public:
  ScalarDeviceEncoder(const std::shared_ptr<const Format>& shared, const GroupedFormat& format, int64_t n,
                      int64_t k, bool walk, cudaStream_t stream)
      : DeviceEncoder(shared, n, k,
                      format.group_size == GroupedFormat::kPerTensor ? 1 : format.group_count(k),
                      std::min(format.columns_per_group(k), k), stream),
        scalar_(format),
        per_tensor_(format.group_size == GroupedFormat::kPerTensor),
        grid_(format, stream),
        scales_(per_tensor_ ? 1 : checked_mul(n, groups_), stream),
        zeros_(scales_.count(), stream) {
    GroupParameters parameters;
    parameters.scales = scales_.data();
    parameters.zeros = zeros_.data();
    if (!per_tensor_) {
      parameters.row_stride = walk ? 1 : groups_;
      parameters.group_stride = walk ? n : 1;
    }
    rounder_ = ScalarRounder{grid_.view(), parameters};
  }

  bool per_tensor() const override { return per_tensor_; }
  void fit(const FitTask& task, const SearchFactors& search) override {
    if (per_tensor_) {
      fit_whole(completed(task), search, stream_);
    } else {
      fit_groups(completed(task), search, nullptr, stream_);
    }
  }
  void fit_scaled(const FitTask& task, const float* factors) override {
    fit_groups(completed(task), SearchFactors(std::nullopt, stream_), factors, stream_);
  }

  void store_codes(const uint8_t* codes, const int32_t* position, PackedTensor& packed) override {
    Tensor& plane = packed.planes.at("codes");
    pack_codes(codes, position, n_, k_, scalar_.bits, reinterpret_cast<uint32_t*>(plane.bytes()),
               plane.shape()[1], stream_);
  }
  void store_parameters(PackedTensor& packed) override {
    cuda::store_parameters(scalar_, parameters(), packed, stream_);
  }

 private:
  const GroupParameters& parameters() const { return std::get<ScalarRounder>(rounder_).parameters; }
  FitTask completed(FitTask task) const {
    task.grid = grid_.view();
    task.parameters = parameters();
    task.failure = failure_.data();
    task.group_count = groups_;
    return task;
  }

  const GroupedFormat& scalar_;
  bool per_tensor_;
  DeviceGrid grid_;
  DeviceBuffer<float> scales_;
  DeviceBuffer<float> zeros_;
};

}  // namespace

DeviceEncoder::DeviceEncoder(std::shared_ptr<const Format> format, int64_t n, int64_t k, int64_t groups,
                             int64_t group_size, cudaStream_t stream)
    : format_(std::move(format)),
      n_(n),
      k_(k),
      groups_(groups),
      group_size_(group_size),
      stream_(stream),
      failure_(1, stream) {
  failure_.fill_bytes(0xff);
}

// Fits the failing group once more with the CPU's encoder, which says what is wrong with it.
void DeviceEncoder::require_fitted(const FitTask& task, const SearchFactors& search) const {
  uint64_t found = 0;
  download(failure_.data(), &found, 1, stream_);
  if (found == kNoneFound) return;
  const int64_t row = per_tensor() ? 0 : static_cast<int64_t>(found) / groups_;
  const int64_t group = per_tensor() ? 0 : static_cast<int64_t>(found) % groups_;
  const int64_t first = per_tensor() ? 0 : task.first_column + (group - task.first_group) * task.group_size;
  const int64_t width = per_tensor() ? k_ : std::min(task.group_size, task.end_column - first);
  const int64_t rows = per_tensor() ? n_ : std::min(rows_per_fit(), n_ - row);
  const int64_t element = size_of(task.w.dtype);
  std::vector<std::byte> bytes(static_cast<size_t>(checked_mul(checked_mul(rows, width), element)));
  check_cuda(
      cudaMemcpy2DAsync(bytes.data(), static_cast<size_t>(width * element),
                        static_cast<const std::byte*>(task.w.data) + (row * task.w.stride + first) * element,
                        static_cast<size_t>(task.w.stride * element), static_cast<size_t>(width * element),
                        static_cast<size_t>(rows), cudaMemcpyDeviceToHost, stream_),
      "copy from the device");
  std::vector<uint8_t> dead(static_cast<size_t>(width), 0);
  if (task.dead != nullptr) download(task.dead + first, dead.data(), width, stream_);
  std::vector<float> weights;
  if (task.weights != nullptr && search.steps() == 0 && weighs_columns()) {
    weights.resize(static_cast<size_t>(width));
    download(task.weights + first, weights.data(), width, stream_);
  }
  check_cuda(cudaStreamSynchronize(stream_), "work of the stream");
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
  const auto encoder = format_->column_encoder(format_, n_, k_, {});
  if (auto* const weighted = dynamic_cast<WeightedFit*>(encoder.get()); weighted && !weights.empty()) {
    weighted->fit_weighted(group, row, columns, weights);
  } else {
    encoder->fit(group, row, columns, {});
  }
  for (const float factor : search.host()) {
    encoder->fit(group, row, columns, std::vector<float>(static_cast<size_t>(rows), factor));
  }
  throw NumericError(text_of("scale of row ", row, ", group ", group, ": got a grid that is not finite"));
}

std::unique_ptr<DeviceEncoder> make_device_encoder(const std::shared_ptr<const Format>& format, int64_t n,
                                                   int64_t k, bool walk, cudaStream_t stream) {
  if (dynamic_cast<const Bcq*>(format.get()) != nullptr) {
    return make_bcq_device_encoder(format, n, k, stream);
  }
  if (dynamic_cast<const Spqr*>(format.get()) != nullptr) {
    return make_spqr_device_encoder(format, n, k, stream);
  }
  return std::make_unique<ScalarDeviceEncoder>(format, dynamic_cast<const GroupedFormat&>(*format), n, k,
                                               walk, stream);
}

void require_columns_format(const Format& format, std::string_view function) {
  if (rounds_columns_on_cuda(format)) return;
  throw Unsupported(
      text_of(function, ": no CUDA kernel rounds to format ", format.spec(), "; round on the CPU instead"));
}

}  // namespace quantloom::cuda
