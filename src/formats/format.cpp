#include "quantloom/formats/format.hpp"

#include <nlohmann/json.hpp>

#include "formats/description.hpp"
#include "quantloom/formats/additive.hpp"
#include "quantloom/formats/bcq.hpp"
#include "quantloom/formats/codebook.hpp"
#include "quantloom/formats/outliers.hpp"
#include "quantloom/formats/sdr.hpp"
#include "quantloom/formats/spqr.hpp"
#include "quantloom/formats/trellis.hpp"
#include "quantloom/formats/uniform.hpp"
#include "quantloom/formats/vector_codebook.hpp"

namespace quantloom {

std::shared_ptr<const Format> Format::fitted(std::shared_ptr<const Format> self, const FloatMatrix& /*w*/,
                                             int /*threads*/) const {
  return self;
}

const std::vector<FormatEntry>& format_table() {
  static const std::vector<FormatEntry> table = {
      {"uniform",
       "evenly spaced grid, 1 to 8 bits, symmetric or with integer zero points",
       &Uniform::from_json,
       &Uniform::from_spec,
       {"uniform:8:channel:sym", "uniform:4:g128:sym", "uniform:4:g128:asym", "uniform:3:g64:asym:bf16",
        "uniform:2:g16:asym", "uniform:5:tensor:asym:f32", "uniform:1:g32:sym", "uniform:6:g128:sym",
        "uniform:7:channel:asym"}},
      {"codebook",
       "table of up to 256 values, such as nf4, nf3, sf4 and fp4",
       &Codebook::from_json,
       &Codebook::from_spec,
       {"codebook:nf4:g64", "codebook:nf3:g16:bf16", "codebook:sf4:channel", "codebook:fp4:g32:f32",
        "codebook:nf4:tensor"}},
      {"vector_codebook",
       "tables of up to 65536 vectors of up to 16 weights, fitted to the matrix",
       &VectorCodebook::from_json,
       &VectorCodebook::from_spec,
       {"vector_codebook:64x2:g64", "vector_codebook:256x4:g128:bf16", "vector_codebook:256x8:channel",
        "vector_codebook:100x4:tensor:f32"}},
      {"outliers",
       "another format, and the weights of the largest magnitude beside it as float16",
       &Outliers::from_json,
       &Outliers::from_spec,
       {"outliers:0.5%:uniform:4:g128:sym", "outliers:2%:codebook:nf3:g64",
        "outliers:1%:vector_codebook:256x4:g64", "outliers:1.25%:uniform:3:channel:asym:bf16"}},
      {"trellis",
       "trellis-coded tiles of 16 x 16 weights, 1 to 8 bits, in a rotated basis",
       &Trellis::from_json,
       &Trellis::from_spec,
       {"trellis:2:mul1", "trellis:3.5:mcg:plain:l10"}},
      {"spqr",
       "evenly spaced grid whose scales and zero points are codes themselves, for SpQR",
       &Spqr::from_json,
       &Spqr::from_spec,
       {"spqr:3:g16:s3:z3:b16", "spqr:2:g32:s3:z3:b16", "spqr:4:g24:s2:z5:b7"}},
      {"sdr",
       "significant digits of 8-bit integers: one scale a row, one shift a group, 2 to 7 bits",
       &Sdr::from_json,
       &Sdr::from_spec,
       {"sdr:4:g16", "sdr:4:g128:bf16", "sdr:3:g8:f32", "sdr:6:g24"}},
      {"additive",
       "additive quantization (AQLM): sums of entries of tables, fitted to the matrix, for blocks of weights",
       &Additive::from_json,
       &Additive::from_spec,
       {"additive:2x6:g8", "additive:1x8:g4:scale64:bf16", "additive:3x4:g2x3:f32",
        "additive:2x6:g4:scale8:s2:t2x3"}},
      {"bcq",
       "binary coding: 1 to 8 planes of signs with a scale each for every group, optionally an offset",
       &Bcq::from_json,
       &Bcq::from_spec,
       {"bcq:3:g128", "bcq:4:g64:offset", "bcq:2:channel:offset:f32:r2", "bcq:1:g32:bf16:r0:greedy"}},
  };
  return table;
}

std::shared_ptr<const Format> format_from_json(std::string_view json) {
  const auto object = nlohmann::json::parse(json, nullptr, /*allow_exceptions=*/false);
  if (!object.is_object() || !object.contains("format") || !object["format"].is_string()) {
    refuse_description(json, "a JSON object with a string \"format\"");
  }
  const auto name = object["format"].get<std::string>();
  for (const FormatEntry& entry : format_table()) {
    if (entry.name == name) return entry.from_json(json);
  }
  throw InvalidArgument("format", printable(name), "a name of the format table");
}

std::shared_ptr<const Format> format_from_spec(std::string_view spec) {
  const std::string_view name = spec.substr(0, spec.find(':'));
  for (const FormatEntry& entry : format_table()) {
    if (entry.name == name) return entry.from_spec(spec);
  }
  throw InvalidArgument("format", printable(spec), "a short form such as uniform:4:g128 or codebook:nf4");
}

}  // namespace quantloom
