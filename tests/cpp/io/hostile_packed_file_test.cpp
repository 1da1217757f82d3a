// Packed files with one thing wrong each, and files with a bit flipped or the end cut off.
#include <functional>
#include <nlohmann/json.hpp>

#include "io/file_bytes.hpp"
#include "io/packed_description.hpp"
#include "io/random_packed.hpp"
#include "quantloom/formats/codebook.hpp"
#include "quantloom/io/packed_file.hpp"
#include "quantloom/rounding/nearest.hpp"

namespace quantloom {
namespace {

using nlohmann::json;
using test::as_bytes;
using test::message_of;

// A packed file taken apart, to be put together again with anything changed.
struct Parts {
  std::map<std::string, Tensor> tensors;
  json packed;
  std::map<std::string, std::string> metadata = {{"format", "pt"}};
};

Parts good_parts() {
  const auto format = std::make_shared<const Uniform>(4, 8, false);
  const PackedTensor packed = test::random_uniform(format, 4, 24, 1);
  Parts parts;
  for (const auto& [name, plane] : packed.planes) parts.tensors.emplace("w." + name, plane);
  parts.tensors.emplace("bias", test::random_tensor(DType::f32, {4}, 2));
  parts.packed["w"] = {{"format", json::parse(format->to_json())},
                       {"k", 24},
                       {"n", 4},
                       {"planes", {"codes", "scales", "zeros"}}};
  return parts;
}

// The description with checksums and the digest of FORMATS.md, computed here a second time.
json description_of(const Parts& parts) {
  json checksums = json::object();
  std::string digested;
  for (const auto& [name, tensor] : parts.tensors) {
    const std::string checksum =
        io::checksum_text(io::checksum_of({tensor.bytes(), static_cast<size_t>(tensor.byte_count())}));
    checksums[name] = checksum;
    digested +=
        json::array({"tensor", name, safetensors_name_of(tensor.dtype()), tensor.shape(), checksum}).dump() +
        "\n";
  }
  for (const auto& [name, entry] : parts.packed.items()) {
    digested += json::array({"packed", name, entry.value("format", json()), entry.value("n", json()),
                             entry.value("k", json()), entry.value("planes", json())})
                    .dump() +
                "\n";
  }
  for (const auto& [key, value] : parts.metadata)
    digested += json::array({"metadata", key, value}).dump() + "\n";
  return {{"checksums", checksums},
          {"digest", io::checksum_text(io::checksum_of(as_bytes(digested)))},
          {"packed", parts.packed},
          {"version", 1}};
}

std::string file_of(const Parts& parts, const std::string& description) {
  const test::TemporaryFolder folder;
  std::map<std::string, std::string> metadata = parts.metadata;
  metadata["quantloom"] = description;
  write_safetensors(folder.file("f"), parts.tensors, metadata);
  return test::read_file(folder.file("f"));
}

void load_all(const std::string& bytes) {
  const PackedFileReader reader = PackedFileReader::parse(as_bytes(bytes), "LABEL");
  for (const auto& [name, description] : reader.packed()) reader.load_packed(name);
  for (const std::string& name : reader.plain()) reader.load_plain(name);
}

void expect_refused(const std::string& name, const std::string& bytes,
                    const std::vector<std::string>& mentions) {
  SCOPED_TRACE(name);
  const std::string message = message_of<FileFormatError>([&] { load_all(bytes); });
  EXPECT_EQ(message.rfind("LABEL: ", 0), 0U) << message;
  for (const std::string& mention : mentions) {
    EXPECT_NE(message.find(mention), std::string::npos) << message << "\n  should mention: " << mention;
  }
}

TEST(HostilePackedFile, TheGoodFileLoads) {
  const Parts parts = good_parts();
  load_all(file_of(parts, description_of(parts).dump()));
  // And is what the library writes.
  PackedFile file;
  PackedTensor packed{format_from_json(parts.packed["w"]["format"].dump()), 4, 24, {}};
  for (const std::string plane : {"codes", "scales", "zeros"})
    packed.planes[plane] = parts.tensors.at("w." + plane);
  file.packed["w"] = packed;
  file.plain["bias"] = parts.tensors.at("bias");
  const test::TemporaryFolder folder;
  save_packed(folder.file("f"), file);
  EXPECT_EQ(test::read_file(folder.file("f")), file_of(parts, description_of(parts).dump()));
}

// A table stands in the description and in a plane: they have to agree.
TEST(HostilePackedFile, CodebooksThatContradictTheirDescription) {
  const auto format = std::make_shared<const Codebook>(std::vector<float>{-2, 0, 1}, 8);
  std::vector<float> w(4 * 24);
  for (size_t i = 0; i < w.size(); ++i) w[i] = static_cast<float>(i % 7) - 3;
  const PackedTensor packed = round_nearest(MatrixView<const float>(w.data(), 4, 24), format).tensor;
  Parts good;
  for (const auto& [name, plane] : packed.planes) good.tensors.emplace("w." + name, plane);
  good.packed["w"] = {{"format", json::parse(format->to_json())},
                      {"k", 24},
                      {"n", 4},
                      {"planes", {"codebook", "codes", "scales"}}};
  load_all(file_of(good, description_of(good).dump()));
  struct Case {
    const char* name;
    std::function<void(Parts&)> change;
    std::vector<std::string> mentions;
  };
  const auto table = [](const json& values) {
    return [=](Parts& p) { p.packed["w"]["format"]["table"] = values; };
  };
  // Fresh memory: copies of a Tensor share theirs.
  const auto entry = [](uint16_t bits) {
    return [=](Parts& p) {
      Tensor plane(DType::f16, {3});
      std::ranges::copy(p.tensors.at("w.codebook").values<uint16_t>(), plane.values<uint16_t>().begin());
      plane.values<uint16_t>()[1] = bits;
      p.tensors.at("w.codebook") = plane;
    };
  };
  const std::vector<Case> cases = {
      {"NaN", entry(0x7e00), {"plane codebook", "nan"}},
      {"infinity", entry(0x7c00), {"plane codebook", "inf"}},
      {"another value", entry(0x3800), {"plane codebook", "0.5", "entry 1"}},
      {"-0", entry(0x8000), {"plane codebook", "-0"}},
      {"another table", table({-2, 0, 1.5}), {"plane codebook", "entry 2"}},
      {"a longer table", table({-2, 0, 1, 2}), {"plane codebook", "[3]", "[4]"}},
      {"a table that falls", table({-2, 1, 0}), {"rise strictly"}},
      {"a table beyond float16", table({-2, 0, 0.1}), {"float16"}},
      {"a name of another width", table("nf4"), {"bits"}},
      {"an unknown name", table("nf9"), {"nf9"}},
      {"a code beyond the table",
       [](Parts& p) {
         Tensor codes(DType::i32, {4, 2});
         codes.values<uint32_t>()[5] = 3;
         p.tensors.at("w.codes") = codes;
       },
       {"plane codes", "row 2, column 16"}},
      {"no table",
       [](Parts& p) {
         p.tensors.erase("w.codebook");
         p.packed["w"]["planes"] = {"codes", "scales"};
       },
       {"codebook"}},
  };
  for (const Case& each : cases) {
    Parts parts = good;
    each.change(parts);
    expect_refused(each.name, file_of(parts, description_of(parts).dump()), each.mentions);
  }
}

TEST(HostilePackedFile, BrokenDescriptionText) {
  const Parts parts = good_parts();
  const std::string good = description_of(parts).dump();
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"", "JSON"},
      {"{", "JSON"},
      {"[]", "an array"},
      {"null", "a value"},
      {"1", "a value"},
      {"\"x\"", "a value"},
      {"{}", "no version"},
      {good + "x", "JSON"},
      {good + good, "JSON"},
      {"{\"version\":2}", "version 2"},
      {"{\"version\":0}", "version 0"},
      {"{\"version\":-1}", "version"},
      {"{\"version\":1.0}", "version"},
      {"{\"version\":\"1\"}", "version"},
      {"{\"version\":null}", "no version"},
      {"{\"version\":[1]}", "version"},
      {"{\"version\":{}}", "version"},
      {"{\"version\":18446744073709551616}", "version"},
      {"{\"version\":1,\"version\":1}", "duplicate"},
      {"{\"version\":3,\"new\":{\"a\":[1,null]}}", "version 3"},
      {"{\"version\":1}", "missing"},
      {"{\"version\":1,\"digest\":\"\"}", "digest"},
      {"{\"version\":1,\"digest\":\"0123456789abcdeF\"}", "digest"},
      {"{\"version\":1,\"digest\":\"0123456789abcde\"}", "digest"},
      {"{\"version\":1,\"digest\":\"0123456789abcdef0\"}", "digest"},
      {"{\"version\":1,\"digest\":5}", "digest"},
      {"{\"version\":1,\"extra\":5}", "\"extra\""},
      {"{\"version\":1,\"packed\":[]}", "packed"},
      {"{\"version\":1,\"packed\":{},\"packed\":{}}", "duplicate"},
      {"{\"version\":1,\"packed\":{\"a\":{},\"a\":{}}}", "\"a\""},
      {"{\"version\":1,\"packed\":{\"a\":3}}", "\"a\""},
      {"{\"version\":1,\"packed\":{\"a\":{\"n\":1,\"n\":1}}}", "duplicate"},
      {"{\"version\":1,\"packed\":{\"a\":{\"m\":1}}}", "\"m\""},
      {"{\"version\":1,\"packed\":{\"a\":{\"n\":-1}}}", "\"a\": n"},
      {"{\"version\":1,\"packed\":{\"a\":{\"k\":1.5}}}", "\"a\": k"},
      {"{\"version\":1,\"packed\":{\"a\":{\"k\":2147483648}}}", "\"a\": k"},
      {"{\"version\":1,\"packed\":{\"a\":{\"n\":\"1\"}}}", "\"a\": n"},
      {"{\"version\":1,\"packed\":{\"a\":{\"planes\":{}}}}", "\"a\": planes"},
      {"{\"version\":1,\"packed\":{\"a\":{\"planes\":[1]}}}", "\"a\": planes"},
      {"{\"version\":1,\"packed\":{\"a\":{\"planes\":[\"\"]}}}", "\"a\": planes"},
      {"{\"version\":1,\"packed\":{\"a\":{\"planes\":[\"A\"]}}}", "\"a\": planes"},
      {"{\"version\":1,\"packed\":{\"a\":{\"planes\":[\"../x\"]}}}", "\"a\": planes"},
      {"{\"version\":1,\"packed\":{\"a\":{\"planes\":[\"b\",\"a\"]}}}", "out of order"},
      {"{\"version\":1,\"packed\":{\"a\":{\"planes\":[\"b\",\"b\"]}}}", "out of order"},
      {"{\"version\":1,\"packed\":{\"a\":{\"format\":[]}}}", "\"a\": format"},
      {"{\"version\":1,\"packed\":{\"a\":{\"format\":\"uniform\"}}}", "\"a\": format"},
      {"{\"version\":1,\"packed\":{\"a\":{\"format\":{}}}}", "\"a\": format"},
      {"{\"version\":1,\"packed\":{\"a\":{\"format\":{\"format\":\"later\"}}}}", "later"},
      {"{\"version\":1,\"packed\":{\"a\":{\"format\":{\"bits\":1,\"bits\":1}}}}", "duplicate"},
      {"{\"version\":1,\"packed\":{\"a\":{\"format\":{\"x\":[[[[[[[[1]]]]]]]]}}}}", "deeper"},
      {"{\"version\":1,\"checksums\":[]}", "checksums"},
      {"{\"version\":1,\"checksums\":{\"a\":1}}", "\"a\""},
      {"{\"version\":1,\"checksums\":{\"a\":\"zz\"}}", "\"a\""},
      {"{\"version\":1,\"checksums\":{\"a\":\"0000000000000000\",\"a\":\"0000000000000000\"}}", "duplicate"},
  };
  for (const auto& [text, mention] : cases)
    expect_refused(text, file_of(parts, text), {"quantloom", mention});
  std::string many = "{\"version\":1,\"packed\":{\"a\":{\"format\":{\"x\":[0";
  for (int i = 0; i < 1000; ++i) many += ",0";
  expect_refused("many values", file_of(parts, many + "]}}}}"), {"\"a\": format", "more than"});
  std::string crowd = "{\"version\":1,\"packed\":{";
  for (int i = 0; i < 100; ++i) crowd += text_of(i == 0 ? "" : ",", "\"", i, "\":", parts.packed["w"].dump());
  expect_refused("more packed than stored", file_of(parts, crowd + "}}"), {"more packed"});
  expect_refused("deep", file_of(parts, "{\"version\":1,\"a\":" + std::string(100000, '[') + "}"),
                 {"deeper"});
}

