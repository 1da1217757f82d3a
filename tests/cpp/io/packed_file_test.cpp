#include "quantloom/io/packed_file.hpp"

#include <algorithm>
#include <array>

#include "io/file_bytes.hpp"
#include "quantloom/formats/bit_packing.hpp"
#include "quantloom/formats/codebook.hpp"
#include "quantloom/formats/uniform.hpp"
#include "quantloom/rounding/nearest.hpp"

namespace quantloom {
namespace {

using test::bytes_of;
using test::message_of;
using test::random_tensor;
using test::TemporaryFolder;

PackedTensor random_packed(const std::shared_ptr<const Format>& format, int64_t n, int64_t k, uint64_t seed) {
  const CounterRandom random(seed);
  std::vector<float> w(static_cast<size_t>(n * k));
  for (size_t i = 0; i < w.size(); ++i) w[i] = static_cast<float>(random.normal(i));
  return round_nearest(FloatMatrix(MatrixView<const float>(w.data(), n, k)), format).tensor;
}

PackedTensor random_packed(const std::string& spec, int64_t n, int64_t k, uint64_t seed) {
  return random_packed(format_from_spec(spec), n, k, seed);
}

void expect_same(const PackedTensor& a, const PackedTensor& b) {
  EXPECT_EQ(a.format->to_json(), b.format->to_json());
  EXPECT_EQ(a.n, b.n);
  EXPECT_EQ(a.k, b.k);
  ASSERT_EQ(a.planes.size(), b.planes.size());
  for (const auto& [name, plane] : a.planes) {
    EXPECT_EQ(plane.dtype(), b.plane(name).dtype());
    EXPECT_EQ(plane.shape(), b.plane(name).shape());
    EXPECT_EQ(bytes_of(plane), bytes_of(b.plane(name))) << name;
  }
}

TEST(PackedFile, RoundTripsEveryFormat) {
  const TemporaryFolder folder;
  PackedFile file;
  uint64_t seed = 1;
  for (const FormatEntry& entry : format_table()) {
    for (const std::string& spec : entry.examples) {
      for (const auto& [n, k] :
           std::vector<std::pair<int64_t, int64_t>>{{5, 37}, {1, 1}, {0, 3}, {3, 0}, {33, 256}}) {
        file.packed.emplace(text_of("layer \"", spec, "\"/", n, "x", k), random_packed(spec, n, k, seed++));
      }
    }
  }
  for (const size_t entries : {2, 100, 256}) {  // tables without a name
    std::vector<float> table(entries);
    for (size_t i = 0; i < entries; ++i) table[i] = static_cast<float>(i) / 7 - 11;
    file.packed.emplace(text_of("table of ", entries),
                        random_packed(std::make_shared<const Codebook>(table, 16), 9, 70, seed++));
  }
  file.plain.emplace("norm", random_tensor(DType::bf16, {7}, seed));
  file.plain.emplace("norm.codes", random_tensor(DType::u8, {7}, seed));  // no packed tensor "norm"
  file.metadata = {{"made by", "a test"}, {"format", "pt"}};
  const std::string path = folder.file("p.safetensors");
  save_packed(path, file);
  const PackedFile got = load_packed(path);
  ASSERT_EQ(got.packed.size(), file.packed.size());
  for (const auto& [name, packed] : file.packed) expect_same(packed, got.packed.at(name));
  ASSERT_EQ(got.plain.size(), 2U);
  for (const auto& [name, tensor] : file.plain) EXPECT_EQ(bytes_of(tensor), bytes_of(got.plain.at(name)));
  EXPECT_EQ(got.metadata, file.metadata);
  const std::string again = folder.file("again.safetensors");
  save_packed(again, got);
  EXPECT_EQ(test::read_file(path), test::read_file(again));
}

TEST(PackedFile, ReaderLoadsWhatIsAskedFor) {
  const TemporaryFolder folder;
  const std::string path = folder.file("p");
  const PackedTensor layer = random_packed("uniform:3:g16:asym", 8, 40, 9);
  save_packed(path, {{{"a", layer}, {"b", layer}}, {{"a.bias", random_tensor(DType::f32, {8}, 2)}}, {}});
  std::string bytes = test::read_file(path);
  bytes.back() = static_cast<char>(bytes.back() ^ 1);  // the last tensor is a plane of "b"
  test::write_file(path, bytes);
  const PackedFileReader reader = PackedFileReader::open(path);
  EXPECT_EQ(reader.packed().at("a").format->spec(), layer.format->spec());
  EXPECT_EQ(reader.packed().at("a").planes, (std::vector<std::string>{"codes", "scales", "zeros"}));
  EXPECT_EQ(reader.plain(), std::vector<std::string>{"a.bias"});
  expect_same(reader.load_packed("a"), layer);
  EXPECT_EQ(bytes_of(reader.load_plain("a.bias")), bytes_of(random_tensor(DType::f32, {8}, 2)));
  const std::string message = message_of<FileFormatError>([&] { reader.load_packed("b"); });
  EXPECT_NE(message.find("\"b.scales\": checksum"), std::string::npos) << message;
  message_of<FileFormatError>([&] { load_packed(path); });
  message_of<InvalidArgument>([&] { reader.load_packed("c"); });
  message_of<InvalidArgument>([&] { reader.load_plain("a.codes"); });
}

TEST(PackedFile, FilesOfOtherLibrariesLoadAsPlainTensors) {
  const TemporaryFolder folder;
  const std::string path = folder.file("p");
  write_safetensors(path, {{"w.codes", random_tensor(DType::i32, {2}, 1)}}, {{"a", "b"}});
  const PackedFile file = load_packed(path);
  EXPECT_TRUE(file.packed.empty());
  EXPECT_EQ(bytes_of(file.plain.at("w.codes")), bytes_of(random_tensor(DType::i32, {2}, 1)));
  EXPECT_EQ(file.metadata, (std::map<std::string, std::string>{{"a", "b"}, {"format", "pt"}}));
}

TEST(PackedFile, SaveRefusesBadInput) {
  const TemporaryFolder folder;
  const std::string path = folder.file("p");
  const PackedTensor layer = random_packed("uniform:4:g8", 2, 16, 1);
  const Tensor x(DType::f32, {1});
  const auto message = [&](const PackedFile& file) {
    return message_of<InvalidArgument>([&] { save_packed(path, file); });
  };
  EXPECT_NE(message({{{"", layer}}, {}, {}}).find("packed tensor name"), std::string::npos);
  EXPECT_NE(message({{}, {{"", x}}, {}}).find("tensor name"), std::string::npos);
  EXPECT_NE(message({{{"a", layer}}, {{"a.scales", x}}, {}}).find("\"a.scales\""), std::string::npos);
  EXPECT_NE(message({{}, {}, {{"quantloom", "{}"}}}).find("quantloom"), std::string::npos);
  EXPECT_NE(message({{{"\xff", layer}}, {}, {}}).find("UTF-8"), std::string::npos);
  EXPECT_NE(message({{}, {}, {{"\xff", ""}}}).find("UTF-8"), std::string::npos);
  PackedTensor broken = layer;
  broken.planes.erase("scales");
  EXPECT_NE(message({{{"a", broken}}, {}, {}}).find("plane scales"), std::string::npos);
  broken = layer;
  broken.planes["scales"] = Tensor(DType::f16, {2, 3});
  EXPECT_NE(message({{{"a", broken}}, {}, {}}).find("\"a\""), std::string::npos);
  EXPECT_EQ(folder.entry_count(), 0);
}

// The examples of FORMATS.md.
TEST(PackedFile, WorkedExampleOfACodebook) {
  const std::vector<float> table = {-1, -0.25F, 0.5F};
  PackedTensor packed{std::make_shared<const Codebook>(table, 8), 2, 12, {}};
  Tensor codes(DType::i32, {2, 1});
  pack_bits(std::array<uint8_t, 12>{0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2}, 2,
            codes.values<uint32_t>().first(1));
  pack_bits(std::vector<uint8_t>(12, 1), 2, codes.values<uint32_t>().last(1));
  Tensor entries(DType::f16, {3});
  std::ranges::transform(table, entries.values<uint16_t>().begin(), f16_from_float);
  Tensor scales(DType::f16, {2, 2});
  for (size_t i = 0; i < 4; ++i) scales.values<uint16_t>()[i] = i % 2 == 0 ? 0x3800 : 0x4000;
  packed.planes = {{"codebook", entries}, {"codes", codes}, {"scales", scales}};
  const TemporaryFolder folder;
  save_packed(folder.file("f"), {{{"w", packed}}, {}, {}});
  const std::string bytes = test::read_file(folder.file("f"));
  EXPECT_EQ(bytes.substr(bytes.size() - 22), std::string("\x24\x49\x92\0\x55\x55\x55\0"
                                                         "\0\xbc\0\xb4\0\x38"
                                                         "\0\x38\0\x40\0\x38\0\x40",
                                                         22));
  const auto description = SafetensorsFile::open(folder.file("f")).metadata().at("quantloom");
  EXPECT_NE(description.find(R"({"bits":2,"format":"codebook","group_size":8,"scale_dtype":"float16",)"
                             R"("table":[-1.0,-0.25,0.5],"version":1})"),
            std::string::npos)
      << description;
  std::vector<float> values(24);
  dequantize(load_packed(folder.file("f")).packed.at("w"), {values.data(), 2, 12}, 1);
  EXPECT_EQ(values[2], 0.25F);
  EXPECT_EQ(values[9], -2.0F);
  EXPECT_EQ(values[12], -0.125F);
}

TEST(PackedFile, WorkedExample) {
  PackedTensor packed{std::make_shared<const Uniform>(3, 4, false), 2, 12, {}};
  Tensor codes(DType::i32, {2, 2});
  pack_bits(std::array<uint8_t, 12>{0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 6, 7}, 3,
            codes.values<uint32_t>().first(2));
  pack_bits(std::vector<uint8_t>(12, 4), 3, codes.values<uint32_t>().subspan(2));
  Tensor scales(DType::f16, {2, 3});
  std::ranges::fill(scales.values<uint16_t>(), uint16_t{0x3800});
  Tensor zeros(DType::i32, {3, 1});
  std::ranges::fill(zeros.values<uint32_t>(), 0x0000000cU);
  packed.planes = {{"codes", codes}, {"scales", scales}, {"zeros", zeros}};
  const TemporaryFolder folder;
  save_packed(folder.file("f"), {{{"w", packed}}, {}, {}});
  const std::string bytes = test::read_file(folder.file("f"));
  EXPECT_EQ(bytes.substr(bytes.size() - 40),
            std::string("\x88\xc6\xfa\x88\x0f\0\0\0\x24\x49\x92\x24\x09\0\0\0\x0c\0\0\0\x0c\0\0\0\x0c\0\0\0"
                        "\0\x38\0\x38\0\x38\0\x38\0\x38\0\x38",
                        40));
  EXPECT_EQ(
      SafetensorsFile::open(folder.file("f")).metadata().at("quantloom"),
      R"({"checksums":{"w.codes":"3230d91422c00972","w.scales":"b2cddebf2e11895b","w.zeros":"45821682cc89e258"},)"
      R"("digest":"03f90997bd5d9bbc","packed":{"w":{"format":{"bits":3,"format":"uniform","group_size":4,)"
      R"("scale_dtype":"float16","symmetric":false,"version":1,"zero_point":"stored"},"k":12,"n":2,)"
      R"("planes":["codes","scales","zeros"]}},"version":1})");
  std::vector<float> values(24);
  dequantize(load_packed(folder.file("f")).packed.at("w"), {values.data(), 2, 12}, 1);
  EXPECT_EQ(values[10], 1.0F);
  EXPECT_EQ(values[12], 1.5F);
}

}  // namespace
}  // namespace quantloom
