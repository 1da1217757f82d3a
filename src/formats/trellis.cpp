#include "quantloom/formats/trellis.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "formats/description.hpp"
#include "formats/grouped.hpp"
#include "formats/trellis_basis.hpp"
#include "formats/trellis_codes.hpp"
#include "formats/trellis_encoder.hpp"
#include "formats/trellis_search.hpp"

namespace quantloom {
namespace {

using trellis::kRingLength;
using trellis::kTileSide;

constexpr int64_t kVersion = 1;
constexpr int kSmallestWindow = 8;
constexpr int kLargestWindow = 20;

int checked_half_bits(double bits, int weights_per_step) {
  const int most = weights_per_step == 2 ? 4 : 8;
  const double halves = bits * 2;
  if (!(halves >= 2 && halves <= 2 * most) || halves != std::floor(halves)) {
    throw InvalidArgument("bits", text_of(bits),
                          text_of("1 to ", most, " in steps of 1/2",
                                  weights_per_step == 2 ? ", for a codebook of two weights per state" : ""));
  }
  return static_cast<int>(halves);
}

int64_t checked_rotation(int64_t rotation) {
  if (rotation != 0 && rotation != trellis::kRotation) {
    throw InvalidArgument("rotation", text_of(rotation), "128, or 0 for none");
  }
  return rotation;
}

TrellisCodebook checked_codebook(TrellisCodebook codebook) {
  // A table of 2^window entries is stored with every matrix.
  const int largest = codebook.code == TrellisCode::table ? 16 : kLargestWindow;
  if (codebook.window < kSmallestWindow || codebook.window > largest) {
    throw InvalidArgument("window", text_of(codebook.window),
                          text_of(kSmallestWindow, " to ", largest, " bits for codebook ", codebook.name));
  }
  return codebook;
}

std::string bits_text(int half_bits) {
  return text_of(half_bits / 2, half_bits % 2 == 1 ? ".5" : "");
}

}  // namespace

double trellis_best_ratio(int half_bits, TrellisCode code) {
  // 1, 1.5, ... 8 bits, found by search on 128 tiles with mul1 and octagon, flat to 0.2% within 0.02. Tails
  // beyond the codebook's largest value decide at many bits.
  constexpr std::array<double, 15> kRatios = {1.13, 1.03, 1.0,  0.97, 0.95, 0.93, 0.92, 0.89,
                                              0.88, 0.84, 0.82, 0.77, 0.74, 0.73, 0.72};
  // Its largest value is 2.9 root mean squares, mul1's 3.5.
  constexpr std::array<double, 7> kOctagonRatios = {1.13, 1.03, 0.98, 0.93, 0.89, 0.86, 0.83};
  if (code == TrellisCode::octagon)
    return kOctagonRatios[static_cast<size_t>(std::clamp(half_bits, 2, 8) - 2)];
  return kRatios[static_cast<size_t>(std::clamp(half_bits, 2, 16) - 2)];
}

Trellis::Trellis(double bits, std::string_view codebook_name, int64_t rotation_given, int window)
    : Trellis(bits,
              trellis_codebook(codebook_name, std::clamp(window, kSmallestWindow - 1, kLargestWindow + 1)),
              rotation_given) {}

Trellis::Trellis(double bits, TrellisCodebook codebook_given, int64_t rotation_given)
    : half_bits(checked_half_bits(bits, codebook_given.weights_per_step)),
      rotation(checked_rotation(rotation_given)),
      codebook(checked_codebook(std::move(codebook_given))),
      values_(std::make_shared<const std::vector<float>>(codebook.values())) {}

TrellisShape Trellis::shape() const {
  return {codebook.window, half_bits, codebook.weights_per_step, kRingLength};
}

std::string Trellis::spec() const {
  return text_of("trellis:", bits_text(half_bits), ":", codebook.name, rotation == 0 ? ":plain" : "",
                 codebook.window == 16 ? "" : text_of(":l", codebook.window));
}

std::string Trellis::to_json() const {
  nlohmann::json object;
  object["format"] = "trellis";
  object["version"] = kVersion;
  if (half_bits % 2 == 0) {
    object["bits"] = half_bits / 2;
  } else {
    object["bits"] = half_bits / 2.0;
  }
  object["codebook"] = codebook.name;
  object["rotation"] = rotation;
  object["window"] = codebook.window;
  return object.dump();
}

std::shared_ptr<const Format> Trellis::from_json(std::string_view json) {
  constexpr std::array<std::string_view, 6> kKeys = {"bits",     "codebook", "format",
                                                     "rotation", "version",  "window"};
  const nlohmann::json object = parse_description(json);
  require_keys(object, kKeys, json);
  if (object.at("format") != "trellis") refuse_description(json, "\"format\": \"trellis\"");
  static_cast<void>(integer_field(object, "version", kVersion, kVersion, json));
  if (!object.at("bits").is_number()) refuse_description(json, "a number \"bits\"");
  if (!object.at("codebook").is_string()) refuse_description(json, "a string \"codebook\"");
  const int64_t rotation = integer_field(object, "rotation", 0, trellis::kRotation, json);
  const int64_t window = integer_field(object, "window", kSmallestWindow, kLargestWindow, json);
  return std::make_shared<const Trellis>(object.at("bits").get<double>(),
                                         object.at("codebook").get<std::string>(), rotation,
                                         static_cast<int>(window));
}

std::shared_ptr<const Format> Trellis::from_spec(std::string_view spec) {
  const auto refuse = [&] {
    throw InvalidArgument(
        "format", printable(spec),
        "trellis:BITS[:CODEBOOK][:plain][:lWINDOW] with BITS 1, 1.5, ... 8 and CODEBOOK 3inst, "
        "mcg[-HEX], mul1[-HEX], 1mad, octagon[-HEX], hyb, rptc or rptc2");
  };
  const std::vector<std::string_view> parts = split_spec(spec);
  if (parts.size() < 2 || parts[0] != "trellis") refuse();
  std::string_view whole = parts[1];
  const bool half = whole.ends_with(".5");
  if (half) whole.remove_suffix(2);
  const std::optional<int64_t> bits = parse_integer(whole);
  if (!bits || *bits < 1 || *bits > 8 || (half && *bits == 8)) refuse();
  std::optional<std::string_view> codebook;
  std::optional<int64_t> window;
  bool plain = false;
  for (size_t i = 2; i < parts.size(); ++i) {
    const std::string_view part = parts[i];
    if (part == "plain" && !plain) {
      plain = true;
    } else if (part.starts_with('l') && !window && parse_integer(part.substr(1))) {
      window = parse_integer(part.substr(1));
      if (*window < kSmallestWindow || *window > kLargestWindow) refuse();
    } else if (!codebook && i == 2) {
      codebook = part;
    } else {
      refuse();
    }
  }
  return std::make_shared<const Trellis>(static_cast<double>(*bits) + (half ? 0.5 : 0),
                                         codebook.value_or("mul1"), plain ? 0 : trellis::kRotation,
                                         static_cast<int>(window.value_or(16)));
}

std::vector<PlaneSpec> Trellis::planes(int64_t n, int64_t k) const {
  const int64_t unit = size_unit();
  const bool empty = n == 0 || k == 0;
  std::vector<PlaneSpec> specs = {
      {"codes",
       DType::i32,
       {checked_pad(k, unit) / kTileSide, checked_pad(n, unit) / kTileSide, shape().words()}},
      {"input_scales", DType::f16, {empty ? 0 : k}},
      {"output_scales", DType::f16, {empty ? 0 : n}},
  };
  if (!codebook.table.empty()) {
    const int64_t per_step = codebook.weights_per_step;
    specs.push_back({"table", DType::f16, {std::ssize(codebook.table) / per_step, per_step}});
  }
  require_countable(specs);
  return specs;
}

void Trellis::validate_values(const PackedTensor& packed) const {
  for (const auto& [name, plane] : packed.planes) {
    // Other planes are those of a format around this one.
    if (name != "input_scales" && name != "output_scales" && name != "table") continue;
    const auto bits = plane.values<uint16_t>();
    for (size_t i = 0; i < bits.size(); ++i) {
      if ((bits[i] >> 10 & 31U) == 31) {
        throw InvalidArgument("plane " + name, text_of(float_from_f16(bits[i]), " at element ", i),
                              "finite numbers");
      }
    }
  }
}

void Trellis::decode(const PackedTensor& packed, int64_t first_row, MatrixView<float> out) const {
  const TrellisShape ring = shape();
  const int64_t unit = size_unit();
  const int64_t k = packed.k;
  const int64_t per_step = ring.weights_per_step;
  std::vector<float> own;
  const std::vector<float>* values = values_.get();
  if (!codebook.table.empty()) {
    TrellisCodebook stored = codebook;
    const auto table = packed.plane("table").values<uint16_t>();
    stored.table.assign(table.begin(), table.end());
    if (stored.table != codebook.table) {
      own = stored.values();
      values = &own;
    }
  }
  const auto codes = packed.plane("codes").values<uint32_t>();
  const auto inputs = packed.plane("input_scales").values<uint16_t>();
  const auto outputs = packed.plane("output_scales").values<uint16_t>();
  const int64_t tile_rows = packed.plane("codes").shape()[1];
  const int64_t padded = checked_pad(k, unit);
  std::vector<float> storage(static_cast<size_t>(checked_mul(unit, padded)));
  const MatrixView<float> band(storage.data(), unit, padded);
  std::vector<uint32_t> states(static_cast<size_t>(ring.steps()));
  const int64_t end = first_row + out.rows();
  for (int64_t begin = first_row / unit * unit; begin < end; begin += unit) {
    for (int64_t r = 0; r < unit; r += kTileSide) {
      for (int64_t c = 0; c < padded; c += kTileSide) {
        const int64_t tile = c / kTileSide * tile_rows + (begin + r) / kTileSide;
        trellis::unpack_ring(ring, codes.data() + tile * ring.words(), states.data());
        for (int p = 0; p < kRingLength; ++p) {
          const int64_t state = states[static_cast<size_t>(p / per_step)];
          band(r + trellis::output_of(p), c + trellis::input_of(p)) =
              (*values)[static_cast<size_t>(state * per_step + p % per_step)];
        }
      }
    }
    if (rotation > 0) {
      trellis::rotate_columns(band);
      trellis::rotate_rows(band);
    }
    for (int64_t row = std::max(begin, first_row); row < std::min(begin + unit, end); ++row) {
      const float output = float_from_f16(outputs[static_cast<size_t>(row)]);
      const float* from = band.row(row - begin);
      float* to = out.row(row - first_row);
      for (int64_t c = 0; c < k; ++c) {
        to[c] = output * (from[c] * float_from_f16(inputs[static_cast<size_t>(c)]));
      }
    }
  }
}

std::unique_ptr<ColumnEncoder> Trellis::column_encoder(std::shared_ptr<const Format> self, int64_t n,
                                                       int64_t k,
                                                       std::span<const int32_t> group_of_column) const {
  if (!group_of_column.empty()) {
    throw InvalidArgument("group_of_column", text_of(group_of_column.size(), " entries"),
                          "none: a trellis has no groups of columns");
  }
  return make_trellis_encoder(std::move(self), *this, n, k, /*unit_scales=*/false);
}

}  // namespace quantloom
