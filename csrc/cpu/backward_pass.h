// What the parts of a backward pass share: the gradients that the sweep leaves for the products after it, and the
// product of gate gradients with a matrix of weights, which both the sweep and the input's gradient consist of.
// Letters as in ../README.md.
#pragma once

#include "sweep.h"

namespace rnnfast {
namespace RNNFAST_ISA {
namespace {

template <class Cell, class Stored, class Math>
struct BackwardPass {
  using Sum = SumOf<Stored>;
  using Exact = typename Math::Exact;  // the format of operands that hold x, h and the weights
  using Wide = typename Math::Wide;    // and of those that hold gradients, and m = o tanh(c)
  static constexpr int U = kLanes<Sum>, G = Cell::kGates, kGrads = Cell::kGrads, kColumns = Cell::kColumns;

  const Backward& f;
  const Panels<Sum> gates, hidden, outputs, inputs;
  const bool projected, packed;
  const int64_t Q, padded;                      // rows, and units up to kAlign
  const Buffer<typename Wide::Element> dgates;  // [D][Q] left rows of [slot][padded]
  const Buffer<typename Wide::Element> dys;     // [D][Q] left rows of P: dh of every step, for w_hr

  explicit BackwardPass(const Backward& f)
      : f(f),
        gates(f.H, G),
        hidden(f.H),
        outputs(f.P),
        inputs(f.I),
        projected(f.projected),
        packed(f.R > kUnpackedRows),
        Q(f.steps.start[f.steps.T]),
        padded(round_up(f.H, Wide::kAlign)),
        dgates(f.D * Q * Wide::row(kColumns * padded)),
        dys(projected ? f.D * Q * Wide::row(f.P) : 0) {}

  // ---- gate gradients

  // The gradients of a row's gates lie [slot][H up to kAlign], in an order that makes one range of those of W_ih x (the
  // first G slots), and one of those of W_hh h (the last G slots). A cell with one gradient more than it has gates, the
  // GRU, has them as n r z and nr. What the step adds to the gradients of the units' own weights comes last.
  static constexpr int kMore = kGrads - G;
  static constexpr int slot(int grad) { return grad < G ? (grad + kMore) % G : grad; }
  static constexpr int input_gate(int64_t slot) { return (slot + G - kMore) % G; }

  // Row k of w [gates*units][width] where k counts [slot][units up to kAlign]; null between units.
  const Stored* gate_row(const void* w, int64_t width, int64_t k, bool of_input) const {
    const int64_t slot = k / padded, unit = k % padded;
    if (unit >= f.H) return nullptr;
    return row_of<Stored>(w, (of_input ? input_gate(slot) : slot) * f.H + unit, width);
  }

  // The elements of a right operand of a product with gate gradients.
  int64_t packed_size(const Panels<Sum>& columns) const { return columns.width() * Exact::column(G * padded); }

  // Makes that operand: w [gates*units][columns], rows in the gradients' order.
  void pack_gates(typename Exact::Element* copy, const void* w, const Panels<Sum>& columns, bool of_input) const {
    constexpr int64_t kRows = 128;
    const int64_t K = G * padded, blocks = ceil_div(K, kRows);
    parallel_for(columns.count() * blocks, min(f.threads, 1 + K * columns.units / kThreadWork), [&](int64_t task) {
      const int64_t k = task % blocks * kRows;
      pack_rows<Exact>(copy, K, {k, min(k + kRows, K)}, columns, task / blocks,
                       [&](int64_t k) { return gate_row(w, columns.units, k, of_input); });
    });
  }

  // out[M][V*U] = init + gradients * panel p of w, or of its packed copy.
  void multiply_gates(Left<Wide> gradients, int64_t M, const void* w, const typename Exact::Element* copy,
                      const Panels<Sum>& panels, int64_t p, bool of_input, const Sum* init, int64_t is, Sum* out,
                      int64_t os) const {
    const int64_t K = G * padded;
    if constexpr (std::is_same_v<Wide, Plain<Sum>>) {
      auto row = [&](int64_t k) { return gate_row(w, panels.units, k, of_input); };
      if (!packed) return product_of_rows(gradients, M, row, panels, p, K, init, is, out, os);
    }
    product<Wide, Exact>(gradients, M, copy + panels.start(p) * Exact::column(K), panels.vectors(p), K, init, is, out,
                         os);
  }

  // ---- rows

  // Calls body(q, t, rank) for every valid row.
  template <class Body>
  void for_rows(Range q, const Body& body) const {
    int64_t t = 0;
    for (int64_t high = f.steps.T; high - t > 1;) {
      int64_t middle = (t + high) / 2;
      if (f.steps.start[middle] <= q.begin) {
        t = middle;
      } else {
        high = middle;
      }
    }
    for (; q.begin < q.end; q.begin++) {
      while (q.begin >= f.steps.start[t + 1]) t++;
      body(q.begin, t, q.begin - f.steps.start[t]);
    }
  }

  // The row of h that direction d came to step t with; null where that is zero.
  const Stored* h_before(int d, int64_t t, int64_t rank) const {
    if (f.steps.cut(d, t, rank)) return nullptr;
    const int64_t previous = f.steps.previous(d, t, rank);
    return previous >= 0 ? row_of<Stored>(f.y, previous * f.D + d, f.P)
                         : row_of<Stored>(f.h0, d * f.steps.N + f.steps.order[rank], f.P);
  }

  // For a product of all gate gradients with a matrix of so many columns.
  int64_t work_threads(int64_t columns) const {
    return min(f.threads, max(1, Q * f.D * gates.width() * columns / kThreadWork));
  }
};

}  // namespace
}  // namespace RNNFAST_ISA
}  // namespace rnnfast
