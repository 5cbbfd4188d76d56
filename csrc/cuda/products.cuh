// Products with a matrix that stays on the chip.
//
// A warp multiplies M tiles of 16 rows of a matrix by vectors of 8 batch rows. The matrix is the left operand of
// mma.sync, so that the batch is its short side; its fragments stay in registers as far as those go, the rest in shared
// memory. Vectors lie in shared memory, rows beyond the batch as zeros.
//
// The unit is a pair: the inputs of two mma.sync, 64 bytes of each row (32 values in 16 bit, 16 in float32). The order
// of inputs within a product is free, so a lane takes 16 bytes that lie together for both of them: a pair of vectors is
// [8 rows][64 bytes], which a warp reads without bank conflicts, lane by lane 16 bytes on.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace rnnfast {

constexpr int kWarp = 32;
constexpr int kTile = 16;       // rows of the matrix
constexpr int kRows = 8;        // of the batch
constexpr int kPairBytes = 64;  // of a row
constexpr int kPair = kRows * kPairBytes;
constexpr int kLaneBytes = 16;
constexpr int kTileBytes = 2 * kWarp * kLaneBytes;  // of a 16-row tile for one pair

// Where byte k of a row lies in vectors.
RNNFAST_DEVICE int place(int row, int k) { return k / kPairBytes * kPair + row * kPairBytes + k % kPairBytes; }

// A lane's part of a 16-row tile for one pair: of row lane / 4, and of the row 8 below.
struct Fragment {
  uint4 low, high;
};

RNNFAST_DEVICE float from_bits(uint32_t x) { return __builtin_bit_cast(float, x); }

// How values are multiplied. kExact, for float32: as three TF32 products, which hold 22 bits of each value.
template <class Value, bool kExact = false>
struct Products {
  using Stored = Value;
  using Sum = std::conditional_t<std::is_same<Value, double>::value, double, float>;
  static constexpr bool kTf32 = std::is_same<Value, float>::value && !kExact;
  static constexpr int kParts = kExact ? 3 : 1;  // registers of a value that stays in them: itself and two parts of it

  // As a product takes it: TF32 truncates what is not rounded.
  static RNNFAST_DEVICE Value operand(Sum x) {
    if constexpr (kTf32) return from_bits(to_tf32(x));
    return Value(x);
  }

  static RNNFAST_DEVICE void multiply(Sum (&sum)[4], const Fragment& a, const uint4& b) {
    half(sum, a.low.x, a.high.x, a.low.y, a.high.y, b.x, b.y);
    half(sum, a.low.z, a.high.z, a.low.w, a.high.w, b.z, b.w);
  }

 private:
  // The part of a value that TF32 holds, rounded: anything if it is a NaN. (The instruction for it takes twice as
  // long.) And the rest of the value: a NaN if it is a NaN, 0 if it is infinite.
  static RNNFAST_DEVICE uint32_t part(uint32_t x) { return (x + 0x1000) & ~0x1fffu; }
  static RNNFAST_DEVICE uint32_t rest(uint32_t x) {
    return (part(x) & 0x7fffffff) == kInfinity ? 0 : __builtin_bit_cast(uint32_t, from_bits(x) - from_bits(part(x)));
  }
  static RNNFAST_DEVICE uint32_t if_finite(uint32_t x) { return (x & kInfinity) == kInfinity ? 0 : x; }
  static constexpr uint32_t kInfinity = 0x7f800000;

  static RNNFAST_DEVICE double from_words(uint32_t low, uint32_t high) {
    return __builtin_bit_cast(double, uint64_t(high) << 32 | low);
  }

