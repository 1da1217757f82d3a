// One matrix to multiply with: random canonical planes, the same in fragment order in as many copies as the
// caches need, and what the product of some tokens should be.
#pragma once

#include <map>
#include <optional>
#include <string>

#include "device.cuh"
#include "quantloom/formats/additive.hpp"
#include "quantloom/formats/outliers.hpp"
#include "quantloom/formats/spqr.hpp"
#include "quantloom/formats/trellis.hpp"
#include "quantloom/formats/uniform.hpp"
#include "quantloom/formats/vector_codebook.hpp"
#include "quantloom/kernels/dequantize.hpp"
#include "quantloom/kernels/matmul_cuda.hpp"

namespace quantloom::bench {

constexpr int kReferenceThreads = 256;
constexpr int kReferenceTokens = 8;

template <class T>
__device__ __forceinline__ double as_double(T value) {
  return static_cast<double>(static_cast<float>(value));
}

// y[t][row] = sum over columns of w[row][column] x[tokens[t]][column] in float64, one block for each row.
template <class W, class X>
__global__ void multiply_reference(const W* w, const X* x, const int* tokens, int token_count, int64_t n,
                                   int64_t k, double* y) {
  __shared__ double parts[kReferenceThreads];
  const auto row = static_cast<int64_t>(blockIdx.x);
  for (int first = 0; first < token_count; first += kReferenceTokens) {
    double sums[kReferenceTokens] = {};
    for (int64_t column = threadIdx.x; column < k; column += kReferenceThreads) {
      const double weight = as_double(w[row * k + column]);
#pragma unroll
      for (int t = 0; t < kReferenceTokens; ++t) {
        const int token = tokens[min(first + t, token_count - 1)];
        sums[t] += weight * as_double(x[token * k + column]);
      }
    }
#pragma unroll
    for (int t = 0; t < kReferenceTokens; ++t) {
      parts[threadIdx.x] = sums[t];
      __syncthreads();
      for (int half = kReferenceThreads / 2; half > 0; half /= 2) {
        if (static_cast<int>(threadIdx.x) < half) parts[threadIdx.x] += parts[threadIdx.x + half];
        __syncthreads();
      }
      if (threadIdx.x == 0 && first + t < token_count) y[(first + t) * n + row] = parts[0];
      __syncthreads();
    }
  }
}

// Tokens that are checked, and the reference's [tokens, n] for them.
struct Expected {
  std::vector<int> tokens;
  int64_t n = 0;
  std::vector<double> values;
};

// The first tokens, and the middle and last one of each number of tokens.
inline std::vector<int> checked_tokens(const std::vector<int64_t>& counts) {
  std::vector<int> tokens;
  const int64_t most = *std::ranges::max_element(counts);
  for (int64_t t = 0; t < std::min<int64_t>(8, most); ++t) tokens.push_back(static_cast<int>(t));
  for (const int64_t count : counts) {
    tokens.push_back(static_cast<int>(count - 1));
    tokens.push_back(static_cast<int>(count / 2));
  }
  std::ranges::sort(tokens);
  tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
  return tokens;
}

template <class W>
Expected reference_product(const Stream& stream, const W* w, const void* x, DType dtype,
                           const std::vector<int>& tokens, int64_t n, int64_t k) {
  Expected expected{tokens, n, std::vector<double>(tokens.size() * static_cast<size_t>(n))};
  const auto bytes = static_cast<int64_t>(expected.values.size() * sizeof(double));
  const auto list = device_memory(static_cast<int64_t>(tokens.size() * sizeof(int)));
  const auto y = device_memory(bytes);
  check_cuda(cudaMemcpyAsync(list.get(), tokens.data(), tokens.size() * sizeof(int), cudaMemcpyHostToDevice,
                             stream.get()),
             "tokens");
  const auto launch = [&]<class X>(const X* activations) {
    multiply_reference<<<static_cast<unsigned>(n), kReferenceThreads, 0, stream.get()>>>(
        w, activations, reinterpret_cast<const int*>(list.get()), static_cast<int>(tokens.size()), n, k,
        reinterpret_cast<double*>(y.get()));
  };
  if (dtype == DType::f16) {
    launch(static_cast<const __half*>(x));
  } else {
    launch(static_cast<const __nv_bfloat16*>(x));
  }
  check_cuda(cudaGetLastError(), "multiply_reference");
  check_cuda(cudaMemcpyAsync(expected.values.data(), y.get(), static_cast<size_t>(bytes),
                             cudaMemcpyDeviceToHost, stream.get()),
             "reference");
  stream.synchronize();
  return expected;
}

struct Error {
  double relative = 0;  // of the norms
  double worst = 0;     // largest, over the reference's root mean square
  bool within(DType dtype) const {
    const double unit = dtype == DType::f16 ? 1.0 : 8.0;
    return relative < 2e-3 * unit && worst < 2e-2 * unit;  // false for NaN
  }
};

// Compares y [m, n] of `dtype` on the device with the tokens below m.
inline Error error_of(const Stream& stream, const void* y, DType dtype, int64_t m, const Expected& expected) {
  std::vector<uint16_t> row(static_cast<size_t>(expected.n));
  double squares = 0;
  double error_squares = 0;
  double worst = 0;
  double count = 0;
  for (size_t t = 0; t < expected.tokens.size(); ++t) {
    if (expected.tokens[t] >= m) continue;
    const auto* from = static_cast<const uint16_t*>(y) + expected.tokens[t] * expected.n;
    check_cuda(cudaMemcpyAsync(row.data(), from, row.size() * 2, cudaMemcpyDeviceToHost, stream.get()), "y");
    stream.synchronize();
    for (size_t i = 0; i < row.size(); ++i) {
      const double wanted = expected.values[t * row.size() + i];
      const double got = dtype == DType::f16 ? float_from_f16(row[i]) : float_from_bf16(row[i]);
      const double difference = std::abs(got - wanted);
      squares += wanted * wanted;
      error_squares += difference * difference;
      worst = std::max(worst, difference);  // NaN shows in the sum of squares
      count += 1;
    }
  }
  return {std::sqrt(error_squares / squares), worst / std::sqrt(squares / count)};
}

class ProductCase {
 public:
  ProductCase(const Stream& stream, std::shared_ptr<const Format> format, int64_t n, int64_t k)
      : format_(std::move(format)) {
    packed_ = PackedTensor{format_, n, k, {}};
    uint64_t seed = 1000;
    for (const PlaneSpec& spec : format_->planes(n, k)) {
      if (spec.optional) continue;
      Tensor plane = on_device(spec.dtype, spec.shape);
      if (spec.name.starts_with("outlier_")) {
        fill_outliers(spec.name, plane, n, k);
      } else {
        fill(spec.name, plane, ++seed, stream);
      }
      packed_.planes.emplace(spec.name, std::move(plane));
    }
    copies_.push_back(empty_planes(n, k));
    fill_source(copies_[0], k);
    prepare_cuda(packed_, copies_[0], stream.get());
    stream.synchronize();
    for (const auto& [name, plane] : copies_[0].planes) {
      if (name != "group_index") bytes_ += plane.byte_count();
    }
    const int count = copies_past_cache(bytes_);
    for (int i = 1; i < count; ++i) {
      copies_.push_back(empty_planes(n, k));
      for (auto& [name, plane] : copies_.back().planes) {
        check_cuda(
            cudaMemcpyAsync(plane.bytes(), copies_[0].plane(name).bytes(),
                            static_cast<size_t>(plane.byte_count()), cudaMemcpyDeviceToDevice, stream.get()),
            "copy of planes");
      }
    }
    stream.synchronize();
  }

