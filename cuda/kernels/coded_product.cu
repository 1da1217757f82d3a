#include <algorithm>
#include <limits>

#include "common/device.hpp"
#include "kernels/coded_product.cuh"
#include "kernels/dense_product.cuh"
#include "quantloom/checked_math.hpp"
#include "quantloom/kernels/coded_product.hpp"

namespace quantloom {
namespace {

using cuda::CodedArguments;
using cuda::CodedSource;

constexpr int kFusedTokens = 8 * cuda::kCodedTiles;
constexpr int64_t kDecodedBytes = int64_t{256} << 20;  // of decoded rows at a time
constexpr int64_t kRingBytes = cuda::kRingBytes;
constexpr int64_t kValueBytes = 256 * sizeof(float);
constexpr int kDecodeWarps = 8;

int64_t padded(int64_t bytes) {
  return checked_pad(bytes, 256);
}

// Evenly spaced values as multiples of a unit, which float16 and bfloat16 hold exactly; others over a power
// of two, so that no exponent is out of float16's range.
struct UnitValues {
  std::vector<float> values;
  float unit = 1.0F;
};

UnitValues unit_values(std::span<const float> values) {
  constexpr double kTolerance = 1e-6;
  constexpr double kLargest = 256;
  std::vector<double> sorted(values.begin(), values.end());
  sorted.push_back(0.0);
  std::sort(sorted.begin(), sorted.end());
  double step = 0;
  for (size_t i = 1; i < sorted.size(); ++i) {
    const double gap = sorted[i] - sorted[i - 1];
    if (gap > 0 && (step == 0 || gap < step)) step = gap;
  }
  UnitValues result;
  const double largest = std::max(std::abs(sorted.front()), std::abs(sorted.back()));
  if (largest == 0) {
    result.values.assign(values.begin(), values.end());
    return result;
  }
  // The gap next to zero may be half a step (a grid of odd multiples), and gaps carry the values' rounding:
  // the largest value, divided by its place, says the step best.
  const double places = std::nearbyint(largest / step);
  step = largest / places;
  bool even = places <= kLargest;
  for (const float v : values) {
    const double place = v / step;
    even = even && std::abs(place - std::nearbyint(place)) <= kTolerance * std::max(1.0, std::abs(place));
  }
  if (!even) step = std::exp2(std::floor(std::log2(largest)));
  for (const float v : values) {
    result.values.push_back(static_cast<float>(even ? std::nearbyint(v / step) : v / step));
  }
  result.unit = static_cast<float>(step);
  return result;
}

// As many warps to a block of threads as deal the streams evenly to the processors, each of which runs
// `resident` at once.
int warps_of_block(const CodedArguments& p, const DeviceFacts& device, int64_t resident,
                   int64_t table_bytes) {
  const int splits = p.w.view.splits;
  const auto spread = [](int64_t count, int64_t over) { return ceil_div(count, ceil_div(count, over)); };
  const int64_t streams = int64_t{p.w.view.row_blocks} * splits;
  const int64_t each = ceil_div(streams, device.processors);
  const int64_t warps = spread(spread(each, resident), cuda::kCodedWarps);
  const int64_t room = (device.shared_memory - table_bytes) / kRingBytes - 1;
  return static_cast<int>(std::max<int64_t>(std::min(warps, room) / splits, 1)) * splits;
}

template <class T, int kTiles, bool kGrouped, bool kVector>
void launch_fused(const CodedArguments& p, const DeviceFacts& device, cudaStream_t stream) {
  auto* const kernel = cuda::multiply_coded<T, kTiles, kGrouped, kVector>;
  cudaFuncAttributes attributes{};
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), "attributes of multiply_coded");
  const int64_t table_bytes = int64_t{cuda::CodedEntries::kBytes} << p.w.view.table_bits;
  constexpr int64_t kRegisters = 65536;  // of a processor
  const int warps = warps_of_block(p, device, kRegisters / (32 * attributes.numRegs), table_bytes);
  const int64_t shared = table_bytes + (warps + 1) * kRingBytes;
  check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
      "shared memory of multiply_coded");
  const int rows = warps / p.w.view.splits;
  kernel<<<static_cast<unsigned>(ceil_div(p.w.view.row_blocks, rows)), static_cast<unsigned>(32 * warps),
           static_cast<size_t>(shared), stream>>>(p);
  check_cuda(cudaGetLastError(), "launch of multiply_coded");
}

