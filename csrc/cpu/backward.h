// A layer's backward pass over a cell and a storage type: the sweep makes gate gradients and the states' gradients, and
// all else is whole-sequence products after it.
//
// Letters as in kernels.h; U lanes of a vector, V vectors of a panel, i a row of a group, s a step in the sweep's
// order.
#pragma once

#include "sweep.h"

namespace rnnfast {
namespace RNNFAST_ISA {
namespace {

template <class Cell, class S>
class BackwardPass {
  using A = AccOf<S>;
  static constexpr int U = kLanes<A>, G = Cell::kGates;

 public:
  explicit BackwardPass(const Backward& f)
      : f(f),
        gates(f.H, G),
        grads(f.H, Cell::kGrads),
        hidden(f.H),
        outputs(f.P),
        inputs(f.I),
        projected(f.weights[0].w_hr != nullptr),
        Q(f.steps.start[f.steps.T]),
        teams(f, gates),
        w_hh(f.D * gates.width() * outputs.width()),
        w_hr(projected ? f.D * f.P * hidden.width() : 0),
        dgates(f.D * grads.width() * Q),
        dhs(projected ? f.D * outputs.width() * Q : 0),
        scratch(teams.groups() * scratch_size()) {}

  void run() {
    pack();
    teams.run([&](const auto& each) { sweep(each); });
    if (f.dx) input_gradient();
    if (f.need_dw) weight_gradients();
  }

 private:
  struct State : Group {
    A *dh, *dc, *dm, *direct, *dgates;  // [rows][outputs], 3 x [rows][hidden], [rows][gates]

    State(const BackwardPass& p, int64_t g) : Group(p.f, p.teams, g) {
      int64_t n = p.teams.rows();
      dh = p.scratch + g * p.scratch_size();
      dc = dh + n * p.outputs.width();
      dm = dc + n * p.hidden.width();
      direct = dm + n * p.hidden.width();
      dgates = direct + n * p.hidden.width();
    }
    int64_t time(int64_t s) const { return Group::time(steps.T - 1 - s); }
  };

  int64_t scratch_size() const { return teams.rows() * (outputs.width() + 3 * hidden.width() + gates.width()); }

  // Calls body(k, row of the unpacked gate matrix or -1) for every row of a matrix that has the columns of `gates`.
  template <class F>
  void for_gate_rows(const F& body) {
    parallel_for(gates.count(), min(f.threads, 1 + gates.width() * f.P / kThreadWork), [&](int64_t p) {
      for (int v = 0; v < gates.vectors(p); v++) {
        for (int lane = 0; lane < U; lane++) {
          body(gates.start(p) + v * U + lane, lane < gates.lanes(p, v) ? gates.column(p, v) + lane : -1);
        }
      }
    });
  }

  // Calls body(q, t, rank) for every valid row.
  template <class F>
  void for_rows(Range q, const F& body) {
    int64_t t = 0;
    for (int64_t high = f.steps.T; high - t > 1;) {
      int64_t middle = (t + high) / 2;
      (f.steps.start[middle] <= q.begin ? t : high) = middle;
    }
    for (; q.begin < q.end; q.begin++) {
      while (q.begin >= f.steps.start[t + 1]) t++;
      body(q.begin, t, q.begin - f.steps.start[t]);
    }
  }

  template <class F>
  void for_all_rows(const F& body) {
    int64_t tasks = max(1, min(f.threads, Q / 64));
    parallel(tasks, [&](int64_t task) { for_rows(share(Q, task, tasks), body); });
  }

  void pack() {
    for (int d = 0; d < f.D; d++) {
      const auto& w = f.weights[d];
      A* packed = w_hh + d * gates.width() * outputs.width();
      for_gate_rows([&](int64_t k, int64_t row) {
        pack_row(packed, row < 0 ? nullptr : row_of<S>(w.w_hh, row, f.P), k, gates.width(), outputs);
      });
      for (int64_t k = 0; projected && k < f.P; k++) {
        pack_row(w_hr + d * f.P * hidden.width(), row_of<S>(w.w_hr, k, f.H), k, f.P, hidden);
      }
    }
  }

