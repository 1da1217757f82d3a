#include "quantloom/formats/sdr.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>

#include "formats/description.hpp"
#include "formats/grouped.hpp"
#include "formats/grouped_encoder.hpp"
#include "formats/sdr_encoder.hpp"
#include "quantloom/formats/bit_packing.hpp"
#include "quantloom/formats/uniform.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {
namespace {

constexpr int64_t kVersion = 1;

// Codes and shifts of one row, and the group of each column.
struct RowDigits {
  std::vector<uint8_t> codes;
  std::vector<uint8_t> shifts;
};

class DigitReader {
 public:
  DigitReader(const Sdr& format, const PackedTensor& packed)
      : format_(format),
        codes_(packed.plane("codes")),
        shifts_(packed.plane("shifts")),
        width_(format.columns_per_group(packed.k)),
        k_(packed.k) {
    if (packed.planes.contains("group_index")) index_ = packed.plane("group_index").values<int32_t>();
  }

  RowDigits row(int64_t r) const {
    RowDigits digits{std::vector<uint8_t>(static_cast<size_t>(k_)),
                     std::vector<uint8_t>(static_cast<size_t>(format_.group_count(k_)))};
    unpack_bits(packed_row(codes_, r), format_.bits, 0, digits.codes);
    unpack_bits(packed_row(shifts_, r), format_.shift_bits(), 0, digits.shifts);
    return digits;
  }

  // The integer code * 2^shift of column c.
  int integer(const RowDigits& digits, int64_t c) const {
    const auto at = static_cast<size_t>(c);
    const auto group = static_cast<size_t>(index_.empty() ? c / width_ : index_[at]);
    const int half = 1 << (format_.bits - 1);
    const int code = (digits.codes[at] ^ half) - half;  // extends the sign
    return code * (1 << digits.shifts[group]);
  }

 private:
  const Sdr& format_;
  const Tensor& codes_;
  const Tensor& shifts_;
  int64_t width_;
  int64_t k_;
  std::span<const int32_t> index_;
};

}  // namespace

Sdr::Sdr(int bits_given, int64_t group_size_given, DType scale_dtype_given)
    : bits(bits_given), group_size(group_size_given), scale_dtype(scale_dtype_given) {
  if (bits < 2 || bits > 7) throw InvalidArgument("bits", text_of(bits), "2 to 7");
  if (group_size < 1) throw InvalidArgument("group_size", text_of(group_size), "a positive number");
  if (!is_float16_or_32(scale_dtype)) {
    throw TypeMismatch("scale_dtype", name_of(scale_dtype), "float16, bfloat16 or float32");
  }
}

int64_t Sdr::columns_per_group(int64_t k) const {
  return std::min(group_size, std::max<int64_t>(k, 1));
}

int Sdr::shift_bits() const {
  return static_cast<int>(std::bit_width(static_cast<unsigned>(largest_shift())));
}

double Sdr::average_bits(int64_t k) const {
  if (k < 1) throw InvalidArgument("k", text_of(k), "a positive number of columns");
  return bits + static_cast<double>(shift_bits()) / static_cast<double>(columns_per_group(k)) +
         static_cast<double>(8 * size_of(scale_dtype)) / static_cast<double>(k);
}

std::string Sdr::spec() const {
  return text_of("sdr:", bits, ":g", group_size, scale_dtype_suffix(scale_dtype));
}

std::string Sdr::to_json() const {
  nlohmann::json object;
  object["format"] = "sdr";
  object["version"] = kVersion;
  object["bits"] = bits;
  object["base_bits"] = kBaseBits;
  object["group_size"] = group_size;
  object["scale_dtype"] = quantloom::name_of(scale_dtype);
  return object.dump();
}

