#include "quantloom/tensor.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <utility>

namespace quantloom {
namespace {

TEST(Tensor, IsZeroedAndAligned) {
  for (const DType dtype : {DType::u8, DType::f16, DType::f32, DType::f64}) {
    const Tensor tensor(dtype, {3, 7, 5});
    EXPECT_EQ(tensor.element_count(), 105);
    EXPECT_EQ(tensor.byte_count(), 105 * size_of(dtype));
    EXPECT_EQ(reinterpret_cast<uintptr_t>(tensor.bytes()) % 64, 0U);
    EXPECT_TRUE(std::all_of(tensor.bytes(), tensor.bytes() + tensor.byte_count(),
                            [](std::byte b) { return b == std::byte{0}; }));
  }
}

TEST(Tensor, MayBeEmptyOrAScalar) {
  EXPECT_EQ(Tensor().element_count(), 0);
  EXPECT_EQ(Tensor(DType::f32, {0, 1000}).byte_count(), 0);
  EXPECT_EQ(Tensor(DType::f32, {}).element_count(), 1);
  EXPECT_THROW(Tensor(DType::f32, {3}, nullptr, nullptr, Device::cuda), InvalidArgument);
}

TEST(Tensor, RefusesSizesThatOverflow) {
  EXPECT_THROW(Tensor(DType::u8, {INT64_MAX, 2}), InvalidArgument);
  EXPECT_THROW(Tensor(DType::f64, {INT64_MAX / 2}), InvalidArgument);
  EXPECT_THROW(Tensor(DType::u8, {-1}), InvalidArgument);
  EXPECT_THROW(Tensor(DType::u8, {INT64_MAX}), InvalidArgument);  // cannot be padded to 64 bytes
}

TEST(Tensor, ChecksBorrowedMemoryAndKeepsItsOwner) {
  alignas(8) static std::byte memory[64];
  auto owner = std::make_shared<int>(1);
  {
    const Tensor tensor(DType::i32, {4}, memory, owner);
    const Tensor copy = tensor;
    EXPECT_EQ(owner.use_count(), 3);
    EXPECT_EQ(copy.bytes(), memory);
  }
  EXPECT_EQ(owner.use_count(), 1);
  EXPECT_THROW(Tensor(DType::i32, {4}, nullptr, owner), InvalidArgument);
  EXPECT_NO_THROW(Tensor(DType::i32, {0}, nullptr, owner));
  EXPECT_THROW(Tensor(DType::i32, {4}, memory + 2, owner), InvalidArgument);
  EXPECT_NO_THROW(Tensor(DType::i16, {4}, memory + 2, owner));
  EXPECT_THROW(Tensor(DType::i64, {INT64_MAX / 2}, memory, owner), InvalidArgument);
}

TEST(Tensor, GivesElementsOfTheRightSizeOnTheCpuOnly) {
  alignas(8) static std::byte memory[64];
  Tensor tensor(DType::i32, {4});
  EXPECT_EQ(tensor.values<uint32_t>().size(), 4U);
  EXPECT_THROW(tensor.values<uint16_t>(), TypeMismatch);
  EXPECT_THROW(static_cast<void>(std::as_const(tensor).values<double>()), TypeMismatch);
  const Tensor remote(DType::i32, {4}, memory, nullptr, Device::cuda);
  EXPECT_THROW(static_cast<void>(remote.values<int32_t>()), TypeMismatch);
}

}  // namespace
}  // namespace quantloom
