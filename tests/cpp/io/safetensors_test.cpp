#include "quantloom/io/safetensors.hpp"

#include <sys/stat.h>

#include "io/file_bytes.hpp"

namespace quantloom {
namespace {

using test::as_bytes;
using test::bytes_of;
using test::file_bytes;
using test::message_of;
using test::random_tensor;
using test::TemporaryFolder;

constexpr DType kAllDTypes[] = {DType::f64, DType::f32, DType::f16,    DType::bf16, DType::i64,
                                DType::i32, DType::i16, DType::i8,     DType::u64,  DType::u32,
                                DType::u16, DType::u8,  DType::boolean};

std::string round_trip_bytes(const std::map<std::string, Tensor>& tensors,
                             const std::map<std::string, std::string>& metadata = {}) {
  const TemporaryFolder folder;
  const std::string path = folder.file("t.safetensors");
  write_safetensors(path, tensors, metadata);
  EXPECT_EQ(folder.entry_count(), 1);
  return test::read_file(path);
}

// Written by hand from the format's description: two tensors out of name order in the data, trailing spaces.
TEST(Safetensors, ReadsHandWrittenBytes) {
  const std::string header =
      R"({"b":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"__metadata__":{"format":"pt","k":"v"},)"
      R"("a":{"data_offsets":[8,11],"shape":[3],"dtype":"U8"},"s":{"dtype":"I16","shape":[],"data_offsets":[11,13]}})"
      "   ";
  const std::string bytes = file_bytes(header, std::string("\0\0\x80\x3f\0\0\0\xc0\x07\x08\x09\x34\x12", 13));
  const SafetensorsFile file = SafetensorsFile::parse(as_bytes(bytes), "hand");
  EXPECT_EQ(file.names(), (std::vector<std::string>{"a", "b", "s"}));
  EXPECT_EQ(file.metadata(), (std::map<std::string, std::string>{{"format", "pt"}, {"k", "v"}}));
  const Tensor b = file.tensor("b");
  EXPECT_EQ(b.dtype(), DType::f32);
  EXPECT_EQ(b.shape(), (std::vector<int64_t>{2, 1}));
  EXPECT_EQ(b.values<float>()[0], 1.0F);
  EXPECT_EQ(b.values<float>()[1], -2.0F);
  EXPECT_EQ(file.tensor("a").values<uint8_t>()[2], 9);
  EXPECT_EQ(file.tensor("s").shape(), std::vector<int64_t>{});
  EXPECT_EQ(file.tensor("s").values<int16_t>()[0], 0x1234);
  EXPECT_NE(message_of<InvalidArgument>([&] { file.tensor("z"); }).find("\"z\""), std::string::npos);
}

TEST(Safetensors, WritesHandWrittenBytes) {
  Tensor half(DType::f16, {2});
  half.values<uint16_t>()[0] = 0x3c00;
  half.values<uint16_t>()[1] = 0x4000;
  Tensor byte(DType::u8, {1});
  byte.values<uint8_t>()[0] = 7;
  const std::string header =
      R"({"__metadata__":{"format":"pt"},"z":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},)"
      R"("a":{"dtype":"U8","shape":[1],"data_offsets":[4,5]}})";
  const size_t padded = (header.size() + 8 + 63) / 64 * 64 - 8;
  EXPECT_EQ(
      round_trip_bytes({{"a", byte}, {"z", half}}),
      file_bytes(header + std::string(padded - header.size(), ' '), std::string("\x00\x3c\x00\x40\x07", 5)));
}

TEST(Safetensors, RoundTripsEveryTypeAndShape) {
  std::map<std::string, Tensor> tensors;
  uint64_t seed = 1;
  for (const DType dtype : kAllDTypes) {
    for (const std::vector<int64_t>& shape : std::vector<std::vector<int64_t>>{
             {}, {0}, {1}, {3, 0, 5}, {7}, {3, 5}, {2, 1, 3}, {1, 1, 1, 1, 1, 1, 1, 2}}) {
      const std::string name = std::string(name_of(dtype)) + "/\"\\\n\t\x01 \xc3\xa9 " +
                               std::to_string(shape.size()) + std::to_string(seed);
      tensors.emplace(name, random_tensor(dtype, shape, seed++));
    }
  }
  const std::map<std::string, std::string> metadata = {{"", "empty key"}, {"quote\"", "\x1f\xe2\x82\xac"}};
  const TemporaryFolder folder;
  const std::string path = folder.file("all.safetensors");
  write_safetensors(path, tensors, metadata);
  const SafetensorsFile file = SafetensorsFile::open(path);
  ASSERT_EQ(file.names().size(), tensors.size());
  EXPECT_EQ(file.metadata().at(""), "empty key");
  EXPECT_EQ(file.metadata().at("quote\""), "\x1f\xe2\x82\xac");
  EXPECT_EQ(file.metadata().at("format"), "pt");
  for (const auto& [name, tensor] : tensors) {
    const Tensor got = file.tensor(name);
    EXPECT_EQ(got.dtype(), tensor.dtype());
    EXPECT_EQ(got.shape(), tensor.shape());
    EXPECT_EQ(bytes_of(got), bytes_of(tensor)) << name;
    // Aligned in the file, so that nothing had to be copied.
    EXPECT_EQ(got.bytes(), file.entry(name).data.data());
  }
  // Writing what was read gives the same bytes.
  std::map<std::string, Tensor> again;
  for (const std::string& name : file.names()) again.emplace(name, file.tensor(name));
  const std::string second = folder.file("again.safetensors");
  write_safetensors(second, again, file.metadata());
  EXPECT_EQ(test::read_file(second), test::read_file(path));
}

TEST(Safetensors, DataBeginsAtAMultipleOf64) {
  for (int length = 1; length < 70; ++length) {
    const std::string bytes =
        round_trip_bytes({{std::string(static_cast<size_t>(length), 'n'), Tensor(DType::f64, {1})}});
    uint64_t header = 0;
    std::memcpy(&header, bytes.data(), 8);
    EXPECT_EQ((header + 8) % 64, 0U);
    EXPECT_EQ(bytes.size(), header + 16);
  }
}

TEST(Safetensors, FileWithoutTensors) {
  const std::string bytes = round_trip_bytes({}, {{"format", "mine"}});
  const SafetensorsFile file = SafetensorsFile::parse(as_bytes(bytes), "empty");
  EXPECT_TRUE(file.names().empty());
  EXPECT_EQ(file.metadata(), (std::map<std::string, std::string>{{"format", "mine"}}));
  EXPECT_TRUE(SafetensorsFile::parse(as_bytes(file_bytes("{}")), "bare").names().empty());
}

TEST(Safetensors, UnalignedTensorsAreCopied) {
  const std::string bytes = file_bytes(
      R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"f":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}})"
      "      ",
      std::string("\x01\0\0\x80\x3f", 5));
  const TemporaryFolder folder;
  test::write_file(folder.file("u"), bytes);
  const SafetensorsFile file = SafetensorsFile::open(folder.file("u"));
  const Tensor f = file.tensor("f");
  EXPECT_EQ(reinterpret_cast<uintptr_t>(f.bytes()) % 4, 0U);
  EXPECT_EQ(f.values<float>()[0], 1.0F);
}

