#include "rounding/trellis_feedback.hpp"

#include <algorithm>
#include <limits>
#include <optional>

#include "common/device_pointer.hpp"
#include "common/math_handles.hpp"
#include "common/matrix_checks.hpp"
#include "formats/trellis_basis.hpp"
#include "formats/trellis_codes.hpp"
#include "quantloom/formats/trellis_cuda.hpp"
#include "quantloom/rounding/nearest.hpp"
#include "rounding/rounds.hpp"
#include "rounding/trellis_diagonals.hpp"
#include "rounding/trellis_scales.hpp"
#include "rounding/trellis_steps.hpp"
#include "rounding/trellis_task.hpp"
#include "rounding/upper_factor.hpp"
#include "rounding/walk.hpp"
#include "rounding/walk_block.hpp"

namespace quantloom {
namespace cuda {
namespace {

constexpr int64_t kRingsAtOnce = 4096;  // of a matrix whose rings are all known

trellis::Scales fitted_scales(const CudaMatrix& w, const uint8_t* dead, double target, cudaStream_t stream) {
  trellis::Scales scales = trellis::unit_scales(w.rows, w.cols);
  std::vector<double> host(static_cast<size_t>(w.rows));
  DeviceBuffer<double> rows(w.rows, stream);
  sum_row_squares(w, dead, rows.data(), stream);
  download(rows.data(), host.data(), w.rows, stream);
  trellis::fit_outputs(host, w.cols, scales);
  rows.upload(host.data(), w.rows);
  const DeviceBuffer<double> columns(w.cols, stream);
  sum_column_squares(w, dead, rows.data(), columns.data(), stream);
  std::vector<double> squares(static_cast<size_t>(w.cols));
  download(columns.data(), squares.data(), w.cols, stream);
  trellis::fit_inputs(squares, w.rows, 1, target, scales);
  return scales;
}

TrellisResult round_nearest_trellis(const TrellisTask& task) {
  DeviceScales scales(fitted_scales(task.w, nullptr, task.target, task.stream), task.stream);
  const DeviceBuffer<float> rotated = task.rotated(nullptr, scales);
  const int64_t strip_rings = task.rows / kStep;
  const int64_t steps = task.cols / kStep;
  const int64_t steps_at_once = std::clamp<int64_t>(kRingsAtOnce / strip_rings, 1, steps);
  const RingCoder coder(task.format, steps_at_once * strip_rings, task.stream);
  DeviceBuffer<uint32_t> words(steps * task.step_words(), task.stream);
  for (int64_t step = 0; step < steps; step += steps_at_once) {
    const int64_t count = std::min(steps_at_once, steps - step);
    coder.encode(matrix_of(rotated.data() + step * kStep, task.rows, count * kStep, task.cols),
                 words.data() + step * task.step_words());
  }
  DeviceBuffer<float> decoded = task.decoded(coder, words.data(), scales, rotated.data());
  return {std::move(words), std::move(scales), std::move(decoded)};
}

// P diag(factor) H diag(factor) P of the padded size.
DeviceBuffer<double> rotated_hessian(const CudaHessian& hessian, const std::vector<double>& factors,
                                     cudaStream_t stream) {
  const int64_t size = checked_pad(hessian.k(), kRotationBlock);
  DeviceBuffer<double> result(checked_mul(size, size), stream);
  scale_both_sides(hessian.sum(stream), hessian.k(), uploaded(factors, stream).data(), result.data(), size,
                   stream);
  rotate_columns(result.data(), size, size, stream);
  rotate_rows(result.data(), size, size, stream);
  make_symmetric(result.data(), size, stream);
  return result;
}

std::vector<double> diagonal_of(const double* matrix, int64_t size, cudaStream_t stream) {
  std::vector<double> diagonal(static_cast<size_t>(size));
  check_cuda(cudaMemcpy2DAsync(diagonal.data(), sizeof(double), matrix,
                               static_cast<size_t>(size + 1) * sizeof(double), sizeof(double),
                               static_cast<size_t>(size), cudaMemcpyDeviceToHost, stream),
             "copy from the device");
  check_cuda(cudaStreamSynchronize(stream), "work of the stream");
  return diagonal;
}

// A side of a walk: the Hessian of the basis, released once it is factored, the order of its positions, and
// its factor.
struct Side {
  Side(const CudaHessian& hessian, const std::vector<double>& factors,
       const CudaErrorFeedbackOptions& options, cudaStream_t stream, std::string_view argument = "hessian")
      : sum(rotated_hessian(hessian, factors, stream)),
        diagonal(diagonal_of(sum.data(), checked_pad(hessian.k(), kRotationBlock), stream)),
        order(ordered(diagonal, options.act_order)),
        order_on_device(uploaded(order, stream)),
        factor(sum.data(), diagonal, order_on_device.data(), options.damping, options.damping_ladder, stream,
               argument) {}
  static std::vector<int32_t> ordered(const std::vector<double>& diagonal, bool act_order) {
    std::vector<int32_t> order;
    for (const int64_t at : walk_order(diagonal, kStep, act_order)) order.push_back(static_cast<int32_t>(at));
    return order;
  }
  DiagonalSide view() const { return {order_on_device.data(), factor.upper(), factor.stride()}; }

