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

template <class Cell, class S, class Math>
class BackwardPass {
  using A = AccOf<S>;
  using X = typename Math::Exact;    // operands that hold x, h and the weights
  using Grad = typename Math::Wide;  // and gradients, and m = o tanh(c)
  template <class E>
  using Elements = typename E::Element*;
  static constexpr int U = kLanes<A>, G = Cell::kGates, kGrads = Cell::kGrads;

 public:
  explicit BackwardPass(const Backward& f)
      : f(f),
        gates(f.H, G),
        hidden(f.H),
        outputs(f.P),
        inputs(f.I),
        projected(f.projected),
        packed(f.R > kUnpackedRows),
        Q(f.steps.start[f.steps.T]),
        padded(round_up(f.H, Grad::kAlign)),
        teams(f, gates, Cost::of<X>()),
        w_hh(packed ? f.D * outputs.width() * X::column(G * padded) : 0),
        w_hr(projected ? f.D * hidden.width() * X::column(f.P) : 0),
        dgates(f.D * Q * Grad::row(kGrads * padded)),
        dys(projected ? f.D * Q * Grad::row(f.P) : 0),
        scratch(group_rows() * state_size()) {}

  void run() {
    pack();
    teams.run([&](const auto& each) { sweep(each); });
    if (f.dx) input_gradient();
    if (f.need_dw) weight_gradients();
  }

 private:
  struct Sweep : Group {
    A *dh, *dc, *dm, *direct;  // [rows][outputs], 3 x [rows][hidden]

    Sweep(const BackwardPass& p, int64_t g) : Group(p.f, p.teams, g) {
      const int64_t n = p.teams.rows();
      dh = p.scratch + g * n * p.state_size();
      dc = dh + n * p.outputs.width();
      dm = dc + n * p.hidden.width();
      direct = dm + n * p.hidden.width();
    }
    int64_t time(int64_t s) const { return Group::time(steps.T - 1 - s); }
    int64_t q(int64_t t, int64_t i) const { return steps.start[t] + rank(i); }
  };

  int64_t group_rows() const { return teams.groups() * teams.rows(); }
  int64_t state_size() const { return outputs.width() + 3 * hidden.width(); }

  // Gate gradients lie [slot][H up to kAlign] in a row, in an order that makes one range of those of W_ih x (the first
  // G slots), and one of those of W_hh h (the last): with a gradient more than gates (GRU), n r z and nr.
  static constexpr int kMore = kGrads - G;
  static constexpr int slot(int grad) { return grad < G ? (grad + kMore) % G : grad; }
  static constexpr int input_gate(int64_t slot) { return (slot + G - kMore) % G; }