using FusedLauncher = void (*)(const CodedArguments&, const DeviceFacts&, cudaStream_t);

// The launcher for up to 8, 16 and 32 tokens.
template <class T, bool kGrouped, bool kVector>
FusedLauncher fused_launcher(int64_t m) {
  if (m <= 8) return launch_fused<T, 1, kGrouped, kVector>;
  if (m <= 16) return launch_fused<T, 2, kGrouped, kVector>;
  return launch_fused<T, 4, kGrouped, kVector>;
}

template <class T>
FusedLauncher fused_launcher(int64_t m, bool grouped, bool vector) {
  if (grouped) return vector ? fused_launcher<T, true, true>(m) : fused_launcher<T, true, false>(m);
  return vector ? fused_launcher<T, false, true>(m) : fused_launcher<T, false, false>(m);
}

}  // namespace

struct CudaCodedTensor::State {
  CodedSource raw;    // values as they are
  CodedSource units;  // values as multiples of a unit
  DeviceFacts device;
  int64_t bytes = 0;
  std::shared_ptr<std::byte> memory;

  int64_t n() const { return raw.n; }
  int64_t k() const { return raw.k; }
  int64_t entry_bytes() const { return int64_t{cuda::CodedEntries::kBytes} << raw.view.table_bits; }

  void require_current() const {
    int current = 0;
    check_cuda(cudaGetDevice(&current), "current CUDA device");
    if (current != device.index) {
      throw InvalidArgument("CudaCodedTensor", text_of("the current CUDA device ", current),
                            text_of("device ", device.index, ", which holds the tensor"));
    }
  }

  bool grouped() const { return raw.columns_per_scale < raw.k; }
  // Why the kernel "fused" does not run; empty if it does.
  std::string why_not_fused(int64_t m, DType dtype) const {
    if (m > kFusedTokens) return text_of(m, " tokens, at most ", kFusedTokens);
    if (dtype != DType::f16 && dtype != DType::bf16) return "activations of " + std::string(name_of(dtype));
    if (grouped() && raw.columns_per_scale % kCodedColumns != 0) {
      return text_of("scales of ", raw.columns_per_scale, " columns, which is no multiple of ",
                     kCodedColumns);
    }
    return {};
  }

  std::string pick(int64_t m, DType dtype, const CudaMatmulOptions& options) const {
    if (dtype != DType::f16 && dtype != DType::bf16 && dtype != DType::f32) {
      throw TypeMismatch("dtype", name_of(dtype), "float16, bfloat16 or float32");
    }
    const std::string reason = why_not_fused(m, dtype);
    if (options.kernel.empty()) return reason.empty() ? "fused" : "decode";
    if (options.kernel != "fused" && options.kernel != "decode") {
      throw InvalidArgument("kernel", options.kernel, "fused or decode");
    }
    if (options.kernel == "fused" && !reason.empty()) {
      throw Unsupported("CudaCodedTensor: the kernel fused does not take " + reason);
    }
    return options.kernel;
  }

  void multiply_fused(const CudaMatmulArguments& a) const {
    CodedArguments p;
    p.w = units;
    p.x = a.x;
    p.x_stride = a.x_stride;
    p.bias = a.bias;
    p.y = a.y;
    p.y_stride = a.y_stride;
    p.m = static_cast<int>(a.m);
    const bool vector =
        reinterpret_cast<uintptr_t>(a.x) % 16 == 0 && k() % 8 == 0 && (a.m == 1 || a.x_stride % 8 == 0);
    const FusedLauncher launch = a.dtype == DType::f16
                                     ? fused_launcher<__half>(a.m, grouped(), vector)
                                     : fused_launcher<__nv_bfloat16>(a.m, grouped(), vector);
    launch(p, device, static_cast<cudaStream_t>(a.stream));
  }