std::shared_ptr<const Format> Sdr::from_json(std::string_view json) {
  constexpr std::array<std::string_view, 6> kKeys = {"base_bits",  "bits",        "format",
                                                     "group_size", "scale_dtype", "version"};
  const nlohmann::json object = parse_description(json);
  require_keys(object, kKeys, json);
  if (object.at("format") != "sdr") refuse_description(json, "\"format\": \"sdr\"");
  static_cast<void>(integer_field(object, "version", kVersion, kVersion, json));
  static_cast<void>(integer_field(object, "base_bits", kBaseBits, kBaseBits, json));
  return std::make_shared<const Sdr>(
      static_cast<int>(integer_field(object, "bits", 2, 7, json)),
      integer_field(object, "group_size", 1, std::numeric_limits<int64_t>::max(), json),
      scale_dtype_field(object, json));
}

std::shared_ptr<const Format> Sdr::from_spec(std::string_view spec) {
  const auto refuse = [&]() {
    throw InvalidArgument("format", printable(spec),
                          "sdr:BITS[:gN][:f16|:bf16|:f32] with BITS from 2 to 7 and N above 0");
  };
  const std::vector<std::string_view> parts = split_spec(spec);
  if (parts.size() < 2 || parts[0] != "sdr") refuse();
  const std::optional<int64_t> bits = parse_integer(parts[1]);
  if (!bits || *bits < 2 || *bits > 7) refuse();
  GroupParts group;
  for (size_t i = 2; i < parts.size(); ++i) {
    if (!group.take(parts[i])) refuse();
  }
  if (group.group_size && *group.group_size < 1) refuse();  // per channel, per tensor
  return std::make_shared<const Sdr>(static_cast<int>(*bits), group.group_size.value_or(16),
                                     group.scale_dtype.value_or(DType::f16));
}

std::vector<PlaneSpec> Sdr::planes(int64_t n, int64_t k) const {
  if (n < 0 || k < 0) throw InvalidArgument("shape", text_of("[", n, ", ", k, "]"), "sizes >= 0");
  std::vector<PlaneSpec> specs = {
      {"codes", DType::i32, {n, packed_words(k, bits)}},
      {"shifts", DType::i32, {n, packed_words(group_count(k), shift_bits())}},
      {"scales", scale_dtype, {n, k > 0 ? 1 : 0}},
      {"group_index", DType::i32, {k}, true},
  };
  require_countable(specs);
  return specs;
}

void Sdr::validate_values(const PackedTensor& packed) const {
  require_finite_scales(packed.plane("scales"));
  const int64_t groups = group_count(packed.k);
  require_zero_padding(packed.plane("codes"), "codes", packed.k, bits);
  require_zero_padding(packed.plane("shifts"), "shifts", groups, shift_bits());
  if (packed.planes.contains("group_index")) {
    require_group_index(packed.plane("group_index").values<int32_t>(), groups, columns_per_group(packed.k),
                        "plane group_index");
  }
  if (packed.n == 0) return;
  std::vector<uint8_t> shifts(static_cast<size_t>(groups));
  for (int64_t r = 0; r < packed.n && packed.k > 0; ++r) {
    unpack_bits(packed_row(packed.plane("shifts"), r), shift_bits(), 0, shifts);
    for (size_t g = 0; g < shifts.size(); ++g) {
      if (shifts[g] <= largest_shift()) continue;
      throw InvalidArgument("plane shifts", text_of(int{shifts[g]}, " at row ", r, ", group ", g),
                            text_of("at most ", largest_shift()));
    }
  }
}

void Sdr::decode(const PackedTensor& packed, int64_t first_row, MatrixView<float> out) const {
  if (packed.k == 0) return;
  const DigitReader reader(*this, packed);
  for (int64_t r = 0; r < out.rows(); ++r) {
    const RowDigits digits = reader.row(first_row + r);
    const float scale = scale_at(packed.plane("scales"), first_row + r);
    float* values = out.row(r);
    for (int64_t c = 0; c < packed.k; ++c) values[c] = scale * static_cast<float>(reader.integer(digits, c));
  }
}