// Changes that the digest would not catch, since it is made to fit; what is left must be caught by meaning.
TEST(HostilePackedFile, DescriptionsThatContradictTheFile) {
  struct Case {
    std::string name;
    std::function<void(Parts&)> change;
    std::vector<std::string> mentions;
  };
  const auto format = [](const char* key, json value) {
    return [key, value](Parts& parts) { parts.packed["w"]["format"][key] = value; };
  };
  const std::vector<Case> cases = {
      {"other bits", format("bits", 3), {"\"w\"", "plane codes"}},
      {"no bits", [](Parts& p) { p.packed["w"]["format"].erase("bits"); }, {"\"w\": format", "bits"}},
      {"unknown format key", format("extra", 1), {"\"w\": format", "extra"}},
      {"format version 2", format("version", 2), {"\"w\": format", "version"}},
      {"symmetric without its zero", format("symmetric", true), {"\"w\": format", "zero_point"}},
      {"other group size", format("group_size", 6), {"\"w\"", "plane scales"}},
      {"group size 0", format("group_size", 0), {"\"w\": format", "group_size"}},
      {"group size 2^63", format("group_size", uint64_t{1} << 63), {"\"w\": format", "group_size"}},
      {"per tensor", format("group_size", "tensor"), {"\"w\"", "plane scales"}},
      {"other scale type", format("scale_dtype", "bfloat16"), {"\"w\"", "plane scales", "bfloat16"}},
      {"unknown scale type", format("scale_dtype", "float8"), {"\"w\": format", "float8"}},
      {"five bits", [](Parts& p) { p.packed["w"]["format"]["bits"] = 5; }, {"\"w\"", "plane codes"}},
      {"n too large", [](Parts& p) { p.packed["w"]["n"] = 5; }, {"\"w\"", "plane codes"}},
      {"n too small", [](Parts& p) { p.packed["w"]["n"] = 3; }, {"\"w\"", "plane codes"}},
      {"n huge", [](Parts& p) { p.packed["w"]["n"] = (int64_t{1} << 31) - 1; }, {"\"w\"", "plane codes"}},
      {"k too large", [](Parts& p) { p.packed["w"]["k"] = 25; }, {"\"w\"", "plane"}},
      {"k zero", [](Parts& p) { p.packed["w"]["k"] = 0; }, {"\"w\"", "plane codes"}},
      {"no n", [](Parts& p) { p.packed["w"].erase("n"); }, {"\"w\"", "\"n\" is missing"}},
      {"no format", [](Parts& p) { p.packed["w"].erase("format"); }, {"\"w\"", "\"format\" is missing"}},
      {"no planes", [](Parts& p) { p.packed["w"].erase("planes"); }, {"\"w\"", "\"planes\" is missing"}},
      {"empty planes", [](Parts& p) { p.packed["w"]["planes"] = json::array(); }, {"\"w\"", "plane codes"}},
      {"plane not listed",
       [](Parts& p) {
         p.packed["w"]["planes"] = {"codes", "scales"};
       },
       {"\"w\"", "plane zeros"}},
      {"plane not stored", [](Parts& p) { p.tensors.erase("w.zeros"); }, {"\"w\"", "zeros", "not stored"}},
      {"plane too many",
       [](Parts& p) {
         p.tensors["w.extra"] = Tensor(DType::u8, {1});
         p.packed["w"]["planes"] = {"codes", "extra", "scales", "zeros"};
       },
       {"\"w\"", "plane extra"}},
      {"plane of another type",
       [](Parts& p) {
         p.tensors["w.codes"] = Tensor(DType::u32, {4, 3});
       },
       {"\"w\"", "plane codes", "uint32"}},
      {"plane of another shape",
       [](Parts& p) {
         p.tensors["w.codes"] = Tensor(DType::i32, {3, 4});
       },
       {"\"w\"", "plane codes", "[3, 4]"}},
      {"plane of another rank",
       [](Parts& p) { p.tensors["w.zeros"] = Tensor(DType::i32, {3}); },
       {"\"w\"", "plane zeros"}},
      {"infinite scale",
       [](Parts& p) { p.tensors["w.scales"].values<uint16_t>()[4] = 0x7c00; },
       {"\"w\"", "plane scales", "row 1"}},
      {"NaN scale",
       [](Parts& p) { p.tensors["w.scales"].values<uint16_t>()[0] = 0x7e01; },
       {"\"w\"", "plane scales"}},
      {"padding bits in zeros",
       [](Parts& p) { p.tensors["w.zeros"].values<uint32_t>()[0] |= 1U << 31; },
       {"\"w\"", "plane zeros"}},
      {"group index out of range",
       [](Parts& p) {
         p.tensors["w.group_index"] = Tensor(DType::i32, {24});
         p.tensors["w.group_index"].values<int32_t>()[7] = 3;
         p.packed["w"]["planes"] = {"codes", "group_index", "scales", "zeros"};
       },
       {"\"w\"", "group_index"}},
      {"group index negative",
       [](Parts& p) {
         p.tensors["w.group_index"] = Tensor(DType::i32, {24});
         p.tensors["w.group_index"].values<int32_t>()[23] = -1;
         p.packed["w"]["planes"] = {"codes", "group_index", "scales", "zeros"};
       },
       {"\"w\"", "group_index"}},
      {"packed without a name", [](Parts& p) { p.packed[""] = p.packed["w"]; }, {"packed tensor \"\""}},
      {"packed that is not there",
       [](Parts& p) { p.packed["v"] = p.packed["w"]; },
       {"\"v\"", "codes", "not stored"}},
  };
  for (const Case& one : cases) {
    Parts parts = good_parts();
    one.change(parts);
    expect_refused(one.name, file_of(parts, description_of(parts).dump()), one.mentions);
  }
}