  static RNNFAST_DEVICE void half(Sum (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                  uint32_t b1) {
    if constexpr (std::is_same<Value, double>::value) {
      const double b = from_words(b0, b1);
      mma(sum[0], sum[1], from_words(a0, a2), b);
      mma(sum[2], sum[3], from_words(a1, a3), b);
    } else if constexpr (kExact) {
      const uint32_t c0 = part(a0), c1 = part(a1), c2 = part(a2), c3 = part(a3), d0 = part(b0), d1 = part(b1);
      // An infinite state times the rest of a weight, whose sign may be the other one, would make a NaN.
      mma(sum, rest(a0), rest(a1), rest(a2), rest(a3), if_finite(d0), if_finite(d1), Value());
      mma(sum, c0, c1, c2, c3, rest(b0), rest(b1), Value());
      mma(sum, c0, c1, c2, c3, d0, d1, Value());
    } else {
      mma(sum, a0, a1, a2, a3, b0, b1, Value());
    }
  }
};

// M tiles of a matrix, for a warp's share of the inputs: the first kKept pairs in registers, the others in shared
// memory.
template <class Math, int M, int kKept>
class Matrix {
 public:
  // load(m, row, k) gives 16 bytes: row `row` of tile m from byte k of the share on.
  template <class Load>
  RNNFAST_DEVICE Matrix(char* shared, int pairs, int lane, const Load& load)
      : shared_(reinterpret_cast<uint4*>(shared) + lane), pairs_(pairs) {
    const int row = lane / 4, k = lane % 4 * kLaneBytes;
#pragma unroll
    for (int pair = 0; pair < kKept; pair++) {
#pragma unroll
      for (int m = 0; m < M; m++) {
        if (pair < pairs) kept_[pair][m] = fragment(load, m, row, pair * kPairBytes + k);
      }
    }
#pragma unroll 1
    for (int pair = kKept; pair < pairs; pair++) {
#pragma unroll 1
      for (int m = 0; m < M; m++) {
        const Fragment f = fragment(load, m, row, pair * kPairBytes + k);
        uint4* to = of(pair, m);
        to[0] = f.low, to[kWarp] = f.high;
      }
    }
  }

  // sum[m] = tile m times the vectors, whose pairs begin at `vectors`.
  RNNFAST_DEVICE void product(float (&sum)[M][4], const char* vectors, int lane) const {
    // A product waits for the one before it in its sum, so few tiles get several sums each.
    float sums[kChains][M][4] = {};
    const uint4* b = reinterpret_cast<const uint4*>(vectors) + lane;
#pragma unroll
    for (int pair = 0; pair < kKept; pair++) {
      if (pair >= pairs_) break;
      const uint4 v = b[pair * kWarp];
#pragma unroll
      for (int m = 0; m < M; m++) Math::multiply(sums[pair % kChains][m], kept_[pair][m], v);
    }
#pragma unroll 1
    for (int first = kKept; first < pairs_; first += kChains) {
#pragma unroll
      for (int chain = 0; chain < kChains; chain++) {
        const int pair = first + chain;
        if (pair >= pairs_) break;
        const uint4 v = b[pair * kWarp];
#pragma unroll
        for (int m = 0; m < M; m++) {
          const uint4* from = of(pair, m);
          Math::multiply(sums[chain][m], {from[0], from[kWarp]}, v);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        sum[m][i] = sums[0][m][i];
#pragma unroll
        for (int chain = 1; chain < kChains; chain++) sum[m][i] += sums[chain][m][i];
      }
    }
  }

 private:
  static constexpr int kChains = M < 4 ? 4 / M : 1;

  template <class Load>
  static RNNFAST_DEVICE Fragment fragment(const Load& load, int m, int row, int k) {
    return {operands(load(m, row, k)), operands(load(m, row + 8, k))};
  }

  static RNNFAST_DEVICE uint4 operands(uint4 x) {
    if constexpr (Math::kTf32) {
      return {to_tf32(from_bits(x.x)), to_tf32(from_bits(x.y)), to_tf32(from_bits(x.z)), to_tf32(from_bits(x.w))};
    }
    return x;
  }

  RNNFAST_DEVICE uint4* of(int pair, int m) const { return shared_ + ((pair - kKept) * M + m) * (2 * kWarp); }

  uint4* shared_;
  int pairs_;
  Fragment kept_[kKept][M];
};

}  // namespace rnnfast
