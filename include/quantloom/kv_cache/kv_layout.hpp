// Where codes and scales lie in the pages of a cache: the same memory for every device.
//
// A page holds page_tokens consecutive tokens of one sequence, for all KV heads of a layer; token t of a
// sequence (counted from the first that is not kept exact) is at slot t % page_tokens of its page number
// t / page_tokens. A page is kv_heads records of record_bytes, one after the other: all that attention reads
// of a head for those tokens, in one run. A record is four parts, each at a multiple of 16 bytes:
//   codes of the keys      [page_tokens, row_bytes]  a dense bit stream per token, lowest bits first, rows
//                                                    padded to 4 bytes
//   their parameters       by channel: float16 (scale, min) [page_tokens / group, head_dim], in an order of
//                                      their own (ChannelPlace)
//                          by token:   float16 (scale, min) [page_tokens, groups]
//                          sdr:        float16 scale [page_tokens], then shifts [page_tokens, shift_bytes]:
//                                      a dense bit stream per token; codes are two's complement
//                          tables:  nothing for keys; of values, float16 (scale, middle) [page_tokens]; then
//                                   outliers [n]: uint16 slot * head_dim + channel, and what is missing there
//                                   in float16; tokens in order, and channels of a token
//   codes of the values    as those of the keys
//   their parameters
//
// Rows of codes of whole 16 bytes are matrices for tensor cores, of windows of 16 bits: of keys, a word is
// the codes of one token in two windows, and of values, the windows of two tokens make a word.
#pragma once

#include <cstdint>

#include "quantloom/kv_cache/kv_format.hpp"

#ifdef __CUDACC__
#define QUANTLOOM_KV __host__ __device__
#else
#define QUANTLOOM_KV
#endif

namespace quantloom {

enum class KVSide : uint8_t { keys, values };

enum class KVCodec : uint8_t { channel_grid, token_grid, digits, channel_table, token_table };

// The keys or the values of a record.
struct KVPart {
  KVCodec codec = KVCodec::token_grid;
  int bits = 0;
  int64_t group = 0;      // tokens or channels
  int64_t groups = 0;     // of a page (channel_grid) or of a token
  int64_t row_bytes = 0;  // of a token's codes
  int64_t codes = 0;      // byte offsets in a record
  int64_t parameters = 0;
  int64_t shifts = 0;         // of digits
  int64_t shift_bytes = 0;    // of digits, for a token
  int shift_bits = 0;         // of digits, for a group
  int64_t outliers = 0;       // of tables: byte offset
  int64_t outlier_share = 0;  // in 1/10000 of elements

  QUANTLOOM_KV bool has_table() const {
    return codec == KVCodec::channel_table || codec == KVCodec::token_table;
  }
  // Outliers of the tokens in slots before this one.
  QUANTLOOM_KV int64_t outliers_before(int64_t slot, int64_t head_dim) const {
    return slot * head_dim * outlier_share / 10000;
  }
};

// Whether rows of codes are whole 16 bytes, and their words the codes of two windows.
QUANTLOOM_KV constexpr bool has_code_windows(int bits, int64_t head_dim) {
  return 16 % bits == 0 && head_dim * bits % 128 == 0;
}

// Where the float16 scale and least value of a channel lie among those of a group of tokens, in bytes.
// Channels whose codes share a word lie together, scales before least values, those of its two windows in
// turn: scales of channels 0, w, 1, w + 1, ... 2 w - 1, then least values, with windows of w = 16 / bits
// codes. Of rows without windows, scale and least value alternate.
struct ChannelPlace {
  int scale;
  int least;

  QUANTLOOM_KV ChannelPlace(int bits, int64_t head_dim, int channel) {
    if (!has_code_windows(bits, head_dim)) {
      scale = channel * 4;
      least = scale + 2;
      return;
    }
    const int window = 16 / bits;
    const int in_word = channel % (2 * window);
    scale = (channel - in_word) * 4 + (in_word % window * 2 + in_word / window) * 2;
    least = scale + 4 * window;
  }
};

struct KVLayout {
  int64_t head_dim = 0;
  int64_t page_tokens = 0;  // the multiple of the keys' group up to 128 tokens (or one group)
  KVPart keys;
  KVPart values;
  int64_t record_bytes = 0;

  // Stored bits of an element whose token has left the window: of whole pages, padding included.
  double average_bits() const;
  QUANTLOOM_KV const KVPart& part(KVSide side) const { return side == KVSide::keys ? keys : values; }
};

// head_dim: a multiple of 8 from 8 to 1024 (InvalidArgument otherwise); with hadamard a size that
// transforms/hadamard.hpp knows;
// with outliers at most 512.
KVLayout kv_layout(const KVFormat& format, int64_t head_dim);

}  // namespace quantloom

#undef QUANTLOOM_KV
