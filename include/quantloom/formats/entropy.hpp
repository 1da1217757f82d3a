// Entropy coding of codes: canonical Huffman and rANS (Duda, 2013), without loss.
//
// A stream holds a model (frequencies or code lengths), an offset for each chunk, and the chunks, which
// decode independently of each other: on threads of the CPU, or one per warp of a GPU. Within a chunk 32
// lanes share one sequence of 16-bit words; see FORMATS.md for the bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace quantloom {

enum class EntropyCoder : uint8_t { rans = 0, huffman = 1 };

inline constexpr int64_t kEntropyAlphabet = 4096;         // codes are below it
inline constexpr int64_t kEntropyChunkStep = 128;         // a chunk holds a multiple of it
inline constexpr int64_t kEntropyLargestChunk = 1 << 20;  // codes
inline constexpr int kEntropySmallestTable = 8;           // rANS: 2^8 slots
inline constexpr int kEntropyLargestTable = 15;           // rANS: 2^15 slots
inline constexpr int kEntropyLongestCode = 16;            // Huffman: bits

// Shannon entropy in bits per code of a source with these counts; 0 if all are 0.
double entropy_of(std::span<const uint64_t> counts);

// Expected bits per code of ideal coding by a model: codes come with `counts`, the coder believes `model`.
// Infinite if a code that occurs has frequency 0 in the model.
double cross_entropy_of(std::span<const uint64_t> counts, std::span<const uint32_t> model);

// How often each code occurs: [alphabet]. Throws InvalidArgument if a code is not below `alphabet`.
std::vector<uint64_t> count_codes(std::span<const uint8_t> codes, int64_t alphabet, int threads = 0);
std::vector<uint64_t> count_codes(std::span<const uint16_t> codes, int64_t alphabet, int threads = 0);

// Frequencies with sum 2^table_bits, at least 1 for each count above 0 and 0 for the others, whose cross
// entropy to the counts is the least possible. Throws InvalidArgument if more symbols occur than there are
// slots, none occurs, or table_bits is not in [0, 16].
std::vector<uint32_t> quantize_frequencies(std::span<const uint64_t> counts, int table_bits);

// Lengths of an optimal prefix code for weights >= 0: 0 for weight 0 and for the only symbol that has one.
// longest > 0 bounds the lengths (Larmore and Hirschberg, 1990). Throws InvalidArgument for negative, NaN or
// infinite weights, and for more symbols than 2^longest.
std::vector<int> huffman_lengths(std::span<const double> weights, int longest = 0);

struct EntropyOptions {
  EntropyCoder coder = EntropyCoder::rans;
  // Counts per code, of this or other data: the model. Empty: those of the codes themselves.
  std::span<const uint64_t> frequencies = {};
  // rANS: log2 of the slots, 8 to 15; 12 and fewer decode fastest. Huffman: the longest code in bits, 1
  // to 16. 0: as few as cost next to nothing.
  int table_bits = 0;
  // Codes per chunk, a multiple of 128 up to 2^20. Small ones decode on more threads at once and cost more: a
  // chunk takes about 220 bits (rANS) or 550 (Huffman) beyond its codes. 0: 2^16 for Huffman, the shortest
  // from 2^15 on that keeps rANS within 0.0085 bits per code of the entropy, as estimated.
  int64_t chunk = 0;
  int threads = 0;  // the result does not depend on it
};

// Throws InvalidArgument for codes of 4096 and above, for codes that the given frequencies exclude, and for
// options out of range.
std::vector<std::byte> entropy_encode(std::span<const uint8_t> codes, const EntropyOptions& options = {});
std::vector<std::byte> entropy_encode(std::span<const uint16_t> codes, const EntropyOptions& options = {});

// What a decoder looks up, made from the model of a stream.
struct EntropyTables {
  // rANS with up to 256 symbols and 2^12 slots, by slot: code, frequency << 8, place within the code << 20.
  std::vector<uint32_t> fused;
  // Other rANS: the code by slot; frequency and first slot << 16 by code.
  std::vector<uint16_t> slots;
  std::vector<uint32_t> parameters;
  // rANS: the code that says that another one follows in so many bits; -1 if there is none.
  int32_t escape = -1;
  int escape_bits = 0;
  int64_t alphabet = 0;
  // Huffman, by the next table_bits bits: length, code << 8.
  std::vector<uint32_t> prefixes;
};

// A stream whose header, model and offsets were checked. The bytes are not copied: the caller keeps them
// alive. Throws FileFormatError if they are not those of a stream.
class EntropyStream {
 public:
  explicit EntropyStream(std::span<const std::byte> bytes);

  EntropyCoder coder() const { return coder_; }
  int table_bits() const { return table_bits_; }
  int64_t alphabet() const { return alphabet_; }  // codes are below it
  int64_t count() const { return count_; }        // codes
  int64_t chunk() const { return chunk_; }        // codes per chunk; the last one may hold fewer
  int64_t chunks() const { return chunks_; }
  // Frequencies (rANS) or code lengths (Huffman): [alphabet]. In rANS codes too rare for a slot have
  // frequency 0 and are spelled out after the code tables().escape, whose frequency is that of all of them
  // together.
  std::span<const uint32_t> model() const { return model_; }
  const EntropyTables& tables() const { return tables_; }
  int64_t codes_of(int64_t chunk) const;
  // The 16-bit words of a chunk, at any alignment.
  std::span<const std::byte> words_of(int64_t chunk) const;
  std::span<const std::byte> bytes() const { return bytes_; }
  // Where the words of all chunks begin in the bytes, and where the offsets do: both multiples of 4.
  int64_t payload_offset() const { return payload_offset_; }
  int64_t offsets_offset() const { return offsets_offset_; }

  // Decodes codes [first, first + codes.size()). Throws InvalidArgument for a range beyond the stream or an
  // alphabet beyond the type, FileFormatError for words that no encoder writes; `codes` may then be partly
  // written.
  void decode(int64_t first, std::span<uint8_t> codes, int threads = 0) const;
  void decode(int64_t first, std::span<uint16_t> codes, int threads = 0) const;

 private:
  std::span<const std::byte> bytes_;
  EntropyCoder coder_ = EntropyCoder::rans;
  int table_bits_ = 0;
  int64_t alphabet_ = 0;
  int64_t count_ = 0;
  int64_t chunk_ = 0;
  int64_t chunks_ = 0;
  int64_t offsets_offset_ = 0;
  int64_t payload_offset_ = 0;
  std::vector<uint32_t> model_;
  EntropyTables tables_;
};

}  // namespace quantloom
