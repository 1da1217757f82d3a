// One product on the device with everything around it: random planes and activations, memory with guard
// zones, and the slow products that the result is compared with.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "device_memory.hpp"
#include "kernels/additive_layout.hpp"
#include "kernels/fragment_layout.hpp"
#include "product_reference.hpp"
#include "quantloom/formats/bcq.hpp"
#include "quantloom/formats/bit_packing.hpp"
#include "quantloom/formats/codebook.hpp"
#include "quantloom/formats/outliers.hpp"
#include "quantloom/formats/vector_codebook.hpp"
#include "quantloom/kernels/matmul_cuda.hpp"
#include "random_levels.hpp"
#include "random_spqr.hpp"
#include "random_trellis.hpp"

namespace quantloom {

struct ProductCase {
  std::shared_ptr<const Format> format;
  int64_t n = 1;
  int64_t k = 1;
  int64_t m = 1;
  DType dtype = DType::f16;
  bool group_index = false;
  bool bias = false;
  bool exact = false;  // small integers and powers of two: the float32 sums are exact
  bool prepare_on_cpu = true;
  bool tight = false;    // no guard zones: memory ends with the last element, for a memory checker
  int64_t x_offset = 0;  // elements from an address of 256 bytes to the first row
  int x_spread = 0;      // activations that are not exact are times 2^-x_spread to 2^x_spread
  int64_t x_gap = 0;     // elements between rows, filled with NaN
  int64_t y_offset = 0;
  int64_t y_gap = 0;
  uint64_t seed = 0;

  std::string text() const {
    return text_of(format->spec(), " n=", n, " k=", k, " m=", m, " ", name_of(dtype),
                   group_index ? " group_index" : "", bias ? " bias" : "", exact ? " exact" : "",
                   prepare_on_cpu ? "" : " prepare_cuda", " x_spread=", x_spread, " x_offset=", x_offset,
                   " x_gap=", x_gap, " y_offset=", y_offset, " y_gap=", y_gap, " seed=", seed);
  }
};

inline std::string text_of_options(const CudaMatmulOptions& options) {
  return text_of("kernel '", options.kernel, "' splits ", options.splits,
                 options.overlap ? " overlapped" : "", options.digits.value_or(false) ? " digits" : "");
}

// Draws that are the same on every machine; fast, for millions of codes.
class Draws {
 public:
  explicit Draws(uint64_t seed) : engine_(seed * 0x9E3779B97F4A7C15ULL + 1) {}
  uint64_t word() { return engine_(); }
  int64_t below(int64_t bound) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(bound)); }
  float uniform() { return static_cast<float>(engine_() >> 40) * 0x1p-24F; }
  // Near enough to normal: the sum of four uniforms, of variance 1.
  float normal() { return (uniform() + uniform() + uniform() + uniform() - 2.0F) * 1.7320508F; }
  template <class Values>
  auto pick(const Values& values) {
    return values[static_cast<size_t>(below(static_cast<int64_t>(std::size(values))))];
  }

 private:
  std::mt19937_64 engine_;
};

// Elements of any of the three dtypes, each by its bits.
using Elements = std::vector<uint32_t>;

inline uint32_t bits_from(float value, DType dtype) {
  if (dtype == DType::f32) return std::bit_cast<uint32_t>(value);
  return dtype == DType::f16 ? f16_from_float(value) : bf16_from_float(value);
}
inline float float_from(uint32_t bits, DType dtype) {
  if (dtype == DType::f32) return std::bit_cast<float>(bits);
  const auto half = static_cast<uint16_t>(bits);
  return dtype == DType::f16 ? float_from_f16(half) : float_from_bf16(half);
}
// Rounded to dtype, the relative error is at most this.
inline double unit_of(DType dtype) {
  if (dtype == DType::f32) return 0x1p-24;
  return dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
}
// What memory full of ones reads as.
inline uint32_t poison_of(DType dtype) {
  return dtype == DType::f32 ? 0xFFFFFFFFU : 0xFFFFU;
}

