// Matrix products of a few rows with a packed matrix, the one kernel under every phase of a layer.
//
// A packed matrix keeps its columns in panels of up to four vectors of U lanes, [panel][K][vector][U], zeros where
// there is no column. A panel of a gate matrix holds all gates of one block of U hidden units, so that a tile of the
// product is what a cell needs; a matrix of one gate takes four blocks a panel.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace rnnfast {
namespace RNNFAST_ISA {
namespace {

constexpr int kMaxVectors = 4;
constexpr int kMaxRows = 8;
constexpr int kBlockRows = 48;          // rows a pass over a panel serves: their sums and a block of the panel fit L1
constexpr int kBlockBytes = 32 * 1024;  // of a panel, kept in L1 while several tiles use it

// Rows of a register tile V vectors wide. With 32 registers: R*V sums, V of the panel, 1 or 2 broadcast values. With 16
// the panel's vectors are memory operands.
constexpr int tile_rows(int V) { return min(kMaxRows, kRegisters == 32 ? (30 - V) / V : 12 / V); }

// The columns of a packed matrix of gates*units columns.
template <class T>
struct Panels {
  static constexpr int U = kLanes<T>;
  int64_t units;
  int gates;
  int64_t blocks = max(1, ceil_div(units, U));  // one, of no lanes, where there is no unit
  int blocks_per_panel = gates == 1 ? kMaxVectors : 1;

  explicit Panels(int64_t units, int gates = 1) : units(units), gates(gates) {}
  int64_t count() const { return ceil_div(blocks, blocks_per_panel); }
  int64_t width() const { return blocks * gates * U; }
  int64_t start(int64_t p) const { return p * blocks_per_panel * gates * U; }
  int vectors(int64_t p) const { return gates * min(blocks_per_panel, blocks - p * blocks_per_panel); }
  // Vector v of panel p holds lanes() columns of the unpacked matrix from column() on.
  int64_t column(int64_t p, int v) const { return gates == 1 ? unit(p, v) : v * units + unit(p, 0); }
  int lanes(int64_t p, int v) const { return min(U, units - unit(p, gates == 1 ? v : 0)); }
  int64_t unit(int64_t p, int block) const { return (p * blocks_per_panel + block) * U; }
};

// Packs panel p of W^T; w [gates*units,K].
template <class S, class T>
void pack_transposed(T* packed, const S* w, int64_t K, const Panels<T>& panels, int64_t p) {
  constexpr int U = kLanes<T>;
  int V = panels.vectors(p);
  T* panel = packed + panels.start(p) * K;
  for (int v = 0; v < V; v++) {
    int lanes = panels.lanes(p, v);
    const S* from = w + panels.column(p, v) * K;
    for (int64_t k = 0; k < K; k += U) {
      int n = min(U, K - k);
      Vec<T> square[U];
#pragma GCC unroll 16
      for (int i = 0; i < U; i++) square[i] = i < lanes ? load(from + i * K + k, n) : Vec<T>(0);
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < U; i++) {
        if (i < n) store(panel + ((k + i) * V + v) * U, square[i]);
      }
    }
  }
}

// Packs row k of a matrix of K rows, columns as they lie; no row, zeros.
template <class S, class T = AccOf<S>>
void pack_row(AccOf<S>* packed, const S* row, int64_t k, int64_t K, const Panels<AccOf<S>>& panels) {
  constexpr int U = kLanes<T>;
  for (int64_t p = 0; p < panels.count(); p++) {
    int V = panels.vectors(p);
    T* to = packed + panels.start(p) * K + k * V * U;
    for (int v = 0; v < V; v++) {
      store(to + v * U, row ? load(row + panels.column(p, v), panels.lanes(p, v)) : Vec<T>(0));
    }
  }
}

template <class S, class T>
void pack_vector(T* packed, const S* vector, const Panels<T>& panels) {
  for (int64_t p = 0; p < panels.count(); p++) {
    for (int v = 0; v < panels.vectors(p); v++) {
      Vec<T> value = vector ? load(vector + panels.column(p, v), panels.lanes(p, v)) : Vec<T>(0);
      store(packed + panels.start(p) + v * panels.U, value);
    }
  }
}

// out[R][V*U] = init[R][V*U] + a[R][K] * b[K][V*U], with the sums in registers; a[r][k] is a[r*rs + k*ks].
template <class T, int V, int R>
void tile(const T* a, int64_t rs, int64_t ks, const T* b, int64_t K, const T* init, int64_t is, T* out, int64_t os) {
  constexpr int U = kLanes<T>;
  Vec<T> sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) sum[r][v] = load(init + r * is + v * U);
  }
  for (int64_t k = 0; k < K; k++, a += ks, b += V * U) {
    Vec<T> column[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) column[v] = load(b + v * U);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      Vec<T> row(a[r * rs]);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sum[r][v] = sum[r][v] + row * column[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) store(out + r * os + v * U, sum[r][v]);
  }
}