  const std::shared_ptr<const Format>& format() const { return format_; }
  int64_t n() const { return packed_.n; }
  int64_t k() const { return packed_.k; }
  // What a product reads of the matrix: codes, scales, zero points, codebook.
  int64_t bytes() const { return bytes_; }
  // Of a code, over the weights that it stands for; those of half a bit rounded up.
  int64_t bits() const {
    if (const auto* trellis = dynamic_cast<const Trellis*>(format_.get()))
      return (trellis->half_bits + 1) / 2;
    if (const auto* additive = dynamic_cast<const Additive*>(format_.get()))
      return ceil_div(int64_t{additive->codebooks} * additive->bits, additive->dim());
    return copies_[0].plane(copies_[0].has("signs") ? "signs" : "codes").shape().at(2);
  }
  int copies() const { return static_cast<int>(copies_.size()); }
  const PreparedPlanes& copy(int i) const { return copies_[static_cast<size_t>(i) % copies_.size()]; }

  Expected expected(const Stream& stream, const void* x, DType dtype, const std::vector<int>& tokens) const {
    const auto decoded = device_memory(checked_mul(checked_mul(n(), k()), 4));
    // From fragment order all formats decode; its rows end with a whole block.
    if (k() % 128 == 0 || (k() % 64 == 0 && dynamic_cast<const Trellis*>(format_.get()) == nullptr &&
                           !copies_[0].has("signs"))) {
      decode_fragments_cuda(copies_[0], decoded.get(), DType::f32, k(), stream.get());
    } else {
      dequantize_cuda(packed_, decoded.get(), DType::f32, k(), stream.get());
    }
    return reference_product(stream, reinterpret_cast<const float*>(decoded.get()), x, dtype, tokens, n(),
                             k());
  }

 private:
  static Tensor on_device(DType dtype, const std::vector<int64_t>& shape) {
    const auto memory = device_memory(checked_mul(checked_product(shape), size_of(dtype)));
    return {dtype, shape, memory.get(), memory, Device::cuda};
  }

  PreparedPlanes empty_planes(int64_t n, int64_t k) const {
    PreparedPlanes planes{format_, n, k, {}};
    for (const PlaneSpec& spec : prepared_planes(*format_, n, k, false)) {
      planes.planes.emplace(spec.name, on_device(spec.dtype, spec.shape));
    }
    return planes;
  }

  void fill_source(PreparedPlanes& planes, int64_t k) const {
    const std::vector<int32_t> source = fragment_source(*format_, k, {});
    if (source.empty()) return;
    check_cuda(cudaMemcpy(planes.planes.at("source").bytes(), source.data(), source.size() * 4,
                          cudaMemcpyHostToDevice),
               "source");
  }

