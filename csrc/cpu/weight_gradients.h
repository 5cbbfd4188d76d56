// The gradients of a layer's weights and biases: products over all valid rows.
// Letters as in ../README.md.
#pragma once

#include "backward_pass.h"
#include "transposed_product.h"

namespace rnnfast {
namespace RNNFAST_ISA {
namespace {

template <class Cell, class Stored, class Math>
class WeightGradients {
  using Pass = BackwardPass<Cell, Stored, Math>;
  using Sum = typename Pass::Sum;
  using Exact = typename Pass::Exact;
  using Wide = typename Pass::Wide;
  static constexpr int U = Pass::U, G = Pass::G, kColumns = Pass::kColumns;

 public:
  explicit WeightGradients(const Pass& pass)
      : pass(pass),
        f(pass.f),
        hidden(pass.hidden),
        projected(pass.projected),
        Q(pass.Q),
        padded(pass.padded),
        stretches(max(1, ceil_div(Q, kStretch))),
        h_size(stretches * f.P * Exact::row(kStretch)),
        m_size(stretches * f.H * Wide::row(kStretch)),
        x(stretches * f.I * Exact::row(kStretch)),
        h(f.D * h_size),
        m(projected ? f.D * m_size : 0) {}

  void run() {
    transpose_operands();
    Product<Exact> products[4];
    Product<Wide> projections[2];
    for (int d = 0; d < f.D; d++) {
      const auto* grads = pass.dgates + d * Q * Wide::row(kColumns * padded);
      Product<Exact>&of_x = products[2 * d], &of_h = products[2 * d + 1];
      of_x = {x, f.I, grads, kColumns * padded, &pass.gates, {}, padded, f.dw[d].w_ih, f.dw[d].b_ih};
      of_h = {h + d * h_size, f.P, grads, kColumns * padded, &pass.gates, {}, padded, f.dw[d].w_hh, f.dw[d].b_hh};
      for (int i = 0; i < G; i++) of_x.slots[i] = Pass::slot(i), of_h.slots[i] = Pass::slot(Cell::hidden(i));
      const auto* dys = pass.dys + d * Q * Wide::row(f.P);
      projections[d] = {m + d * m_size, f.H,    dys, round_up(f.P, Wide::kAlign), &pass.outputs, {}, 0,
                        f.dw[d].w_hr,   nullptr};
    }
    const int64_t threads = pass.work_threads(f.I + f.P);
    multiply(products, 2 * f.D, Q, threads);
    if (projected) multiply(projections, f.D, Q, threads);
    if constexpr (Cell::kUnitWeights > 0) sum_of_units();
  }

 private:
  template <class LeftFormat>
  using Product = TransposedProduct<Stored, LeftFormat, Wide>;

  // ---- the left operands: x, h and m, whose rows become columns

  void transpose_operands() {
    const int64_t blocks = ceil_div(round_up(Q, Exact::kAlign), U), packers = max(1, min(f.threads, Q / 64));
    Buffer<Sum> unprojected(projected ? packers * U * hidden.width() : 0);
    parallel(packers, [&](int64_t task) {
      const Range mine = share(blocks, task, packers);
      for (int64_t q0 = mine.begin * U; q0 < mine.end * U; q0 += U) {
        put_rows<Exact>(x, q0, f.I, [&](int64_t, int64_t t, int64_t rank) {
          return row_of<Stored>(f.x, f.steps.row(t, rank), f.I);
        });
        for (int d = 0; d < f.D; d++) {
          put_rows<Exact>(h + d * h_size, q0, f.P,
                          [&](int64_t, int64_t t, int64_t rank) { return pass.h_before(d, t, rank); });
          if (!projected) continue;
          put_rows<Wide>(m + d * m_size, q0, f.H, [&](int64_t q, int64_t t, int64_t rank) {
            Sum* row = unprojected + (task * U + q - q0) * hidden.width();
            unproject_row(row, d, f.steps.row(t, rank));
            return static_cast<const Sum*>(row);
          });
        }
      }
    });
  }

  // U valid rows from q0 on as columns of a left operand; row_at(q, t, rank) points to a row, or is null for zeros.
  template <class Format, class RowAt>
  void put_rows(typename Format::Element* to, int64_t q0, int64_t width, const RowAt& row_at) const {
    decltype(row_at(0, 0, 0)) rows[U] = {};
    pass.for_rows({q0, min(q0 + U, Q)}, [&](int64_t q, int64_t t, int64_t rank) { rows[q - q0] = row_at(q, t, rank); });
    Product<Format>::put_rows(to, q0, width, rows);
  }

  // m, the cell's own h, what w_hr was applied to.
  void unproject_row(Sum* to, int d, int64_t r) const {
    if constexpr (Cell::kProjects) {
      const Stored* gates = static_cast<const Stored*>(f.gates) + (d * f.R + r) * Cell::kSaved * f.H;
      const Sum* c = static_cast<const Sum*>(f.c) + (r * f.D + d) * f.H;
      for (int64_t unit = 0; unit < f.H; unit += U) {
        const int n = min(U, f.H - unit);
        Vec<Sum> saved[Cell::kSaved];
        for (int k = 0; k < Cell::kSaved; k++) saved[k] = load(gates + k * f.H + unit, n);
        store(to + unit, Cell::output(saved, load(c + unit, n)));
      }
    }
  }

  // The gradients of the units' own weights: sums over the rows of what the sweep has left, a stretch by itself first.
  void sum_of_units() const {
    const int64_t blocks = f.D * Cell::kUnitWeights * hidden.blocks, part = kColumns * padded;
    parallel_for(blocks, pass.work_threads(1), [&](int64_t task) {
      const int64_t k = task / hidden.blocks % Cell::kUnitWeights, unit = task % hidden.blocks * U;
      const int64_t d = task / hidden.blocks / Cell::kUnitWeights;
      Vec<Sum> total(0);
      for (int64_t q0 = 0; q0 < Q; q0 += kStretch) {
        Vec<Sum> sum(0);
        for (int64_t q = q0; q < min(q0 + kStretch, Q); q++) {
          sum = sum + Wide::get(pass.dgates + (d * Q + q) * Wide::row(part) + (Pass::kGrads + k) * padded + unit, part);
        }
        total = total + sum;
      }
      store(static_cast<Stored*>(f.dw[d].w_units) + k * f.H + unit, total, min(U, f.H - unit));
    });
  }

  const Pass& pass;
  const Backward& f;
  const Panels<Sum>& hidden;
  const bool projected;
  const int64_t Q, padded, stretches;
  const int64_t h_size, m_size;             // elements of h and m of one direction
  const Buffer<typename Exact::Element> x;  // [stretch][I] left rows of kStretch
  const Buffer<typename Exact::Element> h;  // [D][stretch][P] left rows of kStretch: the states that steps began with
  const Buffer<typename Wide::Element> m;   // [D][stretch][H] left rows of kStretch
};

}  // namespace
}  // namespace RNNFAST_ISA
}  // namespace rnnfast
