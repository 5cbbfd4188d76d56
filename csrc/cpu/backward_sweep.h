// The sweep of a backward pass: from the last step to the first, the gradients at the gates and those of the states.
// Letters as in ../README.md.
#pragma once

#include "backward_pass.h"

namespace rnnfast {
namespace RNNFAST_ISA {
namespace {

template <class Cell, class Stored, class Math>
class BackwardSweep {
  using Pass = BackwardPass<Cell, Stored, Math>;
  using Sum = typename Pass::Sum;
  using Exact = typename Pass::Exact;
  using Wide = typename Pass::Wide;
  static constexpr int U = Pass::U, kColumns = Pass::kColumns;

 public:
  explicit BackwardSweep(const Pass& pass)
      : pass(pass),
        f(pass.f),
        hidden(pass.hidden),
        outputs(pass.outputs),
        projected(pass.projected),
        Q(pass.Q),
        padded(pass.padded),
        teams(f, pass.gates, Cost::of<Exact>()),
        w_hh(pass.packed ? f.D * pass.packed_size(outputs) : 0),
        w_hr(projected ? f.D * hidden.width() * Exact::column(f.P) : 0),
        scratch(teams.groups() * teams.rows() * state_size()) {}

  void run() {
    pack();
    teams.run([&](const auto& each) { sweep(each); });
  }

 private:
  // A group of rows, with the gradients that it carries from step to step.
  struct GroupState : Group {
    Sum *dh, *dc, *dm, *direct;  // [rows][outputs], 3 x [rows][hidden]

    GroupState(const BackwardSweep& sweep, int64_t g) : Group(sweep.f, sweep.teams, g) {
      const int64_t n = sweep.teams.rows();
      dh = sweep.scratch + g * n * sweep.state_size();
      dc = dh + n * sweep.outputs.width();
      dm = dc + n * sweep.hidden.width();
      direct = dm + n * sweep.hidden.width();
    }
    int64_t time(int64_t s) const { return Group::time(steps.T - 1 - s); }
    int64_t q(int64_t t, int64_t i) const { return steps.start[t] + rank(i); }
  };

  int64_t state_size() const { return outputs.width() + 3 * hidden.width(); }

  void pack() {
    for (int d = 0; d < f.D; d++) {
      const auto& w = f.weights[d];
      if (pass.packed) pass.pack_gates(w_hh + d * pass.packed_size(outputs), w.w_hh, outputs, false);
      for (int64_t p = 0; projected && p < hidden.count(); p++) {
        pack_rows<Exact>(w_hr + d * hidden.width() * Exact::column(f.P), f.P, {0, Exact::column(f.P) / Exact::kParts},
                         hidden, p, [&](int64_t k) { return k < f.P ? row_of<Stored>(w.w_hr, k, f.H) : nullptr; });
      }
    }
  }

  // The rows of a step in an operand [D][Q] of left rows of K.
  Left<Wide> step_rows(const GroupState& g, int64_t t, const typename Wide::Element* data, int64_t K) const {
    return {data + (g.d * Q + g.q(t, 0)) * Wide::row(K), g.stride * Wide::row(K), round_up(K, Wide::kAlign)};
  }

  // The stages of the sweep: see Teams::run.
  template <class Each>
  void sweep(const Each& each) {
    each([&](int64_t g, int64_t part, int64_t) {
      if (part == 0) begin(GroupState(*this, g));
    });
    for (int64_t s = 0; s < f.steps.T; s++) {
      if (projected) {
        each([&](int64_t g, int64_t part, int64_t parts) {
          keep_output_gradient(GroupState(*this, g), s, share(outputs.blocks, part, parts));
        });
        each([&](int64_t g, int64_t part, int64_t parts) {
          unproject(GroupState(*this, g), s, share(hidden.count(), part, parts));
        });
      }
      each([&](int64_t g, int64_t part, int64_t parts) {
        step(GroupState(*this, g), s, share(hidden.blocks, part, parts));
      });
      if (s + 1 == f.steps.T && !f.dh0) break;  // nobody asks for the gradient of the first state
      each([&](int64_t g, int64_t part, int64_t parts) {
        carry(GroupState(*this, g), s, share(outputs.count(), part, parts));
      });
    }
    each([&](int64_t g, int64_t part, int64_t) {
      if (part == 0) end(GroupState(*this, g));
    });
  }

