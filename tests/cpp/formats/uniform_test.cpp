#include "quantloom/formats/uniform.hpp"

#include <gtest/gtest.h>

#include <vector>

namespace quantloom {
namespace {

TEST(Uniform, EveryExampleReadsBackFromSpecAndJson) {
  for (const FormatEntry& entry : format_table()) {
    for (const std::string& example : entry.examples) {
      const auto format = format_from_spec(example);
      EXPECT_EQ(format->spec(), example);
      EXPECT_EQ(format->name(), entry.name);
      const auto again = format_from_json(format->to_json());
      EXPECT_EQ(again->spec(), example);
      EXPECT_EQ(again->to_json(), format->to_json());
    }
  }
}

}  // namespace
}  // namespace quantloom