  DeviceBuffer<double> sum;
  std::vector<double> diagonal;
  std::vector<int32_t> order;
  DeviceBuffer<int32_t> order_on_device;
  UpperFactor factor;
};

// Chooses the rings of 16 positions at a time. rotated: columns in their own order.
void walk(const TrellisTask& task, const UpperFactor& factor, const std::vector<int32_t>& order,
          const float* rotated, const RingCoder& coder, uint32_t* words) {
  const cudaStream_t stream = task.stream;
  const int64_t rows = task.rows;
  const int64_t stride = factor.stride();
  const BlasScope blas(stream);
  const DeviceBuffer<int32_t> order_on_device = uploaded(order, stream);
  DeviceBuffer<uint8_t> none_dead(task.cols, stream);
  none_dead.fill_bytes(0);
  const DeviceBuffer<float> working(checked_mul(rows, stride), stream);
  const DeviceBuffer<float> errors(checked_mul(rows, kWalkBlock), stream);
  const DeviceBuffer<float> decoded(checked_mul(rows, kStep), stream);
  gather_columns({rotated, DType::f32, rows, task.cols, task.cols}, order_on_device.data(), none_dead.data(),
                 working.data(), stride, stream);
  const float one = 1.0F;
  const float minus_one = -1.0F;
  // Column-major: rest^T -= U[positions, rest]^T errors^T.
  const auto push = [&](int64_t begin, int64_t count, int64_t first, int64_t last, const float* of) {
    if (first >= last) return;
    check_cublas(cublas().sgemm(blas.handle(), kOpN, kOpN, static_cast<int>(last - first),
                                static_cast<int>(rows), static_cast<int>(count), &minus_one,
                                factor.upper() + begin * stride + first, static_cast<int>(stride), of,
                                kWalkBlock, &one, working.data() + first, static_cast<int>(stride)),
                 "update of the remaining columns");
  };
  for (int64_t begin = 0; begin < task.cols; begin += kWalkBlock) {
    const int64_t end = std::min<int64_t>(task.cols, begin + kWalkBlock);
    for (int64_t at = begin; at < end; at += kStep) {
      uint32_t* const strip_words = words + order[static_cast<size_t>(at)] / kStep * task.step_words();
      coder.encode(matrix_of(working.data() + at, rows, kStep, stride), strip_words);
      coder.decode(strip_words, matrix_of(decoded.data(), rows, kStep, kStep));
      float* const strip_errors = errors.data() + (at - begin);
      solve_step(working.data() + at, stride, decoded.data(), factor.upper() + at * stride + at, stride,
                 strip_errors, kWalkBlock, rows, stream);
      push(at, kStep, at + kStep, end, strip_errors);
    }
    push(begin, end - begin, end, task.cols, errors.data());
  }
}

// Chooses the rings of all tiles on a diagonal at a time.
void walk_two_sided(const TrellisTask& task, const Side& input, const Side& output, const float* rotated,
                    const RingCoder& coder, uint32_t* words) {
  const cudaStream_t stream = task.stream;
  const int64_t count = checked_mul(task.rows, task.cols);
  const DeviceBuffer<float> along_rows(count, stream);
  const DeviceBuffer<float> along_columns(count, stream);
  const int64_t tall = task.rows / kStep;
  const int64_t wide = task.cols / kStep;
  const int64_t most = std::min(tall, wide);
  const DeviceBuffer<float> left(most * kStep * kStep, stream);
  const DeviceBuffer<float> targets(most * kStep * kStep, stream);
  const DeviceBuffer<float> decoded(most * kStep * kStep, stream);
  const DeviceBuffer<uint32_t> rings(most * coder.shape().words(), stream);
  const DiagonalWalk walk{rotated,       task.rows,         task.cols,           input.view(),
                          output.view(), along_rows.data(), along_columns.data()};
  for (int64_t diagonal = 0; diagonal < tall + wide - 1; ++diagonal) {
    Diagonal which;
    which.diagonal = diagonal;
    which.first = std::max<int64_t>(0, diagonal - wide + 1);
    which.count = std::min(tall - 1, diagonal) - which.first + 1;
    gather_diagonal(walk, which, left.data(), targets.data(), stream);
    coder.encode(matrix_of(targets.data(), which.count * kStep, kStep, kStep), rings.data());
    coder.decode(rings.data(), matrix_of(decoded.data(), which.count * kStep, kStep, kStep));
    finish_diagonal(walk, which, left.data(), targets.data(), decoded.data(), rings.data(),
                    coder.shape().words(), words, stream);
  }
}

int64_t trial_rows(const TrellisTask& task) {
  return std::ssize(trellis::trial_tile_rows(task.rows / kStep)) * kStep;
}

// As the CPU's function of that name.
double tried_factor(const TrellisTask& task, const Side& input, const float* rotated, const RingCoder& coder,
                    std::span<const double> factors) {
  const cudaStream_t stream = task.stream;
  const std::vector<int64_t> tile_rows = trellis::trial_tile_rows(task.rows / kStep);
  const int64_t rows = trial_rows(task);
  TrellisTask trial = task;
  trial.rows = checked_mul(rows, std::ssize(factors));
  std::vector<int32_t> chosen;
  std::vector<float> widening;
  for (int64_t r = 0; r < trial.rows; ++r) {
    const int64_t row = r % rows;
    chosen.push_back(static_cast<int32_t>(tile_rows[static_cast<size_t>(row / kStep)] * kStep + row % kStep));
    widening.push_back(static_cast<float>(factors[static_cast<size_t>(r / rows)]));
  }
  const int64_t count = checked_mul(trial.rows, task.cols);
  const DeviceBuffer<float> wanted(count, stream);
  take_rows(rotated, task.cols, uploaded(chosen, stream).data(), uploaded(widening, stream).data(),
            wanted.data(), trial.rows, stream);
  const DeviceBuffer<float> errors(count, stream);
  {
    const DeviceBuffer<uint32_t> words(task.cols / kStep * trial.step_words(), stream);
    walk(trial, input.factor, input.order, wanted.data(), coder, words.data());
    const DeviceBuffer<float> decoded(count, stream);
    coder.decode(words.data(), matrix_of(decoded.data(), trial.rows, task.cols, task.cols));
    subtract_narrow(matrix_of(wanted.data(), trial.rows, task.cols, task.cols), decoded.data(), errors.data(),
                    stream);
  }
  const DeviceBuffer<float> narrowed(checked_mul(task.cols, task.cols), stream);
  narrow(input.sum.data(), 1 / *std::ranges::max_element(input.diagonal), narrowed.data(),
         task.cols * task.cols, stream);
  const BlasScope blas(stream);
  const float one = 1.0F;
  const float zero = 0.0F;
  const auto k = static_cast<int>(task.cols);
  check_cublas(cublas().sgemm(blas.handle(), kOpN, kOpN, k, static_cast<int>(trial.rows), k, &one,
                              narrowed.data(), k, errors.data(), k, &zero, wanted.data(), k),
               "losses of the factors");
  const DeviceBuffer<double> sums(2 * trial.rows, stream);
  dot_rows(wanted.data(), matrix_of(errors.data(), trial.rows, task.cols, task.cols), errors.data(),
           sums.data(), sums.data() + trial.rows, stream);
  std::vector<double> of_rows(static_cast<size_t>(trial.rows));
  download(sums.data(), of_rows.data(), trial.rows, stream);
  std::vector<double> losses(factors.size(), 0.0);
  for (size_t r = 0; r < of_rows.size(); ++r) {
    const size_t f = r / static_cast<size_t>(rows);
    losses[f] += of_rows[r] / (factors[f] * factors[f]);
  }
  return trellis::best_factor(factors, losses);
}

void store(const TrellisTask& task, const TrellisResult& result, PackedTensor& packed) {
  const auto copy = [&](const char* name, const void* from, int64_t bytes, cudaMemcpyKind kind) {
    check_cuda(
        cudaMemcpyAsync(packed.planes.at(name).bytes(), from, static_cast<size_t>(bytes), kind, task.stream),
        "copy of a plane");
  };
  copy("codes", result.words.data(), task.cols / kStep * task.step_words() * 4, cudaMemcpyDeviceToDevice);
  const trellis::Scales& scales = result.scales.host;
  copy("input_scales", scales.input.data(), 2 * std::ssize(scales.input), cudaMemcpyHostToDevice);
  copy("output_scales", scales.output.data(), 2 * std::ssize(scales.output), cudaMemcpyHostToDevice);
  const std::vector<uint16_t>& table = task.format.codebook.table;
  if (!table.empty()) copy("table", table.data(), 2 * std::ssize(table), cudaMemcpyHostToDevice);
  check_cuda(cudaStreamSynchronize(task.stream), "work of the stream");
}

Losses losses_of(const TrellisTask& task, const float* decoded,
                 std::span<const CudaHessian* const> hessians) {
  const auto errors_of = [&](int64_t first_row, int64_t rows, double* errors, double* partial) {
    subtract_rows(task.w, decoded, first_row, rows, errors, partial, task.stream);
  };
  return measure_losses(task.w.rows, task.w.cols, errors_of, hessians, task.stream);
}

void require_arguments(const CudaMatrix& w, const PackedTensor& packed, const CudaHessian* hessian,
                       const CudaHessian* held_out, const std::optional<ScaleSearch>& scale_search) {
  if (scale_search) {
    throw InvalidArgument("scale_search", "one",
                          "none: on a CUDA device a trellis fits its scales to root mean squares");
  }
  require_matrix(w, "w");
  require_same_shape(w, packed);
  require_planes(packed);
  if (hessian != nullptr) require_hessian(*hessian, w.cols, "hessian");
  if (held_out != nullptr) require_hessian(*held_out, w.cols, "held_out");
  if (w.cols > std::numeric_limits<int>::max() - 127) {
    throw InvalidArgument("w", text_of(w.cols, " columns"), "fewer than 2^31");
  }
}

// Planes of a matrix without elements.
void store_empty(const CudaMatrix& w, PackedTensor& packed, cudaStream_t stream) {
  copy_planes(round_nearest(FloatMatrix(nullptr, w.dtype, w.rows, w.cols, w.stride), packed.format).tensor,
              packed, stream);
}

}  // namespace

const Trellis* trellis_of(const PackedTensor& packed) {
  const auto* format = dynamic_cast<const Trellis*>(packed.format.get());
  if (format == nullptr) return nullptr;
  if (format->rotation == 0 || format->codebook.window != 16) {
    throw Unsupported(text_of("no CUDA kernel rounds to ", format->spec(),
                              ", expected a trellis with its rotation and a window of 16"));
  }
  return format;
}

RoundingReport round_trellis_nearest(const CudaMatrix& w, PackedTensor& packed, const Trellis& format,
                                     const CudaNearestOptions& options, cudaStream_t stream) {
  require_arguments(w, packed, options.hessian, options.held_out, options.scale_search);
  RoundingReport report;
  report.method = "nearest";
  if (options.hessian != nullptr) report.tokens = options.hessian->tokens();
  std::vector<const CudaHessian*> hessians;
  if (options.hessian != nullptr) hessians.push_back(options.hessian);
  if (options.held_out != nullptr) hessians.push_back(options.held_out);
  // Before any plane is written: a Hessian whose tokens held a NaN throws here.
  for (const CudaHessian* hessian : hessians) static_cast<void>(hessian->sum(stream));
  Losses losses{0, std::vector<double>(hessians.size(), 0.0)};
  if (w.rows == 0 || w.cols == 0) {
    store_empty(w, packed, stream);
  } else {
    require_finite_cuda(w, "w", stream);
    const TrellisTask task(w, format, stream);
    const TrellisResult result = round_nearest_trellis(task);
    losses = losses_of(task, result.decoded.data(), hessians);
    store(task, result, packed);
    report.mean_squared_error = losses.mean_squared_error;
  }
  if (options.hessian != nullptr) report.proxy_loss = report.proxy_loss_nearest = losses.proxy_losses.front();
  if (options.held_out != nullptr) {
    report.held_out_loss = report.held_out_loss_nearest = losses.proxy_losses.back();
  }
  return report;
}

}  // namespace cuda

RoundingReport round_trellis_feedback_cuda(const CudaMatrix& w, PackedTensor& packed,
                                           const CudaHessian& hessian,
                                           const CudaErrorFeedbackOptions& options,
                                           const TrellisFeedbackOptions& trellis_options, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const Trellis* format = cuda::trellis_of(packed);
  if (format == nullptr) throw InvalidArgument("packed", packed.format->spec(), "a trellis");
  ErrorFeedbackOptions checked;
  checked.damping = options.damping;
  checked.damping_ladder = options.damping_ladder;
  checked.block = options.block;
  require_valid(checked);
  require_valid(trellis_options);
  cuda::require_arguments(w, packed, &hessian, options.held_out, options.scale_search);
  const std::vector<double> diagonal = hessian.diagonal(stream);
  cuda::require_usable(hessian, diagonal, cuda_stream);
  if (options.held_out != nullptr) static_cast<void>(options.held_out->sum(stream));
  std::vector<double> output_diagonal;
  std::optional<cuda::BothHessians> both;
  if (options.output_hessian != nullptr) {
    cuda::require_hessian(*options.output_hessian, w.rows, "output_hessian");
    output_diagonal = options.output_hessian->diagonal(stream);
    cuda::require_usable(*options.output_hessian, output_diagonal, cuda_stream, "output_hessian");
    both.emplace(cuda::BothHessians{hessian, *options.output_hessian, diagonal, output_diagonal});
  }
  cuda::require_finite_cuda(w, "w", cuda_stream);

  RoundingReport report;
  report.method = "gptq";
  report.act_order = options.act_order;
  report.static_groups = true;
  report.tokens = hessian.tokens();
  report.dead_columns = std::count(diagonal.begin(), diagonal.end(), 0.0);
  if (w.rows == 0 || w.cols == 0) {
    cuda::store_empty(w, packed, cuda_stream);
    if (options.measure_losses) report.proxy_loss = report.proxy_loss_nearest = 0;
    if (options.measure_losses && options.held_out != nullptr) {
      report.held_out_loss = report.held_out_loss_nearest = 0;
    }
    return report;
  }

  const cuda::TrellisTask task(w, *format, cuda_stream);
  std::vector<uint8_t> dead_host;
  for (const double entry : diagonal) dead_host.push_back(entry == 0 ? 1 : 0);
  const cuda::DeviceBuffer<uint8_t> dead = cuda::uploaded(dead_host, cuda_stream);
  cuda::TrellisResult result{
      cuda::DeviceBuffer<uint32_t>(task.cols / cuda::kStep * task.step_words(), cuda_stream),
      cuda::DeviceScales(cuda::fitted_scales(w, dead.data(), task.target, cuda_stream), cuda_stream),
      {}};
  cuda::DeviceBuffer<float> rotated = task.rotated(dead.data(), result.scales);
  {
    const std::vector<double> factors = ratio_factors(trellis_options, *format);
    const int64_t trial = factors.size() == 1 ? 0 : cuda::trial_rows(task) * std::ssize(factors);
    const cuda::RingCoder coder(*format, std::max(task.rows, trial) / cuda::kStep, cuda_stream);
    {
      cuda::Side input(hessian,
                       trellis::hessian_factors(result.scales.host.input, trellis_options.consistent_hessian),
                       options, cuda_stream);
      report.damping_tried = input.factor.damping_tried();
      report.damping = report.damping_tried.back();
      const double chosen = factors.size() == 1
                                ? factors.front()
                                : cuda::tried_factor(task, input, rotated.data(), coder, factors);
      input.sum.release();
      report.trellis_ratio = chosen * trellis_best_ratio(format->half_bits, format->codebook.code);
      const std::vector<double> output_factors = trellis::hessian_factors(result.scales.host.output, true);
      if (chosen != 1) {
        trellis::Scales scales = result.scales.host;
        trellis::widen(chosen, scales);
        result.scales = cuda::DeviceScales(std::move(scales), cuda_stream);
        rotated = task.rotated(dead.data(), result.scales);
      }
      if (options.output_hessian == nullptr) {
        cuda::walk(task, input.factor, input.order, rotated.data(), coder, result.words.data());
      } else {
        cuda::Side output(*options.output_hessian, output_factors, options, cuda_stream, "output_hessian");
        output.sum.release();
        cuda::walk_two_sided(task, input, output, rotated.data(), coder, result.words.data());
      }
    }
    result.decoded = task.decoded(coder, result.words.data(), result.scales, rotated.data());
    const auto refit = [&](bool wanted, const auto& one_sided, const auto& both_sides) {
      if (!wanted) return;
      if (both) {
        both_sides(*both);
      } else {
        one_sided();
      }
      result.decoded = task.decoded(coder, result.words.data(), result.scales, rotated.data());
    };
    const auto outputs = [&](bool wanted) {
      refit(
          wanted, [&] { cuda::refit_output_scales(task, hessian, diagonal, result); },
          [&](const cuda::BothHessians& hessians) { cuda::refit_output_scales(task, hessians, result); });
    };
    outputs(trellis_options.refit_output_scales);
    refit(
        trellis_options.refit_input_scales,
        [&] { cuda::refit_input_scales(task, hessian, diagonal, result); },
        [&](const cuda::BothHessians& hessians) { cuda::refit_input_scales(task, hessians, result); });
    outputs(trellis_options.refit_input_scales && trellis_options.refit_output_scales);
  }
  std::vector<const CudaHessian*> hessians;
  if (options.measure_losses) {
    hessians.push_back(&hessian);
    if (options.held_out != nullptr) hessians.push_back(options.held_out);
  }
  const cuda::Losses own = cuda::losses_of(task, result.decoded.data(), hessians);
  report.mean_squared_error = own.mean_squared_error;
  if (options.measure_losses) {
    const cuda::TrellisResult plain = cuda::round_nearest_trellis(task);
    const cuda::Losses nearest = cuda::losses_of(task, plain.decoded.data(), hessians);
    report.proxy_loss = own.proxy_losses.front();
    report.proxy_loss_nearest = nearest.proxy_losses.front();
    if (options.held_out != nullptr) {
      report.held_out_loss = own.proxy_losses.back();
      report.held_out_loss_nearest = nearest.proxy_losses.back();
    }
    if (both) {
      report.two_sided_loss = cuda::two_sided_loss(task, *both, result.decoded.data());
      report.two_sided_loss_nearest = cuda::two_sided_loss(task, *both, plain.decoded.data());
    }
  }
  cuda::store(task, result, packed);
  return report;
}

}  // namespace quantloom
