// Trellis-coded quantization with tail-biting rings (QTIP, Tseng et al. 2024): codebooks, and the coding of
// rings of weights.
//
// A ring is a closed string of bits; a window of 16 of them that slides along it makes the weights, one or
// two at a time, by arithmetic alone. Neighbouring weights share most of their bits, which is what buys
// quality: at 2 bits the error is within a tenth of the bound for a normal source, where a grid's is nearly
// twice the bound. Any string of bits is a valid ring.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "quantloom/formats/format.hpp"
#include "quantloom/formats/trellis_shape.hpp"

namespace quantloom {

// The weights of all states.
struct TrellisCodebook {
  std::string name;  // as trellis_codebook() takes it
  TrellisCode code = TrellisCode::mul1;
  uint32_t multiplier = 0;      // of mcg, mul1 and octagon
  int window = 16;              // bits of a state
  int weights_per_step = 1;     // weights of a state
  std::vector<uint16_t> table;  // float16 bits: hyb [512, 2], table [2^window, weights_per_step]; else empty

  // All weights, [2^window, weights_per_step]. Each is a float16 number.
  std::vector<float> values() const;
  double rms() const;  // of values()
};

// The codebook of a name:
//   3inst           QTIP's 3INST
//   mcg[-HEX]       3INST with a multiplicative generator; the multiplier in hexadecimal, CBAC1FED by default
//   mul1[-HEX]      the byte sum of one multiplication, 83DCD12D by default
//   1mad            QTIP's 1MAD
//   octagon[-HEX]   two weights a state from one multiplication, for products at the speed of memory: the
//                   bytes b0 (lowest) ... b3 of multiplier * s, less 127.5, are steps along axes at 0, 90, 45
//                   and 135 degrees. With c = 2 b - 255 the weights are the float16 numbers nearest to
//                   203 * 2^-22 times the integers 99 c0 + 70 c2 + 70 c3 and 99 c1 + 70 c2 - 70 c3 (70 / 99
//                   is sqrt(1/2) but for 5e-5). F3C14DB7 by default
//   hyb             QTIP's HYB: two weights a state, a table of 512 pairs fitted to a normal source
//   rptc, rptc2     2^window normal quantiles in random order, one or two weights a state: no arithmetic,
//                   a table that is stored (Mao, Gray and Linder 2010); the yardstick of the others
// Throws InvalidArgument for another name or a window out of [4, 24] (hyb: at least 15).
TrellisCodebook trellis_codebook(std::string_view name, int window = 16);
// The names above, without multipliers.
const std::vector<std::string>& trellis_codebook_names();

// How hard the encoder looks for the place where a ring closes. Errors on a normal source, against `normal`:
enum class TrellisSearch : uint8_t {
  fast,    // first pass of 64 weights to each side of the seam: 0.5 to 0.8% more error, in 3/4 of the time
  normal,  // first pass of 128 to each side
  best,    // two rounds that close where they meet: 0.1 to 0.3% less error
};
TrellisSearch trellis_search_from_name(std::string_view name);  // "fast", "normal", "best"
std::string_view name_of(TrellisSearch search);

struct TrellisEncodeOptions {
  TrellisSearch search = TrellisSearch::normal;
  int threads = 0;
};

// Encode: the states [rings, shape.steps()] of rings near the targets [rings, shape.length], in the
// codebook's own units and the order of the ring. The same states for any number of threads and on every
// processor. Throws InvalidArgument for a shape that the codebook does not fit, NumericError for targets that
// are not finite.
void encode_rings(const TrellisCodebook& codebook, const TrellisShape& shape, MatrixView<const float> targets,
                  MatrixView<uint32_t> states, const TrellisEncodeOptions& options = {});
// Decode: the weights [rings, shape.length] of states. Throws InvalidArgument for states past the window.
void decode_rings(const TrellisCodebook& codebook, const TrellisShape& shape,
                  MatrixView<const uint32_t> states, MatrixView<float> weights, int threads = 0);
// Pack: the words [rings, shape.words()] of rings, stream bit 32 w + i in bit 31 - i of word w, bits past the
// ring's end zero. Throws InvalidArgument, naming ring and step, unless each state continues the one before,
// the first one that of the last.
void pack_rings(const TrellisShape& shape, MatrixView<const uint32_t> states, MatrixView<uint32_t> words);
// Unpack: the states of words.
void unpack_rings(const TrellisShape& shape, MatrixView<const uint32_t> words, MatrixView<uint32_t> states);

// The mean squared error of coding `rings` rings of 256 independent N(0, 1) numbers (of CounterRandom(seed)),
// over their own mean square, which takes most of the chance out. ratio: the source's standard deviation over
// the codebook's RMS when it is coded; 1 / RMS codes it as it is. The bound for any code is 2^-half_bits.
// Throws InvalidArgument.
double trellis_distortion(const TrellisCodebook& codebook, int half_bits, double ratio, int64_t rings = 1024,
                          uint64_t seed = 0, const TrellisEncodeOptions& options = {});

struct Trellis final : Format {
  int half_bits;             // bits per weight, in halves
  int64_t rotation;          // 128, or 0 for no rotation
  TrellisCodebook codebook;  // the table of a packed matrix is that of its plane

  // bits: 1, 1.5, ... 8; with two weights per step at most 4. Throws InvalidArgument naming the argument.
  explicit Trellis(double bits, std::string_view codebook = "mul1", int64_t rotation = 128, int window = 16);
  // With a codebook of one's own, such as a tuned table.
  Trellis(double bits, TrellisCodebook codebook, int64_t rotation);

  TrellisShape shape() const;
  // Sizes are padded to multiples of this, with weights that nobody reads: 128 with the rotation, else 16.
  int64_t size_unit() const { return rotation > 0 ? rotation : 16; }

  std::string_view name() const override { return "trellis"; }
  // "trellis:2:mul1", "trellis:2.5:mcg-FF7A83E5:plain:l18".
  std::string spec() const override;
  std::string to_json() const override;
  std::vector<PlaneSpec> planes(int64_t n, int64_t k) const override;
  void validate_values(const PackedTensor& packed) const override;
  void decode(const PackedTensor& packed, int64_t first_row, MatrixView<float> out) const override;
  // Scales are fitted to root mean squares: of each row, and with the rotation then of each column. Steps are
  // of size_unit() columns, row ranges of multiples of size_unit() rows; group_of_column must be empty.
  std::unique_ptr<ColumnEncoder> column_encoder(std::shared_ptr<const Format> self, int64_t n, int64_t k,
                                                std::span<const int32_t> group_of_column) const override;

  static std::shared_ptr<const Format> from_json(std::string_view json);
  static std::shared_ptr<const Format> from_spec(std::string_view spec);

 private:
  std::shared_ptr<const std::vector<float>> values_;  // codebook.values()
};

// What the standard deviation of a normal source should be, over the codebook's RMS, for the least error with
// a window of 16. Codes but octagon take mul1's.
double trellis_best_ratio(int half_bits, TrellisCode code = TrellisCode::mul1);

}  // namespace quantloom
