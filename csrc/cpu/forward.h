// A layer's forward pass over a cell and a storage type: the input's products for a stretch of steps, then the steps.
// Letters as in ../README.md.
#pragma once

#include "sweep.h"

namespace rnnfast {
namespace RNNFAST_ISA {
namespace {

template <class Cell, class Stored, class Math>
class ForwardPass {
  using Sum = SumOf<Stored>;
  using Exact = typename Math::Exact;  // operands that hold x, h and the weights
  using Wide = typename Math::Wide;    // and m = o tanh(c), before its projection
  template <class Format>
  using Elements = typename Format::Element*;
  static constexpr int U = kLanes<Sum>, G = Cell::kGates;

 public:
  explicit ForwardPass(const Forward& f)
      : f(f),
        gates(f.H, G),
        outputs(f.P),
        projected(f.projected),
        packed(is_packed(f)),
        teams(f, gates, Cost::of<Exact>()),
        chunk(chunk_steps(f.steps.T, teams.rows(), gates.width() * sizeof(Sum))),
        own(f.kept || !packed ? 0 : kept_bytes(f) / sizeof(typename Exact::Element)),
        w_ih(f.kept ? static_cast<Elements<Exact>>(f.kept) : own),
        w_hh(packed ? w_ih + f.D * gates.width() * Exact::column(f.I) : nullptr),
        w_hr(packed ? w_hh + f.D * gates.width() * Exact::column(f.P) : nullptr),
        b_ih(f.D * gates.width()),
        b_hh(f.D * gates.width()),
        xs(group_rows() * chunk * Exact::row(f.I)),
        projections(group_rows() * chunk * gates.width()),
        hs(group_rows() * 2 * Exact::row(f.P)),
        ms(projected ? group_rows() * Wide::row(f.H) : 0),
        cs(Cell::kHasCell ? group_rows() * Plain<Sum>::row(f.H) : 0),
        bases(teams.groups() * (f.steps.T + 1)) {}

  // Of the packed weights.
  static size_t kept_bytes(const Forward& f) {
    if (f.R <= kUnpackedRows) return 0;
    const int64_t width = Panels<Sum>(f.H, G).width() * (Exact::column(f.I) + Exact::column(f.P));
    const int64_t projection = f.projected ? Panels<Sum>(f.P).width() * Exact::column(f.H) : 0;
    return f.D * (width + projection) * sizeof(typename Exact::Element);
  }

  void run() {
    for (int d = 0; d < f.D; d++) {
      pack_vector(b_ih + d * gates.width(), static_cast<const Stored*>(f.weights[d].b_ih), gates);
      pack_vector(b_hh + d * gates.width(), static_cast<const Stored*>(f.weights[d].b_hh), gates);
    }
    if (packed && !f.packed) pack();
    teams.run([&](const auto& each) { sweep(each); });
  }

 private:
  // A group of rows, with its states and what else its sweep computes in.
  struct GroupState : Group {
    Elements<Exact> x;     // [rows of a chunk] left rows of I
    Sum* projection;       // [gates panel][rows of a chunk][V][U]
    Elements<Exact> h[2];  // [rows] left rows of P: read and written in turn
    Elements<Wide> m;      // [rows] left rows of H
    Sum* c;                // [rows][H up to a vector]
    int64_t* base;         // [T+1] the rows before step s

    GroupState(const ForwardPass& p, int64_t g)
        : Group(p.f, p.teams, g),
          x(p.xs + g * p.teams.rows() * p.chunk * Exact::row(p.f.I)),
          projection(p.projections + g * p.teams.rows() * p.chunk * p.gates.width()),
          h{p.hs + 2 * g * p.teams.rows() * Exact::row(p.f.P), p.hs + (2 * g + 1) * p.teams.rows() * Exact::row(p.f.P)},
          m(p.ms + (p.projected ? g * p.teams.rows() * Wide::row(p.f.H) : 0)),
          c(p.cs + (Cell::kHasCell ? g * p.teams.rows() * Plain<Sum>::row(p.f.H) : 0)),
          base(p.bases + g * (p.f.steps.T + 1)) {}
  };

  static bool is_packed(const Forward& f) {
    constexpr bool kAsStored = std::is_same_v<Exact, Plain<Stored>>;
    return f.kept || pays_to_pack(f.R, kAsStored ? min(f.I, f.P) : 0);
  }

  int64_t group_rows() const { return teams.groups() * teams.rows(); }

  template <class Format>
  static Left<Format> rows_of(Elements<Format> data, int64_t K) {
    return {data, Format::row(K), round_up(K, Format::kAlign)};
  }