inline void upload_elements(const Elements& elements, DType dtype, void* to) {
  const auto size = static_cast<size_t>(size_of(dtype));
  std::vector<std::byte> bytes(elements.size() * size);
  for (size_t i = 0; i < elements.size(); ++i) std::memcpy(bytes.data() + i * size, &elements[i], size);
  if (!bytes.empty()) upload(bytes.data(), to, static_cast<int64_t>(bytes.size()));
}

inline uint32_t element_at(const std::byte* bytes, int64_t i, DType dtype) {
  uint32_t bits = 0;
  const auto size = static_cast<size_t>(size_of(dtype));
  std::memcpy(&bits, bytes + static_cast<size_t>(i) * size, size);
  return bits;
}

// Words of signs, [planes, n, words], the padding of each row zero.
inline void draw_signs(Draws& draws, Tensor& plane, int64_t k) {
  const int64_t words = plane.shape()[2];
  const auto all = plane.values<uint32_t>();
  for (size_t i = 0; i < all.size(); ++i) {
    all[i] = static_cast<uint32_t>(draws.word() >> 32);
    const bool last = static_cast<int64_t>(i) % words == words - 1;
    if (last && k % 32 != 0) all[i] &= (1U << k % 32) - 1U;
  }
}

// The exponent of the smallest scale of an exact case. Decoded weights, down to half of it, and the bias are
// numbers of float16 too, unless neither scales nor results are of that type.
inline int lowest_exponent(const ProductCase& c) {
  constexpr int kExponents[] = {-20, -14, -6, -2, 0};
  constexpr int kWideExponents[] = {-60, -20, -6, 0, 40};
  const auto* const outliers = dynamic_cast<const Outliers*>(c.format.get());
  const Format& dense = outliers != nullptr ? *outliers->dense : *c.format;
  // Outliers are float16 whatever the rest is.
  const auto* const scaled = dynamic_cast<const ScaledFormat*>(&dense);
  const bool wide =
      outliers == nullptr && c.dtype != DType::f16 && scaled != nullptr && scaled->scale_dtype != DType::f16;
  return (wide ? kWideExponents : kExponents)[c.seed / 2 % 5];
}

// Tables of vectors are in the plane alone: small whole numbers if `exact`.
inline void fill_vectors(Draws& draws, bool exact, Tensor& plane) {
  for (uint16_t& value : plane.values<uint16_t>()) {
    value = f16_from_float(exact ? static_cast<float>(draws.below(9) - 4) : draws.normal());
  }
}

// `Codes`: VectorCodebook or Additive.
template <class Codes>
void draw_vector_codes(Draws& draws, const Codes& format, int64_t entries, int64_t k, Tensor& plane) {
  if (plane.element_count() == 0) return;
  const auto words = static_cast<size_t>(plane.shape()[1]);
  const auto all = plane.values<uint32_t>();
  std::vector<uint16_t> codes(static_cast<size_t>(format.code_count(k)));
  for (size_t at = 0; at < all.size(); at += words) {
    for (uint16_t& code : codes) code = static_cast<uint16_t>(draws.below(entries));
    pack_wide_bits(codes, format.bits, all.subspan(at, words));
  }
}

inline void fill_codebook(const Format& format, Tensor& plane) {
  const auto& table = dynamic_cast<const Codebook&>(format).table;
  std::ranges::transform(table, plane.values<uint16_t>().begin(), f16_from_float);
}

// A codebook of 2 to 2^bits entries: small whole numbers if `exact`, else anything.
inline std::shared_ptr<const Format> random_codebook(int bits, int64_t group, DType scale_dtype, bool exact,
                                                     Draws& draws) {
  const int64_t most = int64_t{1} << bits;
  const int64_t entries = draws.below(4) == 0 && most > 2 ? 2 + draws.below(most - 2) : most;
  std::vector<float> table;
  for (int64_t i = 0; i < entries; ++i) {
    const auto whole = static_cast<float>(i - entries / 2);
    table.push_back(exact ? whole : (whole + 0.9F * draws.uniform()) * 4.0F / static_cast<float>(entries));
  }
  return std::make_shared<const Codebook>(std::span<const float>(table), group, scale_dtype, bits);
}

