// Files written by released versions. Each must decode to the values stored beside it, bit by bit, and
// writing its content again must give the same bytes.
#include <map>

#include "io/file_bytes.hpp"
#include "quantloom/formats/format.hpp"
#include "quantloom/formats/uniform.hpp"
#include "quantloom/io/compressed_tensors.hpp"
#include "quantloom/io/gptq.hpp"
#include "quantloom/io/packed_file.hpp"

namespace quantloom {
namespace {

const std::string kFolder = QUANTLOOM_TESTS_DIR "/golden/";

void expect_decodes_to(const PackedTensor& packed, const Tensor& expected) {
  ASSERT_EQ(expected.shape(), (std::vector<int64_t>{packed.n, packed.k}));
  std::vector<float> values(static_cast<size_t>(packed.n * packed.k));
  dequantize(packed, {values.data(), packed.n, packed.k}, 1);
  EXPECT_EQ(std::memcmp(values.data(), expected.bytes(), values.size() * sizeof(float)), 0);
}

void expect_golden(const std::string& path, size_t count) {
  const PackedFile file = load_packed(path);
  EXPECT_EQ(file.packed.size(), count);
  for (const auto& [name, packed] : file.packed) {
    SCOPED_TRACE(name);
    expect_decodes_to(packed, file.plain.at("decoded " + name));
    EXPECT_EQ(name.substr(0, packed.format->spec().size()), packed.format->spec());
  }
  const test::TemporaryFolder folder;
  save_packed(folder.file("again"), file);
  EXPECT_EQ(test::read_file(folder.file("again")), test::read_file(path));
}

TEST(Golden, AdditiveVersion01) {
  expect_golden(kFolder + "additive-0.1.safetensors", 5);
}

TEST(Golden, UniformVersion01) {
  expect_golden(kFolder + "uniform-0.1.safetensors", 18);
}

TEST(Golden, CodebookVersion01) {
  expect_golden(kFolder + "codebook-0.1.safetensors", 14);
}

// A file of layers in another layout: "<settings> <tensor>", and "<settings> decoded".
std::map<std::string, std::map<std::string, Tensor>> layers_of(const std::string& path) {
  std::map<std::string, std::map<std::string, Tensor>> layers;
  const SafetensorsFile file = SafetensorsFile::open(path);
  for (const std::string& name : file.names()) {
    const size_t space = name.find(' ');
    layers[name.substr(0, space)].emplace(name.substr(space + 1), file.tensor(name));
  }
  return layers;
}

void expect_same_bytes(const std::map<std::string, Tensor>& a, const std::map<std::string, Tensor>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (const auto& [name, tensor] : a) {
    EXPECT_EQ(tensor.shape(), b.at(name).shape()) << name;
    EXPECT_EQ(test::bytes_of(tensor), test::bytes_of(b.at(name))) << name;
  }
}

TEST(Golden, GptqVersion01) {
  int count = 0;
  for (auto& [name, tensors] : layers_of(kFolder + "gptq-0.1.safetensors")) {
    SCOPED_TRACE(name);
    const auto format =
        std::dynamic_pointer_cast<const Uniform>(format_from_spec(name.substr(0, name.find('/'))));
    const GptqVersion version = name.substr(name.find('/')) == "/v1" ? GptqVersion::v1 : GptqVersion::v2;
    const Tensor decoded = tensors.extract("decoded").mapped();
    const PackedTensor packed =
        from_gptq(tensors, {format->bits, format->group_size, format->symmetric, version});
    expect_decodes_to(packed, decoded);
    expect_same_bytes(to_gptq(packed, version), tensors);
    ++count;
  }
  EXPECT_EQ(count, 8);
}

TEST(Golden, CompressedTensorsVersion01) {
  int count = 0;
  for (auto& [name, tensors] : layers_of(kFolder + "compressed-tensors-0.1.safetensors")) {
    SCOPED_TRACE(name);
    const auto format = std::dynamic_pointer_cast<const Uniform>(format_from_spec(name));
    const Tensor decoded = tensors.extract("decoded").mapped();
    const PackedTensor packed = from_compressed_tensors(
        tensors, {format->bits, format->group_size, format->symmetric, WordPadding::dense});
    expect_decodes_to(packed, decoded);
    expect_same_bytes(to_compressed_tensors(packed), tensors);
    ++count;
  }
  EXPECT_EQ(count, 8);
}

}  // namespace
}  // namespace quantloom