  template <class Each>
  void sweep(const Each& each) {
    each([&](int64_t g, int64_t part, int64_t) { part == 0 ? begin(State(*this, g)) : void(); });
    for (int64_t s = 0; s < f.steps.T; s++) {
      if (projected) {
        each([&](int64_t g, int64_t part, int64_t parts) {
          keep_output_gradient(State(*this, g), s, share(outputs.count(), part, parts));
        });
        each([&](int64_t g, int64_t part, int64_t parts) {
          unproject(State(*this, g), s, share(hidden.count(), part, parts));
        });
      }
      each(
          [&](int64_t g, int64_t part, int64_t parts) { step(State(*this, g), s, share(grads.count(), part, parts)); });
      each([&](int64_t g, int64_t part, int64_t parts) {
        carry(State(*this, g), s, share(outputs.count(), part, parts));
      });
    }
    each([&](int64_t g, int64_t part, int64_t) { part == 0 ? end(State(*this, g)) : void(); });
  }

  void begin(const State& g) {
    for (int64_t i = 0; i < g.rows; i++) {
      int64_t n = g.d * f.steps.N + g.batch_row(i);
      read_row(g.dh + i * outputs.width(), row_of<S>(f.dh_n, n, f.P), f.P);
      if (Cell::kHasCell) read_row(g.dc + i * hidden.width(), row_of<S>(f.dc_n, n, f.H), f.H);
    }
  }

  // dh += dy, kept for the gradient of w_hr.
  void keep_output_gradient(const State& g, int64_t s, Range panels) {
    const int64_t t = g.time(s), rows = g.alive_at(t);
    for (int64_t p = panels.begin; p < panels.end; p++) {
      const int V = outputs.vectors(p);
      A* kept = dhs + (g.d * outputs.width() + outputs.start(p)) * Q;
      for (int64_t i = 0; i < rows; i++) {
        const S* dy = row_of<S>(f.dy, g.row(t, i) * f.D + g.d, f.P);
        for (int v = 0; v < V; v++) {
          A* to = g.dh + i * outputs.width() + outputs.start(p) + v * U;
          Vec<A> dh = load(to);
          if (dy) dh = dh + load(dy + outputs.column(p, v), outputs.lanes(p, v));
          store(to, dh);
          store(kept + ((f.steps.start[t] + g.rank(i)) * V + v) * U, dh);
        }
      }
    }
  }

  void unproject(const State& g, int64_t s, Range panels) {
    for (int64_t p = panels.begin; p < panels.end; p++) {
      product<A>(g.dh, outputs.width(), 1, g.alive_at(g.time(s)), w_hr + (g.d * hidden.width() + hidden.start(p)) * f.P,
                 hidden.vectors(p), f.P, kZeros<A>, 0, g.dm + hidden.start(p), hidden.width());
    }
  }

  void step(const State& g, int64_t s, Range panels) {
    const int64_t t = g.time(s), rows = g.alive_at(t);
    for (int64_t i = 0; i < rows; i++) {  // rows first: what was saved is read as it lies
      for (int64_t p = panels.begin; p < panels.end; p++) {
        for (int b = 0; b < grads.vectors(p) / Cell::kGrads; b++) update(g, t, i, p, b);
      }
    }
  }

  // The row of h that direction d came to step t with; null where that is zero.
  const S* h_before(int d, int64_t t, int64_t rank) const {
    if (f.steps.cut(d, t, rank)) return nullptr;
    const int64_t previous = f.steps.previous(d, t, rank);
    return previous >= 0 ? row_of<S>(f.y, previous * f.D + d, f.P)
                         : row_of<S>(f.h0, d * f.steps.N + f.steps.order[rank], f.P);
  }