inline PackedTensor random_planes(const ProductCase& c, Draws& draws, int lowest);

// Outliers at random places, most of them in the first rows; values as small as weights if `exact`.
inline PackedTensor random_outliers(const ProductCase& c, const Outliers& format, Draws& draws) {
  const int lowest = lowest_exponent(c);
  ProductCase dense = c;
  dense.format = format.dense;
  PackedTensor packed = random_planes(dense, draws, lowest);
  packed.format = c.format;
  for (const PlaneSpec& spec : format.planes(c.n, c.k)) {
    if (spec.name.starts_with("outlier_")) packed.planes.emplace(spec.name, Tensor(spec.dtype, spec.shape));
  }
  const int64_t count = packed.plane("outlier_values").element_count();
  std::set<int64_t> positions;
  while (std::ssize(positions) < count) {
    const int64_t rows = draws.below(3) == 0 ? std::min<int64_t>(c.n, 3) : c.n;
    // Where the first rows are full, anywhere.
    const int64_t row = std::ssize(positions) > 2 * c.k ? draws.below(c.n) : draws.below(rows);
    positions.insert(row * c.k + draws.below(c.k));
  }
  const auto offsets = packed.planes.at("outlier_offsets").values<int32_t>();
  Tensor& columns = packed.planes.at("outlier_columns");
  size_t i = 0;
  for (const int64_t at : positions) {
    for (auto row = static_cast<size_t>(at / c.k + 1); row < offsets.size(); ++row) ++offsets[row];
    const auto column = static_cast<int32_t>(at % c.k);
    if (columns.dtype() == DType::i32) {
      columns.values<int32_t>()[i] = column;
    } else {
      columns.values<uint16_t>()[i] = static_cast<uint16_t>(column);
    }
    const float value =
        c.exact ? std::ldexp(static_cast<float>(draws.below(17) - 8), lowest) : draws.normal();
    packed.planes.at("outlier_values").values<uint16_t>()[i++] = f16_from_float(value);
  }
  return packed;
}