  template <class Out>
  void decode(int64_t first_row, int64_t rows, void* out, int64_t stride, void* stream) const {
    using cuda::CodedScales;
    auto* const kernel = !grouped() ? cuda::decode_coded<Out, CodedScales::rows>
                         : raw.columns_per_scale % kCodedColumns == 0
                             ? cuda::decode_coded<Out, CodedScales::blocks>
                             : cuda::decode_coded<Out, CodedScales::any>;
    const int splits = raw.view.splits;
    const int warps = std::max(kDecodeWarps / splits, 1) * splits;
    const int64_t shared = entry_bytes() + kValueBytes + (warps + 1) * kRingBytes;
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
        "shared memory of decode_coded");
    const int64_t first_block = first_row / kCodedRows;
    const int64_t blocks = ceil_div(first_row + rows, kCodedRows) - first_block;
    const bool vector = reinterpret_cast<uintptr_t>(out) % 16 == 0 && k() % 8 == 0 &&
                        (rows == 1 || stride * static_cast<int64_t>(sizeof(Out)) % 16 == 0);
    kernel<<<static_cast<unsigned>(ceil_div(blocks, warps / splits)), static_cast<unsigned>(32 * warps),
             static_cast<size_t>(shared), static_cast<cudaStream_t>(stream)>>>(
        raw, static_cast<Out*>(out), stride, first_row, rows, static_cast<int>(first_block), vector);
    check_cuda(cudaGetLastError(), "launch of decode_coded");
  }
  void decode(int64_t first_row, int64_t rows, void* out, DType dtype, int64_t stride, void* stream) const {
    if (dtype == DType::f16) return decode<__half>(first_row, rows, out, stride, stream);
    if (dtype == DType::bf16) return decode<__nv_bfloat16>(first_row, rows, out, stride, stream);
    decode<float>(first_row, rows, out, stride, stream);
  }

  // Rows of W decoded at a time.
  int64_t rows_at_a_time(DType dtype) const {
    const int64_t row_bytes = checked_mul(decoded_stride(), size_of(dtype));
    return std::min(std::max<int64_t>(kDecodedBytes / row_bytes / kCodedRows, 1) * kCodedRows,
                    checked_pad(n(), kCodedRows));
  }
  int64_t decoded_stride() const { return checked_pad(k(), 8); }
  int64_t decoded_bytes(DType dtype) const {
    return padded(checked_mul(rows_at_a_time(dtype), decoded_stride() * size_of(dtype)));
  }
  int64_t bias_bytes(DType dtype) const { return padded(rows_at_a_time(dtype) * size_of(dtype)); }

  void multiply_decoded(const CudaMatmulArguments& a) const {
    const int64_t size = size_of(a.dtype);
    const int64_t step = rows_at_a_time(a.dtype);
    auto* const workspace = static_cast<std::byte*>(a.workspace);
    for (int64_t row = 0; row < n(); row += step) {
      const int64_t rows = std::min(step, n() - row);
      decode(row, rows, workspace, a.dtype, decoded_stride(), a.stream);
      cuda::DenseProduct product{rows,
                                 k(),
                                 a.m,
                                 workspace,
                                 decoded_stride(),
                                 a.x,
                                 std::max(a.x_stride, k()),
                                 nullptr,
                                 static_cast<std::byte*>(a.y) + row * size,
                                 std::max(a.y_stride, n()),
                                 a.dtype};
      if (a.bias != nullptr) {
        // What cuBLASLt asks of this address is not documented: a copy of it is aligned.
        auto* const bias = workspace + decoded_bytes(a.dtype);
        check_cuda(cudaMemcpyAsync(bias, static_cast<const std::byte*>(a.bias) + row * size,
                                   static_cast<size_t>(rows * size), cudaMemcpyDeviceToDevice,
                                   static_cast<cudaStream_t>(a.stream)),
                   "copy of the bias");
        product.bias = bias;
      }
      cuda::multiply_dense(product, workspace + decoded_bytes(a.dtype) + bias_bytes(a.dtype),
                           static_cast<cudaStream_t>(a.stream));
    }
  }
};

