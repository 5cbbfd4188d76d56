// Operands of the matrix products: how the rows of a left matrix and the columns of a right one lie in memory. Letters
// as in ../README.md.
//
// Plain<Number> keeps values as they are. Split<n> keeps a float as the sum of n bfloat16, the largest first, for units
// that multiply bfloat16 and add in float. Of a float's 24 bits each part takes 8, so three parts are exact, and the
// products of parts i and j with i + j < 3 are all that a float product has room for (Henry, Tang and Heinecke,
// "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations", 2019).
//
// A left row is [part][k]. A right matrix has its columns in panels of up to four vectors of U lanes, zeros where there
// is no column: [panel][k][vector][U], or [panel][part][k/2][vector][U][2] of Split. A panel of a gate matrix holds all
// gates of one block of U hidden units, so that a tile of the product is what a cell needs; a matrix of one gate takes
// four blocks a panel.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace rnnfast {
namespace RNNFAST_ISA {
namespace {

constexpr int kMaxVectors = 4;

constexpr int64_t round_up(int64_t n, int64_t step) { return ceil_div(n, step) * step; }

// The columns of a right matrix of gates*units columns.
template <class Sum>
struct Panels {
  static constexpr int U = kLanes<Sum>;
  int64_t units;
  int gates;
  int64_t blocks = max(1, ceil_div(units, U));  // one, of no lanes, where there is no unit
  int blocks_per_panel = gates == 1 ? kMaxVectors : 1;

  explicit Panels(int64_t units, int gates = 1) : units(units), gates(gates) {}
  int64_t count() const { return ceil_div(blocks, blocks_per_panel); }
  int64_t width() const { return blocks * gates * U; }
  int64_t start(int64_t p) const { return p * blocks_per_panel * gates * U; }
  int vectors(int64_t p) const { return gates * min(blocks_per_panel, blocks - p * blocks_per_panel); }
  // Vector v of panel p holds lanes() units of gate() from unit() on.
  int gate(int v) const { return gates == 1 ? 0 : v; }
  int64_t unit(int64_t p, int v) const { return (p * blocks_per_panel + (gates == 1 ? v : 0)) * U; }
  int64_t column(int64_t p, int v) const { return gate(v) * units + unit(p, v); }
  int lanes(int64_t p, int v) const { return min(U, units - unit(p, v)); }
};

template <class Number>
struct Plain {
  using Element = Number;
  using Sum = Number;
  static constexpr int kParts = 1, kAlign = kLanes<Number>;
  static constexpr double kCost = sizeof(Number) / 4.0;                  // of a product, in multiply-adds of float
  static int64_t row(int64_t K) { return round_up(max(K, 1), kAlign); }  // elements of a left row, a vector at least
  static int64_t column(int64_t K) { return K; }                         // elements of a right column

  // U values of a left row whose parts lie `part` elements apart.
  static RNNFAST_INLINE void put(Number* row, int64_t, Vec<Number> v) { store(row, v); }
  static RNNFAST_INLINE Vec<Number> get(const Number* row, int64_t) { return load(row); }

  // Rows k and k+1, an even one and the next, of vector v of a right panel [K][V][U].
  static RNNFAST_INLINE void put_pair(Number* panel, int64_t K, int V, int v, int64_t k, Vec<Number> even,
                                      Vec<Number> odd) {
    store(panel + (k * V + v) * kAlign, even);
    if (k + 1 < K) store(panel + ((k + 1) * V + v) * kAlign, odd);
  }
  // The same from left rows, null for zeros.
  static RNNFAST_INLINE void copy_pair(Number* panel, int64_t K, int V, int v, int64_t k, const Number* even,
                                       const Number* odd, int64_t) {
    put_pair(panel, K, V, v, k, even ? load(even) : Vec<Number>(0), odd ? load(odd) : Vec<Number>(0));
  }
};

#if defined(__AVX512BF16__)

template <int kPartCount>
struct Split {
  using Element = uint16_t;
  using Sum = float;
  static constexpr int kParts = kPartCount, kAlign = 32, U = kLanes<float>;
#if defined(RNNFAST_AMX)
  static constexpr double kSpeed = 10;  // times that of float
#else
  static constexpr double kSpeed = 2;
#endif
  static constexpr double kCost = (kParts == 1 ? 1 : kParts == 2 ? 4 : 6) / kSpeed;
  static int64_t row(int64_t K) { return column(max(K, 1)); }
  static int64_t column(int64_t K) { return kParts * round_up(K, kAlign); }