// lowest: of lowest_exponent().
inline PackedTensor random_planes(const ProductCase& c, Draws& draws, int lowest) {
  if (const auto* outliers = dynamic_cast<const Outliers*>(c.format.get())) {
    return random_outliers(c, *outliers, draws);
  }
  const auto* const scaled = dynamic_cast<const ScaledFormat*>(c.format.get());
  const bool binary = dynamic_cast<const Bcq*>(c.format.get()) != nullptr;
  const auto* const additive = dynamic_cast<const Additive*>(c.format.get());
  const FragmentLayout layout =
      binary || additive != nullptr ? FragmentLayout{} : fragment_layout(*c.format, c.n, c.k, c.group_index);
  PackedTensor packed{c.format, c.n, c.k, {}};
  const auto* const vectors = dynamic_cast<const VectorCodebook*>(c.format.get());
  const auto* const spqr = dynamic_cast<const Spqr*>(c.format.get());
  for (const PlaneSpec& spec : c.format->planes(c.n, c.k)) {
    if (spec.optional && !c.group_index) continue;
    Tensor plane(spec.dtype, spec.shape);
    if (spqr != nullptr && fill_spqr(*spqr, spec.name, c.n, c.exact, lowest, draws, plane)) {
      packed.planes.emplace(spec.name, std::move(plane));
      continue;
    }
    if (spec.name == "codes" && vectors != nullptr) {
      draw_vector_codes(draws, *vectors, vectors->entries, c.k, plane);
    } else if (spec.name == "codes" && additive != nullptr) {
      draw_vector_codes(draws, *additive, additive->entries(), c.k, plane);
    } else if (spec.name == "scale_codes" || spec.name == "codebook_codes") {
      draw_level_codes(draws, *additive, spec.name, c.k, plane);
    } else if (spec.name == "codebook_levels" ||
               (spec.name == "codebook" && (vectors != nullptr || additive != nullptr))) {
      fill_vectors(draws, c.exact, plane);
    } else if (spec.name == "signs") {
      draw_signs(draws, plane, c.k);
    } else if (spec.name == "codes") {
      const int64_t all = int64_t{1} << layout.bits;
      draw_codes(draws, plane, c.k, layout.bits, layout.table_entries > 0 ? layout.table_entries : all);
    } else if (spec.name == "zeros") {
      draw_codes(draws, plane, layout.per_tensor ? 1 : c.n, layout.bits, int64_t{1} << layout.bits);
    } else if (spec.name == "scales" || spec.name == "scale_levels" || spec.name == "offsets") {
      for (int64_t i = 0; i < plane.element_count(); ++i) {
        float scale = c.exact ? std::ldexp(1.0F, lowest + static_cast<int>(draws.below(4)))
                              : 0.01F + 0.01F * draws.uniform();
        // Groups of different weight, so that one mistaken for another shows.
        if (!c.exact && c.seed % 4 == 1) scale = std::ldexp(scale, -static_cast<int>(draws.below(6)));
        if (draws.below(4) == 0) scale = -scale;
        const uint32_t bits = bits_from(scale, spec.dtype);
        const int64_t size = size_of(spec.dtype);
        std::memcpy(plane.bytes() + i * size, &bits, static_cast<size_t>(size));
      }
    } else if (spec.name == "group_index") {
      std::vector<int32_t> order(static_cast<size_t>(c.k));
      for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
      for (size_t i = order.size(); i > 1; --i) {
        std::swap(order[i - 1], order[static_cast<size_t>(draws.below(static_cast<int64_t>(i)))]);
      }
      for (int64_t i = 0; i < c.k; ++i) {
        plane.values<int32_t>()[static_cast<size_t>(order[static_cast<size_t>(i)])] =
            static_cast<int32_t>(i / (binary ? scaled->columns_per_group(c.k) : layout.format_columns));
      }
    } else if (spec.name == "codebook") {
      fill_codebook(*c.format, plane);
    } else {
      throw Unsupported("no random values for plane " + spec.name);
    }
    packed.planes.emplace(spec.name, std::move(plane));
  }
  return packed;
}
inline PackedTensor random_planes(const ProductCase& c, Draws& draws) {
  if (dynamic_cast<const Trellis*>(c.format.get()) != nullptr) {
    return random_trellis(c.format, c.n, c.k, c.exact, draws);
  }
  return random_planes(c, draws, lowest_exponent(c));
}

// Memory of prepared_planes(), full of NaN; "source" is filled in, as prepare_cuda() wants it.
inline PreparedPlanes empty_planes(const PackedTensor& packed) {
  const bool indexed = packed.planes.contains("group_index");
  PreparedPlanes prepared{packed.format, packed.n, packed.k, {}};
  for (const PlaneSpec& spec : prepared_planes(*packed.format, packed.n, packed.k, indexed)) {
    Tensor plane(spec.dtype, spec.shape);
    std::memset(plane.bytes(), 0xFF, static_cast<size_t>(plane.byte_count()));
    if (spec.name == "source") {
      const auto source = fragment_source(
          *packed.format, packed.k,
          indexed ? packed.plane("group_index").values<int32_t>() : std::span<const int32_t>{});
      std::ranges::copy(source, plane.values<int32_t>().begin());
    }
    prepared.planes.emplace(spec.name, to_device(plane));
  }
  return prepared;
}

inline PreparedPlanes to_device(const PreparedPlanes& prepared) {
  PreparedPlanes copy{prepared.format, prepared.n, prepared.k, {}};
  for (const auto& [name, plane] : prepared.planes) copy.planes.emplace(name, to_device(plane));
  return copy;
}

// Planes on the CPU, brought into fragment order on the CPU or on the device.
inline PreparedPlanes prepared_on_device(const PackedTensor& packed, bool on_cpu) {
  if (on_cpu) return to_device(prepare_fragments(packed));
  PreparedPlanes prepared = empty_planes(packed);
  prepare_cuda(to_device(packed), prepared, nullptr);
  check_cuda(cudaDeviceSynchronize(), "prepare_cuda");
  return prepared;
}

