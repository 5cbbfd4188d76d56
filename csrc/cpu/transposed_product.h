// Products that sum over all rows, as the gradients of weights do: a stretch of rows after the other. Letters as in
// ../README.md.
#pragma once

#include "gemm.h"

namespace rnnfast {
namespace RNNFAST_ISA {
namespace {

constexpr int64_t kStretch = 128;

// A product dw^T = left^T grads of Q rows; left [stretch][row] left rows of kStretch.
template <class Stored, class LeftFormat, class Wide>
struct TransposedProduct {
  using Sum = typename Wide::Sum;
  static constexpr int U = kLanes<Sum>;
  static constexpr int64_t kSide = kMaxVectors * U;

  const typename LeftFormat::Element* left;
  int64_t lefts;  // rows of left
  const typename Wide::Element* grads;
  int64_t part;                        // from one part of a row of grads to the next
  const Panels<Sum>* panels;           // of the columns of dw^T
  int64_t slots[kMaxVectors], padded;  // gate i of dw is at slots[i] * padded in a row of grads
  void* dw;                            // [columns][lefts]
  void* db;                            // [columns]: the sums of grads over the rows; or null

  // U rows from q0 on, null for zeros, as columns of a left operand.
  template <class Row>
  static void put_rows(typename LeftFormat::Element* to, int64_t q0, int64_t lefts, const Row* const* rows) {
    put_transposed<LeftFormat>(to + q0 / kStretch * lefts * LeftFormat::row(kStretch) + q0 % kStretch,
                               LeftFormat::row(kStretch), kStretch, rows, lefts);
  }

  int64_t blocks(int64_t size) const { return ceil_div(panels->count(), size) * max(1, ceil_div(lefts, size * kSide)); }

  // Block i: size x size panels of dw^T, for which its operands are read from memory once. In `sums` are those of the
  // block, [size][size][kSide][kSide], and after them those of the columns of grads, [size][kSide].
  void multiply_block(int64_t Q, int64_t i, int64_t size, Sum* sums) const {
    Sum* column_sums = sums + size * size * kSide * kSide;
    const int64_t wide = max(1, ceil_div(lefts, size * kSide)), p0 = i / wide * size, n0 = i % wide * size * kSide;
    const int64_t p1 = min(p0 + size, panels->count()), n1 = min(n0 + size * kSide, lefts);
    auto sum_of = [&](int64_t n, int64_t p) { return sums + ((p - p0) * size * kSide + n - n0) * kSide; };
    for (int64_t q = 0; q == 0 || q < Q; q += kStretch) {
      const int64_t depth = min(kStretch, Q - q);
      for (int64_t p = p0; p < p1; p++) {
        const int V = panels->vectors(p);
        typename Wide::Element right[Wide::kParts * kStretch * kMaxVectors * U];
        for (int v = 0; v < V; v++) {
          const int64_t column = slots[panels->gate(v)] * padded + panels->unit(p, v);
          auto row = [&](int64_t k) { return k < depth ? grads + (q + k) * Wide::kParts * part + column : nullptr; };
          for (int64_t k = 0; k < Wide::column(depth) / Wide::kParts; k += 2) {
            Wide::copy_pair(right, depth, V, v, k, row(k), row(k + 1), part);
          }
          if (!db || n0) continue;
          Vec<Sum> sum(0);  // a stretch by itself first, for accuracy
          for (int64_t k = 0; k < depth; k++) sum = sum + Wide::get(row(k), part);
          Sum* total = column_sums + (p - p0) * kSide + v * U;
          store(total, q ? load(total) + sum : sum);
        }
        for (int64_t n = n0; n < n1; n += kSide) {
          Sum* sum = sum_of(n, p);
          const auto* rows = left + (q / kStretch * lefts + n) * LeftFormat::row(kStretch);
          product<LeftFormat, Wide>(Left<LeftFormat>{rows, LeftFormat::row(kStretch), kStretch}, min(kSide, n1 - n),
                                    right, V, depth, q ? sum : kZeros<Sum>, q ? kSide : 0, sum, kSide);
        }
      }
    }
    for (int64_t p = p0; p < p1; p++) {
      for (int v = 0; v < panels->vectors(p); v++) {
        const int64_t row = panels->column(p, v);
        const int lanes = panels->lanes(p, v);
        if (db && n0 == 0) {
          store(static_cast<Stored*>(db) + row, load(column_sums + (p - p0) * kSide + v * U), lanes);
        }
        for (int64_t n = n0; n < n1; n += U) {
          Vec<Sum> square[U];
          for (int j = 0; j < U; j++) square[j] = load(sum_of(n, p) + j * kSide + v * U);
          transpose(square);
          for (int j = 0; j < lanes; j++) {
            store(static_cast<Stored*>(dw) + (row + j) * lefts + n, square[j], min(U, n1 - n));
          }
        }
      }
    }
  }
};

// Computes some products of Q rows, in blocks that are dealt to the threads.
template <class Product>
void multiply(const Product* products, int64_t count, int64_t Q, int64_t threads) {
  constexpr int64_t kSide = Product::kSide;
  auto all_blocks = [&](int64_t size) {
    int64_t n = 0;
    for (int64_t i = 0; i < count; i++) n += products[i].blocks(size);
    return n;
  };
  int64_t size = 4;
  while (size > 1 && all_blocks(size) < 4 * threads) size /= 2;
  const int64_t blocks = all_blocks(size), sums_size = (size * kSide + 1) * size * kSide;
  Buffer<typename Product::Sum> sums(threads * sums_size);
  parallel(threads, [&](int64_t task) {
    const Range mine = share(blocks, task, threads);
    int64_t first = 0;
    for (int64_t i = 0; i < count; first += products[i++].blocks(size)) {
      const int64_t end = min(mine.end - first, products[i].blocks(size));
      for (int64_t b = max(mine.begin - first, 0); b < end; b++) {
        products[i].multiply_block(Q, b, size, sums + task * sums_size);
      }
    }
  });
}

}  // namespace
}  // namespace RNNFAST_ISA
}  // namespace rnnfast
