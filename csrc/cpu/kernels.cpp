// The layer's passes, written once over a cell and a storage type and compiled once per instruction set.
//
// The policy: a group is some batch rows of one direction, and a thread takes a group through the whole sequence with
// no barrier, its states in scratch of its own. Where rows are too few for that, every stage of a step is shared by the
// hidden units instead. The backward sweep makes gate gradients only; all else is whole-sequence products after it.
//
// Letters as in kernels.h; U lanes of a vector, V vectors of a panel, i a row of a group, s a step in a sweep's order.
#include "gemm.h"

namespace rnnfast {
namespace RNNFAST_ISA {
namespace {

constexpr int64_t kChunkBytes = 256 * 1024;  // of projected inputs, to be in cache still when the recurrence reads them
constexpr int64_t kThreadWork = 1 << 18;     // multiply-adds worth a thread

template <class A>
constexpr A kZeros[kMaxVectors * kLanes<A>] = {};

// How the work of a sweep over the sequence is dealt to threads.
struct Teams {
  int64_t N;
  int D;
  int64_t groups_per_direction, parts;

  // A step of one row costs `weights` multiply-adds. Sharing units costs barriers, sharing rows costs each thread all
  // of the weights' traffic, worth about kRowsFree rows of arithmetic.
  Teams(const Layer& l, int64_t weights) : N(l.steps.N), D(l.D) {
    constexpr int64_t kRowsFree = 4, kBarrier = 1 << 16;
    int64_t threads = min(l.threads, max(1, l.R * D * weights / kThreadWork));
    groups_per_direction = max(1, min(threads % D ? threads : threads / D, N));
    parts = 1;
    if (threads <= D || N == 0) return;
    int64_t by_rows = max(kRowsFree, ceil_div(N, groups_per_direction)) * weights;
    int64_t by_units = max(kRowsFree, N) * weights * D / threads + kBarrier;
    if (by_units < by_rows) groups_per_direction = 1, parts = ceil_div(threads, D);
  }
  int64_t groups() const { return D * groups_per_direction; }
  int64_t rows() const { return ceil_div(N, groups_per_direction); }

  // Takes sweep(each) through all groups, where each(stage) has to call stage(group, part, parts).
  template <class Sweep>
  void run(const Sweep& sweep) const {
    if (parts == 1) {
      parallel(groups(), [&](int64_t g) { sweep([&](const auto& stage) { stage(g, 0, 1); }); });
    } else {
      sweep([&](const auto& stage) {
        parallel(groups() * parts, [&](int64_t task) { stage(task / parts, task % parts, parts); });
      });
    }
  }
};

// A group's rows are the ranks first, first + stride, ...: round-robin, so that ragged work balances.
struct Group {
  const Steps& steps;
  int d;
  int64_t first, stride, rows;

  Group(const Layer& l, const Teams& teams, int64_t g)
      : steps(l.steps),
        d(g / teams.groups_per_direction),
        first(g % teams.groups_per_direction),
        stride(teams.groups_per_direction),
        rows(alive(teams.N)) {}
  int64_t alive(int64_t ranks) const { return max(0, ceil_div(ranks - first, stride)); }
  int64_t alive_at(int64_t t) const { return alive(steps.active[t]); }
  int64_t rank(int64_t i) const { return first + i * stride; }
  int64_t batch_row(int64_t i) const { return steps.order[rank(i)]; }
  int64_t row(int64_t t, int64_t i) const { return steps.row(t, rank(i)); }
  int64_t time(int64_t s) const { return d ? steps.T - 1 - s : s; }
};

template <class S, class A>
void read_row(A* to, const S* from, int64_t n) {
  for (int64_t k = 0; k < n; k += kLanes<A>) store(to + k, from ? load(from + k, min(kLanes<A>, n - k)) : Vec<A>(0));
}

template <class S, class A>
void write_row(S* to, const A* from, int64_t n) {
  for (int64_t k = 0; k < n; k += kLanes<A>) store(to + k, load(from + k), min(kLanes<A>, n - k));
}

template <class T>
const T* row_of(const void* base, int64_t row, int64_t width) {
  return base ? static_cast<const T*>(base) + row * width : nullptr;
}

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
        teams(f, gates.width() * (f.I + f.P)),
        chunk(max(1, min(f.steps.T, max(kChunkBytes / int64_t(gates.width() * sizeof(A)), 24) / max(1, teams.rows())))),
        w_ih(f.D * gates.width() * f.I),
        w_hh(f.D * gates.width() * f.P),
        w_hr(projected ? f.D * outputs.width() * f.H : 0),
        b_ih(f.D * gates.width()),
        b_hh(f.D * gates.width()),
        scratch(teams.groups() * scratch_size()),
        bases(teams.groups() * (f.steps.T + 1)) {}

