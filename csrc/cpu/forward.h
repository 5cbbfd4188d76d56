// A layer's forward pass over a cell and a storage type: the input's products for a stretch of steps, then the steps.
//
// Letters as in kernels.h; U lanes of a vector, V vectors of a panel, i a row of a group, s a step in a sweep's order.
#pragma once

#include "sweep.h"

namespace rnnfast {
namespace RNNFAST_ISA {
namespace {

constexpr int64_t kChunkBytes = 256 * 1024;  // of projected inputs, to be in cache still when the recurrence reads them
constexpr int64_t kChunkRows = 128;          // at least, so that they share the traffic of W_ih
constexpr int64_t kUnpackedRows = 4;         // of a sequence, up to which packing would cost more than it gains

template <class Cell, class S>
class ForwardPass {
  using A = AccOf<S>;
  static constexpr int U = kLanes<A>, G = Cell::kGates;

 public:
  explicit ForwardPass(const Forward& f)
      : f(f),
        gates(f.H, G),
        hidden(f.H),
        outputs(f.P),
        projected(f.weights[0].w_hr != nullptr),
        packed(f.R > kUnpackedRows),
        teams(f, gates),
        chunk(max(1, min(f.steps.T,
                         max(kChunkBytes / int64_t(gates.width() * sizeof(A)), kChunkRows) / max(1, teams.rows())))),
        w_ih(packed ? f.D * gates.width() * f.I : 0),
        w_hh(packed ? f.D * gates.width() * f.P : 0),
        w_hr(packed && projected ? f.D * outputs.width() * f.H : 0),
        b_ih(f.D * gates.width()),
        b_hh(f.D * gates.width()),
        scratch(teams.groups() * scratch_size()),
        bases(teams.groups() * (f.steps.T + 1)) {}

  void run() {
    for (int d = 0; d < f.D; d++) {
      pack_vector(b_ih + d * gates.width(), static_cast<const S*>(f.weights[d].b_ih), gates);
      pack_vector(b_hh + d * gates.width(), static_cast<const S*>(f.weights[d].b_hh), gates);
    }
    if (packed) pack();
    teams.run([&](const auto& each) { sweep(each); });
  }

 private:
  struct State : Group {
    A *h[2], *c, *m, *x, *gates;  // h [2][rows][outputs], c and m [rows][hidden], x [*][I], gates [*][gates]
    int64_t* base;                // [T+1] the rows before step s

    State(const ForwardPass& p, int64_t g) : Group(p.f, p.teams, g), base(p.bases + g * (p.f.steps.T + 1)) {
      int64_t n = p.teams.rows();
      h[0] = p.scratch + g * p.scratch_size();
      h[1] = h[0] + n * p.outputs.width();
      c = h[1] + n * p.outputs.width();
      m = c + n * p.hidden.width();
      gates = m + n * p.hidden.width();
      x = gates + p.chunk * n * p.gates.width();
    }
  };

  int64_t scratch_size() const {
    return teams.rows() * (2 * outputs.width() + 2 * hidden.width() + chunk * (gates.width() + ceil_div(f.I, U) * U));
  }

  void pack() {
    int64_t per_w = gates.count(), per_d = 2 * per_w + (projected ? outputs.count() : 0);
    parallel_for(f.D * per_d, min(f.threads, 1 + gates.width() * (f.I + f.P) / kThreadWork), [&](int64_t i) {
      int64_t d = i / per_d, p = i % per_d;
      const auto& w = f.weights[d];
      if (p < per_w) {
        pack_transposed(w_ih + d * gates.width() * f.I, static_cast<const S*>(w.w_ih), f.I, gates, p);
      } else if (p < 2 * per_w) {
        pack_transposed(w_hh + d * gates.width() * f.P, static_cast<const S*>(w.w_hh), f.P, gates, p - per_w);
      } else {
        pack_transposed(w_hr + d * outputs.width() * f.H, static_cast<const S*>(w.w_hr), f.H, outputs, p - 2 * per_w);
      }
    });
  }

  // out[M][V*U] = init + a W^T for panel p of direction d's matrix w, or of its packed copy.
  void multiply(const A* a, int64_t rs, int64_t M, int d, const void* w, const A* copy, const Panels<A>& panels,
                int64_t p, int64_t K, const A* init, A* out, int64_t os) {
    if (!packed) return product_unpacked(a, rs, M, static_cast<const S*>(w), panels, p, K, init, out, os);
    product<A>(a, rs, 1, M, copy + (d * panels.width() + panels.start(p)) * K, panels.vectors(p), K, init, 0, out, os);
  }