  void pack() {
    int64_t per_w = gates.count(), per_d = 2 * per_w + (projected ? outputs.count() : 0);
    parallel_for(f.D * per_d, min(f.threads, 1 + gates.width() * (f.I + f.P) / kThreadWork), [&](int64_t i) {
      int64_t d = i / per_d, p = i % per_d;
      const auto& w = f.weights[d];
      if (p < per_w) {
        pack_transposed<Exact>(w_ih + d * gates.width() * Exact::column(f.I), static_cast<const Stored*>(w.w_ih), f.I,
                               gates, p);
      } else if (p < 2 * per_w) {
        pack_transposed<Exact>(w_hh + d * gates.width() * Exact::column(f.P), static_cast<const Stored*>(w.w_hh), f.P,
                               gates, p - per_w);
      } else {
        pack_transposed<Exact>(w_hr + d * outputs.width() * Exact::column(f.H), static_cast<const Stored*>(w.w_hr), f.H,
                               outputs, p - 2 * per_w);
      }
    });
  }

  // out[M][V*U] = init + a W^T for panel p of direction d's matrix w, or of its packed copy.
  template <class LeftFormat>
  void multiply(Left<LeftFormat> a, int64_t M, int d, const void* w, typename Exact::Element* copy,
                const Panels<Sum>& panels, int64_t p, int64_t K, const Sum* init, Sum* out, int64_t os) {
    if constexpr (std::is_same_v<LeftFormat, Plain<Sum>>) {
      if (!packed) return product_unpacked(a, M, static_cast<const Stored*>(w), panels, p, K, init, out, os);
    }
    product<LeftFormat, Exact>(a, M, copy + (d * panels.width() + panels.start(p)) * Exact::column(K),
                               panels.vectors(p), K, init, 0, out, os);
  }

  // The stages of the sweep: see Teams::run.
  template <class Each>
  void sweep(const Each& each) {
    const int64_t T = f.steps.T;
    each([&](int64_t g, int64_t part, int64_t) {
      if (part == 0) begin(GroupState(*this, g));
    });
    for (int64_t s0 = 0; s0 < T; s0 += chunk) {
      int64_t s1 = min(s0 + chunk, T);
      each([&](int64_t g, int64_t part, int64_t parts) { gather(GroupState(*this, g), s0, s1, part, parts); });
      each([&](int64_t g, int64_t part, int64_t parts) {
        project_input(GroupState(*this, g), s0, s1, share(gates.count(), part, parts));
      });
      for (int64_t s = s0; s < s1; s++) {
        if (f.steps.resets) {
          each([&](int64_t g, int64_t part, int64_t) {
            if (part == 0) cut(GroupState(*this, g), s);
          });
        }
        each([&](int64_t g, int64_t part, int64_t parts) {
          step(GroupState(*this, g), s, s0, share(gates.count(), part, parts));
        });
        if (projected) {
          each([&](int64_t g, int64_t part, int64_t parts) {
            project_state(GroupState(*this, g), s, share(outputs.count(), part, parts));
          });
        }
      }
    }
    each([&](int64_t g, int64_t part, int64_t) {
      if (part == 0) end(GroupState(*this, g));
    });
  }

  void begin(const GroupState& g) {
    g.base[0] = 0;
    for (int64_t s = 0; s < f.steps.T; s++) g.base[s + 1] = g.base[s] + g.alive_at(g.time(s));
    for (int64_t i = 0; i < g.rows; i++) {
      int64_t n = g.d * f.steps.N + g.batch_row(i);
      for (auto* h : g.h) put_row<Exact>(h + i * Exact::row(f.P), row_of<Stored>(f.h0, n, f.P), f.P);
      if (projected) put_row<Wide>(g.m + i * Wide::row(f.H), static_cast<const Stored*>(nullptr), f.H);
      if (Cell::kHasCell) put_row<Plain<Sum>>(g.c + i * Plain<Sum>::row(f.H), row_of<Stored>(f.c0, n, f.H), f.H);
    }
  }

  // Collects the group's rows of x; zeros the outputs past the sequences' ends.
  void gather(const GroupState& g, int64_t s0, int64_t s1, int64_t part, int64_t parts) {
    for (int64_t s = s0 + part; s < s1; s += parts) {
      int64_t t = g.time(s), rows = g.alive_at(t);
      auto* x = g.x + (g.base[s] - g.base[s0]) * Exact::row(f.I);
      for (int64_t i = 0; i < rows; i++) {
        put_row<Exact>(x + i * Exact::row(f.I), row_of<Stored>(f.x, g.row(t, i), f.I), f.I);
      }
      if (f.R != f.steps.T * f.steps.N) continue;  // packed: no row lies past an end
      for (int64_t i = rows; i < g.rows; i++) {
        int64_t row = g.row(t, i), r = row * f.D + g.d, saved = Cell::kSaved * f.H;
        clear(static_cast<Stored*>(f.y) + r * f.P, f.P * sizeof(Stored));
        if (f.c) clear(static_cast<Sum*>(f.c) + r * f.H, f.H * sizeof(Sum));
        if (f.gates) clear(static_cast<Stored*>(f.gates) + (g.d * f.R + row) * saved, saved * sizeof(Stored));
      }
    }
  }