  void run() {
    pack();
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
    for (int d = 0; d < f.D; d++) {
      pack_vector(b_ih + d * gates.width(), static_cast<const S*>(f.weights[d].b_ih), gates);
      pack_vector(b_hh + d * gates.width(), static_cast<const S*>(f.weights[d].b_hh), gates);
    }
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
        if (f.steps.resets) each([&](int64_t g, int64_t part, int64_t) { part == 0 ? cut(State(*this, g), s) : void(); });
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
      product<A>(g.x, width, 1, g.base[s1] - g.base[s0], w_ih + (g.d * gates.width() + gates.start(p)) * f.I,
                 gates.vectors(p), f.I, b_ih + g.d * gates.width() + gates.start(p), 0, g.gates + gates.start(p),
                 gates.width());
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
      const A* w = w_hh + (g.d * gates.width() + gates.start(p)) * f.P;
      for (int64_t i0 = 0; i0 < rows; i0 += kBlockRows) {
        int64_t i1 = min(i0 + kBlockRows, rows);
        product<A>(g.h[s & 1] + i0 * outputs.width(), outputs.width(), 1, i1 - i0, w, V, f.P,
                   b_hh + g.d * gates.width() + gates.start(p), 0, a, V * U);
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
      product<A>(g.m, hidden.width(), 1, rows, w_hr + (g.d * outputs.width() + outputs.start(p)) * f.H, V, f.H,
                 kZeros<A>, 0, h, outputs.width());
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
  const bool projected;
  const Teams teams;
  const int64_t chunk;  // steps
  Buffer<A> w_ih, w_hh, w_hr, b_ih, b_hh, scratch;
  Buffer<int64_t> bases;
};

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
        teams(f, gates.width() * f.P),
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
      each([&](int64_t g, int64_t part, int64_t parts) {
        step(State(*this, g), s, share(grads.count(), part, parts));
      });
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
    for (int64_t p = panels.begin; p < panels.end; p++) {
      for (int64_t i = 0; i < rows; i++) {
        for (int b = 0; b < grads.vectors(p) / Cell::kGrads; b++) update(g, t, i, p, b);
      }
    }
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
    if (Cell::kNeedsOldH && !cut) {
      const S* y = previous >= 0 ? row_of<S>(f.y, previous * f.D + g.d, f.P) : row_of<S>(f.h0, n, f.P);
      if (y) old_h = load(y + unit, lanes);
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
    A* x_side = dgates + (g.d * grads.width() + grads.start(p)) * Q +
                ((f.steps.start[t] + rank) * grads.vectors(p) + b) * U;
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

  // dw[rows of left][columns of right] = left^T right, of panel p of left with every panel of right, both [panel][Q][V][U].
  // The gradient's rows are those of `rows`, whose vector v is vector source(v) of left.
  template <class Source>
  void outer(const A* left, const Panels<A>& lefts, const Panels<A>& rows, const Source& source, int64_t p,
             const A* right, const Panels<A>& rights, int64_t n, void* dw) {
    const int V = rights.vectors(n);
    A sum[U * kMaxVectors * U];
    for (int v = 0; v < rows.vectors(p); v++) {
      product<A>(left + lefts.start(p) * Q + source(v) * U, 1, lefts.vectors(p) * U, rows.lanes(p, v),
                 right + rights.start(n) * Q, V, Q, kZeros<A>, 0, sum, V * U);
      for (int m = 0; m < rows.lanes(p, v); m++) {
        S* to = static_cast<S*>(dw) + (rows.column(p, v) + m) * rights.units;
        for (int k = 0; k < V; k++) store(to + rights.column(n, k), load(sum + (m * V + k) * U), rights.lanes(n, k));
      }
    }
  }

  // Gradients of both biases from the column sums of panel p; short sums first, for accuracy.
  void bias_gradients(int d, int64_t p) {
    const int V = grads.vectors(p);
    const A* from = dgates + (d * grads.width() + grads.start(p)) * Q;
    A total[kMaxVectors * U] = {};
    for (int64_t q0 = 0; q0 < Q; q0 += 128) {
      Vec<A> sum[kMaxVectors] = {};
      for (int64_t q = q0; q < min(q0 + 128, Q); q++) {
        for (int v = 0; v < V; v++) sum[v] = sum[v] + load(from + (q * V + v) * U);
      }
      for (int v = 0; v < V; v++) store(total + v * U, load(total + v * U) + sum[v]);
    }
    for (int v = 0; v < gates.vectors(p); v++) {
      const int64_t column = gates.column(p, v);
      store(static_cast<S*>(f.dw[d].b_ih) + column, load(total + v * U), gates.lanes(p, v));
      store(static_cast<S*>(f.dw[d].b_hh) + column, load(total + hidden_source(v) * U), gates.lanes(p, v));
    }
  }
  static int hidden_source(int v) { return G == 1 ? v : Cell::kHidden[G == 1 ? 0 : v]; }

  void weight_gradients() {
    Buffer<A> x(inputs.width() * Q), h(f.D * outputs.width() * Q), m(projected ? f.D * hidden.width() * Q : 0);
    for_all_rows([&](int64_t q, int64_t t, int64_t rank) {
      const int64_t r = f.steps.row(t, rank);
      pack_row(x, row_of<S>(f.x, r, f.I), q, Q, inputs);
      for (int d = 0; d < f.D; d++) {
        const int64_t previous = f.steps.previous(d, t, rank), n = d * f.steps.N + f.steps.order[rank];
        const S* old_h = f.steps.cut(d, t, rank) ? nullptr
                         : previous >= 0         ? row_of<S>(f.y, previous * f.D + d, f.P)
                                                 : row_of<S>(f.h0, n, f.P);
        pack_row(h + d * outputs.width() * Q, old_h, q, Q, outputs);
        if (projected) pack_unprojected(m + d * hidden.width() * Q, d, r, q);
      }
    });

    const int64_t per_ih = gates.count() * inputs.count(), per_hh = gates.count() * outputs.count();
    const int64_t per_hr = projected ? outputs.count() * hidden.count() : 0;
    const int64_t per_bias = f.weights[0].b_ih ? gates.count() : 0, per_d = per_ih + per_hh + per_hr + per_bias;
    parallel_for(f.D * per_d, work_threads(f.I + f.P), [&](int64_t task) {
      const int64_t d = task / per_d;
      const A* dg = dgates + d * grads.width() * Q;
      int64_t i = task % per_d;
      if (i < per_ih) {
        return outer(dg, grads, gates, [](int v) { return v; }, i % gates.count(), x, inputs, i / gates.count(),
                     f.dw[d].w_ih);
      }
      if ((i -= per_ih) < per_hh) {
        return outer(dg, grads, gates, hidden_source, i % gates.count(), h + d * outputs.width() * Q, outputs,
                     i / gates.count(), f.dw[d].w_hh);
      }
      if ((i -= per_hh) < per_hr) {
        return outer(dhs + d * outputs.width() * Q, outputs, outputs, [](int v) { return v; }, i % outputs.count(),
                     m + d * hidden.width() * Q, hidden, i / outputs.count(), f.dw[d].w_hr);
      }
      bias_gradients(d, i - per_hr);
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

template <class Cell, class S>
void forward(const Forward& f) {
  ForwardPass<Cell, S>(f).run();
}

template <class Cell, class S>
void backward(const Backward& f) {
  BackwardPass<Cell, S>(f).run();
}

}  // namespace

#define RNNFAST_NAME_OF(isa) #isa
#define RNNFAST_NAME(isa) RNNFAST_NAME_OF(isa)
const Kernels kernels = {
    RNNFAST_NAME(RNNFAST_ISA),
    {{forward<Rnn<Tanh>, float>, forward<Rnn<Tanh>, double>, forward<Rnn<Tanh>, BFloat16>, forward<Rnn<Tanh>, Half>},
     {forward<Rnn<Relu>, float>, forward<Rnn<Relu>, double>, forward<Rnn<Relu>, BFloat16>, forward<Rnn<Relu>, Half>},
     {forward<Lstm, float>, forward<Lstm, double>, forward<Lstm, BFloat16>, forward<Lstm, Half>},
     {forward<Gru, float>, forward<Gru, double>, forward<Gru, BFloat16>, forward<Gru, Half>}},
    {{backward<Rnn<Tanh>, float>, backward<Rnn<Tanh>, double>, backward<Rnn<Tanh>, BFloat16>,
      backward<Rnn<Tanh>, Half>},
     {backward<Rnn<Relu>, float>, backward<Rnn<Relu>, double>, backward<Rnn<Relu>, BFloat16>,
      backward<Rnn<Relu>, Half>},
     {backward<Lstm, float>, backward<Lstm, double>, backward<Lstm, BFloat16>, backward<Lstm, Half>},
     {backward<Gru, float>, backward<Gru, double>, backward<Gru, BFloat16>, backward<Gru, Half>}}};

}  // namespace RNNFAST_ISA
}  // namespace rnnfast
