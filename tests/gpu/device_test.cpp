// Which of a build's code a device runs.
#include "common/device.hpp"

#include <gtest/gtest.h>

namespace quantloom {
namespace {

TEST(DeviceFacts, TheHighestCodeThatRunsCounts) {
  EXPECT_EQ(code_architecture("90a", 90), 90);
  EXPECT_EQ(code_architecture("80,86,89,90a,100,120", 90), 90);
  EXPECT_EQ(code_architecture("80,86,89,90a,100,120", 103), 100);
  EXPECT_EQ(code_architecture("80,86,89,90a,100,120", 121), 120);
  EXPECT_EQ(code_architecture("80,90a", 89), 80);
  EXPECT_EQ(code_architecture("80;90", 90), 90);
  // PTX of 80 runs on a 90 without its instructions, code for 90a on nothing but a 90.
  EXPECT_EQ(code_architecture("80", 90), 80);
  EXPECT_EQ(code_architecture("80,90a", 100), 80);
  EXPECT_EQ(code_architecture("90a", 89), 0);
  EXPECT_EQ(code_architecture("native", 90), 0);
  EXPECT_EQ(code_architecture("", 90), 0);
}

}  // namespace
}  // namespace quantloom
