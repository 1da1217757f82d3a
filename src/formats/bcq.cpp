#include "quantloom/formats/bcq.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <nlohmann/json.hpp>

#include "formats/bcq_encoder.hpp"
#include "formats/description.hpp"
#include "formats/grouped.hpp"
#include "quantloom/formats/bit_packing.hpp"
#include "quantloom/formats/uniform.hpp"

namespace quantloom {
namespace {

constexpr int64_t kVersion = 1;
constexpr int kDefaultRounds = 15;
constexpr std::string_view kSpecForm =
    "bcq:BITS[:gN|:channel][:offset][:f16|:bf16|:f32][:rN][:greedy] with BITS from 1 to 8, groups of N > 0 "
    "columns and up to 1000 rounds";

// Row `row` of sign plane `plane`.
std::span<const uint32_t> sign_row(const Tensor& signs, int64_t plane, int64_t row) {
  const int64_t words = signs.shape()[2];
  return signs.values<uint32_t>().subspan(static_cast<size_t>((plane * signs.shape()[1] + row) * words),
                                          static_cast<size_t>(words));
}

void require_finite(const Tensor& plane, const std::string& name) {
  for (int64_t i = 0; i < plane.element_count(); ++i) {
    if (std::isfinite(scale_at(plane, i))) continue;
    const int64_t groups = plane.shape().back();
    const int64_t n = plane.shape()[plane.shape().size() - 2];
    throw InvalidArgument("plane " + name,
                          text_of(scale_at(plane, i), " at row ", i / groups % n, ", group ", i % groups),
                          "finite values");
  }
}

void store(Tensor& plane, int64_t at, double value, std::string_view what, int64_t row, int64_t group) {
  const auto i = static_cast<size_t>(at);
  const auto single = static_cast<float>(value);
  float stored = single;
  if (plane.dtype() == DType::f32) {
    plane.values<float>()[i] = single;
  } else {
    const bool half = plane.dtype() == DType::f16;
    plane.values<uint16_t>()[i] = half ? f16_from_float(single) : bf16_from_float(single);
    stored = scale_at(plane, at);
  }
  if (!std::isfinite(stored)) {
    throw NumericError(text_of(what, " of row ", row, ", group ", group, ": got ", value,
                               ", expected one that ", std::string(name_of(plane.dtype())),
                               " holds; choose float32"));
  }
}

}  // namespace

Bcq::Bcq(int bits_given, int64_t group_size_given, bool offset_given, DType scale_dtype_given,
         int rounds_given, bool greedy_given)
    : ScaledFormat(group_size_given, scale_dtype_given),
      bits(bits_given),
      offset(offset_given),
      rounds(rounds_given),
      greedy(greedy_given) {
  if (bits < 1 || bits > 8) throw InvalidArgument("bits", text_of(bits), "1 to 8");
  if (rounds < 0 || rounds > kMostRounds) {
    throw InvalidArgument("rounds", text_of(rounds), text_of("0 to ", kMostRounds));
  }
  if (group_size == kPerTensor) {
    throw InvalidArgument("group_size", "one for the tensor", "a number of columns, or one for each row");
  }
}

std::string Bcq::spec() const {
  return text_of("bcq:", bits, ":", group_text(group_size), offset ? ":offset" : "",
                 scale_dtype_suffix(scale_dtype), rounds == kDefaultRounds ? "" : text_of(":r", rounds),
                 greedy ? ":greedy" : "");
}

std::string Bcq::to_json() const {
  nlohmann::json object;
  object["format"] = "bcq";
  object["version"] = kVersion;
  object["bits"] = bits;
  object["group_size"] = group_size_json(group_size);
  object["offset"] = offset;
  object["scale_dtype"] = name_of(scale_dtype);
  object["rounds"] = rounds;
  object["start"] = greedy ? "greedy" : "best";
  return object.dump();
}

std::shared_ptr<const Format> Bcq::from_json(std::string_view json) {
  constexpr std::array<std::string_view, 8> kKeys = {"bits",   "format",      "group_size", "offset",
                                                     "rounds", "scale_dtype", "start",      "version"};
  const nlohmann::json object = parse_description(json);
  require_keys(object, kKeys, json);
  if (object.at("format") != "bcq") refuse_description(json, "\"format\": \"bcq\"");
  static_cast<void>(integer_field(object, "version", kVersion, kVersion, json));
  const auto bits = static_cast<int>(integer_field(object, "bits", 1, 8, json));
  const auto rounds = static_cast<int>(integer_field(object, "rounds", 0, kMostRounds, json));
  if (!object.at("offset").is_boolean()) refuse_description(json, "\"offset\": true or false");
  const bool greedy = object.at("start") == "greedy";
  if (!greedy && object.at("start") != "best") refuse_description(json, "\"start\": greedy or best");
  return std::make_shared<const Bcq>(bits, group_size_field(object, json), object.at("offset").get<bool>(),
                                     scale_dtype_field(object, json), rounds, greedy);
}

std::shared_ptr<const Format> Bcq::from_spec(std::string_view spec) {
  const auto refuse = [&]() { throw InvalidArgument("format", printable(spec), kSpecForm); };
  const std::vector<std::string_view> parts = split_spec(spec);
  if (parts.size() < 2 || parts[0] != "bcq") refuse();
  const std::optional<int64_t> bits = parse_integer(parts[1]);
  if (!bits || *bits < 1 || *bits > 8) refuse();
  bool offset = false;
  bool greedy = false;
  std::optional<int64_t> rounds;
  GroupParts group;
  for (size_t i = 2; i < parts.size(); ++i) {
    if (!offset && parts[i] == "offset") {
      offset = true;
    } else if (!greedy && parts[i] == "greedy") {
      greedy = true;
    } else if (!rounds && parts[i].starts_with('r')) {
      rounds = parse_integer(parts[i].substr(1));
      if (!rounds || *rounds < 0 || *rounds > kMostRounds) refuse();
    } else if (parts[i] == "tensor" || !group.take(parts[i])) {
      refuse();
    }
  }
  return std::make_shared<const Bcq>(static_cast<int>(*bits), group.group_size.value_or(128), offset,
                                     group.scale_dtype.value_or(DType::f16),
                                     static_cast<int>(rounds.value_or(kDefaultRounds)), greedy);
}

std::vector<PlaneSpec> Bcq::planes(int64_t n, int64_t k) const {
  if (n < 0 || k < 0) throw InvalidArgument("shape", text_of("[", n, ", ", k, "]"), "sizes >= 0");
  std::vector<PlaneSpec> specs;
  specs.push_back({"signs", DType::i32, {bits, n, packed_words(k, 1)}});
  specs.push_back({"scales", scale_dtype, {bits, n, group_count(k)}});
  if (offset) specs.push_back({"offsets", scale_dtype, {n, group_count(k)}});
  if (group_size > 0) specs.push_back({"group_index", DType::i32, {k}, true});
  require_countable(specs);
  return specs;
}

void Bcq::validate_values(const PackedTensor& packed) const {
  require_finite(packed.plane("scales"), "scales");
  if (offset) require_finite(packed.plane("offsets"), "offsets");
  const Tensor& signs = packed.plane("signs");
  if (packed.k % 32 != 0) {
    const uint32_t mask = ~0U << (packed.k % 32);
    for (int64_t p = 0; p < bits; ++p) {
      for (int64_t row = 0; row < packed.n; ++row) {
        if ((sign_row(signs, p, row).back() & mask) == 0) continue;
        throw InvalidArgument("plane signs", text_of("non-zero padding bits in plane ", p, ", row ", row),
                              "zero bits");
      }
    }
  }
  if (packed.planes.contains("group_index")) {
    require_group_index(packed.plane("group_index").values<int32_t>(), group_count(packed.k),
                        columns_per_group(packed.k), "plane group_index");
  }
}

void Bcq::decode(const PackedTensor& packed, int64_t first_row, MatrixView<float> out) const {
  const int64_t n = packed.n;
  const int64_t k = packed.k;
  const int64_t groups = group_count(k);
  const int64_t width = columns_per_group(k);
  const Tensor& signs = packed.plane("signs");
  const Tensor& scales = packed.plane("scales");
  const Tensor* const offsets = offset ? &packed.plane("offsets") : nullptr;
  std::span<const int32_t> group_index;
  if (packed.planes.contains("group_index")) {
    group_index = packed.plane("group_index").values<int32_t>();
  }
  std::vector<float> own(static_cast<size_t>(groups));
  // Adds to each value what its group and its bit say.
  const auto add = [&](float* values, const auto& value_at) {
    if (!group_index.empty()) {
      for (int64_t c = 0; c < k; ++c) values[c] += value_at(c, own[static_cast<size_t>(group_index[c])]);
      return;
    }
    for (int64_t g = 0, begin = 0; begin < k; ++g) {
      const int64_t end = k - begin > width ? begin + width : k;
      const float scale = own[static_cast<size_t>(g)];
      for (int64_t c = begin; c < end; ++c) values[c] += value_at(c, scale);
      begin = end;
    }
  };
  for (int64_t r = 0; r < out.rows() && k > 0; ++r) {
    const int64_t row = first_row + r;
    float* const values = out.row(r);
    std::fill_n(values, k, 0.0F);
    if (offsets != nullptr) {
      for (int64_t g = 0; g < groups; ++g) own[g] = scale_at(*offsets, row * groups + g);
      add(values, [](int64_t, float value) { return value; });
    }
    for (int64_t p = 0; p < bits; ++p) {
      for (int64_t g = 0; g < groups; ++g) own[g] = scale_at(scales, (p * n + row) * groups + g);
      const uint32_t* const words = sign_row(signs, p, row).data();
      // The sign bit, without a branch that half of all weights would mispredict.
      add(values, [&](int64_t c, float scale) {
        const uint32_t minus = ~(words[c / 32] >> (c % 32)) << 31;
        return std::bit_cast<float>(std::bit_cast<uint32_t>(scale) ^ minus);
      });
    }
  }
}

std::unique_ptr<ColumnEncoder> Bcq::column_encoder(std::shared_ptr<const Format> self, int64_t n, int64_t k,
                                                   std::span<const int32_t> group_of_column) const {
  return make_bcq_encoder(std::move(self), *this, n, k, group_of_column);
}

PackedTensor to_bcq(const PackedTensor& packed, std::optional<DType> scale_dtype) {
  validate(packed);
  const auto* const uniform = dynamic_cast<const Uniform*>(packed.format.get());
  if (uniform == nullptr) {
    throw InvalidArgument("packed", packed.format->spec(), "a tensor of the uniform format");
  }
  for (const auto& [name, plane] : packed.planes) {
    if (plane.device() != Device::cpu) {
      throw TypeMismatch("plane " + name, "memory of a CUDA device", "memory of the CPU");
    }
  }
  const int bits = uniform->bits;
  const bool per_tensor = uniform->group_size == Uniform::kPerTensor;
  const bool centred = uniform->symmetric && bits == 1;
  const auto format = std::make_shared<const Bcq>(bits, per_tensor ? Bcq::kPerChannel : uniform->group_size,
                                                  !centred, scale_dtype.value_or(uniform->scale_dtype));
  const int64_t n = packed.n;
  const int64_t k = packed.k;
  const int64_t groups = format->group_count(k);
  PackedTensor result{format, n, k, {}};
  for (const PlaneSpec& spec : format->planes(n, k)) {
    if (!spec.optional) result.planes.emplace(spec.name, Tensor(spec.dtype, spec.shape));
  }
  if (packed.planes.contains("group_index")) {
    result.planes.emplace("group_index", packed.plane("group_index"));
  }
  const Tensor& from = packed.plane("scales");
  Tensor& signs = result.planes.at("signs");
  const int64_t words = packed_words(k, 1);
  std::vector<uint8_t> codes(static_cast<size_t>(k));
  for (int64_t row = 0; row < n; ++row) {
    unpack_bits(packed_row(packed.plane("codes"), row), bits, 0, codes);
    for (int p = 0; p < bits; ++p) {
      uint32_t* const out = signs.values<uint32_t>().data() + (p * n + row) * words;
      for (int64_t c = 0; c < k; ++c) {
        out[c / 32] |= static_cast<uint32_t>(codes[static_cast<size_t>(c)] >> p & 1) << (c % 32);
      }
    }
    for (int64_t g = 0; g < groups; ++g) {
      const double scale = scale_at(from, per_tensor ? 0 : row * from.shape()[1] + g);
      for (int p = 0; p < bits; ++p) {
        store(result.planes.at("scales"), (p * n + row) * groups + g, std::ldexp(scale, p - 1), "scale", row,
              g);
      }
      if (centred) continue;
      double zero = uniform->symmetric_zero_point();
      if (!uniform->symmetric) {
        uint8_t stored = 0;
        unpack_bits(packed_row(packed.plane("zeros"), per_tensor ? 0 : g), bits, per_tensor ? 0 : row,
                    {&stored, 1});
        zero = stored;
      }
      const double middle = static_cast<double>((1 << bits) - 1) / 2;
      store(result.planes.at("offsets"), row * groups + g, scale * (middle - zero), "offset", row, g);
    }
  }
  validate(result);
  return result;
}

}  // namespace quantloom
