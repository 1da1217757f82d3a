#include <algorithm>
#include <array>
#include <bit>
#include <string_view>

#include "quantloom/checked_math.hpp"
#include "quantloom/transforms/hadamard.hpp"

namespace quantloom {
namespace {

constexpr int64_t kMaxWholeMatrix = int64_t{1} << 14;

struct PrimePower {
  int prime = 0;
  int degree = 0;
};

// q = prime^degree, or nothing.
std::optional<PrimePower> prime_power(int64_t q) {
  if (q < 2) return std::nullopt;
  int64_t prime = 2;
  while (q % prime != 0) prime += 1;
  PrimePower result{static_cast<int>(prime), 0};
  while (q % prime == 0) {
    q /= prime;
    result.degree += 1;
  }
  if (q != 1) return std::nullopt;
  return result;
}

// The finite field of q elements. An element is the polynomial whose coefficients are the digits of its
// number in base p, the constant first; products are taken modulo an irreducible monic polynomial.
class Field {
 public:
  explicit Field(PrimePower q) : p_(q.prime), degree_(q.degree), size_(1) {
    for (int i = 0; i < degree_; ++i) size_ *= p_;
    if (degree_ == 1) return;
    while (!is_field()) modulus_ += 1;
  }
  int size() const { return size_; }

  int subtract(int a, int b) const {
    int result = 0;
    int place = 1;
    for (int i = 0; i < degree_; ++i) {
      result += ((a % p_ - b % p_ + p_) % p_) * place;
      a /= p_;
      b /= p_;
      place *= p_;
    }
    return result;
  }

  int multiply(int a, int b) const {
    std::array<int, 20> product{};  // 2 * degree - 1 digits; the degree is below 10
    for (int i = 0; i < degree_; ++i, a /= p_) {
      int rest = b;
      for (int j = 0; j < degree_; ++j, rest /= p_)
        product[i + j] = (product[i + j] + a % p_ * (rest % p_)) % p_;
    }
    // x^degree = -modulus_
    for (int i = 2 * degree_ - 2; i >= degree_; --i) {
      int rest = modulus_;
      for (int j = 0; j < degree_; ++j, rest /= p_) {
        int& digit = product[i - degree_ + j];
        digit = (digit + product[i] * (p_ - rest % p_)) % p_;
      }
    }
    int result = 0;
    for (int i = degree_; i-- > 0;) result = result * p_ + product[i];
    return result;
  }

  // +1 for squares, -1 for other elements, 0 for 0: [size].
  std::vector<int8_t> quadratic_character() const {
    std::vector<int8_t> character(static_cast<size_t>(size_), -1);
    character[0] = 0;
    for (int a = 1; a < size_; ++a) character[static_cast<size_t>(multiply(a, a))] = 1;
    return character;
  }

 private:
  // Whether the modulus is irreducible: no product of elements other than 0 is 0. Of two factors of the
  // modulus one has at most half its degree.
  bool is_field() const {
    int half = 1;
    for (int i = 0; i < degree_ / 2; ++i) half *= p_;
    // Elements below half * p_ are the polynomials of degree up to degree / 2.
    for (int a = p_; a < half * p_; ++a) {
      for (int b = p_; b < size_; ++b) {
        if (multiply(a, b) == 0) return false;
      }
    }
    return true;
  }

  int p_;
  int degree_;
  int size_;
  int modulus_ = 0;  // the polynomial less its leading x^degree
};

class SquareMatrix {
 public:
  explicit SquareMatrix(int64_t size) : size_(size), values_(static_cast<size_t>(size * size), 0) {}
  int8_t& operator()(int64_t row, int64_t col) { return values_[static_cast<size_t>(row * size_ + col)]; }
  std::vector<int8_t> take() { return std::move(values_); }

