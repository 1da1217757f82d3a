#include "quantloom/activations/activation_format.hpp"

#include <gtest/gtest.h>

#include "quantloom/error.hpp"

namespace quantloom {
namespace {

TEST(ActivationFormat, ShortFormsAndDescriptionsReadBack) {
  for (const char* spec :
       {"int8:token", "int4:g128:asym", "int6:tensor", "int8:tensor:static", "int8:tensor:static=0.0123",
        "int8:tensor:asym:static=1e-05,-7", "sdr4:g16:b8", "sdr4:g16:b16", "sdr3:g8:b16:tensor:static=2",
        "int2:token:asym", "int8:token:outliers=6", "int8:token:outliers=6:static-outliers",
        "int8:tensor:static:outliers=6.5:columns=0,17,4095", "int8:g16:asym:outliers=6:columns=",
        "int8:token:outliers=1%", "int8:token:outliers=0.5%:columns=3,17"}) {
    const ActivationFormat format = activation_format_from_spec(spec);
    EXPECT_EQ(format.spec(), spec);
    EXPECT_EQ(activation_format_from_json(format.to_json()), format) << spec;
  }
  EXPECT_EQ(activation_format_from_spec("sdr4:g16").spec(), "sdr4:g16:b8");
  EXPECT_EQ(activation_format_from_spec("sdr4:g16:token"), activation_format_from_spec("sdr4:g16:b8"));
  EXPECT_EQ(activation_format_from_spec("int8:asym:token").spec(), "int8:token:asym");
}

TEST(ActivationFormat, RefusesWhatItDoesNotUnderstand) {
  for (const char* spec : {"",
                           "int8",
                           "int1:token",
                           "int9:token",
                           "int:token",
                           "uint8:token",
                           "int8:g0",
                           "int8:g",
                           "int8:gx",
                           "int8:token:tensor",
                           "int8:token:g16",
                           "int8:token:static",
                           "int8:g16:static",
                           "int8:token:b8",
                           "int8:tensor:static=",
                           "int8:tensor:static=x",
                           "int8:tensor:static=0",
                           "int8:tensor:static=-1",
                           "int8:tensor:static=inf",
                           "int8:tensor:static=nan",
                           "int8:tensor:static=1,3",
                           "int8:token:sym2",
                           "int4:tensor:asym:static=1,8",
                           "sdr4",
                           "sdr4:b8",
                           "sdr8:g16",
                           "sdr4:g16:b4",
                           "sdr4:g16:b17",
                           "sdr4:g16:asym",
                           "sdr4:g16:static",
                           "int8:tensor:static:static",
                           "int8:token:asym:asym",
                           "int8:token:outliers=",
                           "int8:token:outliers=0",
                           "int8:token:outliers=-1",
                           "int8:token:outliers=inf",
                           "int8:token:static-outliers",
                           "int8:token:columns=3",
                           "int8:token:outliers=6:columns=3,3",
                           "int8:token:outliers=6:columns=3,",
                           "int8:token:outliers=6:columns=x",
                           "int8:token:outliers=6:outliers=6",
                           "int8:token:outliers=6:columns=4,2",
                           "sdr4:g16:outliers=6",
                           "sdr4:g16:outliers=1%",
                           "int8:token:outliers=%",
                           "int8:token:outliers=0%",
                           "int8:token:outliers=100%",
                           "int8:token:outliers=1%%",
                           "int8:token:outliers=1%:static-outliers",
                           "int8:token:outliers=1%:outliers=6",
                           "int8:token:outliers=6:static-outliers:columns=3",
                           "int8:token:outliers=6:columns=4294967296",
                           "int8:g99999999999999999999"}) {
    EXPECT_THROW(activation_format_from_spec(spec), InvalidArgument) << spec;
  }
  const std::string good = activation_format_from_spec("int8:tensor:asym:static=0.5,3").to_json();
  const auto changed = [&](const std::string& from, const std::string& to) {
    std::string text = good;
    const size_t at = text.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    return text.replace(at, from.size(), to);
  };
  EXPECT_NO_THROW(activation_format_from_json(good));
  for (const auto& [from, to] :
       std::vector<std::pair<std::string, std::string>>{{"\"bits\":8", "\"bits\":8.0"},
                                                        {"\"bits\":8", "\"bits\":1"},
                                                        {"\"int\"", "\"sdr\""},
                                                        {"\"version\":1", "\"version\":2"},
                                                        {"\"scale\":0.5", "\"scale\":null"},
                                                        {"\"scale\":0.5", "\"scale\":1e300"},
                                                        {"\"scale\":0.5", "\"scale\":\"1\""},
                                                        {"\"tensor\"", "\"token\""},
                                                        {"\"tensor\"", "\"row\""},
                                                        {"\"static\":true", "\"static\":1"},
                                                        {"\"static\":true", "\"static\":false"},
                                                        {"\"zero_point\":3", "\"zero_point\":128"},
                                                        {"\"bits\"", "\"bit\""}}) {
    EXPECT_THROW(activation_format_from_json(changed(from, to)), InvalidArgument) << to;
  }
  EXPECT_THROW(activation_format_from_json("[]"), InvalidArgument);
  EXPECT_THROW(activation_format_from_json("{"), InvalidArgument);
}

TEST(ActivationFormat, FieldsAreCheckedByName) {
  const auto message = [](const ActivationFormat& format) {
    try {
      require_valid(format);
    } catch (const InvalidArgument& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_EQ(message({}), "");
  EXPECT_NE(message({.bits = 9}).find("bits: got 9"), std::string::npos);
  EXPECT_NE(message({.scope = ActivationScope::group}).find("group_size: got 0"), std::string::npos);
  EXPECT_NE(message({.group_size = 4}).find("group_size: got 4"), std::string::npos);
  EXPECT_NE(message({.is_static = true}).find("static: got true"), std::string::npos);
  EXPECT_NE(message({.grid = FixedGrid{1, 0}}).find("scale: got 1"), std::string::npos);
  EXPECT_NE(message({.bits = 4, .group_size = 8, .base_bits = 4}).find("base_bits: got 4"),
            std::string::npos);
  EXPECT_THROW(with_range({}, 0, 1), InvalidArgument);
  EXPECT_THROW(with_range(activation_format_from_spec("int8:tensor:static"), 1, 0), InvalidArgument);
}

}  // namespace
}  // namespace quantloom