// Device memory between guard zones, full of NaN: of float16, bfloat16 and float32 alike.
class GuardedMemory {
 public:
  GuardedMemory(int64_t bytes, int64_t offset, int64_t guard, bool filled = true)
      : bytes_(bytes), begin_(guard + offset), total_(guard + offset + bytes + guard) {
    memory_ = device_bytes(total_);
    if (filled) poison();
  }
  std::byte* data() const { return memory_.get() + begin_; }
  int64_t bytes() const { return bytes_; }
  void poison() const {
    check_cuda(
        cudaMemset(memory_.get(), static_cast<int>(kFill), static_cast<size_t>(std::max<int64_t>(total_, 1))),
        "poison");
  }
  // Empty if a guard zone has changed.
  std::optional<std::vector<std::byte>> read() const {
    if (damaged()) return std::nullopt;
    return download(data(), bytes_);
  }
  // True if a guard zone has changed.
  bool damaged() const {
    const auto whole = [&](int64_t from, int64_t to) {
      if (from == to) return true;
      const std::vector<std::byte> zone = download(memory_.get() + from, to - from);
      return std::all_of(zone.begin(), zone.end(), [](std::byte b) { return b == kFill; });
    };
    return !whole(0, begin_) || !whole(begin_ + bytes_, total_);
  }

 private:
  static constexpr std::byte kFill{0xFF};

  int64_t bytes_;
  int64_t begin_;
  int64_t total_;
  std::shared_ptr<std::byte> memory_;
};

// The memory of a product, and the result that it should have.
class Product {
 public:
  explicit Product(const ProductCase& c) : case_(c) {
    Draws draws(c.seed);
    packed_ = random_planes(c, draws);
    prepared_ = prepared_on_device(packed_, c.prepare_on_cpu);
    const auto size = [](int64_t rows, int64_t columns, int64_t stride) {
      return rows == 0 ? 0 : (rows - 1) * stride + columns;
    };
    x_stride_ = c.k + c.x_gap;
    y_stride_ = c.n + c.y_gap;
    x_.assign(static_cast<size_t>(size(c.m, c.k, x_stride_)), poison_of(c.dtype));
    for (int64_t t = 0; t < c.m; ++t) {
      for (int64_t i = 0; i < c.k; ++i) {
        float value = c.exact ? static_cast<float>(draws.below(5) - 2) : draws.normal();
        if (!c.exact && c.x_spread > 0) {
          value = std::ldexp(value, static_cast<int>(draws.below(2 * c.x_spread + 1)) - c.x_spread);
        }
        x_[static_cast<size_t>(t * x_stride_ + i)] = bits_from(value, c.dtype);
      }
    }
    const int64_t bytes = size_of(c.dtype);
    x_memory_.emplace(static_cast<int64_t>(x_.size()) * bytes, c.x_offset * bytes, guard());
    upload_x(x_);
    y_memory_.emplace(size(c.m, c.n, y_stride_) * bytes, c.y_offset * bytes, guard());
    if (c.bias) {
      Elements bias(static_cast<size_t>(c.n));
      for (uint32_t& value : bias) {
        const auto whole = static_cast<float>(draws.below(17) - 8);
        value = bits_from(c.exact ? std::ldexp(whole, lowest_exponent(c)) : draws.normal(), c.dtype);
      }
      bias_memory_.emplace(c.n * bytes, 0, guard());
      upload_elements(bias, c.dtype, bias_memory_->data());
    }
  }

  const ProductCase& the_case() const { return case_; }
  const PackedTensor& packed() const { return packed_; }
  const PreparedPlanes& prepared() const { return prepared_; }
  int64_t guard() const { return case_.tight ? 0 : 512; }
  const Elements& x() const { return x_; }
  int64_t x_stride() const { return x_stride_; }
  void upload_x(const Elements& x) const { upload_elements(x, case_.dtype, x_memory_->data()); }

  // A workspace of just the bytes that are asked for. In a tight case a checker of memory watches it, so that
  // it stays uninitialized.
  GuardedMemory workspace(const CudaMatmulOptions& options) const {
    return {matmul_cuda_workspace(prepared_, case_.m, case_.dtype, options), 0, guard(), !case_.tight};
  }