  template <class Each>
  void sweep(const Each& each) {
    const int64_t T = f.steps.T;
    each([&](int64_t g, int64_t part, int64_t) { part == 0 ? begin(State(*this, g)) : void(); });
    for (int64_t s0 = 0; s0 < T; s0 += chunk) {
      int64_t s1 = min(s0 + chunk, T);
      each([&](int64_t g, int64_t part, int64_t parts) { gather(State(*this, g), s0, s1, part, parts); });
      each([&](int64_t g, int64_t part, int64_t parts) {
        project_input(State(*this, g), s0, s1, share(gates.count(), part, parts));
      });
      for (int64_t s = s0; s < s1; s++) {
        if (f.steps.resets)
          each([&](int64_t g, int64_t part, int64_t) { part == 0 ? cut(State(*this, g), s) : void(); });
        each([&](int64_t g, int64_t part, int64_t parts) {
          step(State(*this, g), s, s0, share(gates.count(), part, parts));
        });
        if (projected) {
          each([&](int64_t g, int64_t part, int64_t parts) {
            project_state(State(*this, g), s, share(outputs.count(), part, parts));
          });
        }
      }
    }
    each([&](int64_t g, int64_t part, int64_t) { part == 0 ? end(State(*this, g)) : void(); });
  }

  void begin(const State& g) {
    g.base[0] = 0;
    for (int64_t s = 0; s < f.steps.T; s++) g.base[s + 1] = g.base[s] + g.alive_at(g.time(s));
    for (int64_t i = 0; i < g.rows; i++) {
      int64_t n = g.d * f.steps.N + g.batch_row(i);
      for (A* h : g.h) read_row(h + i * outputs.width(), row_of<S>(f.h0, n, f.P), f.P);
      if (Cell::kHasCell) read_row(g.c + i * hidden.width(), row_of<S>(f.c0, n, f.H), f.H);
    }
  }

  // Collects the group's rows of x; zeros the outputs past the sequences' ends.
  void gather(const State& g, int64_t s0, int64_t s1, int64_t part, int64_t parts) {
    const int64_t width = ceil_div(f.I, U) * U, T = f.steps.T;
    for (int64_t s = s0 + part; s < s1; s += parts) {
      int64_t t = g.time(s), rows = g.alive_at(t);
      A* x = g.x + (g.base[s] - g.base[s0]) * width;
      for (int64_t i = 0; i < rows; i++) read_row(x + i * width, row_of<S>(f.x, g.row(t, i), f.I), f.I);
      if (f.R != T * f.steps.N) continue;  // packed: no row lies past an end
      for (int64_t i = rows; i < g.rows; i++) {
        int64_t row = g.row(t, i), r = row * f.D + g.d, saved = Cell::kSaved * f.H;
        memset(static_cast<S*>(f.y) + r * f.P, 0, f.P * sizeof(S));
        if (f.c) memset(static_cast<A*>(f.c) + r * f.H, 0, f.H * sizeof(A));
        if (f.gates) memset(static_cast<S*>(f.gates) + (g.d * f.R + row) * saved, 0, saved * sizeof(S));
      }
    }
  }

  void project_input(const State& g, int64_t s0, int64_t s1, Range panels) {
    const int64_t width = ceil_div(f.I, U) * U;
    for (int64_t p = panels.begin; p < panels.end; p++) {
      multiply(g.x, width, g.base[s1] - g.base[s0], g.d, f.weights[g.d].w_ih, w_ih, gates, p, f.I,
               b_ih + g.d * gates.width() + gates.start(p), g.gates + gates.start(p), gates.width());
    }
  }

  void cut(const State& g, int64_t s) {
    int64_t t = g.time(s), rows = g.alive_at(t);
    for (int64_t i = 0; i < rows; i++) {
      if (!f.steps.cut(g.d, t, g.rank(i))) continue;
      memset(g.h[s & 1] + i * outputs.width(), 0, f.P * sizeof(A));
      if (Cell::kHasCell) memset(g.c + i * hidden.width(), 0, f.H * sizeof(A));
    }
  }