 private:
  int64_t size_;
  std::vector<int8_t> values_;
};

// Q[i][j] = character(i - j): symmetric for q = 1 mod 4, skew for q = 3 mod 4.
template <class Set>
void for_each_character(const Field& field, const Set& set) {
  const std::vector<int8_t> character = field.quadratic_character();
  for (int i = 0; i < field.size(); ++i) {
    for (int j = 0; j < field.size(); ++j) set(i, j, character[static_cast<size_t>(field.subtract(i, j))]);
  }
}

// Paley's first construction, m = q + 1 with q = 3 mod 4: I + S with a skew S of zero diagonal.
std::vector<int8_t> paley_one(int64_t m, PrimePower q) {
  SquareMatrix matrix(m);
  for_each_character(Field(q), [&](int i, int j, int8_t value) { matrix(i + 1, j + 1) = value; });
  for (int64_t i = 1; i < m; ++i) {
    matrix(0, i) = 1;
    matrix(i, 0) = -1;
  }
  for (int64_t i = 0; i < m; ++i) matrix(i, i) = 1;
  return matrix.take();
}

// Paley's second, m = 2 (q + 1) with q = 1 mod 4: a symmetric conference matrix C of order q + 1, with each
// +-1 replaced by +-[1 1; 1 -1] and each 0 by [1 -1; -1 -1].
std::vector<int8_t> paley_two(int64_t m, PrimePower q) {
  SquareMatrix matrix(m);
  const auto place = [&](int64_t row, int64_t col, int8_t value) {
    const bool zero = value == 0;
    matrix(2 * row, 2 * col) = zero ? int8_t{1} : value;
    matrix(2 * row, 2 * col + 1) = zero ? int8_t{-1} : value;
    matrix(2 * row + 1, 2 * col) = zero ? int8_t{-1} : value;
    matrix(2 * row + 1, 2 * col + 1) = zero ? int8_t{-1} : static_cast<int8_t>(-value);
  };
  place(0, 0, 0);
  for (int64_t i = 1; i < m / 2; ++i) {
    place(0, i, 1);
    place(i, 0, 1);
  }
  for_each_character(Field(q), [&](int i, int j, int8_t value) { place(i + 1, j + 1, value); });
  return matrix.take();
}

// First rows of four symmetric circulants A, B, C, D of +-1 with A^2 + B^2 + C^2 + D^2 = m I. For 43 they are
// constant on the cosets of {1, 6, 36} and their negatives modulo 43.
struct Williamson {
  int64_t m;
  std::array<std::string_view, 4> rows;
};
constexpr std::array<Williamson, 2> kWilliamson = {{
    {92,
     {"+--+-+-++++++++++-+-+--", "+--++-+-+-++++-+-+-++--", "+++---++--++++--++---++",
      "+--+--+++------+++--+--"}},
    {172,
     {"+---++--++++-+-+++-++--++-+++-+-++++--++---", "++---++++-+--+--++--------++--+--+-++++---+",
      "+++-+-++--+-+-++++-+----+-++++-+-+--++-+-++", "++-++++++----+-+--++-++-++--+-+----++++++-+"}},
}};

std::vector<int8_t> williamson(const Williamson& sequences) {
  // Blocks of [A B C D; -B A -D C; -C D A -B; -D -C B A].
  constexpr int kBlock[4][4] = {{0, 1, 2, 3}, {1, 0, 3, 2}, {2, 3, 0, 1}, {3, 2, 1, 0}};
  constexpr int kSign[4][4] = {{1, 1, 1, 1}, {-1, 1, -1, 1}, {-1, 1, 1, -1}, {-1, -1, 1, 1}};
  SquareMatrix matrix(sequences.m);
  const int64_t n = sequences.m / 4;
  for (int row = 0; row < 4; ++row) {
    for (int col = 0; col < 4; ++col) {
      const std::string_view first = sequences.rows[static_cast<size_t>(kBlock[row][col])];
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < n; ++j) {
          const int value = first[static_cast<size_t>((j - i + n) % n)] == '+' ? 1 : -1;
          matrix(row * n + i, col * n + j) = static_cast<int8_t>(kSign[row][col] * value);
        }
      }
    }
  }
  return matrix.take();
}

enum class Construction : uint8_t { none, trivial, paley_one, paley_two, williamson, product };

struct Order {
  Construction construction = Construction::none;
  PrimePower q;
  int64_t factor = 0;  // of a product: the smaller one
};

bool is_power_of_two(int64_t m) {
  return std::has_single_bit(static_cast<uint64_t>(m));
}

