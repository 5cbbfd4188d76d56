// The gradients at a layer's gates as the sweep has left them, written out in the cell's order.
// Letters as in ../README.md.
#pragma once

#include "backward_pass.h"

namespace rnnfast {
namespace RNNFAST_ISA {
namespace {

template <class Cell, class Stored, class Math>
void gate_gradients(const BackwardPass<Cell, Stored, Math>& pass) {
  using Pass = BackwardPass<Cell, Stored, Math>;
  using Wide = typename Pass::Wide;
  constexpr int U = Pass::U, kColumns = Pass::kColumns;
  const Backward& f = pass.f;
  const int64_t Q = pass.Q, width = kColumns * f.H + (pass.projected ? f.P : 0);
  const int64_t of_gates = kColumns * pass.padded, of_projection = round_up(f.P, Wide::kAlign);
  auto write = [](Stored* to, const typename Wide::Element* from, int64_t part, int64_t count) {
    for (int64_t i = 0; i < count; i += U) store(to + i, Wide::get(from + i, part), min(U, count - i));
  };
  parallel_for(ceil_div(Q, kBlockRows), pass.work_threads(1), [&](int64_t task) {
    pass.for_rows({task * kBlockRows, min((task + 1) * kBlockRows, Q)}, [&](int64_t q, int64_t t, int64_t rank) {
      for (int d = 0; d < f.D; d++) {
        Stored* row = static_cast<Stored*>(f.dgates) + (d * f.R + f.steps.row(t, rank)) * width;
        const auto* grads = pass.dgates + (d * Q + q) * Wide::row(of_gates);
        for (int k = 0; k < kColumns; k++) write(row + k * f.H, grads + Pass::slot(k) * pass.padded, of_gates, f.H);
        if (!pass.projected) continue;
        write(row + kColumns * f.H, pass.dys + (d * Q + q) * Wide::row(f.P), of_projection, f.P);
      }
    });
  });
}

}  // namespace
}  // namespace RNNFAST_ISA
}  // namespace rnnfast
