// Matrix products of a few rows with a packed matrix: what every phase of a layer spends its time in. Letters as in
// ../README.md.
#pragma once

#include "amx.h"
#include "operands.h"

namespace rnnfast {
namespace RNNFAST_ISA {
namespace {

constexpr int kMaxRows = 8;
constexpr int kBlockRows = 64;          // rows a pass over a panel serves: their sums and a block of the panel fit L1
constexpr int kBlockBytes = 32 * 1024;  // of a panel, kept in L1 while several tiles use it

// Rows of a tile of V vectors that is computed in registers: M*V for sums, the smaller one of M and V for one operand,
// and 1 or 2 for the other one.
constexpr int tile_rows(int V) { return min(kMaxRows, kRegisters == 32 ? (30 - V) / V : 12 / V); }

template <class Sum>
constexpr Sum kZeros[kMaxVectors * kLanes<Sum>] = {};

// ---- plain operands, and pairs of bfloat16 where the vector unit multiplies them

template <class Number>
RNNFAST_INLINE Vec<Number> load_lanes(const Number* p) {
  return load(p);
}
template <class Number>
RNNFAST_INLINE Vec<Number> broadcast(const Number* p) {
  return Vec<Number>(*p);
}
template <class Number>
RNNFAST_INLINE Vec<Number> multiply_add(Vec<Number> sum, Vec<Number> a, Vec<Number> b) {
  return sum + a * b;
}

// A value that is loaded once, and not again by each instruction that uses it.
template <class Number>
RNNFAST_INLINE Vec<Number> in_register(Vec<Number> v) {
#if defined(__x86_64__)
  asm("" : "+v"(v.v));
#endif
  return v;
}

#if defined(__AVX512BF16__)
RNNFAST_INLINE __m512bh in_register(__m512bh v) {
  asm("" : "+v"(v));
  return v;
}
struct Pair {
  uint16_t k[2];
};
RNNFAST_INLINE __m512bh load_lanes(const Pair* p) { return (__m512bh)_mm512_loadu_si512(p); }
RNNFAST_INLINE __m512bh broadcast(const Pair* p) { return (__m512bh)_mm512_set1_epi32(bit_cast<int>(*p)); }
RNNFAST_INLINE Vec<float> multiply_add(Vec<float> sum, __m512bh a, __m512bh b) {
  return Vec<float>(_mm512_dpbf16_ps((__m512)sum.v, a, b));
}
#endif

// out[M][V*U] = init[M][V*U] + a[M][K] * b[K][V*U], with the sums in registers.
template <class Element, class Sum, int V, int M>
void tile(const Element* a, int64_t stride, const Element* b, int64_t K, const Sum* init, int64_t is, Sum* out,
          int64_t os) {
  constexpr int U = kLanes<Sum>;
  Vec<Sum> sum[M][V];
#pragma GCC unroll 8
  for (int r = 0; r < M; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) sum[r][v] = Vec<Sum>(0);
  }
  for (int64_t k = 0; k < K; k++, a++, b += V * U) {
    if constexpr (M < V) {  // the fewer operands are in registers, the others come one after the other
      decltype(load_lanes(b)) row[M];
#pragma GCC unroll 4
      for (int r = 0; r < M; r++) row[r] = in_register(broadcast(a + r * stride));
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        const auto column = in_register(load_lanes(b + v * U));
#pragma GCC unroll 4
        for (int r = 0; r < M; r++) sum[r][v] = multiply_add(sum[r][v], row[r], column);
      }
    } else {
      decltype(load_lanes(b)) column[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) column[v] = in_register(load_lanes(b + v * U));
#pragma GCC unroll 8
      for (int r = 0; r < M; r++) {
        const auto row = broadcast(a + r * stride);
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[r][v] = multiply_add(sum[r][v], row, column[v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < M; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) store(out + r * os + v * U, load(init + r * is + v * U) + sum[r][v]);
  }
}

template <class Element, class Sum>
using Tile = void (*)(const Element*, int64_t, const Element*, int64_t, const Sum*, int64_t, Sum*, int64_t);

template <class Element, class Sum, int V, size_t... kIndex>
Tile<Element, Sum> tile_of(int rows, std::index_sequence<kIndex...>) {
  static constexpr Tile<Element, Sum> tiles[] = {tile<Element, Sum, V, kIndex + 1>...};
  return tiles[rows - 1];
}

template <class Element, class Sum, int V>
void product_of(const Element* a, int64_t stride, int64_t M, const Element* b, int64_t K, const Sum* init, int64_t is,
                Sum* out, int64_t os) {
  constexpr int kRows = tile_rows(V);
  constexpr int64_t kDepth = kBlockBytes / (V * kVectorBytes);
  const int64_t tiles = ceil_div(M, kRows);
  for (int64_t k = 0; k == 0 || k < K; k += kDepth) {  // each block is a sum of its own, which also is more accurate
    for (int64_t i = 0; i < tiles; i++) {              // rows are dealt evenly: 16 are 6 + 5 + 5
      Range r = share(M, i, tiles);
      const Sum* from = k ? out + r.begin * os : init + r.begin * is;
      tile_of<Element, Sum, V>(r.end - r.begin, std::make_index_sequence<kRows>())(
          a + r.begin * stride + k, stride, b + k * V * kLanes<Sum>, min(kDepth, K - k), from, k ? os : is,
          out + r.begin * os, os);
    }
  }
}

template <class Element, class Sum>
void product_in_registers(const Element* a, int64_t stride, int64_t M, const Element* b, int V, int64_t K,
                          const Sum* init, int64_t is, Sum* out, int64_t os) {
  static constexpr decltype(&product_of<Element, Sum, 1>) products[] = {
      product_of<Element, Sum, 1>, product_of<Element, Sum, 2>, product_of<Element, Sum, 3>,
      product_of<Element, Sum, 4>};
  for (int64_t i = 0; i < M; i += kBlockRows) {
    products[V - 1](a + i * stride, stride, min(kBlockRows, M - i), b, K, init + i * is, is, out + i * os, os);
  }
}

// out[M][V*U] = init[M][V*U] + a[M][K] * b, with b a panel of V vectors. Sums run over k in order, whatever M is. init
// may be out.
template <class LeftFormat, class RightFormat, class Sum>
void product(Left<Plain<Sum>> a, int64_t M, const Sum* b, int V, int64_t K, const Sum* init, int64_t is, Sum* out,
             int64_t os) {
  product_in_registers(a.data, a.stride, M, b, V, K, init, is, out, os);
}

// ---- operands split in bfloat16

#if defined(__AVX512BF16__)

// Calls body(0), ..., body(n - 1) with numbers that are constants.
template <class Body, int... kIndex>
RNNFAST_INLINE void for_constants(const Body& body, std::integer_sequence<int, kIndex...>) {
  (body(std::integral_constant<int, kIndex>()), ...);
}
template <int n, class Body>
RNNFAST_INLINE void for_constants(const Body& body) {
  for_constants(body, std::make_integer_sequence<int, n>());
}

#if defined(RNNFAST_AMX)

constexpr int kTileRows = 16;
constexpr int64_t kTileDepth = 288;  // k times parts, so that those of all rows and of a few vectors stay in L1

// sums[16*kTiles][V*U] (+)= a[kTiles][16][K] * b for some tiles of rows and V of a panel's vectors.
template <class LeftFormat, class RightFormat, int kTiles, int V>
void multiply_tiles(const uint16_t* const* a, int64_t stride, int64_t part, const uint16_t* b, int panel_vectors,
                    int64_t depth, Range ks, float* const* sums, int64_t ss) {
  constexpr int kLeft = 4, kRight = 6, U = kLanes<float>;
  const int64_t width = panel_vectors * 2 * U;  // of two rows of b
  for_constants<kTiles>([&](auto t) {
    for_constants<V>([&](auto v) {
      if (ks.begin) {
        tile_load<t * V + v>(sums[t] + v * U, ss * sizeof(float));
      } else {
        tile_zero<t * V + v>();
      }
    });
  });
  for (int64_t k = ks.begin; k < ks.end; k += LeftFormat::kAlign) {
    for_constants<LeftFormat::kParts>([&](auto i) {
      for_constants<kTiles>([&](auto t) { tile_load<kLeft + t>(a[t] + i * part + k, stride * sizeof *b); });
      for_constants<RightFormat::kParts>([&](auto j) {
        if constexpr (i + j < 3) {
          for_constants<V>([&](auto v) {
            tile_load<kRight + v % 2>(b + (j * depth + k) / 2 * width + v * 2 * U, width * sizeof *b);
            for_constants<kTiles>([&](auto t) { tile_dot<t * V + v, kLeft + t, kRight + v % 2>(); });
          });
        }
      });
    });
  }
  for_constants<kTiles>(
      [&](auto t) { for_constants<V>([&](auto v) { tile_store<t * V + v>(sums[t] + v * U, ss * sizeof(float)); }); });
}

// sums[M][V*U] = a * b.
template <class LeftFormat, class RightFormat>
void multiply(Left<LeftFormat> a, int64_t M, const uint16_t* b, int V, int64_t depth, float* sums, int64_t ss) {
  constexpr int U = kLanes<float>;
  constexpr int64_t kDepth = kTileDepth / RightFormat::kParts / RightFormat::kAlign * RightFormat::kAlign;
  const int64_t tiles = ceil_div(M, kTileRows), rows = ceil_div(M, tiles);
  set_tile_rows(rows);
  for (int64_t t = 0; t < tiles; t += 2) {
    for (int64_t k = 0; k == 0 || k < depth; k += kDepth) {
      const Range ks{k, min(k + kDepth, depth)};
      // Tiles are of one height: where rows do not divide into them they overlap, and both make the same sums.
      auto multiply_some = [&](auto tiles_at_once, auto vectors, int v) {
        const uint16_t* left[tiles_at_once];
        float* to[tiles_at_once];
        for (int i = 0; i < tiles_at_once; i++) {
          const int64_t first = min(share(M, t + i, tiles).begin, M - rows);
          left[i] = a.from(first).data, to[i] = sums + first * ss + v * U;
        }
        multiply_tiles<LeftFormat, RightFormat, tiles_at_once, vectors>(left, a.stride, a.part, b + v * 2 * U, V, depth,
                                                                        ks, to, ss);
      };
      constexpr std::integral_constant<int, 1> one{};
      constexpr std::integral_constant<int, 2> two{};
      if (t + 1 < tiles) {
        for (int v = 0; v < V; v += 2) {
          if (v + 1 < V) {
            multiply_some(two, two, v);
          } else {
            multiply_some(two, one, v);
          }
        }
      } else if (V == 4) {
        multiply_some(one, std::integral_constant<int, 4>(), 0);
      } else if (V == 3) {
        multiply_some(one, std::integral_constant<int, 3>(), 0);
      } else if (V == 2) {
        multiply_some(one, two, 0);
      } else {
        multiply_some(one, one, 0);
      }
    }
  }
}

#else

template <class LeftFormat, class RightFormat>
void multiply(Left<LeftFormat> a, int64_t M, const uint16_t* b, int V, int64_t depth, float* sums, int64_t ss) {
  auto pairs = [](const uint16_t* p) { return reinterpret_cast<const Pair*>(p); };
  for (int i = 0; i < LeftFormat::kParts; i++) {
    for (int j = 0; j < RightFormat::kParts && i + j < 3; j++) {
      const bool first = i + j == 0;
      product_in_registers(pairs(a.data + i * a.part), a.stride / 2, M, pairs(b + j * depth * V * kLanes<float>), V,
                           depth / 2, first ? kZeros<float> : sums, first ? 0 : ss, sums, ss);
    }
  }
}

#endif

// One row of the product in float, of what the parts add up to: an infinity times the parts of a number would be NaN.
template <class LeftFormat, class RightFormat>
void multiply_whole(Left<LeftFormat> a, const uint16_t* b, int V, int64_t K, float* sums) {
  constexpr int U = kLanes<float>;
  const int64_t depth = round_up(K, RightFormat::kAlign);
  for (int v = 0; v < V; v++) {
    Vec<float> sum(0);
    for (int64_t k = 0; k < K; k++) {
      float left = 0;
      for (int i = LeftFormat::kParts - 1; i >= 0; i--) left += bit_cast<float>(uint32_t(a.data[i * a.part + k]) << 16);
      Vec<float> right(0);
      for (int j = RightFormat::kParts - 1; j >= 0; j--) {
        UBits pair;
        memcpy(&pair, b + ((j * depth + k) / 2 * V + v) * 2 * U, sizeof pair);
        right = right + bit_cast<Vec<float>>(k % 2 ? pair & 0xffff0000 : pair << 16);
      }
      sum = sum + Vec<float>(left) * right;
    }
    store(sums + v * U, sum);
  }
}

template <class LeftFormat, class RightFormat>
void product(Left<LeftFormat> a, int64_t M, const uint16_t* b, int V, int64_t K, const float* init, int64_t is,
             float* out, int64_t os) {
  constexpr int U = kLanes<float>;
  constexpr bool kSeveralParts = LeftFormat::kParts * RightFormat::kParts > 1;
  const int64_t depth = round_up(K, RightFormat::kAlign);
  float scratch[kBlockRows * kMaxVectors * U];
  for (int64_t i0 = 0; i0 < M; i0 += kBlockRows) {
    const int64_t rows = min(kBlockRows, M - i0);
    float* sums = init == out ? scratch : out + i0 * os;
    const int64_t ss = init == out ? V * U : os;
    multiply<LeftFormat, RightFormat>(a.from(i0), rows, b, V, depth, sums, ss);

    Vec<float> zero(0);
    for (int64_t i = 0; kSeveralParts && i < rows; i++) {
      for (int v = 0; v < V; v++) zero = zero + load(sums + i * ss + v * U) * Vec<float>(0);
    }
    const bool finite = _mm512_cmp_ps_mask((__m512)zero.v, (__m512)zero.v, _CMP_UNORD_Q) == 0;
    for (int64_t i = 0; i < rows; i++) {
      const float* from = init + (i0 + i) * is;
      float *to = out + (i0 + i) * os, *sum = sums + i * ss;
      if (!finite) multiply_whole<LeftFormat, RightFormat>(a.from(i0 + i), b, V, K, sum);
      for (int v = 0; v < V; v++) store(to + v * U, load(from + v * U) + load(sum + v * U));
    }
  }
}

#endif

// ---- rows too few to pay for packing

// out[M][V*U] = init[V*U] + a[M][K] W^T for panel p of W^T, read from w [gates*units,K] as it lies.
template <class Stored, class Sum = SumOf<Stored>>
void product_unpacked(Left<Plain<Sum>> a, int64_t M, const Stored* w, const Panels<Sum>& panels, int64_t p, int64_t K,
                      const Sum* init, Sum* out, int64_t os) {
  constexpr int U = kLanes<Sum>;
  for (int v = 0; v < panels.vectors(p); v++) {
    const int lanes = panels.lanes(p, v);
    const Stored* from = w + panels.column(p, v) * K;
    for (int64_t i = 0; i < M; i++) {
      const Sum* left = a.from(i).data;
      Vec<Sum> sums[U] = {};
      int64_t k = 0;
      for (; lanes == U && k + U <= K; k += U) {  // without branches
        const Vec<Sum> row = load(left + k);
#pragma GCC unroll 16
        for (int j = 0; j < U; j++) sums[j] = sums[j] + row * load(from + j * K + k);
      }
      for (; k < K; k += U) {
        const int n = min(U, K - k);
        const Vec<Sum> row = load(left + k, n);
#pragma GCC unroll 16
        for (int j = 0; j < U; j++) {
          if (j < lanes) sums[j] = sums[j] + row * load(from + j * K + k, n);
        }
      }
      store(out + i * os + v * U, load(init + v * U) + sums_of_rows(sums));
    }
  }
}

// out[M][V*U] = init + a[M][K] W for panel p of W, where row(k) points to its row k, or is null for zeros.
template <class Sum, class RowAt>
void product_of_rows(Left<Plain<Sum>> a, int64_t M, const RowAt& row, const Panels<Sum>& panels, int64_t p, int64_t K,
                     const Sum* init, int64_t is, Sum* out, int64_t os) {
  constexpr int U = kLanes<Sum>;
  const int V = panels.vectors(p);
  for (int64_t i = 0; i < M; i++) {
    Vec<Sum> sums[kMaxVectors];
    for (int v = 0; v < V; v++) sums[v] = load(init + i * is + v * U);
    for (int64_t k = 0; k < K; k++) {
      const auto* from = row(k);
      if (!from) continue;
      const Vec<Sum> left(a.from(i).data[k]);
      for (int v = 0; v < V; v++) sums[v] = sums[v] + left * load(from + panels.column(p, v), panels.lanes(p, v));
    }
    for (int v = 0; v < V; v++) store(out + i * os + v * U, sums[v]);
  }
}

}  // namespace
}  // namespace RNNFAST_ISA
}  // namespace rnnfast