  // One row and one block of units back through the cell. Lanes beyond H hold zeros all the way.
  void update(const State& g, int64_t t, int64_t i, int64_t p, int b) {
    const int64_t unit = grads.unit(p, b), rank = g.rank(i), r = g.row(t, i), n = g.d * f.steps.N + g.batch_row(i);
    const int64_t previous = f.steps.previous(g.d, t, rank), out = (r * f.D + g.d) * f.P + unit;
    const int64_t cell = (r * f.D + g.d) * f.H + unit, state = i * hidden.width() + unit;
    const int lanes = min(U, f.H - unit);
    const bool cut = f.steps.cut(g.d, t, rank);

    Vec<A> dh = projected ? load(g.dm + state) : load(g.dh + i * outputs.width() + unit);
    if (f.dy && !projected) dh = dh + load(static_cast<const S*>(f.dy) + out, lanes);
    Vec<A> saved[Cell::kSaved + 1], d[Cell::kGrads], h, old_h(0), c, old_c(0), dc;
    for (int k = 0; k < Cell::kSaved; k++) {
      saved[k] = load(static_cast<const S*>(f.gates) + ((g.d * f.R + r) * Cell::kSaved + k) * f.H + unit, lanes);
    }
    if (Cell::kNeedsH) h = load(static_cast<const S*>(f.y) + out, lanes);
    if (Cell::kNeedsOldH) {
      if (const S* from = h_before(g.d, t, rank)) old_h = load(from + unit, lanes);
    }
    if (Cell::kHasCell) {
      const A* cs = static_cast<const A*>(f.c);
      c = load(cs + cell, lanes);
      if (cut) {
      } else if (previous >= 0) {
        old_c = load(cs + (previous * f.D + g.d) * f.H + unit, lanes);
      } else if (f.c0) {
        old_c = load(row_of<S>(f.c0, n, f.H) + unit, lanes);
      }
      dc = load(g.dc + state);
      if (f.dc) dc = dc + load(static_cast<const A*>(f.dc) + cell, lanes);
    }

    Vec<A> direct = Cell::backward(saved, h, old_h, c, old_c, dh, dc, d);

    if (Cell::kHasCell) store(g.dc + state, cut ? Vec<A>(0) : dc);
    if (Cell::kNeedsOldH) store(g.direct + state, direct);
    A* x_side =
        dgates + (g.d * grads.width() + grads.start(p)) * Q + ((f.steps.start[t] + rank) * grads.vectors(p) + b) * U;
    A* h_side = g.dgates + i * gates.width() + gates.start(p) + b * U;
    for (int k = 0; k < Cell::kGrads; k++) store(x_side + k * U, d[k]);
    for (int k = 0; k < G; k++) store(h_side + k * U, d[Cell::kHidden[k]]);
  }

  // dh of the step before: through W_hh, and straight through the cell.
  void carry(const State& g, int64_t s, Range panels) {
    const int64_t t = g.time(s), rows = g.alive_at(t);
    for (int64_t p = panels.begin; p < panels.end; p++) {
      const int V = outputs.vectors(p);
      A* dh = g.dh + outputs.start(p);
      product<A>(g.dgates, gates.width(), 1, rows, w_hh + (g.d * outputs.width() + outputs.start(p)) * gates.width(), V,
                 gates.width(), Cell::kNeedsOldH ? g.direct + outputs.start(p) : kZeros<A>,
                 Cell::kNeedsOldH ? hidden.width() : 0, dh, outputs.width());
      for (int64_t i = 0; f.steps.resets && i < rows; i++) {
        if (f.steps.cut(g.d, t, g.rank(i))) memset(dh + i * outputs.width(), 0, V * kVectorBytes);
      }
    }
  }

  void end(const State& g) {
    for (int64_t i = 0; i < g.rows; i++) {
      int64_t n = g.d * f.steps.N + g.batch_row(i);
      if (f.dh0) write_row(static_cast<S*>(f.dh0) + n * f.P, g.dh + i * outputs.width(), f.P);
      if (f.dc0) write_row(static_cast<S*>(f.dc0) + n * f.H, g.dc + i * hidden.width(), f.H);
    }
  }