  Sum* projection(const GroupState& g, int64_t p, int64_t row) const {
    return g.projection + gates.start(p) * chunk * teams.rows() + row * gates.vectors(p) * U;
  }

  void project_input(const GroupState& g, int64_t s0, int64_t s1, Range panels) {
    for (int64_t p = panels.begin; p < panels.end; p++) {
      multiply(rows_of<Exact>(g.x, f.I), g.base[s1] - g.base[s0], g.d, f.weights[g.d].w_ih, w_ih, gates, p, f.I,
               b_ih + g.d * gates.width() + gates.start(p), projection(g, p, 0), gates.vectors(p) * U);
    }
  }

  void cut(const GroupState& g, int64_t s) {
    int64_t t = g.time(s), rows = g.alive_at(t);
    for (int64_t i = 0; i < rows; i++) {
      if (!f.steps.cut(g.d, t, g.rank(i))) continue;
      put_row<Exact>(g.h[s & 1] + i * Exact::row(f.P), static_cast<const Stored*>(nullptr), f.P);
      if (Cell::kHasCell) memset(g.c + i * Plain<Sum>::row(f.H), 0, f.H * sizeof(Sum));
    }
  }

  void step(const GroupState& g, int64_t s, int64_t s0, Range panels) {
    const int64_t t = g.time(s), rows = g.alive_at(t);
    const Update update(*this, g, s, t);
    Sum a[kBlockRows * kMaxVectors * U];
    to_and_fro(panels, s, [&](int64_t p) {
      const int V = gates.vectors(p);
      const Sum* x = projection(g, p, g.base[s] - g.base[s0]);
      for (int64_t i0 = 0; i0 < rows; i0 += kBlockRows) {
        int64_t i1 = min(i0 + kBlockRows, rows);
        multiply(rows_of<Exact>(g.h[s & 1], f.P).from(i0), i1 - i0, g.d, f.weights[g.d].w_hh, w_hh, gates, p, f.P,
                 b_hh + g.d * gates.width() + gates.start(p), a, V * U);
        for (int b = 0; b < V / G; b++) {
          update.rows({i0, i1}, gates.unit(p, b), x + (i0 * V + b) * U, a + b * U, V * U);
        }
      }
    });
  }

  // The cell at one step. It has copies of what its loop uses: members of the pass the compiler would read again after
  // every store, which might have changed them.
  class Update {
   public:
    Update(const ForwardPass& p, const GroupState& g, int64_t s, int64_t t)
        : H(p.f.H),
          D(p.f.D),
          P(p.f.P),
          rank(g.first),
          stride(g.stride),
          start(p.f.steps.offset[t]),
          order(p.f.steps.order),
          old_h(g.h[s & 1]),
          h(p.projected ? nullptr : g.h[(s + 1) & 1]),
          m(g.m),
          c(g.c),
          y(static_cast<Stored*>(p.f.y) + g.d * P),
          kept_c(p.f.c ? static_cast<Sum*>(p.f.c) + g.d * H : nullptr),
          w_units(static_cast<const Stored*>(p.f.weights[g.d].w_units)),
          kept_gates(p.f.gates ? static_cast<Stored*>(p.f.gates) + g.d * p.f.R * Cell::kSaved * H : nullptr) {}

    // One block of units of some rows; x and a [rows][G][U], a row `next` from the one before.
    void rows(Range range, int64_t unit, const Sum* x, const Sum* a, int64_t next) const {
      const int lanes = min(U, H - unit);
      if (lanes == U) {
        rows_of(std::true_type(), range, unit, lanes, x, a, next);
      } else {
        rows_of(std::false_type(), range, unit, lanes, x, a, next);
      }
    }