TEST(Safetensors, TensorsOutliveTheFileAndWritesStayPrivate) {
  const TemporaryFolder folder;
  const std::string path = folder.file("t");
  write_safetensors(path, {{"x", random_tensor(DType::u8, {100}, 5)}});
  const std::string before = test::read_file(path);
  Tensor x = SafetensorsFile::open(path).tensor("x");
  EXPECT_EQ(bytes_of(x), bytes_of(random_tensor(DType::u8, {100}, 5)));
  x.values<uint8_t>()[0] ^= 0xffU;
  EXPECT_EQ(test::read_file(path), before);
  // The name now belongs to another file; the mapping still shows the one that was opened.
  write_safetensors(path, {{"x", Tensor(DType::u8, {100})}});
  EXPECT_NE(x.values<uint8_t>()[1], 0);
}

TEST(Safetensors, FilesThatCannotBeRead) {
  const TemporaryFolder folder;
  const auto message = [&](const std::string& name) {
    return message_of<IoError>([&] { SafetensorsFile::open(folder.file(name)); });
  };
  EXPECT_NE(message("missing").find("No such file"), std::string::npos);
  EXPECT_NE(message(".").find("not a regular file"), std::string::npos);
  ASSERT_EQ(::mkfifo(folder.file("fifo").c_str(), 0600), 0);
  EXPECT_NE(message("fifo").find("not a regular file"), std::string::npos);
  test::write_file(folder.file("plain"), "x");
  EXPECT_NE(message("plain/below").find("Not a directory"), std::string::npos);
  test::write_file(folder.file("empty"), "");
  EXPECT_NE(message_of<FileFormatError>([&] { SafetensorsFile::open(folder.file("empty")); }).find("0 bytes"),
            std::string::npos);
  if (::geteuid() != 0) {
    ASSERT_EQ(::chmod(folder.file("plain").c_str(), 0), 0);
    EXPECT_NE(message("plain").find("Permission denied"), std::string::npos);
  }
}