TEST(HostilePackedFile, ChecksumsAndDigestThatDoNotFit) {
  const Parts parts = good_parts();
  const json good = description_of(parts);
  const auto refused = [&](const std::string& name, const std::function<void(json&)>& change,
                           const std::vector<std::string>& mentions) {
    json changed = good;
    change(changed);
    expect_refused(name, file_of(parts, changed.dump()), mentions);
  };
  refused("checksum missing", [](json& d) { d["checksums"].erase("bias"); }, {"\"bias\"", "no checksum"});
  refused("checksum of nothing",
          [](json& d) {
            d["checksums"].erase("bias");
            d["checksums"]["ghost"] = "0000000000000000";
          },
          {"checksum"});
  refused("checksum too many", [](json& d) { d["checksums"]["ghost"] = "0000000000000000"; },
          {"more checksums"});
  refused("other checksum", [](json& d) { d["checksums"]["bias"] = "0000000000000000"; }, {"digest"});
  refused("other digest", [](json& d) { d["digest"] = "0000000000000000"; }, {"digest"});
  refused("other n", [](json& d) { d["packed"]["w"]["n"] = 3; }, {"digest"});
  refused("other group size", [](json& d) { d["packed"]["w"]["format"]["group_size"] = 9; }, {"digest"});
  refused("packed removed", [](json& d) { d["packed"] = json::object(); }, {"digest"});
  Parts renamed = parts;
  renamed.metadata["added"] = "x";
  expect_refused("metadata added", file_of(renamed, good.dump()), {"digest"});
  Parts reshaped = parts;
  reshaped.tensors["bias"] =
      Tensor(DType::f32, {2, 2},
             parts.tensors.at("bias").values<float>().empty() ? nullptr : reshaped.tensors["bias"].bytes(),
             std::make_shared<Tensor>(parts.tensors.at("bias")));
  expect_refused("shape changed", file_of(reshaped, good.dump()), {"digest"});
  Parts retyped = parts;
  retyped.tensors["bias"] = Tensor(DType::i32, {4}, retyped.tensors["bias"].bytes(),
                                   std::make_shared<Tensor>(parts.tensors.at("bias")));
  expect_refused("type changed", file_of(retyped, good.dump()), {"digest"});
}