  void step(const State& g, int64_t s, int64_t s0, Range panels) {
    const int64_t t = g.time(s), rows = g.alive_at(t);
    const A* x = g.gates + (g.base[s] - g.base[s0]) * gates.width();
    A a[kBlockRows * kMaxVectors * U];
    for (int64_t p = panels.begin; p < panels.end; p++) {
      const int V = gates.vectors(p);
      for (int64_t i0 = 0; i0 < rows; i0 += kBlockRows) {
        int64_t i1 = min(i0 + kBlockRows, rows);
        multiply(g.h[s & 1] + i0 * outputs.width(), outputs.width(), i1 - i0, g.d, f.weights[g.d].w_hh, w_hh, gates, p,
                 f.P, b_hh + g.d * gates.width() + gates.start(p), a, V * U);
        for (int64_t i = i0; i < i1; i++) {
          for (int b = 0; b < V / G; b++) {
            update(g, s, t, i, gates.unit(p, b), x + i * gates.width() + gates.start(p) + b * U,
                   a + ((i - i0) * V + b) * U);
          }
        }
      }
    }
  }

  // One row and one block of units through the cell; x and a [G][U].
  void update(const State& g, int64_t s, int64_t t, int64_t i, int64_t unit, const A* x, const A* a) {
    const int64_t r = g.row(t, i);
    const int lanes = min(U, f.H - unit);
    Vec<A> xs[G], as[G], saved[Cell::kSaved + 1], h, c;
    for (int k = 0; k < G; k++) xs[k] = load(x + k * U), as[k] = load(a + k * U);
    if (Cell::kNeedsOldH) h = load(g.h[s & 1] + i * outputs.width() + unit);
    if (Cell::kHasCell) c = load(g.c + i * hidden.width() + unit);
    Cell::forward(xs, as, h, c, saved);
    if (Cell::kHasCell) {
      store(g.c + i * hidden.width() + unit, c);
      if (f.c) store(static_cast<A*>(f.c) + (r * f.D + g.d) * f.H + unit, c, lanes);
    }
    if (f.gates) {
      S* to = static_cast<S*>(f.gates) + (g.d * f.R + r) * Cell::kSaved * f.H + unit;
      for (int k = 0; k < Cell::kSaved; k++) store(to + k * f.H, saved[k], lanes);
    }
    if (projected) return store(g.m + i * hidden.width() + unit, h);
    store(g.h[(s + 1) & 1] + i * outputs.width() + unit, rounded<S>(h));
    store(static_cast<S*>(f.y) + (r * f.D + g.d) * f.P + unit, h, lanes);
  }

  void project_state(const State& g, int64_t s, Range panels) {
    const int64_t t = g.time(s), rows = g.alive_at(t);
    for (int64_t p = panels.begin; p < panels.end; p++) {
      const int V = outputs.vectors(p);
      A* h = g.h[(s + 1) & 1] + outputs.start(p);
      multiply(g.m, hidden.width(), rows, g.d, f.weights[g.d].w_hr, w_hr, outputs, p, f.H, kZeros<A>, h,
               outputs.width());
      for (int64_t i = 0; i < rows; i++) {
        S* y = static_cast<S*>(f.y) + (g.row(t, i) * f.D + g.d) * f.P + outputs.start(p);
        for (int v = 0; v < V; v++) {
          Vec<A> value = load(h + i * outputs.width() + v * U);
          store(h + i * outputs.width() + v * U, rounded<S>(value));
          store(y + v * U, value, outputs.lanes(p, v));
        }
      }
    }
  }

  void end(const State& g) {
    for (int64_t i = 0; i < g.rows; i++) {
      int64_t n = g.d * f.steps.N + g.batch_row(i), steps = g.d ? f.steps.T : f.steps.length[g.rank(i)];
      write_row(static_cast<S*>(f.h_n) + n * f.P, g.h[steps & 1] + i * outputs.width(), f.P);
      if (Cell::kHasCell) write_row(static_cast<S*>(f.c_n) + n * f.H, g.c + i * hidden.width(), f.H);
    }
  }

  const Forward& f;
  const Panels<A> gates, hidden, outputs;
  const bool projected, packed;
  const Teams teams;
  const int64_t chunk;  // steps
  Buffer<A> w_ih, w_hh, w_hr, b_ih, b_hh, scratch;
  Buffer<int64_t> bases;
};

}  // namespace
}  // namespace RNNFAST_ISA
}  // namespace rnnfast
