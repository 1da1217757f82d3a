#include "quantloom/io/exl3.hpp"

#include <algorithm>
#include <array>

#include "formats/trellis_codes.hpp"
#include "io/text.hpp"
#include "io/word_layout.hpp"
#include "quantloom/formats/trellis.hpp"

namespace quantloom {
namespace {

using io::TensorMap;

constexpr int64_t kUnit = 128;  // of sizes
constexpr int kWindow = 16;
// int16 numbers of a tile for each half bit of its weights.
constexpr int64_t kShortsPerHalfBit = trellis::kRingLength / 32;
constexpr uint16_t kOne = 0x3C00;  // float16
constexpr uint16_t kMinusOne = 0xBC00;

struct Marker {
  std::string_view name;  // of the tensor, and of the codebook
  TrellisCode code;
  uint32_t multiplier;
};
constexpr std::array<Marker, 2> kMarkers = {{
    {"mcg", TrellisCode::mcg, trellis::kExl3Mcg},
    {"mul1", TrellisCode::mul1, trellis::kExl3Mul1},
}};

std::string hexadecimal(uint32_t value) {
  constexpr std::string_view kDigits = "0123456789ABCDEF";
  std::string text;
  for (int shift = 28; shift >= 0; shift -= 4) text += kDigits[value >> shift & 15U];
  return text;
}

// The marker of a codebook; none for 3inst.
const Marker* marker_of(const TrellisCodebook& codebook) {
  const auto* found = std::ranges::find(kMarkers, codebook.code, &Marker::code);
  return found == kMarkers.end() ? nullptr : found;
}

// The same memory as other elements, or a copy where its address does not suit them.
Tensor viewed(const Tensor& tensor, DType dtype, std::vector<int64_t> shape) {
  if (reinterpret_cast<uintptr_t>(tensor.bytes()) % static_cast<uintptr_t>(size_of(dtype)) == 0) {
    const auto owner = std::make_shared<const Tensor>(tensor);
    return {dtype, std::move(shape), const_cast<std::byte*>(owner->bytes()), owner};
  }
  Tensor copy(dtype, std::move(shape));
  std::copy_n(tensor.bytes(), tensor.byte_count(), copy.bytes());
  return copy;
}

Tensor padded(const Tensor& scales, int64_t size) {
  if (scales.element_count() == size) return scales;
  Tensor result(DType::f16, {size});
  std::ranges::copy(scales.values<uint16_t>(), result.values<uint16_t>().begin());
  return result;
}

// `count` scales of one side, from the tensor `name` or the signs `signs`, padded to `padded_count`.
Tensor read_scales(const TensorMap& tensors, const std::string& name, const std::string& signs, int64_t count,
                   int64_t padded_count) {
  const bool as_signs = tensors.contains(signs);
  if (as_signs == tensors.contains(name)) {
    throw InvalidArgument("tensors", as_signs ? text_of(name, " and ", signs) : "neither",
                          text_of("one of ", name, " and ", signs));
  }
  Tensor scales(DType::f16, {count});
  const auto out = scales.values<uint16_t>();
  if (as_signs) {
    const Tensor& bits = io::require_tensor(tensors, signs);
    io::require_dtype(signs, bits, {DType::i16});
    io::require_shape(signs, bits, {padded_count / 16});
    const auto fields = bits.values<uint16_t>();
    for (size_t i = 0; i < out.size(); ++i) out[i] = (fields[i / 16] >> i % 16 & 1U) != 0 ? kMinusOne : kOne;
    return scales;
  }
  const Tensor& stored = io::require_tensor(tensors, name);
  io::require_dtype(name, stored, {DType::f16});
  io::require_shape(name, stored, {padded_count});
  const auto values = stored.values<uint16_t>();
  for (size_t i = 0; i < values.size(); ++i) {
    if ((values[i] >> 10 & 31U) == 31) {
      throw InvalidArgument("tensor " + name, text_of(float_from_f16(values[i]), " at element ", i),
                            "finite numbers");
    }
  }
  if (count == padded_count) return stored;
  std::copy_n(values.begin(), out.size(), out.begin());
  return scales;
}

std::string read_codebook(const TensorMap& tensors) {
  const Marker* found = nullptr;
  for (const Marker& marker : kMarkers) {
    const std::string name(marker.name);
    if (!tensors.contains(name)) continue;
    if (found != nullptr)
      throw InvalidArgument("tensors", "the markers mcg and mul1", "one of them, or none");
    found = &marker;
    const Tensor& value = io::require_tensor(tensors, name);
    io::require_dtype(name, value, {DType::i32});
    if (value.element_count() != 1) {
      throw InvalidArgument("tensor " + name, io::shape_text(value.shape()), "one number");
    }
    const uint32_t multiplier = value.values<uint32_t>()[0];
    if (multiplier != marker.multiplier) {
      throw InvalidArgument(
          "tensor " + name, "the multiplier " + hexadecimal(multiplier),
          hexadecimal(marker.multiplier) + ": exllamav3 decodes by that one, whatever the file holds");
    }
  }
  return found == nullptr ? "3inst" : std::string(found->name);
}

// The size of one side: `given`, which must pad to `padded_size`, or that.
int64_t checked_size(std::string_view name, int64_t given, int64_t padded_size) {
  if (given == -1) return padded_size;
  if (given < 1 || given > padded_size || padded_size - given >= kUnit) {
    throw InvalidArgument(name, text_of(given),
                          text_of(padded_size - kUnit + 1, " to ", padded_size, ", or -1 for ", padded_size,
                                  ", as the tensor trellis is padded"));
  }
  return given;
}

}  // namespace

std::string exl3_refusal(const Format& format) {
  const auto* trellis = dynamic_cast<const Trellis*>(&format);
  if (trellis == nullptr) return "EXL3 holds the format trellis only, not " + format.spec();
  const TrellisCodebook& codebook = trellis->codebook;
  const Marker* marker = marker_of(codebook);
  if (marker == nullptr && codebook.code != TrellisCode::lcg) {
    return text_of("EXL3 has the codebooks 3inst, mcg and mul1, not ", codebook.name);
  }
  if (marker != nullptr && codebook.multiplier != marker->multiplier) {
    return text_of("EXL3 decodes ", marker->name, " with the multiplier ", hexadecimal(marker->multiplier),
                   " only, not ", hexadecimal(codebook.multiplier));
  }
  if (codebook.window != kWindow) {
    return text_of("EXL3 has windows of ", kWindow, " bits, not ", codebook.window);
  }
  if (trellis->rotation != kUnit) return "EXL3 rotates blocks of 128, not " + format.spec();
  if (trellis->half_bits % 2 == 1 && codebook.code != TrellisCode::mul1) {
    return "EXL3 has rates of half bits with the codebook mul1 only, not " + format.spec();
  }
  return "";
}

std::map<std::string, Tensor> to_exl3(const PackedTensor& packed) {
  validate(packed);
  if (const std::string refusal = exl3_refusal(*packed.format); !refusal.empty()) throw Unsupported(refusal);
  for (const auto& [name, plane] : packed.planes) {
    if (plane.device() != Device::cpu) {
      throw TypeMismatch("plane " + name, "memory of a CUDA device", "memory of the CPU");
    }
  }
  if (packed.n == 0 || packed.k == 0) {
    throw Unsupported(
        text_of("EXL3 holds no matrix without elements, such as [", packed.n, ", ", packed.k, "]"));
  }
  const Tensor& codes = packed.plane("codes");
  std::vector<int64_t> shape = codes.shape();
  const int64_t padded_k = shape[0] * trellis::kTileSide;
  const int64_t padded_n = shape[1] * trellis::kTileSide;
  shape[2] *= 2;
  TensorMap tensors = {{"trellis", viewed(codes, DType::i16, std::move(shape))},
                       {"suh", padded(packed.plane("input_scales"), padded_k)},
                       {"svh", padded(packed.plane("output_scales"), padded_n)}};
  const auto& format = dynamic_cast<const Trellis&>(*packed.format);
  if (const Marker* marker = marker_of(format.codebook)) {
    Tensor value(DType::i32, {});
    value.values<uint32_t>()[0] = marker->multiplier;
    tensors.emplace(marker->name, std::move(value));
  }
  return tensors;
}

PackedTensor from_exl3(const std::map<std::string, Tensor>& tensors, const Exl3Settings& settings) {
  io::require_names(tensors, {"trellis", "suh", "svh", "su", "sv", "mcg", "mul1"});
  const Tensor& codes = io::require_tensor(tensors, "trellis");
  io::require_dtype("trellis", codes, {DType::i16});
  std::vector<int64_t> shape = codes.shape();
  constexpr int64_t kTiles = kUnit / trellis::kTileSide;
  if (shape.size() != 3 || shape[0] < 1 || shape[1] < 1 || shape[0] % kTiles != 0 || shape[1] % kTiles != 0 ||
      shape[2] % kShortsPerHalfBit != 0 || shape[2] < 2 * kShortsPerHalfBit ||
      shape[2] > 16 * kShortsPerHalfBit) {
    throw InvalidArgument(
        "tensor trellis", io::shape_text(shape),
        "[K / 16, N / 16, 16 * bits] with K and N multiples of 128 and 1 to 8 bits in halves");
  }
  const int64_t padded_k = checked_mul(shape[0], trellis::kTileSide);
  const int64_t padded_n = checked_mul(shape[1], trellis::kTileSide);
  io::require_sizes("trellis", padded_n, padded_k);
  const int64_t n = checked_size("n", settings.n, padded_n);
  const int64_t k = checked_size("k", settings.k, padded_k);
  const double bits = static_cast<double>(shape[2] / kShortsPerHalfBit) / 2;
  const auto format = std::make_shared<const Trellis>(bits, read_codebook(tensors));
  if (const std::string refusal = exl3_refusal(*format); !refusal.empty()) {
    throw InvalidArgument("tensor trellis", io::shape_text(shape), "whole bits: " + refusal);
  }
  shape[2] /= 2;
  PackedTensor packed{format, n, k, {}};
  packed.planes.emplace("codes", viewed(codes, DType::i32, std::move(shape)));
  packed.planes.emplace("input_scales", read_scales(tensors, "suh", "su", k, padded_k));
  packed.planes.emplace("output_scales", read_scales(tensors, "svh", "sv", n, padded_n));
  validate(packed);
  return packed;
}

}  // namespace quantloom