std::shared_ptr<const Format> Sdr::fitted(std::shared_ptr<const Format> self, const FloatMatrix& w,
                                          int threads) const {
  if (w.rows() == 0 || w.cols() == 0 || std::ssize(row_scales) == w.rows()) return self;
  constexpr double kLevels = (1 << (kBaseBits - 1)) - 1;
  constexpr int64_t kSlabRows = 64;
  auto result = std::make_shared<Sdr>(bits, group_size, scale_dtype);
  result->row_scales.resize(static_cast<size_t>(w.rows()), 1.0F);
  parallel_for(ceil_div(w.rows(), kSlabRows), threads, [&](int64_t slab) {
    std::vector<float> row(static_cast<size_t>(w.cols()));
    for (int64_t r = slab * kSlabRows; r < std::min(w.rows(), (slab + 1) * kSlabRows); ++r) {
      w.read(r, 0, w.cols(), row.data());
      const auto [low, high] = std::minmax_element(row.begin(), row.end());
      const double largest = std::max(std::abs(double{*low}), std::abs(double{*high}));
      if (largest == 0) continue;
      const double wanted = largest / kLevels;
      const float scale = stored_scale(scale_dtype, wanted);
      require_finite_grid(scale, 1 << (kBaseBits - 1), scale_dtype, wanted, {*low, *high, 0}, r, 0);
      result->row_scales[static_cast<size_t>(r)] = scale;
    }
  });
  return result;
}

std::unique_ptr<ColumnEncoder> Sdr::column_encoder(std::shared_ptr<const Format> self, int64_t n, int64_t k,
                                                   std::span<const int32_t> group_of_column) const {
  if (n > 0 && k > 0 && std::ssize(row_scales) != n) {
    throw InvalidArgument("format", text_of(spec(), " with the scales of ", row_scales.size(), " rows"),
                          text_of("fitted() to a matrix of ", n, " rows"));
  }
  return make_sdr_encoder(std::move(self), *this, n, k, group_of_column);
}

PackedTensor sdr_to_uniform(const PackedTensor& packed, bool by_groups) {
  const auto* format = dynamic_cast<const Sdr*>(packed.format.get());
  if (format == nullptr) throw InvalidArgument("packed", "another format", "sdr");
  const int64_t k = packed.k;
  const int64_t groups = format->group_count(k);
  const int width = by_groups ? format->bits : Sdr::kBaseBits;
  const int half = 1 << (width - 1);
  const auto uniform =
      std::make_shared<const Uniform>(width, by_groups ? format->group_size : Uniform::kPerChannel, true,
                                      by_groups ? DType::f32 : format->scale_dtype);
  PackedTensor result{uniform, packed.n, k, {}};
  for (const PlaneSpec& spec : uniform->planes(packed.n, k)) {
    if (!spec.optional) result.planes.emplace(spec.name, Tensor(spec.dtype, spec.shape));
  }
  if (by_groups && packed.planes.contains("group_index")) {
    result.planes.emplace("group_index", packed.plane("group_index"));
  }
  if (!by_groups) result.planes["scales"] = packed.plane("scales");
  if (k == 0) return result;
  const DigitReader reader(*format, packed);
  Tensor& words = result.planes.at("codes");
  const auto row_words = static_cast<size_t>(words.shape()[1]);
  std::vector<uint8_t> codes(static_cast<size_t>(k));
  for (int64_t r = 0; r < packed.n; ++r) {
    const RowDigits digits = reader.row(r);
    for (int64_t c = 0; c < k; ++c) {
      const auto at = static_cast<size_t>(c);
      codes[at] = by_groups ? static_cast<uint8_t>(digits.codes[at] ^ half)
                            : static_cast<uint8_t>(reader.integer(digits, c) + half);
    }
    pack_bits(codes, width, words.values<uint32_t>().subspan(static_cast<size_t>(r) * row_words, row_words));
    if (!by_groups) continue;
    const float scale = scale_at(packed.plane("scales"), r);
    for (int64_t g = 0; g < groups; ++g) {
      const float own = scale * static_cast<float>(1 << digits.shifts[static_cast<size_t>(g)]);
      if (!std::isfinite(own * static_cast<float>(half))) {
        throw NumericError(text_of("scale of row ", r, ": got ", scale,
                                   ", expected one whose groups stay finite in float32"));
      }
      result.planes.at("scales").values<float>()[static_cast<size_t>(r * groups + g)] = own;
    }
  }
  return result;
}

}  // namespace quantloom