  static RNNFAST_INLINE void put(uint16_t* row, int64_t part, Vec<float> v) {
    Bits16 parts[kParts];
    split(v, parts);
    for (int i = 0; i < kParts; i++) memcpy(row + i * part, &parts[i], sizeof parts[i]);
  }
  static RNNFAST_INLINE Vec<float> get(const uint16_t* row, int64_t part) {
    Vec<float> sum = bit_cast<Vec<float>>(widened(row + (kParts - 1) * part) << 16);
    for (int i = kParts - 2; i >= 0; i--) sum = sum + bit_cast<Vec<float>>(widened(row + i * part) << 16);
    return sum;
  }

  static RNNFAST_INLINE void put_pair(uint16_t* panel, int64_t K, int V, int v, int64_t k, Vec<float> even,
                                      Vec<float> odd) {
    Bits16 low[kParts], high[kParts];
    split(even, low);
    split(odd, high);
    for (int i = 0; i < kParts; i++) put_bits(panel, K, V, v, k, i, widened(low[i]) | widened(high[i]) << 16);
  }
  static RNNFAST_INLINE void copy_pair(uint16_t* panel, int64_t K, int V, int v, int64_t k, const uint16_t* even,
                                       const uint16_t* odd, int64_t part) {
    for (int i = 0; i < kParts; i++) {
      UBits low = even ? widened(even + i * part) : UBits{}, high = odd ? widened(odd + i * part) : UBits{};
      put_bits(panel, K, V, v, k, i, low | high << 16);
    }
  }