  void begin(const GroupState& g) {
    for (int64_t i = 0; i < g.rows; i++) {
      int64_t n = g.d * f.steps.N + g.batch_row(i);
      put_row<Plain<Sum>>(g.dh + i * outputs.width(), row_of<Stored>(f.dh_n, n, f.P), f.P);
      if (Cell::kHasCell) put_row<Plain<Sum>>(g.dc + i * hidden.width(), row_of<Stored>(f.dc_n, n, f.H), f.H);
    }
  }

  // Keeps dh + dy in dys: the product with w_hr takes it from there, and at the end the gradient of w_hr.
  void keep_output_gradient(const GroupState& g, int64_t s, Range blocks) {
    const int64_t t = g.time(s), rows = g.alive_at(t), part = round_up(f.P, Wide::kAlign);
    for (int64_t i = 0; i < rows; i++) {
      const Stored* dy = row_of<Stored>(f.dy, g.row(t, i) * f.D + g.d, f.P);
      auto* kept = pass.dys + (g.d * Q + g.q(t, i)) * Wide::row(f.P);
      for (int64_t k = blocks.begin * U; k < blocks.end * U; k += U) {
        Vec<Sum> dh = load(g.dh + i * outputs.width() + k);
        if (dy) dh = dh + load(dy + k, min(U, f.P - k));
        Wide::put(kept + k, part, dh);
      }
      for (int64_t k = outputs.width(); blocks.end == outputs.blocks && k < part; k += U) {
        Wide::put(kept + k, part, Vec<Sum>(0));
      }
    }
  }

  // dm, the gradient of what was projected: dh W_hr.
  void unproject(const GroupState& g, int64_t s, Range panels) {
    const int64_t t = g.time(s);
    for (int64_t p = panels.begin; p < panels.end; p++) {
      product<Wide, Exact>(step_rows(g, t, pass.dys, f.P), g.alive_at(t),
                           w_hr + (g.d * hidden.width() + hidden.start(p)) * Exact::column(f.P), hidden.vectors(p), f.P,
                           kZeros<Sum>, 0, g.dm + hidden.start(p), hidden.width());
    }
  }

  void step(const GroupState& g, int64_t s, Range blocks) {
    const int64_t t = g.time(s), rows = g.alive_at(t);
    for (int64_t i = 0; i < rows; i++) {  // row by row, since what was saved lies so
      auto* gradients = pass.dgates + (g.d * Q + g.q(t, i)) * Wide::row(kColumns * padded);
      update(g, t, i, blocks, gradients);
      for (int64_t k = hidden.width(); blocks.end == hidden.blocks && k < padded; k += U) {
        for (int j = 0; j < kColumns; j++) Wide::put(gradients + j * padded + k, kColumns * padded, Vec<Sum>(0));
      }
    }
  }

