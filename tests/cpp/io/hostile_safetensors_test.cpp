// Safetensors files made by hand to break one rule each. The error must be of the right class and name the
// tensor and the rule.
#include "io/file_bytes.hpp"

namespace quantloom {
namespace {

using test::as_bytes;
using test::file_bytes;

enum class Kind { format, unsupported };

struct Hostile {
  std::string name;
  std::string bytes;
  std::vector<std::string> mentions;
  Kind kind = Kind::format;
};

std::string with_length(uint64_t length, const std::string& rest) {
  std::string bytes = file_bytes("", rest);
  std::memcpy(bytes.data(), &length, 8);
  return bytes;
}

// One tensor "t" whose entry has these three values.
std::string entry(const std::string& dtype, const std::string& shape, const std::string& offsets,
                  const std::string& data = "") {
  return file_bytes(
      "{\"t\":{\"dtype\":" + dtype + ",\"shape\":" + shape + ",\"data_offsets\":" + offsets + "}}", data);
}

std::string bytes_tensor(const std::string& name, int begin, int end) {
  return text_of("\"", name, "\":{\"dtype\":\"U8\",\"shape\":[", end - begin, "],\"data_offsets\":[", begin,
                 ",", end, "]}");
}

std::string metadata(const std::string& value) {
  return file_bytes("{\"__metadata__\":" + value + "}");
}

std::vector<Hostile> length_cases() {
  return {
      {"empty file", "", {"header length", "0 bytes"}},
      {"one byte", "{", {"header length", "1 bytes"}},
      {"seven bytes", std::string(7, '\0'), {"header length", "7 bytes"}},
      {"length without header", with_length(2, ""), {"header length: got 2"}},
      {"length one too large", with_length(3, "{}"), {"header length: got 3", "2 bytes follow"}},
      {"length zero", with_length(0, ""), {"does not begin"}},
      {"length zero, data", with_length(0, "{}"), {"does not begin"}},
      {"length above the limit", with_length((32U << 20) + 1, "{}"), {"header length", "limit is 33554432"}},
      {"length 2^32 + 2", with_length((uint64_t{1} << 32) + 2, "{}"), {"header length", "4294967298"}},
      {"length 2^63", with_length(uint64_t{1} << 63, "{}"), {"header length", "9223372036854775808"}},
      {"length 2^64 - 1", with_length(~uint64_t{0}, "{}"), {"header length", "18446744073709551615"}},
      {"length 2^64 - 8", with_length(~uint64_t{0} - 7, "{}"), {"header length", "18446744073709551608"}},
      {"length big-endian", with_length(uint64_t{2} << 56, "{}"), {"header length"}},
      {"length cuts the header", with_length(1, "{}"), {"JSON"}},
  };
}

std::vector<Hostile> json_cases() {
  std::vector<Hostile> cases;
  for (const std::string first : {"[]", " {}", "\n{}", "\xef\xbb\xbf{}", "\"a\"", "null", "}", "0"}) {
    cases.push_back({"begins with " + first, file_bytes(first), {"header", "begin"}});
  }
  cases.push_back({"begins with NUL", file_bytes(std::string("\0{}", 3)), {"begin"}});
  for (const std::string text : {"{",
                                 "{\"a\"",
                                 "{\"a\":",
                                 "{,}",
                                 "{\"__metadata__\":{},}",
                                 "{\"__metadata__\":{},,\"a\":{}}",
                                 "{'a':{}}",
                                 "{a:{}}",
                                 "{\"__metadata__\" {}}",
                                 "{}x",
                                 "{}{}",
                                 "{}]",
                                 "{} /* c */",
                                 "{} // c",
                                 "{]",
                                 "{\"__metadata__\":{}",
                                 "{\"__metadata__\":{\"a\":\"b}}",
                                 "{\"__metadata__\":{\"a\":\"\\x41\"}}",
                                 "{\"__metadata__\":{\"a\":\"\\u12\"}}",
                                 "{\"__metadata__\":{\"a\":\"\\ud800\"}}",
                                 "{\"__metadata__\":{\"a\":\"\\udc00\"}}",
                                 "{\"__metadata__\":{\"a\":\"\\udc00\\ud800\"}}",
                                 "{\"__metadata__\":{\"a\":\"\n\"}}",
                                 "{\"__metadata__\":{\"a\":\"\x01\"}}",
                                 "{\"\xff\":{}}",
                                 "{\"\xc0\xaf\":{}}",
                                 "{\"\xe0\x80\x80\":{}}",
                                 "{\"\xed\xa0\x80\":{}}",
                                 "{\"\xf4\x90\x80\x80\":{}}",
                                 "{\"\xf5\x80\x80\x80\":{}}",
                                 "{\"\xe2\x82\":{}}",
                                 "{\"\x80\":{}}",
                                 "{\"a\":nul}",
                                 "{\"a\":NaN}",
                                 "{\"a\":Infinity}",
                                 "{\"a\":+1}",
                                 "{\"a\":.5}",
                                 "{\"a\":1.}",
                                 "{\"a\":1e999}",
                                 "{\"a\":tru"}) {
    cases.push_back({"text " + text, file_bytes(text), {"JSON"}});
  }
  cases.push_back({"NUL after the object", file_bytes(std::string("{}\0", 3)), {"NUL"}});
  cases.push_back(
      {"a number of 65 digits", file_bytes("{\"t\":" + std::string(65, '1') + "}"), {"more than 64"}});
  cases.push_back({"a long number after an escape",
                   file_bytes("{\"__metadata__\":{\"a\\\\\":" + std::string(65, '1') + "}}"),
                   {"more than 64"}});
  cases.push_back({"NUL and more", file_bytes(std::string("{}\0{\"a\":1}", 10)), {"NUL"}});
  cases.push_back({"NUL in a name", file_bytes(std::string("{\"a\0b\":{}}", 10)), {"NUL"}});
  cases.push_back({"UTF-16", file_bytes(std::string("{\0\"\0a\0\"\0:\0", 10)), {"NUL"}});
  return cases;
}

std::vector<Hostile> structure_cases() {
  std::vector<Hostile> cases;
  for (const std::string value : {"1", "-1", "1.5", "01", "\"x\"", "[]", "null", "true"}) {
    cases.push_back({"tensor " + value, file_bytes("{\"t\":" + value + "}"), {"tensor \"t\"", "object"}});
    cases.push_back({"metadata " + value, metadata(value), {"__metadata__", "object of strings"}});
  }
  for (const std::string value :
       {"1", "-1", "1.5", "{}", "[]", "null", "false", "[\"a\"]", "{\"b\":\"c\"}"}) {
    cases.push_back(
        {"metadata value " + value, metadata("{\"k\":" + value + "}"), {"__metadata__ \"k\"", "a string"}});
  }
  const std::string good = R"("dtype":"U8","shape":[0],"data_offsets":[0,0])";
  const std::string again = ",\"t\":{" + good + "}}";
  cases.insert(
      cases.end(),
      {{"metadata key twice", metadata(R"({"k":"a","k":"a"})"), {"__metadata__", "duplicate", "\"k\""}},
       {"metadata key twice by escape", metadata(R"({"k":"a","\u006b":"b"})"), {"__metadata__", "duplicate"}},
       {"metadata twice",
        file_bytes(R"({"__metadata__":{},"__metadata__":{}})"),
        {"duplicate", "__metadata__"}},
       {"tensor twice", file_bytes("{\"t\":{" + good + "}" + again), {"tensor \"t\"", "duplicate"}},
       {"tensor twice by escape",
        file_bytes("{\"\\u0074\":{" + good + "}" + again),
        {"tensor \"t\"", "duplicate"}},
       {"empty name twice",
        file_bytes("{\"\":{" + good + "},\"\":{" + good + "}}"),
        {"tensor \"\"", "duplicate"}},
       {"empty entry", file_bytes("{\"t\":{}}"), {"tensor \"t\"", "\"dtype\"", "missing"}},
       {"no dtype",
        file_bytes(R"({"t":{"shape":[0],"data_offsets":[0,0]}})"),
        {"tensor \"t\"", "\"dtype\"", "missing"}},
       {"no shape",
        file_bytes(R"({"t":{"dtype":"U8","data_offsets":[0,0]}})"),
        {"tensor \"t\"", "\"shape\"", "missing"}},
       {"no offsets",
        file_bytes(R"({"t":{"dtype":"U8","shape":[0]}})"),
        {"tensor \"t\"", "\"data_offsets\"", "missing"}},
       {"extra key",
        file_bytes("{\"t\":{" + good + ",\"extra\":1}}"),
        {"tensor \"t\"", "unknown key", "\"extra\""}},
       {"offset in old style",
        file_bytes(R"({"t":{"dtype":"U8","shape":[0],"offsets":[0,0]}})"),
        {"unknown key"}},
       {"key in other case",
        file_bytes(R"({"t":{"Dtype":"U8","shape":[0],"data_offsets":[0,0]}})"),
        {"unknown key"}},
       {"dtype twice",
        file_bytes("{\"t\":{" + good + ",\"dtype\":\"U8\"}}"),
        {"tensor \"t\"", "duplicate", "\"dtype\""}},
       {"shape twice",
        file_bytes("{\"t\":{" + good + ",\"shape\":[0]}}"),
        {"tensor \"t\"", "duplicate", "\"shape\""}},
       {"offsets twice",
        file_bytes("{\"t\":{" + good + ",\"data_offsets\":[0,0]}}"),
        {"duplicate", "\"data_offsets\""}},
       {"tensor within a tensor",
        file_bytes("{\"t\":{\"u\":{" + good + "}}}"),
        {"tensor \"t\"", "unknown key"}},
       {"second tensor is broken", file_bytes("{\"ok\":{" + good + "},\"t\":3}"), {"tensor \"t\""}},
       {"deep nesting", file_bytes("{\"t\":" + std::string(100000, '[')), {"tensor \"t\"", "an array"}},
       {"deep objects",
        file_bytes([] {
          std::string text = "{";
          for (int i = 0; i < 100000; ++i) text += "\"a\":{";
          return text;
        }()),
        {"tensor \"a\"", "unknown key"}}});
  return cases;
}

std::vector<Hostile> entry_cases() {
  std::vector<Hostile> cases;
  for (const std::string dtype :
       {"\"U9\"", "\"u8\"", "\"\"", "\"float32\"", "\"F32 \"", "\"F\"", "\"U8\\u0000\""}) {
    cases.push_back(
        {"dtype " + dtype, entry(dtype, "[0]", "[0,0]"), {"tensor \"t\": dtype", "element type"}});
  }
  for (const std::string dtype : {"1", "null", "[\"U8\"]", "{}", "true", "-3", "1.0"}) {
    cases.push_back({"dtype " + dtype, entry(dtype, "[0]", "[0,0]"), {"tensor \"t\": dtype", "a string"}});
  }
  for (const std::string dtype :
       {"C64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4"}) {
    cases.push_back({"dtype " + dtype,
                     entry("\"" + dtype + "\"", "[0]", "[0,0]"),
                     {"tensor \"t\"", dtype, "not supported"},
                     Kind::unsupported});
  }
  for (const std::string shape : {"1", "\"1\"", "{}", "null", "true", "-1", "1.0"}) {
    cases.push_back(
        {"shape " + shape, entry("\"U8\"", shape, "[0,0]"), {"tensor \"t\": shape", "array of sizes"}});
  }
  for (const std::string value :
       {"-1", "-0", "1.0", "1e2", "0.5", "\"1\"", "null", "true", "[1]", "{}", "9223372036854775808",
        "18446744073709551615", "18446744073709551616", "100000000000000000000000000000000"}) {
    cases.push_back({"dimension " + value,
                     entry("\"U8\"", "[" + value + "]", "[0,1]", "x"),
                     {"tensor \"t\": shape", "integers from 0 to 2^63 - 1"}});
    cases.push_back({"offset " + value,
                     entry("\"U8\"", "[1]", "[0," + value + "]", "x"),
                     {"tensor \"t\": data_offsets", "integers from 0 to 2^63 - 1"}});
  }
  for (const std::string offsets : {"1", "\"0,1\"", "{}", "null", "true"}) {
    cases.push_back({"offsets " + offsets,
                     entry("\"U8\"", "[1]", offsets, "x"),
                     {"tensor \"t\": data_offsets", "array"}});
  }
  cases.insert(
      cases.end(),
      {{"no offsets", entry("\"U8\"", "[1]", "[]", "x"), {"tensor \"t\": data_offsets", "0 offsets"}},
       {"one offset", entry("\"U8\"", "[1]", "[1]", "x"), {"tensor \"t\": data_offsets", "1 offsets"}},
       {"three offsets",
        entry("\"U8\"", "[1]", "[0,1,1]", "x"),
        {"tensor \"t\": data_offsets", "more than two"}},
       {"begin above end", entry("\"U8\"", "[1]", "[1,0]", "x"), {"tensor \"t\": data_offsets", "above end"}},
       {"rank 9",
        entry("\"U8\"", "[1,1,1,1,1,1,1,1,1]", "[0,1]", "x"),
        {"tensor \"t\": shape", "8 dimensions"}}});
  return cases;
}

std::vector<Hostile> size_cases() {
  const std::string two62 = "4611686018427387904";
  return {
      {"one byte too many", entry("\"U8\"", "[1]", "[0,2]", "xx"), {"tensor \"t\": data_offsets", "takes 1"}},
      {"one byte too few", entry("\"U8\"", "[2]", "[0,1]", "x"), {"tensor \"t\": data_offsets", "takes 2"}},
      {"element size forgotten",
       entry("\"F32\"", "[2]", "[0,2]", "xx"),
       {"tensor \"t\": data_offsets", "takes 8"}},
      {"scalar of no bytes", entry("\"U8\"", "[]", "[0,0]"), {"tensor \"t\": data_offsets", "takes 1"}},
      {"empty tensor of one byte",
       entry("\"U8\"", "[0]", "[0,1]", "x"),
       {"tensor \"t\": data_offsets", "takes 0"}},
      {"2^32 * 2^32",
       entry("\"U8\"", "[4294967296,4294967296]", "[0,0]"),
       {"tensor \"t\": shape", "overflows"}},
      {"2^62 * 4", entry("\"U8\"", "[" + two62 + ",4]", "[0,0]"), {"tensor \"t\": shape", "overflows"}},
      {"2^62 * 2 bytes", entry("\"F16\"", "[" + two62 + "]", "[0,0]"), {"tensor \"t\": shape", "overflows"}},
      {"2^60 * 8 bytes",
       entry("\"F64\"", "[1152921504606846976]", "[0,0]"),
       {"tensor \"t\": shape", "overflows"}},
      {"2^61 * 2^3",
       entry("\"U8\"", "[2,2305843009213693952,2,2]", "[0,0]"),
       {"tensor \"t\": shape", "overflows"}},
      {"wraps to one byte",
       entry("\"U8\"", "[18446744073709551,1001]", "[0,1]", "x"),
       {"tensor \"t\"", "shape"}},
      {"2^62 bytes",
       entry("\"U8\"", "[" + two62 + "]", "[0," + two62 + "]", "x"),
       {"tensor \"t\"", "the file has 1 bytes"}},
      {"data missing", entry("\"U8\"", "[4]", "[0,4]", ""), {"tensor \"t\"", "the file has 0 bytes"}},
      {"data cut", entry("\"U8\"", "[4]", "[0,4]", "abc"), {"tensor \"t\"", "the file has 3 bytes"}},
      {"byte after the data", entry("\"U8\"", "[4]", "[0,4]", "abcde"), {"file size", "1 bytes follow"}},
      {"byte after no tensors", file_bytes("{}", "x"), {"file size", "1 bytes follow"}},
      {"second file behind", file_bytes("{}", file_bytes("{}")), {"file size", "10 bytes follow"}},
      {"hole at the start", entry("\"U8\"", "[1]", "[1,2]", "xx"), {"tensor \"t\"", "hole"}},
      {"begins far behind",
       entry("\"U8\"", "[0]", "[9223372036854775807,9223372036854775807]"),
       {"tensor \"t\"", "hole"}},
      {"empty tensor behind", entry("\"U8\"", "[0]", "[1,1]", "x"), {"tensor \"t\"", "hole"}},
      {"hole",
       file_bytes("{" + bytes_tensor("a", 0, 2) + "," + bytes_tensor("b", 3, 4) + "}", "abcd"),
       {"tensor \"b\"", "hole"}},
      {"overlap",
       file_bytes("{" + bytes_tensor("a", 0, 3) + "," + bytes_tensor("b", 2, 4) + "}", "abcd"),
       {"tensor \"b\"", "overlap"}},
      {"same range",
       file_bytes("{" + bytes_tensor("a", 0, 4) + "," + bytes_tensor("b", 0, 4) + "}", "abcd"),
       {"tensor", "overlap"}},
      {"range inside",
       file_bytes("{" + bytes_tensor("a", 0, 4) + "," + bytes_tensor("b", 1, 3) + "}", "abcd"),
       {"tensor \"b\"", "overlap"}},
      {"empty tensor inside",
       file_bytes("{" + bytes_tensor("a", 0, 4) + "," + bytes_tensor("b", 2, 2) + "}", "abcd"),
       {"tensor \"b\"", "overlap"}},
      {"overlap of three",
       file_bytes("{" + bytes_tensor("c", 0, 2) + "," + bytes_tensor("b", 1, 3) + "," +
                      bytes_tensor("a", 3, 4) + "}",
                  "abcd"),
       {"tensor \"b\"", "overlap"}},
  };
}

std::vector<Hostile> all_cases() {
  std::vector<Hostile> cases;
  for (const auto& part : {length_cases(), json_cases(), structure_cases(), entry_cases(), size_cases()}) {
    cases.insert(cases.end(), part.begin(), part.end());
  }
  cases.push_back({"name of 513 bytes",
                   file_bytes("{\"" + std::string(513, 'n') + "\":{}}"),
                   {"tensor \"nnn", "513 bytes"}});
  return cases;
}

TEST(HostileSafetensors, EachFileIsRefusedByName) {
  const std::vector<Hostile> cases = all_cases();
  RecordProperty("cases", std::to_string(cases.size()));
  EXPECT_GE(cases.size(), 200U);
  for (const Hostile& hostile : cases) {
    SCOPED_TRACE(hostile.name);
    std::string message;
    try {
      SafetensorsFile::parse(as_bytes(hostile.bytes), "LABEL");
      ADD_FAILURE() << "was read";
    } catch (const FileFormatError& error) {
      EXPECT_EQ(hostile.kind, Kind::format) << error.what();
      message = error.what();
    } catch (const Unsupported& error) {
      EXPECT_EQ(hostile.kind, Kind::unsupported) << error.what();
      message = error.what();
    }
    EXPECT_EQ(message.rfind("LABEL: ", 0), 0U) << message;
    EXPECT_LT(message.size(), 1000U);
    for (const std::string& mention : hostile.mentions) {
      EXPECT_NE(message.find(mention), std::string::npos) << message << "\n  should mention: " << mention;
    }
  }
}

TEST(HostileSafetensors, SameErrorsFromFiles) {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("hostile");
  for (const Hostile& hostile : all_cases()) {
    test::write_file(path, hostile.bytes);
    EXPECT_THROW(SafetensorsFile::open(path), Error) << hostile.name;
  }
}

TEST(HostileSafetensors, LimitsOfTheCaller) {
  const std::string bytes = file_bytes("{\"__metadata__\":{\"a\":\"\",\"b\":\"\"}," +
                                       bytes_tensor("x", 0, 0) + "," + bytes_tensor("yy", 0, 0) + "}");
  const auto message = [&](const SafetensorsLimits& limits) {
    return test::message_of<FileFormatError>(
        [&] { SafetensorsFile::parse(as_bytes(bytes), "f", nullptr, limits); });
  };
  EXPECT_NE(message({.header_bytes = std::ssize(bytes) - 9}).find("header length"), std::string::npos);
  EXPECT_NE(message({.header_bytes = -1}).find("header length"), std::string::npos);
  EXPECT_NE(message({.tensors = 1}).find("more than 1 tensors"), std::string::npos);
  EXPECT_NE(message({.rank = 0}).find("more than 0 dimensions"), std::string::npos);
  EXPECT_NE(message({.name_bytes = 1}).find("\"yy\""), std::string::npos);
  EXPECT_NE(message({.metadata_entries = 1}).find("more than 1 entries"), std::string::npos);
}

TEST(HostileSafetensors, LegalOddities) {
  const auto names = [](const std::string& bytes) {
    return SafetensorsFile::parse(as_bytes(bytes), "odd").names().size();
  };
  EXPECT_EQ(names(file_bytes("{}   ")), 0U);
  EXPECT_EQ(names(file_bytes("{} \n\t\r")), 0U);
  EXPECT_EQ(names(file_bytes("{\"__metadata__\":{\"\\\"a\":\"" + std::string(65, '1') + "\"}}")), 0U);
  EXPECT_EQ(names(entry("\"U8\"", "[]", "[0,1]", "x")), 1U);
  EXPECT_EQ(names(entry("\"F64\"", "[0,9223372036854775807,9]", "[0,0]")), 1U);
  EXPECT_EQ(names(entry("\"BF16\"", "[1,1,1,1,1,1,1,1]", "[0,2]", "xx")), 1U);
  EXPECT_EQ(names(file_bytes("{" + bytes_tensor("", 0, 0) + "," + bytes_tensor("a", 0, 0) + "," +
                                 bytes_tensor("b", 0, 1) + "}",
                             "x")),
            3U);
  EXPECT_EQ(names(file_bytes("{" + bytes_tensor("\\u0000\\ud83d\\ude00", 0, 1) + "}", "x")), 1U);
}

TEST(HostileSafetensors, BooleansOtherThanZeroAndOne) {
  const std::string bytes = entry("\"BOOL\"", "[3]", "[0,3]", std::string("\0\1\2", 3));
  const SafetensorsFile file = SafetensorsFile::parse(as_bytes(bytes), "f");
  const std::string message = test::message_of<FileFormatError>([&] { file.tensor("t"); });
  EXPECT_NE(message.find("tensor \"t\": boolean element 2 is 2"), std::string::npos) << message;
}

}  // namespace
}  // namespace quantloom