TEST(Safetensors, WriterRefusesBadInput) {
  const TemporaryFolder folder;
  const std::string path = folder.file("t");
  const Tensor x(DType::f32, {1});
  const auto message = [&](const std::map<std::string, Tensor>& tensors,
                           const std::map<std::string, std::string>& metadata = {}) {
    return message_of<InvalidArgument>([&] { write_safetensors(path, tensors, metadata); });
  };
  EXPECT_NE(message({{"__metadata__", x}}).find("__metadata__"), std::string::npos);
  EXPECT_NE(message({{std::string(513, 'n'), x}}).find("513 bytes"), std::string::npos);
  EXPECT_NE(message({{"r", Tensor(DType::f32, {1, 1, 1, 1, 1, 1, 1, 1, 1})}}).find("9 dimensions"),
            std::string::npos);
  EXPECT_NE(message({{"\xff", x}}).find("UTF-8"), std::string::npos);
  EXPECT_NE(message({{"x", x}}, {{"key", "\xc3"}}).find("UTF-8"), std::string::npos);
  EXPECT_NE(message({{"x", x}}, {{"\xc3", ""}}).find("UTF-8"), std::string::npos);
  EXPECT_NE(message({{"x", x}}, {{"big", std::string(33 << 20, 'm')}}).find("header"), std::string::npos);
  const Tensor device(DType::f32, {1}, const_cast<std::byte*>(x.bytes()), nullptr, Device::cuda);
  EXPECT_NE(message_of<TypeMismatch>([&] {
              write_safetensors(path, {{"d", device}});
            }).find("\"d\""),
            std::string::npos);
  EXPECT_EQ(folder.entry_count(), 0);
  EXPECT_NE(message_of<IoError>([&] {
              write_safetensors(folder.file("no/such/folder"), {{"x", x}});
            }).find("No such"),
            std::string::npos);
  EXPECT_NE(message_of<IoError>([&] {
              write_safetensors(folder.path().string(), {{"x", x}});
            }).find("rename"),
            std::string::npos);
}

TEST(Safetensors, LongFileNamesAndTheCurrentFolder) {
  const TemporaryFolder folder;
  const std::string path = folder.file(std::string(250, 'f'));
  write_file_atomically(path, as_bytes("abc"));
  EXPECT_EQ(test::read_file(path), "abc");
  write_file_atomically(path, {});
  EXPECT_EQ(test::read_file(path), "");
}

// At the limit of tensors anything quadratic would take minutes.
TEST(Safetensors, OpensAsManyTensorsAsTheLimitAllows) {
  const int64_t count = SafetensorsLimits{}.tensors;
  std::map<std::string, Tensor> tensors;
  for (int64_t i = 0; i < count; ++i) tensors.emplace("layers." + std::to_string(i), Tensor(DType::u8, {1}));
  const std::string bytes = round_trip_bytes(tensors);
  EXPECT_EQ(std::ssize(SafetensorsFile::parse(as_bytes(bytes), "many").names()), count);
  tensors.emplace("one more", Tensor(DType::u8, {1}));
  EXPECT_NE(message_of<InvalidArgument>([&] { round_trip_bytes(tensors); }).find("131073"),
            std::string::npos);
}

}  // namespace
}  // namespace quantloom