// About 4 KiB, most of it header.
std::string sample_file() {
  const test::TemporaryFolder folder;
  PackedFile file;
  file.packed["model.layers.0.mlp.down_proj"] =
      test::random_uniform(std::make_shared<const Uniform>(3, 16, false), 24, 72, 1, 0, true);
  file.packed["model.layers.0.mlp.up_proj"] =
      test::random_uniform(std::make_shared<const Uniform>(4, 32), 16, 64, 2);
  file.plain["model.norm"] = test::random_tensor(DType::bf16, {64}, 3);
  file.plain["flags"] = test::random_tensor(DType::boolean, {9}, 4);
  file.metadata["made by"] = "quantloom, \xc3\xa9t\xc3\xa9";
  save_packed(folder.file("f"), file);
  return test::read_file(folder.file("f"));
}

TEST(HostilePackedFile, TruncationAtEveryByte) {
  const std::string bytes = sample_file();
  EXPECT_GE(bytes.size(), 3500U);
  EXPECT_LE(bytes.size(), 6000U);
  load_all(bytes);
  for (size_t size = 0; size < bytes.size(); ++size) {
    // A copy of just that size, so that a sanitizer sees any read behind it.
    const std::vector<std::byte> cut(as_bytes(bytes).begin(),
                                     as_bytes(bytes).begin() + static_cast<int64_t>(size));
    ASSERT_THROW(PackedFileReader::parse(cut, "cut"), FileFormatError) << size;
    ASSERT_THROW(SafetensorsFile::parse(cut, "cut"), FileFormatError) << size;
  }
}