   private:
    template <class Full>
    RNNFAST_INLINE void rows_of(Full, Range range, int64_t unit, int lanes, const Sum* x, const Sum* a,
                                int64_t next) const {
      const Update u = *this;
      const int n = Full::value ? U : lanes;
      const int64_t part = round_up(u.P, Exact::kAlign), m_part = round_up(u.H, Wide::kAlign);
      const int64_t state = Exact::row(u.P), memory = Wide::row(u.H), cells = Plain<Sum>::row(u.H);
      Vec<Sum> w[Cell::kUnitWeights + 1];
      for (int k = 0; k < Cell::kUnitWeights; k++) w[k] = load(u.w_units + k * u.H + unit, n);
      for (int64_t i = range.begin; i < range.end; i++, x += next, a += next) {
        const int64_t r = u.start + u.order[u.rank + i * u.stride];
        Vec<Sum> xs[G], as[G], saved[Cell::kSaved + 1], h, c;
        for (int k = 0; k < G; k++) xs[k] = load(x + k * U), as[k] = load(a + k * U);
        if (Cell::kReadsH) h = Exact::get(u.old_h + i * state + unit, part);
        if (Cell::kHasCell) c = load(u.c + i * cells + unit);
        Cell::forward(xs, as, w, h, c, saved);
        if (Cell::kHasCell) {
          store(u.c + i * cells + unit, c);
          if (u.kept_c) store(u.kept_c + r * u.D * u.H + unit, c, n);
        }
        if (Cell::kSaved && u.kept_gates) {
          Stored* to = u.kept_gates + r * Cell::kSaved * u.H + unit;
          for (int k = 0; k < Cell::kSaved; k++) store(to + k * u.H, saved[k], n);
        }
        if (u.h) {
          Exact::put(u.h + i * state + unit, part, rounded<Stored>(h));
          store(u.y + r * u.D * u.P + unit, h, n);
        } else {
          Wide::put(u.m + i * memory + unit, m_part, h);
        }
      }
    }

    const int64_t H, D, P, rank, stride, start;
    const int64_t* const order;
    const typename Exact::Element* const old_h;
    const Elements<Exact> h;  // null where m is projected
    const Elements<Wide> m;
    Sum* const c;
    Stored* const y;
    Sum* const kept_c;  // null where nothing is kept, as kept_gates
    const Stored* const w_units;
    Stored* const kept_gates;
  };

  void project_state(const GroupState& g, int64_t s, Range panels) {
    const int64_t t = g.time(s), rows = g.alive_at(t), part = round_up(f.P, Exact::kAlign);
    Sum a[kBlockRows * kMaxVectors * U];
    for (int64_t p = panels.begin; p < panels.end; p++) {
      const int V = outputs.vectors(p);
      for (int64_t i0 = 0; i0 < rows; i0 += kBlockRows) {
        int64_t i1 = min(i0 + kBlockRows, rows);
        multiply(rows_of<Wide>(g.m, f.H).from(i0), i1 - i0, g.d, f.weights[g.d].w_hr, w_hr, outputs, p, f.H,
                 kZeros<Sum>, a, V * U);
        for (int64_t i = i0; i < i1; i++) {
          auto* h = g.h[(s + 1) & 1] + i * Exact::row(f.P) + outputs.start(p);
          Stored* y = static_cast<Stored*>(f.y) + (g.row(t, i) * f.D + g.d) * f.P + outputs.start(p);
          for (int v = 0; v < V; v++) {
            Vec<Sum> value = load(a + ((i - i0) * V + v) * U);
            Exact::put(h + v * U, part, rounded<Stored>(value));
            store(y + v * U, value, outputs.lanes(p, v));
          }
        }
      }
    }
  }

  void end(const GroupState& g) {
    for (int64_t i = 0; i < g.rows; i++) {
      int64_t n = g.d * f.steps.N + g.batch_row(i), steps = g.d ? f.steps.T : f.steps.length[g.rank(i)];
      get_row<Exact>(static_cast<Stored*>(f.h_n) + n * f.P, g.h[steps & 1] + i * Exact::row(f.P), f.P);
      if (Cell::kHasCell) {
        get_row<Plain<Sum>>(static_cast<Stored*>(f.c_n) + n * f.H, g.c + i * Plain<Sum>::row(f.H), f.H);
      }
    }
  }

  const Forward& f;
  const Panels<Sum> gates, outputs;
  const bool projected, packed;
  const Teams teams;
  const int64_t chunk;                  // steps
  Buffer<typename Exact::Element> own;  // packed weights, unless the caller keeps them
  const Elements<Exact> w_ih, w_hh, w_hr;
  Buffer<Sum> b_ih, b_hh;
  Buffer<typename Exact::Element> xs;
  Buffer<Sum> projections;
  Buffer<typename Exact::Element> hs;
  Buffer<typename Wide::Element> ms;
  Buffer<Sum> cs;
  Buffer<int64_t> bases;
};

}  // namespace
}  // namespace RNNFAST_ISA
}  // namespace rnnfast
