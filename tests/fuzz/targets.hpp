// What the fuzzers run, as plain functions, so that the tests can replay the corpus through them. Each takes
// any bytes and returns, or aborts the process where a promise is broken.
#pragma once

#include <cstddef>
#include <span>

namespace quantloom::fuzz {

// SafetensorsFile::parse() and every tensor.
void safetensors(std::span<const std::byte> input);
// PackedFileReader on the input, and on the input with checksums and digest made to fit, so that what lies
// behind them is reached too; packed tensors are decoded and exported.
void packed_file(std::span<const std::byte> input);
// Format descriptions in JSON and in short form.
void formats(std::span<const std::byte> input);
// from_gptq(), from_awq() and from_compressed_tensors(): four bytes of settings, then a safetensors file.
void layouts(std::span<const std::byte> input);
// EntropyStream: the input as a stream if it begins like one, else two bytes of settings and codes to encode.
void entropy(std::span<const std::byte> input);

}  // namespace quantloom::fuzz