// A bit flipped in the header either breaks a rule of safetensors or changes what the header says, which the
// digest covers; so no flip may go unseen, but in the key "quantloom" itself: without it the file is one of
// another library, of plain tensors only. As plain safetensors, names, metadata or types may
// turn into other legal ones, and then every tensor must still lie in the data.
TEST(HostilePackedFile, EveryBitOfTheHeader) {
  const std::string bytes = sample_file();
  uint64_t length = 0;
  std::memcpy(&length, bytes.data(), 8);
  int64_t read_as_plain = 0;
  const size_t key = bytes.find("\"quantloom\":") + 1;
  for (size_t bit = 0; bit < (8 + length) * 8; ++bit) {
    std::string flipped = bytes;
    flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << (bit % 8)));
    if (bit / 8 >= key && bit / 8 < key + 9) {
      try {
        const PackedFileReader reader = PackedFileReader::parse(as_bytes(flipped), "flipped");
        ASSERT_TRUE(reader.packed().empty());
        ASSERT_EQ(reader.plain(), reader.file().names());
      } catch (const FileFormatError&) {
      }
    } else {
      ASSERT_THROW(load_all(flipped), Error) << "bit " << bit % 8 << " of byte " << bit / 8;
    }
    try {
      const SafetensorsFile file = SafetensorsFile::parse(as_bytes(flipped), "flipped");
      ++read_as_plain;
      int64_t total = 0;
      for (const std::string& name : file.names()) {
        const SafetensorsEntry& entry = file.entry(name);
        ASSERT_GE(entry.data.data(), as_bytes(flipped).data() + 8 + length);
        ASSERT_LE(entry.data.data() + entry.data.size(), as_bytes(flipped).data() + flipped.size());
        ASSERT_EQ(std::ssize(entry.data), checked_product(entry.shape) * size_of(entry.dtype));
        total += std::ssize(entry.data);
      }
      ASSERT_EQ(total, static_cast<int64_t>(bytes.size() - 8 - length));
    } catch (const Error&) {
    }
  }
  EXPECT_GT(read_as_plain, 0);
}

TEST(HostilePackedFile, EveryBitOfTheData) {
  const std::string bytes = sample_file();
  uint64_t length = 0;
  std::memcpy(&length, bytes.data(), 8);
  const SafetensorsFile good = SafetensorsFile::parse(as_bytes(bytes), "good");
  int64_t flips = 0;
  for (size_t bit = (8 + length) * 8; bit < bytes.size() * 8; ++bit, ++flips) {
    std::string flipped = bytes;
    flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << (bit % 8)));
    const std::string message = message_of<FileFormatError>([&] { load_all(flipped); });
    std::string hit;
    for (const std::string& name : good.names()) {
      const auto first = static_cast<size_t>(good.entry(name).data.data() - as_bytes(bytes).data());
      if (bit / 8 >= first && bit / 8 < first + good.entry(name).data.size()) hit = name;
    }
    ASSERT_NE(message.find("\"" + hit + "\""), std::string::npos) << message;
    ASSERT_TRUE(message.find("checksum") != std::string::npos || message.find("boolean") != std::string::npos)
        << message;
  }
  EXPECT_GE(flips, 10000);
}

}  // namespace
}  // namespace quantloom
