// The cell's step of one element of a state, whichever kernel made the product before it.
#pragma once

#include "stepwise.cuh"

namespace rnnfast {

template <class Stored>
using SumOf = std::conditional_t<std::is_same<Stored, double>::value, double, float>;

template <class Stored>
RNNFAST_DEVICE Stored read(const void* p, int64_t i) {
  return static_cast<const Stored*>(p)[i];
}

template <class Stored>
RNNFAST_DEVICE void write(void* p, int64_t i, Stored value) {
  static_cast<Stored*>(p)[i] = value;
}

// An element of a state [D, N, units], and its step.
struct Element {
  int64_t index, unit, n, d, t;
  int length;
  bool exists, valid;  // valid: the row has this step

  RNNFAST_DEVICE Element() {}
  RNNFAST_DEVICE Element(const StepArguments& p, int64_t units, int64_t unit, int64_t n, int64_t d)
      : index((d * p.sequence.N + n) * units + unit),
        unit(unit),
        n(n),
        d(d),
        t(d ? p.sequence.T - 1 - p.step : p.step),
        exists(unit < units && n < p.sequence.N && d < p.D) {
    length = exists ? p.sequence.length(n) : 0;
    valid = t >= 0 && t < length;
  }

  RNNFAST_DEVICE int64_t row(const StepArguments& p) const { return p.sequence.row(t, n); }
  RNNFAST_DEVICE bool keeps(const StepArguments& p) const { return p.sequence.keeps(t, n, length, int(d)); }

  // Where the element lies in a row of outputs [R, D*units], and in that of the step before, or -1 if it has none.
  RNNFAST_DEVICE int64_t output(const StepArguments& p, int64_t units, int64_t row) const {
    return (row * p.D + d) * units + unit;
  }
  RNNFAST_DEVICE int64_t output_before(const StepArguments& p, int64_t units) const {
    const int64_t before = t - 1 + 2 * d;
    return before >= 0 && before < length ? output(p, units, p.sequence.row(before, n)) : -1;
  }
};

// Both are loaded, which a product need not wait for, and then finished with what it made.

template <class Cell, class Stored>
struct ForwardElement {
  using Sum = SumOf<Stored>;
  using Number = Real<Sum, sizeof(Stored) == 2>;
  static constexpr int G = Cell::kGates, S = Cell::kSaved;

  Element at;
  bool keeps;
  int64_t row;  // of x
  Number x[G], h, c;
  Sum b[G];

  RNNFAST_DEVICE void load(const ForwardStep& p, const Element& element) {
    at = element;
    if (!at.valid) return;
    keeps = at.keeps(p), row = at.row(p);
    const int64_t first = (at.d * p.sequence.R + row) * G * p.H + at.unit;
    h = keeps && p.y ? Sum(read<Stored>(p.h, at.index)) : 0;
    c = Cell::kHasCell && keeps ? read<Sum>(p.c, at.index) : 0;
#pragma unroll
    for (int gate = 0; gate < G; gate++) {
      x[gate] = Sum(read<Stored>(p.x, first + gate * p.H));
      b[gate] = p.b[at.d] ? Sum(read<Stored>(p.b[at.d], gate * p.H + at.unit)) : 0;
    }
  }

  // Of_h: W_hh h of each gate. Returns the new h of a valid step.
  template <class OfH>
  RNNFAST_DEVICE Stored finish(const ForwardStep& p, const OfH& of_h) {
    Number a[G], saved[S ? S : 1];
#pragma unroll
    for (int gate = 0; gate < G; gate++) a[gate] = (keeps ? Sum(of_h(gate)) : 0) + b[gate];
    const UnitWeights<Cell, Number, 1> own(static_cast<const Stored*>(p.w_units[at.d]), at.unit, p.H);
    Cell::forward(x, a, own[0], h, c, saved);
    const int64_t out = at.output(p, p.H, row), first = (at.d * p.sequence.R + row) * S * p.H + at.unit;
    write(p.h, at.index, Stored(h.value));
    if (p.y) write(p.y, out, Stored(h.value));
    if (Cell::kHasCell) write(p.c, at.index, c.value);
    if (Cell::kHasCell && p.cs) write(p.cs, out, c.value);
    if (S && p.gates) {
#pragma unroll
      for (int k = 0; k < S; k++) write(p.gates, first + k * p.H, Stored(saved[k].value));
    }
    return Stored(h.value);
  }
};

template <class Cell, class Stored>
struct BackwardElement {
  using Sum = SumOf<Stored>;
  using Number = Real<Sum, sizeof(Stored) == 2>;
  static constexpr int G = Cell::kGates, S = Cell::kSaved, kColumns = Cell::kColumns;

  Element at;
  bool keeps;
  int64_t row;  // of all directions'
  Number saved[S ? S : 1], h, old_h, c, old_c, dc;
  Sum dh, dy;

  RNNFAST_DEVICE void load(const BackwardStep& p, const Element& element) {
    at = element;
    keeps = at.valid && at.keeps(p);
    dh = at.exists && p.dh ? read<Sum>(p.dh, at.index) : 0;
    if (!at.valid) return;
    row = at.row(p);
    const int64_t out = at.output(p, p.H, row), before = at.output_before(p, p.H);
    row += at.d * p.sequence.R;
    dy = p.dy ? Sum(read<Stored>(p.dy, out)) : 0;
    h = old_h = c = old_c = dc = 0;
#pragma unroll
    for (int k = 0; k < S; k++) saved[k] = Sum(read<Stored>(p.gates, row * S * p.H + k * p.H + at.unit));
    if (Cell::kNeedsH) h = Sum(read<Stored>(p.y, out));
    if (Cell::kNeedsOldH && keeps) {
      if (before >= 0) {
        old_h = Sum(read<Stored>(p.y, before));
      } else if (p.h0) {
        old_h = Sum(read<Stored>(p.h0, at.index));
      }
    }
    if (Cell::kHasCell) {
      c = read<Sum>(p.cs, out);
      dc = read<Sum>(p.dc, at.index);
      if (p.dcs) dc = dc + Number(read<Sum>(p.dcs, out));
      if (keeps && before >= 0) {
        old_c = read<Sum>(p.cs, before);
      } else if (keeps && p.c0) {
        old_c = Sum(read<Stored>(p.c0, at.index));
      }
    }
  }

  // Through: what comes back through the product. Leaves the gradients at W_hh h of each gate with give(gate, value).
  template <class Give>
  RNNFAST_DEVICE void finish(const BackwardStep& p, Sum through, const Give& give) {
    dh += through;
    Sum direct = dh;
    Number grads[kColumns];
    if (at.valid) {
      const UnitWeights<Cell, Number, 1> own(static_cast<const Stored*>(p.w_units[at.d]), at.unit, p.H);
      direct = Cell::backward(saved, own[0], h, old_h, c, old_c, Number(dh + dy), dc, grads).value;
      if (!keeps) direct = 0;
      if (Cell::kHasCell) write(p.dc, at.index, keeps ? dc.value : Sum(0));
      const int64_t first = row * kColumns * p.H + at.unit;
#pragma unroll
      for (int k = 0; k < kColumns; k++) write(p.dgates, first + k * p.H, Stored(grads[k].value));
    }
    if (p.dh) write(p.dh, at.index, direct);
#pragma unroll
    for (int gate = 0; gate < G; gate++) give(gate, keeps ? Stored(grads[Cell::hidden(gate)].value) : Stored(0));
  }
};

}  // namespace rnnfast