CudaCodedTensor::CudaCodedTensor(const CodedTensor& tensor, void* stream) {
  auto state = std::make_shared<State>();
  state->device = current_device();
  const CodedMatrix& codes = tensor.codes();
  const int64_t shared = (int64_t{cuda::CodedEntries::kBytes} << codes.table_bits()) + kValueBytes +
                         kRingBytes * (std::max(codes.splits(), kDecodeWarps) + 1);
  if (shared > state->device.shared_memory) {
    throw Unsupported(text_of("CudaCodedTensor: tables of ", shared, " bytes, but a block has ",
                              state->device.shared_memory, "; encode with fewer table_bits"));
  }
  const UnitValues units = unit_values(tensor.values());
  const FloatMatrix scales = tensor.scales();
  // Words end with whole groups of four, at least one.
  const int64_t quads = std::max<int64_t>(1, ceil_div(std::ssize(codes.words()), 4));

  int64_t end = 0;
  const auto place = [&](int64_t bytes) {
    const int64_t at = end;
    end = checked_add(end, padded(bytes));
    return at;
  };
  const int64_t words_at = place(16 * quads);
  const int64_t table_at = place(4 * std::ssize(codes.table()));
  const int64_t begins_at = place(4 * std::ssize(codes.begins()));
  const int64_t raw_at = place(kValueBytes);
  const int64_t units_at = place(kValueBytes);
  const int64_t scale_bytes = scales.rows() * scales.cols() * size_of(scales.dtype());
  const int64_t scales_at = place(scale_bytes);
  state->bytes = end;
  void* memory = nullptr;
  check_cuda(cudaMalloc(&memory, static_cast<size_t>(end)), text_of("device memory, ", end, " bytes"));
  state->memory = {static_cast<std::byte*>(memory), [](std::byte* p) { static_cast<void>(cudaFree(p)); }};
  std::byte* const base = state->memory.get();
  const auto on = static_cast<cudaStream_t>(stream);
  check_cuda(cudaMemsetAsync(base, 0, static_cast<size_t>(end), on), "fill of device memory");
  const auto upload = [&](int64_t at, const void* from, int64_t size) {
    if (size == 0) return;
    check_cuda(cudaMemcpyAsync(base + at, from, static_cast<size_t>(size), cudaMemcpyHostToDevice, on),
               "copy of a coded tensor to the device");
  };
  upload(words_at, codes.words().data(), 4 * std::ssize(codes.words()));
  upload(table_at, codes.table().data(), 4 * std::ssize(codes.table()));
  upload(begins_at, codes.begins().data(), 4 * std::ssize(codes.begins()));
  upload(raw_at, tensor.values().data(), 4 * std::ssize(tensor.values()));
  upload(units_at, units.values.data(), 4 * std::ssize(units.values));
  upload(scales_at, scales.data(), scale_bytes);
  check_cuda(cudaStreamSynchronize(on), "copy of a coded tensor to the device");

  CodedSource& w = state->raw;
  w.view.words = reinterpret_cast<const uint32_t*>(base + words_at);
  w.view.last_quad = static_cast<uint32_t>(quads - 1);
  w.view.table = reinterpret_cast<const uint32_t*>(base + table_at);
  w.view.begins = reinterpret_cast<const uint32_t*>(base + begins_at);
  w.view.table_bits = codes.table_bits();
  w.view.splits = codes.splits();
  w.view.column_blocks = static_cast<int>(codes.column_blocks());
  w.view.row_blocks = static_cast<int>(codes.row_blocks());
  w.n = codes.n();
  w.k = codes.k();
  w.values = reinterpret_cast<const float*>(base + raw_at);
  w.scales = base + scales_at;
  w.scale_dtype = scales.dtype();
  w.scales_per_row = scales.cols();
  w.rows_per_scale = tensor.rows_per_scale();
  w.columns_per_scale = tensor.columns_per_scale();
  state->units = w;
  state->units.values = reinterpret_cast<const float*>(base + units_at);
  state->units.unit = units.unit;
  state_ = std::move(state);
}

int64_t CudaCodedTensor::n() const {
  return state_->n();
}
int64_t CudaCodedTensor::k() const {
  return state_->k();
}
int64_t CudaCodedTensor::byte_count() const {
  return state_->bytes;
}

