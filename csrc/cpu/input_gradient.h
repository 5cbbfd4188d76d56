// The gradient of a layer's input, from the gradients at its gates.
// Letters as in ../README.md.
#pragma once

#include "backward_pass.h"

namespace rnnfast {
namespace RNNFAST_ISA {
namespace {

// dx = dgates W_ih, both directions in one sum.
template <class Cell, class Stored, class Math>
void input_gradient(const BackwardPass<Cell, Stored, Math>& pass) {
  using Pass = BackwardPass<Cell, Stored, Math>;
  using Sum = typename Pass::Sum;
  using Wide = typename Pass::Wide;
  constexpr int U = Pass::U;
  const Backward& f = pass.f;
  const Panels<Sum>& inputs = pass.inputs;
  const int64_t Q = pass.Q, part = Pass::kColumns * pass.padded, row = Wide::row(part), size = pass.packed_size(inputs);
  const Buffer<typename Pass::Exact::Element> w_ih(pass.packed ? f.D * size : 0);
  for (int d = 0; pass.packed && d < f.D; d++) pass.pack_gates(w_ih + d * size, f.weights[d].w_ih, inputs, true);
  parallel_for(ceil_div(Q, kBlockRows) * inputs.count(), pass.work_threads(f.I), [&](int64_t task) {
    const int64_t n = task % inputs.count(), q0 = task / inputs.count() * kBlockRows, q1 = min(q0 + kBlockRows, Q);
    const int V = inputs.vectors(n);
    Sum sum[kBlockRows * kMaxVectors * U];
    for (int d = 0; d < f.D; d++) {
      pass.multiply_gates(Left<Wide>{pass.dgates + (d * Q + q0) * row, row, part}, q1 - q0, f.weights[d].w_ih,
                          w_ih + d * size, inputs, n, true, d ? sum : kZeros<Sum>, d ? V * U : 0, sum, V * U);
    }
    pass.for_rows({q0, q1}, [&](int64_t q, int64_t t, int64_t rank) {
      Stored* dx = static_cast<Stored*>(f.dx) + f.steps.row(t, rank) * f.I;
      for (int v = 0; v < V; v++) {
        store(dx + inputs.column(n, v), load(sum + ((q - q0) * V + v) * U), inputs.lanes(n, v));
      }
    });
  });
}

}  // namespace
}  // namespace RNNFAST_ISA
}  // namespace rnnfast