  // Takes some blocks of units of one row back through the cell. Lanes beyond H hold zeros all the way. What the loop
  // uses is in variables: members the compiler would read again after every store, which might have changed them.
  void update(const GroupState& g, int64_t t, int64_t i, Range blocks, typename Wide::Element* gradients) const {
    const int64_t H = f.H, padded = this->padded, rank = g.rank(i), r = g.row(t, i);
    const int64_t previous = f.steps.previous(g.d, t, rank), of_d = r * f.D + g.d;
    const bool cut = f.steps.cut(g.d, t, rank);
    const Sum* const dh_in = projected ? g.dm + i * hidden.width() : g.dh + i * outputs.width();
    const Stored* const dy = projected ? nullptr : row_of<Stored>(f.dy, of_d, f.P);
    const Stored* const gates = static_cast<const Stored*>(f.gates) + (g.d * f.R + r) * Cell::kSaved * H;
    const Stored* const y = static_cast<const Stored*>(f.y) + of_d * f.P;
    const Stored* const old_y = Cell::kNeedsOldH ? pass.h_before(g.d, t, rank) : nullptr;
    const Sum* const cs = row_of<Sum>(Cell::kHasCell ? f.c : nullptr, of_d, H);
    const Sum* const old_cs = !cut && previous >= 0 ? row_of<Sum>(f.c, previous * f.D + g.d, H) : nullptr;
    const Stored* const c0 = !cut && previous < 0 ? row_of<Stored>(f.c0, g.d * f.steps.N + g.batch_row(i), H) : nullptr;
    const Sum* const dcs = row_of<Sum>(f.dc, of_d, H);
    const Stored* const w_units = static_cast<const Stored*>(f.weights[g.d].w_units);
    Sum *const dc_state = g.dc + i * hidden.width(), *const direct_out = g.direct + i * hidden.width();
    for (int64_t unit = blocks.begin * U; unit < blocks.end * U; unit += U) {
      const int lanes = min(U, H - unit);
      Vec<Sum> dh = load(dh_in + unit), saved[Cell::kSaved + 1], d[kColumns], h, old_h(0), c, old_c(0), dc;
      Vec<Sum> w[Cell::kUnitWeights + 1];
      for (int k = 0; k < Cell::kUnitWeights; k++) w[k] = load(w_units + k * H + unit, lanes);
      if (dy) dh = dh + load(dy + unit, lanes);
      for (int k = 0; k < Cell::kSaved; k++) saved[k] = load(gates + k * H + unit, lanes);
      if (Cell::kNeedsH) h = load(y + unit, lanes);
      if (Cell::kNeedsOldH && old_y) old_h = load(old_y + unit, lanes);
      if (Cell::kHasCell) {
        c = load(cs + unit, lanes);
        if (old_cs) old_c = load(old_cs + unit, lanes);
        if (c0) old_c = load(c0 + unit, lanes);
        dc = load(dc_state + unit);
        if (dcs) dc = dc + load(dcs + unit, lanes);
      }
      Vec<Sum> direct = Cell::backward(saved, w, h, old_h, c, old_c, dh, dc, d);
      if (Cell::kHasCell) store(dc_state + unit, cut ? Vec<Sum>(0) : dc);
      if (Cell::kHasDirect) store(direct_out + unit, direct);
      for (int k = 0; k < kColumns; k++) Wide::put(gradients + Pass::slot(k) * padded + unit, kColumns * padded, d[k]);
    }
  }

  // dh of the step before: what comes through W_hh, and what comes straight through the cell.
  void carry(const GroupState& g, int64_t s, Range panels) {
    const int64_t t = g.time(s), rows = g.alive_at(t);
    Left<Wide> gradients = step_rows(g, t, pass.dgates, kColumns * padded);
    gradients.data += Pass::kMore * padded;  // those of W_hh h
    to_and_fro(panels, s, [&](int64_t p) {
      Sum* dh = g.dh + outputs.start(p);
      const Sum* init = Cell::kHasDirect ? g.direct + outputs.start(p) : kZeros<Sum>;
      const int64_t is = Cell::kHasDirect ? hidden.width() : 0;
      pass.multiply_gates(gradients, rows, f.weights[g.d].w_hh, w_hh + g.d * pass.packed_size(outputs), outputs, p,
                          false, init, is, dh, outputs.width());
      for (int64_t i = 0; f.steps.resets && i < rows; i++) {
        if (f.steps.cut(g.d, t, g.rank(i))) memset(dh + i * outputs.width(), 0, outputs.vectors(p) * kVectorBytes);
      }
    });
  }

  void end(const GroupState& g) {
    for (int64_t i = 0; i < g.rows; i++) {
      int64_t n = g.d * f.steps.N + g.batch_row(i);
      if (f.dh0) get_row<Plain<Sum>>(static_cast<Stored*>(f.dh0) + n * f.P, g.dh + i * outputs.width(), f.P);
      if (f.dc0) get_row<Plain<Sum>>(static_cast<Stored*>(f.dc0) + n * f.H, g.dc + i * hidden.width(), f.H);
    }
  }

  const Pass& pass;
  const Backward& f;
  const Panels<Sum>&hidden, &outputs;
  const bool projected;
  const int64_t Q, padded;
  const Teams teams;
  const Buffer<typename Exact::Element> w_hh;  // [D][outputs panel][G*H][V][U]
  const Buffer<typename Exact::Element> w_hr;  // [D][hidden panel][P][V][U]
  const Buffer<Sum> scratch;
};

}  // namespace
}  // namespace RNNFAST_ISA
}  // namespace rnnfast