std::string CudaCodedTensor::kernel(int64_t m, DType dtype, const CudaMatmulOptions& options) const {
  return state_->pick(m, dtype, options);
}

int64_t CudaCodedTensor::workspace(int64_t m, DType dtype, const CudaMatmulOptions& options) const {
  const State& s = *state_;
  if (s.pick(m, dtype, options) == "fused" || m <= 0 || s.n() == 0 || s.k() == 0) return 0;
  return s.decoded_bytes(dtype) + s.bias_bytes(dtype) + cuda::kLibraryBytes;
}

void CudaCodedTensor::matmul(const CudaMatmulArguments& a, const CudaMatmulOptions& options) const {
  const State& s = *state_;
  if (a.m < 0) throw InvalidArgument("m", text_of(a.m), "0 or more tokens");
  if (a.m > std::numeric_limits<int32_t>::max()) {
    throw Unsupported(text_of("CudaCodedTensor: no kernel for ", a.m, " tokens"));
  }
  if (a.m > 1 && a.x_stride < s.k()) {
    throw InvalidArgument("x_stride", text_of(a.x_stride), text_of("at least k = ", s.k()));
  }
  if (a.m > 1 && a.y_stride < s.n()) {
    throw InvalidArgument("y_stride", text_of(a.y_stride), text_of("at least n = ", s.n()));
  }
  const std::string kernel = s.pick(a.m, a.dtype, options);
  const int64_t workspace = this->workspace(a.m, a.dtype, options);
  if (a.m == 0 || s.n() == 0) return;
  s.require_current();
  const auto require = [&](const void* pointer, const char* argument, int64_t alignment) {
    if (pointer == nullptr) {
      throw InvalidArgument(argument, "a null pointer", "memory of the current CUDA device");
    }
    if (reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(alignment) != 0) {
      throw InvalidArgument(argument, text_of("an address that is not a multiple of ", alignment),
                            "an aligned address");
    }
    require_on_device(pointer, argument, s.device.index);
  };
  const int64_t size = size_of(a.dtype);
  if (s.k() > 0) require(a.x, "x", size);
  require(a.y, "y", size);
  if (a.bias != nullptr) require(a.bias, "bias", size);
  if (a.workspace_bytes < workspace) {
    throw InvalidArgument("workspace", text_of(a.workspace_bytes, " bytes"), text_of("at least ", workspace));
  }
  if (workspace > 0) require(a.workspace, "workspace", 256);
  if (s.k() == 0 && a.dtype == DType::f32) {
    throw Unsupported("CudaCodedTensor: no kernel for float32 activations without columns");
  }
  if (kernel == "fused") return s.multiply_fused(a);
  s.multiply_decoded(a);
}

void CudaCodedTensor::dequantize(int64_t first_row, int64_t rows, void* out, DType dtype, int64_t stride,
                                 void* stream) const {
  const State& s = *state_;
  if (dtype != DType::f16 && dtype != DType::bf16 && dtype != DType::f32) {
    throw TypeMismatch("dtype", name_of(dtype), "float16, bfloat16 or float32");
  }
  if (first_row < 0 || rows < 0 || first_row > s.n() || rows > s.n() - first_row) {
    throw InvalidArgument("rows", text_of("rows ", first_row, " to ", first_row, " + ", rows),
                          text_of("a range within ", s.n(), " rows"));
  }
  if (rows > 1 && stride < s.k()) {
    throw InvalidArgument("stride", text_of(stride), text_of("at least k = ", s.k()));
  }
  static_cast<void>(checked_mul(checked_mul(rows, std::max(stride, s.k())), 4));
  if (rows == 0 || s.k() == 0) return;
  s.require_current();
  if (out == nullptr) throw InvalidArgument("out", "a null pointer", "memory of the current CUDA device");
  if (reinterpret_cast<uintptr_t>(out) % static_cast<uintptr_t>(size_of(dtype)) != 0) {
    throw InvalidArgument("out", "an address that is not a multiple of the element size",
                          "an aligned address");
  }
  require_on_device(out, "out", s.device.index);
  s.decode(first_row, rows, out, dtype, stride, stream);
}

}  // namespace quantloom