template <class T>
using Tile = void (*)(const T*, int64_t, int64_t, const T*, int64_t, const T*, int64_t, T*, int64_t);

template <class T, int V, size_t... R>
Tile<T> tile_of(int rows, std::index_sequence<R...>) {
  static constexpr Tile<T> tiles[] = {tile<T, V, R + 1>...};
  return tiles[rows - 1];
}

template <class T, int V>
void product_of(const T* a, int64_t rs, int64_t ks, int64_t M, const T* b, int64_t K, const T* init, int64_t is, T* out,
                int64_t os) {
  constexpr int kRows = tile_rows(V);
  constexpr int64_t kDepth = kBlockBytes / (V * kVectorBytes);
  int64_t tiles = ceil_div(M, kRows), depth = tiles > 1 ? kDepth : max(K, 1);
  for (int64_t k = 0; k == 0 || k < K; k += depth) {
    for (int64_t i = 0; i < tiles; i++) {  // rows are dealt evenly: 16 are 6 + 5 + 5
      Range r = share(M, i, tiles);
      const T* from = k ? out + r.begin * os : init + r.begin * is;
      tile_of<T, V>(r.end - r.begin, std::make_index_sequence<kRows>())(a + r.begin * rs + k * ks, rs, ks,
                                                                        b + k * V * kLanes<T>, min(depth, K - k), from,
                                                                        k ? os : is, out + r.begin * os, os);
    }
  }
}

// out[M][V*U] = init[M][V*U] + a[M][K] * b, with b a panel of V vectors. Sums run over k in order, whatever M is.
template <class T>
void product(const T* a, int64_t rs, int64_t ks, int64_t M, const T* b, int V, int64_t K, const T* init, int64_t is,
             T* out, int64_t os) {
  static constexpr decltype(&product_of<T, 1>) products[] = {product_of<T, 1>, product_of<T, 2>, product_of<T, 3>,
                                                             product_of<T, 4>};
  for (int64_t i = 0; i < M; i += kBlockRows) {
    products[V - 1](a + i * rs, rs, ks, min(kBlockRows, M - i), b, K, init + i * is, is, out + i * os, os);
  }
}

// The same with panel p of W^T, read from w [gates*units,K] as it lies: for rows too few to pay for packing.
template <class S, class T = AccOf<S>>
void product_unpacked(const T* a, int64_t rs, int64_t M, const S* w, const Panels<AccOf<S>>& panels, int64_t p,
                      int64_t K, const T* init, T* out, int64_t os) {
  constexpr int U = kLanes<T>;
  for (int v = 0; v < panels.vectors(p); v++) {
    const int lanes = panels.lanes(p, v);
    const S* from = w + panels.column(p, v) * K;
    for (int64_t i = 0; i < M; i++) {
      Vec<T> sums[U] = {};
      for (int64_t k = 0; k < K; k += U) {
        const int n = min(U, K - k);
        const Vec<T> row = load(a + i * rs + k, n);
#pragma GCC unroll 16
        for (int j = 0; j < U; j++) {
          if (j < lanes) sums[j] = sums[j] + row * load(from + j * K + k, n);
        }
      }
      transpose(sums);
      Vec<T> total = load(init + v * U);
      for (int j = 0; j < U; j++) total = total + sums[j];
      store(out + i * os + v * U, total);
    }
  }
}

}  // namespace
}  // namespace RNNFAST_ISA
}  // namespace rnnfast