  CudaMatmulArguments arguments(const GuardedMemory& workspace, void* stream = nullptr) const {
    CudaMatmulArguments a;
    a.x = x_memory_->data();
    a.x_stride = x_stride_;
    a.bias = bias_memory_ ? bias_memory_->data() : nullptr;
    a.y = y_memory_->data();
    a.y_stride = y_stride_;
    a.m = case_.m;
    a.dtype = case_.dtype;
    a.workspace = workspace.bytes() > 0 ? workspace.data() : nullptr;
    a.workspace_bytes = workspace.bytes();
    a.stream = stream;
    return a;
  }

  // The elements of `memory`, laid out as y is, without the gaps; nullopt if anything beside them changed.
  std::optional<Elements> read(const GuardedMemory& memory) const {
    const auto bytes = memory.read();
    if (!bytes) return std::nullopt;
    Elements values;
    values.reserve(static_cast<size_t>(case_.m * case_.n));
    for (int64_t t = 0; t < case_.m; ++t) {
      for (int64_t r = 0; r < (t + 1 < case_.m ? y_stride_ : case_.n); ++r) {
        const uint32_t element = element_at(bytes->data(), t * y_stride_ + r, case_.dtype);
        if (r < case_.n) {
          values.push_back(element);
        } else if (element != poison_of(case_.dtype)) {
          return std::nullopt;
        }
      }
    }
    return values;
  }
  GuardedMemory fresh_output() const {
    return {y_memory_->bytes(), case_.y_offset * size_of(case_.dtype), guard()};
  }
  std::optional<Elements> read() const { return read(*y_memory_); }

  // Runs the product; nullopt, after a failed expectation, if it wrote outside y or the workspace.
  std::optional<Elements> run(const CudaMatmulOptions& options) const {
    y_memory_->poison();
    const GuardedMemory memory = workspace(options);
    matmul_cuda(prepared_, arguments(memory), options);
    check_cuda(cudaDeviceSynchronize(), "matmul_cuda: run");
    const bool damaged = !case_.tight && memory.damaged();
    EXPECT_FALSE(damaged) << "written outside the workspace";
    auto y = read();
    EXPECT_TRUE(y.has_value()) << "written outside y";
    return damaged ? std::nullopt : y;
  }

  // Empty if `y` is right, else what is wrong. `kernel`: what made it. cuBLASLt rounds a product before it
  // adds the bias, and then again.
  std::string compare(const Elements& y, const std::string& kernel = "") {
    if (reference_.empty() && !y.empty()) compute_reference();
    if (!case_.exact) return compare_errors(y);
    return compare_exactly(y, case_.bias && kernel == "decode");
  }

  // The weights as the library decodes them on the CPU, [n, k].
  std::vector<float> weights() const {
    std::vector<float> w(static_cast<size_t>(case_.n * case_.k));
    dequantize(packed_, MatrixView<float>(w.data(), case_.n, case_.k));
    return w;
  }

 private:
  void compute_reference() {
    const std::vector<float> w = weights();
    const auto bytes = static_cast<int64_t>(w.size()) * 4;
    const auto w_memory = device_bytes(bytes);
    if (bytes > 0) upload(w.data(), w_memory.get(), bytes);
    const int64_t count = case_.m * case_.n;
    const auto y64 = device_bytes(count * 8);
    const int64_t size = size_of(case_.dtype);
    const auto plain = device_bytes(count * size);
    const SlowProduct slow{x_memory_->data(),
                           x_stride_,
                           reinterpret_cast<const float*>(w_memory.get()),
                           bias_memory_ ? bias_memory_->data() : nullptr,
                           case_.dtype,
                           case_.m,
                           case_.n,
                           case_.k};
    slow.in_float64(reinterpret_cast<double*>(y64.get()));
    if (!case_.exact) slow.in_dtype(plain.get());
    check_cuda(cudaDeviceSynchronize(), "slow products");
    reference_.resize(static_cast<size_t>(count));
    std::memcpy(reference_.data(), download(y64.get(), count * 8).data(), static_cast<size_t>(count) * 8);
    if (case_.exact) {
      for (const double value : reference_) {
        expected_.push_back(bits_from(static_cast<float>(value), case_.dtype));
      }
      return;
    }
    const std::vector<std::byte> plain_bytes = download(plain.get(), count * size);
    Elements plain_y;
    for (int64_t i = 0; i < count; ++i) plain_y.push_back(element_at(plain_bytes.data(), i, case_.dtype));
    plain_ = deviation_of(plain_y);
  }