// How to build a matrix of order m, for m = 1 and for multiples of 4 with an odd factor.
Order order_of(int64_t m) {
  if (m == 1) return {Construction::trivial, {}, 0};
  if (m <= 0 || m % 4 != 0 || m > kMaxHadamardOrder || is_power_of_two(m)) return {};
  if (const auto q = prime_power(m - 1)) return {Construction::paley_one, *q, 0};  // m - 1 = 3 mod 4
  if (const auto q = prime_power(m / 2 - 1); q && (m / 2 - 1) % 4 == 1) {
    return {Construction::paley_two, *q, 0};
  }
  if (std::ranges::any_of(kWilliamson, [m](const Williamson& w) { return w.m == m; })) {
    return {Construction::williamson, {}, 0};
  }
  for (int64_t a = 12; a * a <= m; a += 4) {
    if (m % a != 0 || order_of(a).construction == Construction::none) continue;
    if (order_of(m / a).construction != Construction::none) return {Construction::product, {}, a};
  }
  return {};
}

std::vector<int8_t> kronecker(const std::vector<int8_t>& a, int64_t rows_a, const std::vector<int8_t>& b,
                              int64_t rows_b) {
  const int64_t n = rows_a * rows_b;
  SquareMatrix matrix(n);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const int value = a[static_cast<size_t>(i / rows_b * rows_a + j / rows_b)] *
                        b[static_cast<size_t>(i % rows_b * rows_b + j % rows_b)];
      matrix(i, j) = static_cast<int8_t>(value);
    }
  }
  return matrix.take();
}

}  // namespace

std::optional<HadamardSize> hadamard_size(int64_t n) {
  if (n <= 0 || n > kMaxHadamardBlock) return std::nullopt;
  const int twos = std::countr_zero(static_cast<uint64_t>(n));
  const int64_t odd = n >> twos;
  if (odd == 1) return HadamardSize{1, twos};
  for (int j = 2; j <= twos && (odd << j) <= kMaxHadamardOrder; ++j) {
    const int64_t m = odd << j;
    if (order_of(m).construction != Construction::none) return HadamardSize{m, twos - j};
  }
  return std::nullopt;
}

int64_t largest_hadamard_block(int64_t cols) {
  int64_t best = std::min<int64_t>(cols, 1);
  for (int64_t d = 1; d * d <= cols; ++d) {
    if (cols % d != 0) continue;
    for (const int64_t divisor : {d, cols / d}) {
      if (divisor > best && hadamard_size(divisor)) best = divisor;
    }
  }
  return best;
}

HadamardSize require_hadamard_block(int64_t cols, int64_t block) {
  const int64_t n = block == 0 ? cols : block;
  const std::optional<HadamardSize> size = n > 0 && cols % n == 0 ? hadamard_size(n) : std::nullopt;
  if (size) return *size;
  const std::string got = block == 0 ? text_of("whole rows of ", cols) : text_of(block);
  std::string why = "a divisor of the ";
  if (n > 0 && cols % n == 0) why = "a size with a known Hadamard matrix that divides the ";
  throw InvalidArgument(
      "block", got, text_of(why, cols, " columns; the largest that works is ", largest_hadamard_block(cols)));
}

std::vector<int8_t> hadamard_base(int64_t m) {
  const Order order = order_of(m);
  switch (order.construction) {
    case Construction::trivial:
      return {1};
    case Construction::paley_one:
      return paley_one(m, order.q);
    case Construction::paley_two:
      return paley_two(m, order.q);
    case Construction::williamson:
      return williamson(*std::ranges::find(kWilliamson, m, &Williamson::m));
    case Construction::product:
      return kronecker(hadamard_base(order.factor), order.factor, hadamard_base(m / order.factor),
                       m / order.factor);
    default:
      throw InvalidArgument("m", text_of(m), "1 or a known order of a dense Hadamard matrix");
  }
}

std::vector<int8_t> hadamard_matrix(int64_t n) {
  const std::optional<HadamardSize> size = hadamard_size(n);
  if (!size || n > kMaxWholeMatrix) {
    throw InvalidArgument("n", text_of(n),
                          text_of("a size with a known Hadamard matrix, at most ", kMaxWholeMatrix));
  }
  const int64_t walsh = int64_t{1} << size->power;
  SquareMatrix butterflies(walsh);
  for (int64_t i = 0; i < walsh; ++i) {
    for (int64_t j = 0; j < walsh; ++j) {
      butterflies(i, j) = std::popcount(static_cast<uint64_t>(i & j)) % 2 == 0 ? int8_t{1} : int8_t{-1};
    }
  }
  return kronecker(hadamard_base(size->order), size->order, butterflies.take(), walsh);
}

}  // namespace quantloom