  // The table that belongs to the format, from a matrix of one weight.
  static Tensor format_codebook(const Format& dense) {
    const std::shared_ptr<const Format> format(&dense, [](const Format*) {});
    const auto encoder = format->column_encoder(format, 1, 1, {});
    const float one = 1.0F;
    float decoded = 0.0F;
    encoder->fit(0, 0, MatrixView<const float>(&one, 1, 1), {});
    encoder->encode(0, 0, MatrixView<const float>(&one, 1, 1), MatrixView<float>(&decoded, 1, 1));
    return encoder->finish().plane("codebook");
  }

  // As many in each row, at even distances from a place of its own.
  void fill_outliers(const std::string& name, Tensor& plane, int64_t n, int64_t k) const {
    const int64_t count = dynamic_cast<const Outliers&>(*format_).entry_count(n, k);
    const auto begin = [&](int64_t row) { return row * count / n; };
    Tensor host(plane.dtype(), plane.shape());
    for (int64_t row = 0; row <= n && name == "outlier_offsets"; ++row) {
      host.values<int32_t>()[static_cast<size_t>(row)] = static_cast<int32_t>(begin(row));
    }
    for (int64_t row = 0; row < n && name != "outlier_offsets"; ++row) {
      const int64_t in_row = begin(row + 1) - begin(row);
      for (int64_t i = 0; i < in_row; ++i) {
        const auto at = static_cast<size_t>(begin(row) + i);
        const int64_t column = (i * k + row * 7 % k) / in_row;
        if (name == "outlier_values") {
          host.values<uint16_t>()[at] = f16_from_float(static_cast<float>(i % 5 - 2) / 4);
        } else if (host.dtype() == DType::u16) {
          host.values<uint16_t>()[at] = static_cast<uint16_t>(column);
        } else {
          host.values<int32_t>()[at] = static_cast<int32_t>(column);
        }
      }
    }
    check_cuda(cudaMemcpy(plane.bytes(), host.bytes(), static_cast<size_t>(host.byte_count()),
                          cudaMemcpyHostToDevice),
               "outliers");
  }

  // Any bits are codes and zero points. Scales keep the weights below one eighth, so that no float16 product
  // overflows.
  void fill(const std::string& name, Tensor& plane, uint64_t seed, const Stream& stream) const {
    const auto* outliers = dynamic_cast<const Outliers*>(format_.get());
    const Format& dense = outliers != nullptr ? *outliers->dense : *format_;
    const auto* uniform = dynamic_cast<const Uniform*>(&dense);
    if (const auto* trellis = dynamic_cast<const Trellis*>(format_.get());
        trellis != nullptr && name != "codes") {
      if (name != "table") {
        fill_values(plane.bytes(), plane.dtype(), plane.element_count(), 0.125F, 0.25F, 0, seed,
                    stream.get());
        return;
      }
      check_cuda(cudaMemcpy(plane.bytes(), trellis->codebook.table.data(),
                            static_cast<size_t>(plane.byte_count()), cudaMemcpyHostToDevice),
                 "table");
      return;
    }
    const auto* spqr = dynamic_cast<const Spqr*>(&dense);
    if (name == "codes" || name == "signs" || name == "zeros" || (name == "scales" && spqr != nullptr)) {
      fill_words(plane.bytes(), plane.byte_count(), seed, stream.get());
    } else if (spqr != nullptr) {
      // Step and zero of grids alike.
      const float codes = std::exp2(static_cast<float>(name == "zero_grids" ? spqr->zero_bits - spqr->bits
                                                                            : spqr->scale_bits + spqr->bits));
      fill_values(plane.bytes(), plane.dtype(), plane.element_count(), 0.125F / codes, 0.25F / codes, 0, seed,
                  stream.get());
    } else if (name == "scales" || name == "offsets") {
      const float unit = std::exp2(uniform != nullptr ? -3.0F - static_cast<float>(uniform->bits) : -4.0F);
      fill_values(plane.bytes(), plane.dtype(), plane.element_count(), unit / 2, unit, 0, seed, stream.get());
    } else if (name == "codebook" && (dynamic_cast<const VectorCodebook*>(&dense) != nullptr ||
                                      dynamic_cast<const Additive*>(&dense) != nullptr)) {
      fill_values(plane.bytes(), plane.dtype(), plane.element_count(), -1, 1, 0, seed, stream.get());
    } else if (name == "codebook") {
      const Tensor table = format_codebook(dense);
      check_cuda(cudaMemcpy(plane.bytes(), table.bytes(), static_cast<size_t>(table.byte_count()),
                            cudaMemcpyHostToDevice),
                 "codebook");
    } else {
      throw Unsupported("bench_matmul knows no contents for plane " + name + " of " + format_->spec());
    }
  }

  std::shared_ptr<const Format> format_;
  PackedTensor packed_;
  std::vector<PreparedPlanes> copies_;
  int64_t bytes_ = 0;
};

}  // namespace quantloom::bench