  // dx = dgates W_ih, both directions in one sum.
  void input_gradient() {
    Buffer<A> w_ih(f.D * gates.width() * inputs.width());
    for (int d = 0; d < f.D; d++) {
      A* packed = w_ih + d * gates.width() * inputs.width();
      for_gate_rows([&](int64_t k, int64_t row) {
        pack_row(packed, row < 0 ? nullptr : row_of<S>(f.weights[d].w_ih, row, f.I), k, gates.width(), inputs);
      });
    }
    parallel_for(ceil_div(Q, kBlockRows) * inputs.count(), work_threads(f.I), [&](int64_t task) {
      const int64_t n = task % inputs.count(), q0 = task / inputs.count() * kBlockRows, q1 = min(q0 + kBlockRows, Q);
      const int V = inputs.vectors(n);
      A sum[kBlockRows * kMaxVectors * U] = {};
      for (int d = 0; d < f.D; d++) {
        const A* w = w_ih + (d * inputs.width() + inputs.start(n)) * gates.width();
        for (int64_t p = 0; p < gates.count(); p++) {
          const int ld = grads.vectors(p) * U;
          product<A>(dgates + (d * grads.width() + grads.start(p)) * Q + q0 * ld, ld, 1, q1 - q0,
                     w + gates.start(p) * V * U, V, gates.vectors(p) * U, sum, V * U, sum, V * U);
        }
      }
      for_rows({q0, q1}, [&](int64_t q, int64_t t, int64_t rank) {
        S* dx = static_cast<S*>(f.dx) + f.steps.row(t, rank) * f.I;
        for (int v = 0; v < V; v++) {
          store(dx + inputs.column(n, v), load(sum + ((q - q0) * V + v) * U), inputs.lanes(n, v));
        }
      });
    });
  }

  int64_t work_threads(int64_t columns) const {
    return min(f.threads, max(1, Q * f.D * gates.width() * columns / kThreadWork));
  }

  // A product left^T right over all valid rows; left and right [panel][Q][V][U].
  struct Outer {
    const A* left;
    const Panels<A>* lefts;
    const Panels<A>* rows;  // those of the result; their vector v is vector source[v] of left
    const int* source;
    const A* right;
    const Panels<A>* rights;
    void* dw;  // [rows][units of rights]
    void* db;  // [rows]: the column sums of left; or null

    int64_t blocks(int64_t size) const { return ceil_div(rows->count(), size) * ceil_div(rights->count(), size); }
  };

  static constexpr int64_t kStretch = 128, kSide = kMaxVectors * U;
  static constexpr int64_t sums_size(int64_t size) { return (size * kSide + 1) * size * kSide; }

  // Block i of a product, of size x size panels. One stretch of Q after the other, so that the block's panels are read
  // from memory once; sums [size][size][kSide][kSide], column_sums [size][kSide].
  void outer_block(const Outer& o, int64_t i, int64_t size, A* sums) {
    A* column_sums = sums + size * size * kSide * kSide;
    const int64_t wide = ceil_div(o.rights->count(), size), p0 = i / wide * size, n0 = i % wide * size;
    const int64_t p1 = min(p0 + size, o.rows->count()), n1 = min(n0 + size, o.rights->count());
    auto sum_of = [&](int64_t n, int64_t p, int v) {
      return sums + (((n - n0) * size + p - p0) * kSide + v * U) * kSide;
    };
    for (int64_t q = 0; q == 0 || q < Q; q += kStretch) {
      const int64_t depth = min(kStretch, Q - q);
      for (int64_t p = p0; p < p1; p++) {
        const int ld = o.lefts->vectors(p) * U;
        for (int v = 0; v < o.rows->vectors(p); v++) {
          const A* from = o.left + o.lefts->start(p) * Q + q * ld + o.source[v] * U;
          A left[kStretch * U];  // dense, as lines at the panel's stride would share a few sets of the cache
          Vec<A> column(0);      // a stretch by itself first, for accuracy
          for (int64_t k = 0; k < depth; k++) {
            Vec<A> row = load(from + k * ld);
            store(left + k * U, row);
            column = column + row;
          }
          A* total = column_sums + (p - p0) * kSide + v * U;
          store(total, q ? load(total) + column : column);
          for (int64_t n = n0; n < n1; n++) {
            const int V = o.rights->vectors(n);
            A* sum = sum_of(n, p, v);
            product<A>(left, 1, U, o.rows->lanes(p, v), o.right + o.rights->start(n) * Q + q * V * U, V, depth,
                       q ? sum : kZeros<A>, q ? kSide : 0, sum, kSide);
          }
        }
      }
    }
    for (int64_t p = p0; p < p1; p++) {
      for (int v = 0; v < o.rows->vectors(p); v++) {
        const int64_t row = o.rows->column(p, v);
        const int lanes = o.rows->lanes(p, v);
        if (o.db && n0 == 0) store(static_cast<S*>(o.db) + row, load(column_sums + (p - p0) * kSide + v * U), lanes);
        for (int64_t n = n0; n < n1; n++) {
          for (int m = 0; m < lanes; m++) {
            for (int k = 0; k < o.rights->vectors(n); k++) {
              store(static_cast<S*>(o.dw) + (row + m) * o.rights->units + o.rights->column(n, k),
                    load(sum_of(n, p, v) + m * kSide + k * U), o.rights->lanes(n, k));
            }
          }
        }
      }
    }
  }

