// The kernels of one step, an element of a state a thread.
#include "stepwise.cuh"

namespace rnnfast {
namespace {

template <class Stored>
using SumOf = std::conditional_t<std::is_same<Stored, double>::value, double, float>;

RNNFAST_DEVICE int64_t thread_index() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }

// An element of a state [D, N, units], and its step.
struct Element {
  int64_t index, unit, n, d, t;
  int length;
  bool exists, valid;  // valid: the row has this step

  RNNFAST_DEVICE Element(const StepArguments& p, int64_t units)
      : index(thread_index()),
        unit(index % units),
        n(index / units % p.sequence.N),
        d(index / units / p.sequence.N),
        t(d ? p.sequence.T - 1 - p.step : p.step),
        exists(d < p.D) {
    length = exists ? p.sequence.length(n) : 0;
    valid = t < length;
  }

  RNNFAST_DEVICE int64_t row(const StepArguments& p) const { return p.sequence.row(t, n); }
  RNNFAST_DEVICE bool keeps(const StepArguments& p) const { return p.sequence.keeps(t, n, length, int(d)); }

  // Where the element lies in outputs [R, D*units]: of a step, and of the step before, or -1 if the row begins here.
  RNNFAST_DEVICE int64_t output(const StepArguments& p, int64_t units, int64_t step) const {
    return (p.sequence.row(step, n) * p.D + d) * units + unit;
  }
  RNNFAST_DEVICE int64_t output_before(const StepArguments& p, int64_t units) const {
    const int64_t before = t - 1 + 2 * d;
    return before >= 0 && before < length ? output(p, units, before) : -1;
  }
};

template <class Stored>
RNNFAST_DEVICE Stored read(const void* p, int64_t i) {
  return static_cast<const Stored*>(p)[i];
}

template <class Stored>
RNNFAST_DEVICE void write(void* p, int64_t i, Stored value) {
  static_cast<Stored*>(p)[i] = value;
}

template <class Cell, class Stored>
__global__ void __launch_bounds__(kStepThreads) forward_step(const __grid_constant__ ForwardStep p) {
  using Sum = SumOf<Stored>;
  using Number = Real<Sum, sizeof(Stored) == 2>;
  constexpr int G = Cell::kGates, S = Cell::kSaved;
  const int64_t H = p.H;
  const Element e(p, H);
  if (!e.valid) return;
  const bool keeps = e.keeps(p);
  const int64_t row = e.d * p.sequence.R + e.row(p);
  Number x[G], a[G], saved[S ? S : 1], h = 0, c = 0;
  if (keeps && p.y) h = Sum(read<Stored>(p.h, e.index));
  if (Cell::kHasCell && keeps) c = read<Sum>(p.c, e.index);
#pragma unroll
  for (int gate = 0; gate < G; gate++) {
    x[gate] = Sum(read<Stored>(p.x, row * G * H + gate * H + e.unit));
    Sum of_h = keeps ? Sum(read<Stored>(p.a, (e.d * p.sequence.N + e.n) * G * H + gate * H + e.unit)) : 0;
    if (p.b[e.d]) of_h += Sum(read<Stored>(p.b[e.d], gate * H + e.unit));
    a[gate] = of_h;
  }
  const UnitWeights<Cell, Number, 1> own(static_cast<const Stored*>(p.w_units[e.d]), e.unit, H);
  Cell::forward(x, a, own[0], h, c, saved);
  write(p.h, e.index, Stored(h.value));
  const int64_t out = e.output(p, H, e.t);
  if (p.y) write(p.y, out, Stored(h.value));
  if (Cell::kHasCell) write(p.c, e.index, c.value);
  if (Cell::kHasCell && p.cs) write(p.cs, out, c.value);
  if (S && p.gates) {
#pragma unroll
    for (int k = 0; k < S; k++) write(p.gates, row * S * H + k * H + e.unit, Stored(saved[k].value));
  }
}

template <class Cell, class Stored>
__global__ void __launch_bounds__(kStepThreads) backward_step(const __grid_constant__ BackwardStep p) {
  using Sum = SumOf<Stored>;
  using Number = Real<Sum, sizeof(Stored) == 2>;
  constexpr int G = Cell::kGates, S = Cell::kSaved, kColumns = Cell::kColumns;
  const int64_t H = p.H;
  const Element e(p, H);
  if (!e.exists) return;
  const bool keeps = e.valid && e.keeps(p);
  Sum dh = read<Stored>(p.through, e.index);
  if (p.dh) dh += read<Sum>(p.dh, e.index);
  Sum direct = dh;
  Number grads[kColumns];
  if (e.valid) {
    const int64_t row = e.d * p.sequence.R + e.row(p), at = e.output(p, H, e.t), before = e.output_before(p, H);
    if (p.dy) dh += Sum(read<Stored>(p.dy, at));
    Number saved[S ? S : 1], h = 0, old_h = 0, c = 0, old_c = 0, dc = 0;
#pragma unroll
    for (int k = 0; k < S; k++) saved[k] = Sum(read<Stored>(p.gates, row * S * H + k * H + e.unit));
    if (Cell::kNeedsH) h = Sum(read<Stored>(p.y, at));
    if (Cell::kNeedsOldH && keeps) {
      if (before >= 0) {
        old_h = Sum(read<Stored>(p.y, before));
      } else if (p.h0) {
        old_h = Sum(read<Stored>(p.h0, e.index));
      }
    }
    if (Cell::kHasCell) {
      c = read<Sum>(p.cs, at);
      dc = read<Sum>(p.dc, e.index);
      if (p.dcs) dc = dc + Number(read<Sum>(p.dcs, at));
      if (keeps && before >= 0) {
        old_c = read<Sum>(p.cs, before);
      } else if (keeps && p.c0) {
        old_c = Sum(read<Stored>(p.c0, e.index));
      }
    }
    const UnitWeights<Cell, Number, 1> own(static_cast<const Stored*>(p.w_units[e.d]), e.unit, H);
    direct = Cell::backward(saved, own[0], h, old_h, c, old_c, Number(dh), dc, grads).value;
    if (!keeps) direct = 0;
    if (Cell::kHasCell) write(p.dc, e.index, keeps ? dc.value : Sum(0));
#pragma unroll
    for (int k = 0; k < kColumns; k++) write(p.dgates, row * kColumns * H + k * H + e.unit, Stored(grads[k].value));
  }
  if (p.dh) write(p.dh, e.index, direct);
#pragma unroll
  for (int gate = 0; gate < G; gate++) {
    write(p.da, (e.d * p.sequence.N + e.n) * G * H + gate * H + e.unit,
          keeps ? Stored(grads[Cell::hidden(gate)].value) : Stored(0));
  }
}

template <class Stored>
__global__ void __launch_bounds__(kStepThreads) project_forward(const __grid_constant__ ProjectForward p) {
  const Element e(p, p.P);
  if (!e.valid) return;
  const Stored h = read<Stored>(p.projected, e.index);
  write(p.h, e.index, h);
  write(p.y, e.output(p, p.P, e.t), h);
}

template <class Stored>
__global__ void __launch_bounds__(kStepThreads) project_backward(const __grid_constant__ ProjectBackward p) {
  using Sum = SumOf<Stored>;
  const Element e(p, p.P);
  if (!e.exists) return;
  Sum dh = read<Sum>(p.dh, e.index) + Sum(read<Stored>(p.through, e.index));
  write(p.dh, e.index, e.valid ? Sum(0) : dh);
  if (e.valid && p.dy) dh += Sum(read<Stored>(p.dy, e.output(p, p.P, e.t)));
  const Stored d = e.valid ? Stored(dh) : Stored(0);
  write(p.dprojected, e.index, d);
  if (e.valid) write(p.dprojections, (e.d * p.sequence.R + e.row(p)) * p.P + e.unit, d);
}

template <class Stored>
__global__ void __launch_bounds__(kStepThreads) accumulate(const __grid_constant__ Accumulate p) {
  const int64_t i = thread_index();
  if (i < p.count) write(p.to, i, read<SumOf<Stored>>(p.to, i) + SumOf<Stored>(read<Stored>(p.from, i)));
}

// All steps at once: p.step is not read.
template <class Stored>
__global__ void __launch_bounds__(kStepThreads) states_before(const __grid_constant__ StatesBefore p) {
  StepArguments at = p;
  const int64_t state = p.D * p.sequence.N * p.P, index = thread_index();
  Element e(at, p.P);
  e.index = index % state, e.d = e.index / p.P / p.sequence.N, e.t = index / state;
  if (e.t >= p.sequence.T) return;
  e.length = p.sequence.length(e.n);
  e.valid = e.t < e.length;
  if (p.sequence.offsets && !e.valid) return;
  Stored h = 0;
  if (e.valid && e.keeps(p)) {
    const int64_t before = e.output_before(p, p.P);
    if (before >= 0) {
      h = read<Stored>(p.y, before);
    } else if (p.h0) {
      h = read<Stored>(p.h0, e.index);
    }
  }
  write(p.out, (e.d * p.sequence.R + e.row(p)) * p.P + e.unit, h);
}

template <class Stored>
constexpr StepKernels kernels_of() {
#define RNNFAST_FORWARD(Cell) forward_step<Cell, Stored>,
#define RNNFAST_BACKWARD(Cell) backward_step<Cell, Stored>,
  return {{RNNFAST_CELLS(RNNFAST_FORWARD)},
          {RNNFAST_CELLS(RNNFAST_BACKWARD)},
          project_forward<Stored>,
          project_backward<Stored>,
          accumulate<Stored>,
          states_before<Stored>};
}

}  // namespace

const StepKernels step_kernels[4] = {kernels_of<float>(), kernels_of<double>(), kernels_of<BFloat16>(),
                                     kernels_of<Half>()};

}  // namespace rnnfast