 private:
  static RNNFAST_INLINE UBits widened(Bits16 bits) {
    return bit_cast<UBits>(_mm512_maskz_cvtepu16_epi32(kAll, bit_cast<__m256i>(bits)));
  }
  static RNNFAST_INLINE UBits widened(const uint16_t* p) {
    Bits16 bits;
    memcpy(&bits, p, sizeof bits);
    return widened(bits);
  }
  static RNNFAST_INLINE void put_bits(uint16_t* panel, int64_t K, int V, int v, int64_t k, int part, UBits bits) {
    memcpy(panel + (((part * round_up(K, kAlign) + k) / 2) * V + v) * 2 * U, &bits, sizeof bits);
  }
  // All parts but the last are cut off or rounded so that what remains is exact; cutting the first keeps large values
  // from rounding to infinity. Nothing remains of an infinity.
  static RNNFAST_INLINE void split(Vec<float> v, Bits16* parts) {
    if constexpr (kParts > 1) {
      const UBits first = bit_cast<UBits>(v) & 0xffff0000;
      const __mmask16 finite = ~_mm512_fpclass_ps_mask((__m512)v.v, kInfinity);
      *parts++ = bit_cast<Bits16>(_mm512_maskz_cvtepi32_epi16(kAll, bit_cast<__m512i>(first >> 16)));
      v = Vec<float>(_mm512_maskz_sub_ps(finite, (__m512)v.v, bit_cast<__m512>(first)));
    }
    for (int i = 1; i < kParts; i++) {
      *parts = bit_cast<Bits16>(_mm512_cvtneps_pbh((__m512)v.v));
      if (i + 1 < kParts) v = v - bit_cast<Vec<float>>(widened(*parts++) << 16);
    }
    if constexpr (kParts == 1) *parts = bit_cast<Bits16>(_mm512_cvtneps_pbh((__m512)v.v));
  }
  static constexpr __mmask16 kAll = 0xffff;
  static constexpr int kInfinity = 0x18;
};

#endif

// The formats that a pass computes with: Exact for operands that hold stored values, Wide for those that hold sums.
template <class Stored>
struct PlainMath {
  using Exact = Plain<SumOf<Stored>>;
  using Wide = Exact;
};

// The formats of the fastest arithmetic that the instruction set has. For small layers the plain ones are faster.
template <class Stored>
struct FastMath : PlainMath<Stored> {};
#if defined(__AVX512BF16__)
template <>
struct FastMath<BFloat16> {
  using Exact = Split<1>;
  using Wide = Split<2>;
};
#endif
#if defined(RNNFAST_AMX)
template <>
struct FastMath<Half> {  // of 11 bits
  using Exact = Split<2>;
  using Wide = Split<2>;
};
template <>
struct FastMath<float> {
  using Exact = Split<3>;
  using Wide = Split<3>;
};
#endif

// Rows of a left operand: row i from data + i * stride on, its parts `part` elements apart.
template <class Format>
struct Left {
  const typename Format::Element* data;
  int64_t stride, part;
  Left from(int64_t i) const { return {data + i * stride, stride, part}; }
};

// ---- packing

// Writes n values, and zeros up to the row's end, as a left row of K.
template <class Format, class Stored>
void put_row(typename Format::Element* to, const Stored* from, int64_t K) {
  const int64_t part = round_up(K, Format::kAlign);
  for (int64_t k = 0; k < part; k += kLanes<typename Format::Sum>) {
    const int n = max(0, min(kLanes<typename Format::Sum>, K - k));
    Format::put(to + k, part, from && n ? load(from + k, n) : Vec<typename Format::Sum>(0));
  }
}

// Panel p of W^T as a right operand; w [gates*units,K].
template <class Format, class Stored, class Sum = typename Format::Sum>
void pack_transposed(typename Format::Element* packed, const Stored* w, int64_t K, const Panels<Sum>& panels,
                     int64_t p) {
  constexpr int U = kLanes<Sum>;
  const int V = panels.vectors(p);
  auto* panel = packed + panels.start(p) * Format::column(K);
  for (int v = 0; v < V; v++) {
    const int lanes = panels.lanes(p, v);
    const Stored* from = w + panels.column(p, v) * K;
    // A square of `n` columns from k on; whole ones have no branches.
    const auto pack_square = [&](auto whole, int64_t k, int n) {
      constexpr bool kWhole = decltype(whole)::value;
      Vec<Sum> square[U];
#pragma GCC unroll 16
      for (int i = 0; i < U; i++) {
        if constexpr (kWhole) {
          square[i] = load(from + i * K + k);
        } else {
          square[i] = i < lanes && n ? load(from + i * K + k, n) : Vec<Sum>(0);
        }
      }
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < U; i += 2) {
        if (kWhole || i < n || Format::kAlign > U) {
          Format::put_pair(panel, K, V, v, k + i, square[i], square[i + 1]);
        }
      }
    };
    int64_t k = 0;
    for (; lanes == U && k + U <= K; k += U) pack_square(std::true_type(), k, U);
    for (; k < Format::column(K) / Format::kParts; k += U) pack_square(std::false_type(), k, max(0, min(U, K - k)));
  }
}

// Rows [k0, k1) of panel p of a right operand of K rows; row(k) points to row k, or is null for zeros. k0 is even.
template <class Format, class RowAt, class Sum = typename Format::Sum>
void pack_rows(typename Format::Element* packed, int64_t K, Range ks, const Panels<Sum>& panels, int64_t p,
               const RowAt& row) {
  auto* panel = packed + panels.start(p) * Format::column(K);
  for (int64_t k = ks.begin; k < ks.end; k += 2) {
    const auto *even = row(k), *odd = k + 1 < K ? row(k + 1) : nullptr;
    for (int v = 0; v < panels.vectors(p); v++) {
      auto values = [&](auto* from) {
        return from ? load(from + panels.column(p, v), panels.lanes(p, v)) : Vec<Sum>(0);
      };
      Format::put_pair(panel, K, panels.vectors(p), v, k, values(even), values(odd));
    }
  }
}

// U rows of a matrix, null for zeros, as U columns of left rows: values of column k go to row k at `to`.
template <class Format, class Stored, class Sum = typename Format::Sum>
void put_transposed(typename Format::Element* to, int64_t stride, int64_t part, const Stored* const* rows,
                    int64_t width) {
  constexpr int U = kLanes<Sum>;
  for (int64_t k = 0; k < width; k += U) {
    const int n = min(U, width - k);
    Vec<Sum> square[U];
#pragma GCC unroll 16
    for (int i = 0; i < U; i++) square[i] = rows[i] ? load(rows[i] + k, n) : Vec<Sum>(0);
    transpose(square);
#pragma GCC unroll 16
    for (int i = 0; i < U; i++) {
      if (i < n) Format::put(to + (k + i) * stride, part, square[i]);
    }
  }
}

template <class Stored, class Sum>
void pack_vector(Sum* packed, const Stored* vector, const Panels<Sum>& panels) {
  for (int64_t p = 0; p < panels.count(); p++) {
    for (int v = 0; v < panels.vectors(p); v++) {
      Vec<Sum> value = vector ? load(vector + panels.column(p, v), panels.lanes(p, v)) : Vec<Sum>(0);
      store(packed + panels.start(p) + v * panels.U, value);
    }
  }
}

}  // namespace
}  // namespace RNNFAST_ISA
}  // namespace rnnfast