  std::string place(size_t i) const {
    return text_of("token ", static_cast<int64_t>(i) / case_.n, ", row ", static_cast<int64_t>(i) % case_.n);
  }

  // The sums are exact in float32, so the result is the sum rounded once, or as near as two roundings come.
  std::string compare_exactly(const Elements& y, bool rounded_twice) const {
    int64_t wrong = 0;
    double largest = 0;
    for (const double value : reference_) largest = std::max(largest, std::fabs(value));
    const double allowed = rounded_twice ? 2 * unit_of(case_.dtype) * largest : 0.0;
    std::string first;
    for (size_t i = 0; i < y.size(); ++i) {
      if (y[i] == expected_[i]) continue;
      const float expected = float_from(expected_[i], case_.dtype);
      const float got = float_from(y[i], case_.dtype);
      // Zeros of both signs are equal; NaN is not.
      if (std::fabs(static_cast<double>(got) - expected) <= allowed) continue;
      if (wrong++ == 0)
        first = text_of(" wrong, the first at ", place(i), ": ", got, ", expected ", expected);
    }
    return wrong == 0 ? "" : text_of(wrong, " of ", y.size(), first);
  }

  struct Deviation {
    double largest = 0;
    double squares = 0;
    size_t at = 0;
  };
  Deviation deviation_of(const Elements& y) const {
    Deviation error;
    for (size_t i = 0; i < y.size(); ++i) {
      const double difference = std::fabs(static_cast<double>(float_from(y[i], case_.dtype)) - reference_[i]);
      error.squares += difference * difference;
      // Not written as a comparison that NaN would pass.
      if (!(difference <= error.largest)) {
        error.largest = difference;
        error.at = i;
        if (std::isnan(difference)) return {difference, difference, i};
      }
    }
    return error;
  }

  // Within twice the error of a plain product in dtype, which may be small with luck: so some roundings of
  // the result are allowed as well, more of them where there are few results or terms.
  std::string compare_errors(const Elements& y) const {
    const Deviation error = deviation_of(y);
    const double unit = unit_of(case_.dtype);
    double largest = 0;
    double squares = 0;
    for (const double value : reference_) {
      largest = std::max(largest, std::fabs(value));
      squares += value * value;
    }
    const double smallest = case_.dtype == DType::f16 ? 0x1p-24 : 0.0;
    const bool few = y.size() < 64 || case_.k < 8;
    const double largest_allowed = 2 * plain_.largest + (few ? 2.0 : 1.0) * unit * largest + smallest;
    const double rms_allowed =
        2 * std::sqrt(plain_.squares) + (few ? 2.0 : 0.25) * unit * std::sqrt(squares) + smallest;
    if (error.largest <= largest_allowed && std::sqrt(error.squares) <= rms_allowed) return "";
    return text_of("largest error ", error.largest, " at ", place(error.at), ", allowed ", largest_allowed,
                   "; norm of the error ", std::sqrt(error.squares), ", allowed ", rms_allowed);
  }

  ProductCase case_;
  PackedTensor packed_;
  PreparedPlanes prepared_;
  int64_t x_stride_ = 0;
  int64_t y_stride_ = 0;
  Elements x_;
  std::optional<GuardedMemory> x_memory_;
  std::optional<GuardedMemory> y_memory_;
  std::optional<GuardedMemory> bias_memory_;
  std::vector<double> reference_;  // [m, n]
  Elements expected_;              // [m, n], of an exact case
  Deviation plain_;                // of a plain product
};

}  // namespace quantloom