  // Row k of w [gates*units][width] where k counts [slot][units up to kAlign]; null between units.
  const S* gate_row(const void* w, int64_t width, int64_t k, bool of_input) const {
    const int64_t slot = k / padded, unit = k % padded;
    if (unit >= f.H) return nullptr;
    return row_of<S>(w, (of_input ? input_gate(slot) : slot) * f.H + unit, width);
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

  // The right operand of a product with gate gradients: w [gates*units][columns], rows in the gradients' order.
  void pack_gates(Elements<X> packed, const void* w, const Panels<A>& columns, bool of_input) {
    constexpr int64_t kRows = 128;
    const int64_t K = G * padded, blocks = ceil_div(K, kRows);
    parallel_for(columns.count() * blocks, min(f.threads, 1 + K * columns.units / kThreadWork), [&](int64_t task) {
      const int64_t k = task % blocks * kRows;
      pack_rows<X>(packed, K, {k, min(k + kRows, K)}, columns, task / blocks,
                   [&](int64_t k) { return gate_row(w, columns.units, k, of_input); });
    });
  }

  void pack() {
    for (int d = 0; d < f.D; d++) {
      const auto& w = f.weights[d];
      if (packed) pack_gates(w_hh + d * outputs.width() * X::column(G * padded), w.w_hh, outputs, false);
      for (int64_t p = 0; projected && p < hidden.count(); p++) {
        pack_rows<X>(w_hr + d * hidden.width() * X::column(f.P), f.P, {0, X::column(f.P) / X::kParts}, hidden, p,
                     [&](int64_t k) { return k < f.P ? row_of<S>(w.w_hr, k, f.H) : nullptr; });
      }
    }
  }

  // The rows of a step in an operand [D][Q] of left rows of K.
  Left<Grad> step_rows(const Sweep& g, int64_t t, const typename Grad::Element* data, int64_t K) const {
    return {data + (g.d * Q + g.q(t, 0)) * Grad::row(K), g.stride * Grad::row(K), round_up(K, Grad::kAlign)};
  }

  template <class Each>
  void sweep(const Each& each) {
    each([&](int64_t g, int64_t part, int64_t) { part == 0 ? begin(Sweep(*this, g)) : void(); });
    for (int64_t s = 0; s < f.steps.T; s++) {
      if (projected) {
        each([&](int64_t g, int64_t part, int64_t parts) {
          keep_output_gradient(Sweep(*this, g), s, share(outputs.blocks, part, parts));
        });
        each([&](int64_t g, int64_t part, int64_t parts) {
          unproject(Sweep(*this, g), s, share(hidden.count(), part, parts));
        });
      }
      each(
          [&](int64_t g, int64_t part, int64_t parts) { step(Sweep(*this, g), s, share(hidden.blocks, part, parts)); });
      if (s + 1 == f.steps.T && !f.dh0) break;  // nobody asks for the gradient of the first state
      each([&](int64_t g, int64_t part, int64_t parts) {
        carry(Sweep(*this, g), s, share(outputs.count(), part, parts));
      });
    }
    each([&](int64_t g, int64_t part, int64_t) { part == 0 ? end(Sweep(*this, g)) : void(); });
  }

  void begin(const Sweep& g) {
    for (int64_t i = 0; i < g.rows; i++) {
      int64_t n = g.d * f.steps.N + g.batch_row(i);
      put_row<Plain<A>>(g.dh + i * outputs.width(), row_of<S>(f.dh_n, n, f.P), f.P);
      if (Cell::kHasCell) put_row<Plain<A>>(g.dc + i * hidden.width(), row_of<S>(f.dc_n, n, f.H), f.H);
    }
  }

  // dh += dy, kept as an operand of w_hr and for its gradient.
  void keep_output_gradient(const Sweep& g, int64_t s, Range blocks) {
    const int64_t t = g.time(s), rows = g.alive_at(t), part = round_up(f.P, Grad::kAlign);
    for (int64_t i = 0; i < rows; i++) {
      const S* dy = row_of<S>(f.dy, g.row(t, i) * f.D + g.d, f.P);
      auto* kept = dys + (g.d * Q + g.q(t, i)) * Grad::row(f.P);
      for (int64_t k = blocks.begin * U; k < blocks.end * U; k += U) {
        Vec<A> dh = load(g.dh + i * outputs.width() + k);
        if (dy) dh = dh + load(dy + k, min(U, f.P - k));
        Grad::put(kept + k, part, dh);
      }
      for (int64_t k = outputs.width(); blocks.end == outputs.blocks && k < part; k += U) {
        Grad::put(kept + k, part, Vec<A>(0));
      }
    }
  }

  void unproject(const Sweep& g, int64_t s, Range panels) {
    const int64_t t = g.time(s);
    for (int64_t p = panels.begin; p < panels.end; p++) {
      product<Grad, X>(step_rows(g, t, dys, f.P), g.alive_at(t),
                       w_hr + (g.d * hidden.width() + hidden.start(p)) * X::column(f.P), hidden.vectors(p), f.P,
                       kZeros<A>, 0, g.dm + hidden.start(p), hidden.width());
    }
  }

  void step(const Sweep& g, int64_t s, Range blocks) {
    const int64_t t = g.time(s), rows = g.alive_at(t);
    for (int64_t i = 0; i < rows; i++) {  // rows first: what was saved is read as it lies
      auto* gradients = dgates + (g.d * Q + g.q(t, i)) * Grad::row(kGrads * padded);
      update(g, t, i, blocks, gradients);
      for (int64_t k = hidden.width(); blocks.end == hidden.blocks && k < padded; k += U) {
        for (int j = 0; j < kGrads; j++) Grad::put(gradients + j * padded + k, kGrads * padded, Vec<A>(0));
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

  // Some blocks of units of one row back through the cell. Lanes beyond H hold zeros all the way. What the loop uses is
  // in variables, so that no store makes the compiler read it again.
  void update(const Sweep& g, int64_t t, int64_t i, Range blocks, Elements<Grad> gradients) const {
    const int64_t H = f.H, padded = this->padded, rank = g.rank(i), r = g.row(t, i);
    const int64_t previous = f.steps.previous(g.d, t, rank), of_d = r * f.D + g.d;
    const bool cut = f.steps.cut(g.d, t, rank);
    const A* const dh_in = projected ? g.dm + i * hidden.width() : g.dh + i * outputs.width();
    const S* const dy = projected ? nullptr : row_of<S>(f.dy, of_d, f.P);
    const S* const gates = static_cast<const S*>(f.gates) + (g.d * f.R + r) * Cell::kSaved * H;
    const S* const y = static_cast<const S*>(f.y) + of_d * f.P;
    const S* const old_y = Cell::kNeedsOldH ? h_before(g.d, t, rank) : nullptr;
    const A* const cs = row_of<A>(Cell::kHasCell ? f.c : nullptr, of_d, H);
    const A* const old_cs = !cut && previous >= 0 ? row_of<A>(f.c, previous * f.D + g.d, H) : nullptr;
    const S* const c0 = !cut && previous < 0 ? row_of<S>(f.c0, g.d * f.steps.N + g.batch_row(i), H) : nullptr;
    const A* const dcs = row_of<A>(f.dc, of_d, H);
    A *const dc_state = g.dc + i * hidden.width(), *const direct_out = g.direct + i * hidden.width();
    for (int64_t unit = blocks.begin * U; unit < blocks.end * U; unit += U) {
      const int lanes = min(U, H - unit);
      Vec<A> dh = load(dh_in + unit), saved[Cell::kSaved + 1], d[kGrads], h, old_h(0), c, old_c(0), dc;
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
      Vec<A> direct = Cell::backward(saved, h, old_h, c, old_c, dh, dc, d);
      if (Cell::kHasCell) store(dc_state + unit, cut ? Vec<A>(0) : dc);
      if (Cell::kHasDirect) store(direct_out + unit, direct);
      for (int k = 0; k < kGrads; k++) Grad::put(gradients + slot(k) * padded + unit, kGrads * padded, d[k]);
    }
  }

  // dh of the step before: through W_hh, and straight through the cell.
  void carry(const Sweep& g, int64_t s, Range panels) {
    const int64_t t = g.time(s), rows = g.alive_at(t);
    Left<Grad> gradients = step_rows(g, t, dgates, kGrads * padded);
    gradients.data += kMore * padded;
    to_and_fro(panels, s, [&](int64_t p) {
      A* dh = g.dh + outputs.start(p);
      const A* init = Cell::kHasDirect ? g.direct + outputs.start(p) : kZeros<A>;
      const int64_t is = Cell::kHasDirect ? hidden.width() : 0;
      multiply_gates(gradients, rows, f.weights[g.d].w_hh, w_hh + g.d * outputs.width() * X::column(G * padded),
                     outputs, p, false, init, is, dh, outputs.width());
      for (int64_t i = 0; f.steps.resets && i < rows; i++) {
        if (f.steps.cut(g.d, t, g.rank(i))) memset(dh + i * outputs.width(), 0, outputs.vectors(p) * kVectorBytes);
      }
    });
  }

  // out[M][V*U] = init + gradients * panel p of w, or of its packed copy.
  void multiply_gates(Left<Grad> gradients, int64_t M, const void* w, const typename X::Element* copy,
                      const Panels<A>& panels, int64_t p, bool of_input, const A* init, int64_t is, A* out,
                      int64_t os) {
    const int64_t K = G * padded;
    if constexpr (std::is_same_v<Grad, Plain<A>>) {
      auto row = [&](int64_t k) { return gate_row(w, panels.units, k, of_input); };
      if (!packed) return product_of_rows(gradients, M, row, panels, p, K, init, is, out, os);
    }
    product<Grad, X>(gradients, M, copy + panels.start(p) * X::column(K), panels.vectors(p), K, init, is, out, os);
  }

  void end(const Sweep& g) {
    for (int64_t i = 0; i < g.rows; i++) {
      int64_t n = g.d * f.steps.N + g.batch_row(i);
      if (f.dh0) get_row<Plain<A>>(static_cast<S*>(f.dh0) + n * f.P, g.dh + i * outputs.width(), f.P);
      if (f.dc0) get_row<Plain<A>>(static_cast<S*>(f.dc0) + n * f.H, g.dc + i * hidden.width(), f.H);
    }
  }

  int64_t work_threads(int64_t columns) const {
    return min(f.threads, max(1, Q * f.D * gates.width() * columns / kThreadWork));
  }

  // dx = dgates W_ih, both directions in one sum.
  void input_gradient() {
    const int64_t row = Grad::row(kGrads * padded), size = inputs.width() * X::column(G * padded);
    Buffer<typename X::Element> w_ih(packed ? f.D * size : 0);
    for (int d = 0; packed && d < f.D; d++) pack_gates(w_ih + d * size, f.weights[d].w_ih, inputs, true);
    parallel_for(ceil_div(Q, kBlockRows) * inputs.count(), work_threads(f.I), [&](int64_t task) {
      const int64_t n = task % inputs.count(), q0 = task / inputs.count() * kBlockRows, q1 = min(q0 + kBlockRows, Q);
      const int V = inputs.vectors(n);
      A sum[kBlockRows * kMaxVectors * U];
      for (int d = 0; d < f.D; d++) {
        multiply_gates(Left<Grad>{dgates + (d * Q + q0) * row, row, kGrads * padded}, q1 - q0, f.weights[d].w_ih,
                       w_ih + d * size, inputs, n, true, d ? sum : kZeros<A>, d ? V * U : 0, sum, V * U);
      }
      for_rows({q0, q1}, [&](int64_t q, int64_t t, int64_t rank) {
        S* dx = static_cast<S*>(f.dx) + f.steps.row(t, rank) * f.I;
        for (int v = 0; v < V; v++) {
          store(dx + inputs.column(n, v), load(sum + ((q - q0) * V + v) * U), inputs.lanes(n, v));
        }
      });
    });
  }

  // ---- gradients of the weights: products over all valid rows, a stretch of them after the other

  static constexpr int64_t kStretch = 128, kSide = kMaxVectors * U;
  static constexpr int64_t sums_size(int64_t size) { return (size * kSide + 1) * size * kSide; }

  // dw^T = left^T grads; left [stretch][row] left rows of kStretch.
  template <class L>
  struct Outer {
    const typename L::Element* left;
    int64_t lefts;  // rows of left
    const typename Grad::Element* grads;
    int64_t part;                        // from one part of a row of grads to the next
    const Panels<A>* panels;             // of the columns of dw^T
    int64_t slots[kMaxVectors], padded;  // gate i of dw is at slots[i] * padded in a row of grads
    void* dw;                            // [columns][lefts]
    void* db;                            // [columns]: the sums of grads over the rows; or null

    int64_t blocks(int64_t size) const {
      return ceil_div(panels->count(), size) * max(1, ceil_div(lefts, size * kSide));
    }
  };

  // Block i of a product, of size x size panels, read from memory once; sums [size][size][kSide][kSide], column_sums
  // [size][kSide].
  template <class L>
  void outer_block(const Outer<L>& o, int64_t i, int64_t size, A* sums) {
    using Right = typename Grad::Element;
    A* column_sums = sums + size * size * kSide * kSide;
    const int64_t wide = max(1, ceil_div(o.lefts, size * kSide)), p0 = i / wide * size, n0 = i % wide * size * kSide;
    const int64_t p1 = min(p0 + size, o.panels->count()), n1 = min(n0 + size * kSide, o.lefts);
    auto sum_of = [&](int64_t n, int64_t p) { return sums + ((p - p0) * size * kSide + n - n0) * kSide; };
    for (int64_t q = 0; q == 0 || q < Q; q += kStretch) {
      const int64_t depth = min(kStretch, Q - q);
      for (int64_t p = p0; p < p1; p++) {
        const int V = o.panels->vectors(p);
        Right right[Grad::kParts * kStretch * kMaxVectors * U];
        for (int v = 0; v < V; v++) {
          const int64_t column = o.slots[o.panels->gate(v)] * o.padded + o.panels->unit(p, v);
          auto row = [&](int64_t k) {
            return k < depth ? o.grads + (q + k) * Grad::kParts * o.part + column : nullptr;
          };
          for (int64_t k = 0; k < Grad::column(depth) / Grad::kParts; k += 2) {
            Grad::copy_pair(right, depth, V, v, k, row(k), row(k + 1), o.part);
          }
          if (!o.db || n0) continue;
          Vec<A> sum(0);  // a stretch by itself first, for accuracy
          for (int64_t k = 0; k < depth; k++) sum = sum + Grad::get(row(k), o.part);
          A* total = column_sums + (p - p0) * kSide + v * U;
          store(total, q ? load(total) + sum : sum);
        }
        for (int64_t n = n0; n < n1; n += kSide) {
          A* sum = sum_of(n, p);
          const auto* left = o.left + (q / kStretch * o.lefts + n) * L::row(kStretch);
          product<L, Grad>(Left<L>{left, L::row(kStretch), kStretch}, min(kSide, n1 - n), right, V, depth,
                           q ? sum : kZeros<A>, q ? kSide : 0, sum, kSide);
        }
      }
    }
    for (int64_t p = p0; p < p1; p++) {
      for (int v = 0; v < o.panels->vectors(p); v++) {
        const int64_t row = o.panels->column(p, v);
        const int lanes = o.panels->lanes(p, v);
        if (o.db && n0 == 0) store(static_cast<S*>(o.db) + row, load(column_sums + (p - p0) * kSide + v * U), lanes);
        for (int64_t n = n0; n < n1; n += U) {
          Vec<A> square[U];
          for (int j = 0; j < U; j++) square[j] = load(sum_of(n, p) + j * kSide + v * U);
          transpose(square);
          for (int j = 0; j < lanes; j++)
            store(static_cast<S*>(o.dw) + (row + j) * o.lefts + n, square[j], min(U, n1 - n));
        }
      }
    }
  }

  template <class L>
  void outer_products(const Outer<L>* products, int count) {
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
        for (int64_t b = max(mine.begin - first, 0); b < end; b++) {
          outer_block(products[i], b, size, sums + task * sums_size(size));
        }
      }
    });
  }

  void weight_gradients() {
    const int64_t stretches = max(1, ceil_div(Q, kStretch));
    const int64_t h_size = stretches * f.P * X::row(kStretch), m_size = stretches * f.H * Grad::row(kStretch);
    Buffer<typename X::Element> x(stretches * f.I * X::row(kStretch)), h(f.D * h_size);
    Buffer<typename Grad::Element> m(projected ? f.D * m_size : 0);
    const int64_t blocks = ceil_div(round_up(Q, X::kAlign), U), packers = max(1, min(f.threads, Q / 64));
    Buffer<A> unprojected(projected ? packers * U * hidden.width() : 0);
    parallel(packers, [&](int64_t task) {
      const Range mine = share(blocks, task, packers);
      for (int64_t q0 = mine.begin * U; q0 < mine.end * U; q0 += U) {
        auto put = [&](auto math, auto* to, int64_t width, const auto& row_at) {
          decltype(row_at(0, 0, 0)) rows[U] = {};
          for_rows({q0, min(q0 + U, Q)},
                   [&](int64_t q, int64_t t, int64_t rank) { rows[q - q0] = row_at(q, t, rank); });
          using L = decltype(math);
          put_transposed<L>(to + q0 / kStretch * width * L::row(kStretch) + q0 % kStretch, L::row(kStretch), kStretch,
                            rows, width);
        };
        put(X(), static_cast<Elements<X>>(x), f.I,
            [&](int64_t, int64_t t, int64_t rank) { return row_of<S>(f.x, f.steps.row(t, rank), f.I); });
        for (int d = 0; d < f.D; d++) {
          put(X(), h + d * h_size, f.P, [&](int64_t, int64_t t, int64_t rank) { return h_before(d, t, rank); });
          if (!projected) continue;
          put(Grad(), m + d * m_size, f.H, [&](int64_t q, int64_t t, int64_t rank) {
            A* row = unprojected + (task * U + q - q0) * hidden.width();
            unproject_row(row, d, f.steps.row(t, rank));
            return static_cast<const A*>(row);
          });
        }
      }
    });

    Outer<X> products[4];
    Outer<Grad> projections[2];
    for (int d = 0; d < f.D; d++) {
      const auto* grads = dgates + d * Q * Grad::row(kGrads * padded);
      Outer<X>&of_x = products[2 * d], &of_h = products[2 * d + 1];
      of_x = {x, f.I, grads, kGrads * padded, &gates, {}, padded, f.dw[d].w_ih, f.dw[d].b_ih};
      of_h = {h + d * h_size, f.P, grads, kGrads * padded, &gates, {}, padded, f.dw[d].w_hh, f.dw[d].b_hh};
      for (int i = 0; i < G; i++) of_x.slots[i] = slot(i), of_h.slots[i] = slot(Cell::hidden(i));
      projections[d] = {
          m + d * m_size, f.H,    dys + d * Q * Grad::row(f.P), round_up(f.P, Grad::kAlign), &outputs, {}, 0,
          f.dw[d].w_hr,   nullptr};
    }
    outer_products(products, 2 * f.D);
    if (projected) outer_products(projections, f.D);
  }

  // m, the cell's own h, what w_hr was applied to.
  void unproject_row(A* to, int d, int64_t r) const {
    if constexpr (Cell::kProjects) {
      const S* gates = static_cast<const S*>(f.gates) + (d * f.R + r) * Cell::kSaved * f.H;
      const A* c = static_cast<const A*>(f.c) + (r * f.D + d) * f.H;
      for (int64_t unit = 0; unit < f.H; unit += U) {
        const int n = min(U, f.H - unit);
        Vec<A> saved[Cell::kSaved];
        for (int k = 0; k < Cell::kSaved; k++) saved[k] = load(gates + k * f.H + unit, n);
        store(to + unit, Cell::output(saved, load(c + unit, n)));
      }
    }
  }

  const Backward& f;
  const Panels<A> gates, hidden, outputs, inputs;
  const bool projected, packed;
  const int64_t Q, padded;  // rows, and units up to kAlign
  const Teams teams;
  Buffer<typename X::Element> w_hh;       // [D][outputs panel][G*H][V][U]
  Buffer<typename X::Element> w_hr;       // [D][hidden panel][P][V][U]
  Buffer<typename Grad::Element> dgates;  // [D][Q] left rows of [slot][padded]
  Buffer<typename Grad::Element> dys;     // [D][Q] left rows of P: dh of every step, for w_hr
  Buffer<A> scratch;
};

}  // namespace
}  // namespace RNNFAST_ISA
}  // namespace rnnfast