  static constexpr int kSame[kMaxVectors] = {0, 1, 2, 3};
  static constexpr const int* kHiddenSource = G == 1 ? kSame : Cell::kHidden;

  void weight_gradients() {
    Buffer<A> x(inputs.width() * Q), h(f.D * outputs.width() * Q), m(projected ? f.D * hidden.width() * Q : 0);
    for_all_rows([&](int64_t q, int64_t t, int64_t rank) {
      const int64_t r = f.steps.row(t, rank);
      pack_row(x, row_of<S>(f.x, r, f.I), q, Q, inputs);
      for (int d = 0; d < f.D; d++) {
        pack_row(h + d * outputs.width() * Q, h_before(d, t, rank), q, Q, outputs);
        if (projected) pack_unprojected(m + d * hidden.width() * Q, d, r, q);
      }
    });

    Outer products[6];
    int count = 0;
    for (int d = 0; d < f.D; d++) {
      const A* dg = dgates + d * grads.width() * Q;
      products[count++] = {dg, &grads, &gates, kSame, x, &inputs, f.dw[d].w_ih, f.dw[d].b_ih};
      products[count++] = {dg,       &grads,       &gates,      kHiddenSource, h + d * outputs.width() * Q,
                           &outputs, f.dw[d].w_hh, f.dw[d].b_hh};
      if (!projected) continue;
      products[count++] = {dhs + d * outputs.width() * Q, &outputs, &outputs,     kSame,
                           m + d * hidden.width() * Q,    &hidden,  f.dw[d].w_hr, nullptr};
    }
    const int64_t threads = work_threads(f.I + f.P);
    auto all_blocks = [&](int64_t size) {
      int64_t n = 0;
      for (int i = 0; i < count; i++) n += products[i].blocks(size);
      return n;
    };
    int64_t size = 4;
    while (size > 1 && all_blocks(size) < 4 * threads) size /= 2;
    const int64_t blocks = all_blocks(size);
    Buffer<A> sums(threads * sums_size(size));
    parallel(threads, [&](int64_t task) {
      const Range mine = share(blocks, task, threads);
      int64_t first = 0;
      for (int i = 0; i < count; first += products[i++].blocks(size)) {
        const int64_t end = min(mine.end - first, products[i].blocks(size));
        for (int64_t b = max(mine.begin - first, 0); b < end; b++)
          outer_block(products[i], b, size, sums + task * sums_size(size));
      }
    });
  }

  // Row q of m = o * tanh(c), what w_hr was applied to.
  void pack_unprojected(A* packed, int d, int64_t r, int64_t q) {
    if constexpr (Cell::kHasCell) {
      const S* o = static_cast<const S*>(f.gates) + ((d * f.R + r) * Cell::kSaved + 3) * f.H;
      const A* c = static_cast<const A*>(f.c) + (r * f.D + d) * f.H;
      for (int64_t p = 0; p < hidden.count(); p++) {
        for (int v = 0; v < hidden.vectors(p); v++) {
          int64_t unit = hidden.column(p, v);
          int lanes = hidden.lanes(p, v);
          store(packed + hidden.start(p) * Q + (q * hidden.vectors(p) + v) * U,
                load(o + unit, lanes) * tanh(load(c + unit, lanes)));
        }
      }
    }
  }

  const Backward& f;
  const Panels<A> gates, grads, hidden, outputs, inputs;
  const bool projected;
  const int64_t Q;
  const Teams teams;
  Buffer<A> w_hh;    // [D][outputs panel][gates][V][U]
  Buffer<A> w_hr;    // [D][hidden panel][P][V][U]
  Buffer<A> dgates;  // [D][grads panel][Q][V][U]
  Buffer<A> dhs;     // [D][outputs panel][Q][V][U]: dh of every step, for w_hr
  Buffer<A> scratch;
};

}  // namespace
}  // namespace RNNFAST_ISA
}  // namespace rnnfast
