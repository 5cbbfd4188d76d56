#include "stepwise.cuh"

namespace rnnfast {
namespace {

template <class T>
using Sum = std::conditional_t<std::is_same<T, double>::value, double, float>;

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

  // Of outputs [R, D*units]: this step's, and that of the step before, or -1 if the row begins here.
  RNNFAST_DEVICE int64_t output(const StepArguments& p, int64_t units, int64_t step) const {
    return (p.sequence.row(step, n) * p.D + d) * units + unit;
  }
  RNNFAST_DEVICE int64_t output_before(const StepArguments& p, int64_t units) const {
    const int64_t before = t - 1 + 2 * d;
    return before >= 0 && before < length ? output(p, units, before) : -1;
  }
};

template <class T>
RNNFAST_DEVICE T read(const void* p, int64_t i) {
  return static_cast<const T*>(p)[i];
}

template <class T>
RNNFAST_DEVICE void write(void* p, int64_t i, T value) {
  static_cast<T*>(p)[i] = value;
}

template <class Cell, class T>
__global__ void __launch_bounds__(kStepThreads) forward_step(const __grid_constant__ ForwardStep p) {
  using A = Sum<T>;
  using F = Real<A, sizeof(T) == 2>;
  constexpr int G = Cell::kGates, S = Cell::kSaved;
  const int64_t H = p.H;
  const Element e(p, H);
  if (!e.valid) return;
  const bool keeps = e.keeps(p);
  const int64_t row = e.d * p.sequence.R + e.row(p);
  F x[G], a[G], saved[S ? S : 1], h = 0, c = 0;
  if (keeps && p.y) h = A(read<T>(p.h, e.index));
  if (Cell::kHasCell && keeps) c = read<A>(p.c, e.index);
#pragma unroll
  for (int gate = 0; gate < G; gate++) {
    x[gate] = A(read<T>(p.x, row * G * H + gate * H + e.unit));
    A of_h = keeps ? A(read<T>(p.a, (e.d * p.sequence.N + e.n) * G * H + gate * H + e.unit)) : 0;
    if (p.b[e.d]) of_h += A(read<T>(p.b[e.d], gate * H + e.unit));
    a[gate] = of_h;
  }
  Cell::forward(x, a, h, c, saved);
  write(p.h, e.index, T(h.value));
  const int64_t out = e.output(p, H, e.t);
  if (p.y) write(p.y, out, T(h.value));
  if (Cell::kHasCell) write(p.c, e.index, c.value);
  if (Cell::kHasCell && p.cs) write(p.cs, out, c.value);
  if (S && p.gates) {
#pragma unroll
    for (int k = 0; k < S; k++) write(p.gates, row * S * H + k * H + e.unit, T(saved[k].value));
  }
}

template <class Cell, class T>
__global__ void __launch_bounds__(kStepThreads) backward_step(const __grid_constant__ BackwardStep p) {
  using A = Sum<T>;
  using F = Real<A, sizeof(T) == 2>;
  constexpr int G = Cell::kGates, S = Cell::kSaved, K = Cell::kGrads;
  const int64_t H = p.H;
  const Element e(p, H);
  if (!e.exists) return;
  const bool keeps = e.valid && e.keeps(p);
  A dh = read<T>(p.through, e.index);
  if (p.dh) dh += read<A>(p.dh, e.index);
  A direct = dh;
  F grads[K];
  if (e.valid) {
    const int64_t row = e.d * p.sequence.R + e.row(p), at = e.output(p, H, e.t), before = e.output_before(p, H);
    if (p.dy) dh += A(read<T>(p.dy, at));
    F saved[S ? S : 1], h = 0, old_h = 0, c = 0, old_c = 0, dc = 0;
#pragma unroll
    for (int k = 0; k < S; k++) saved[k] = A(read<T>(p.gates, row * S * H + k * H + e.unit));
    if (Cell::kNeedsH) h = A(read<T>(p.y, at));
    if (Cell::kNeedsOldH && keeps) {
      old_h = before >= 0 ? A(read<T>(p.y, before)) : p.h0 ? A(read<T>(p.h0, e.index)) : 0;
    }
    if (Cell::kHasCell) {
      c = read<A>(p.cs, at);
      dc = read<A>(p.dc, e.index);
      if (p.dcs) dc = dc + F(read<A>(p.dcs, at));
      if (keeps) old_c = before >= 0 ? read<A>(p.cs, before) : p.c0 ? A(read<T>(p.c0, e.index)) : 0;
    }
    direct = Cell::backward(saved, h, old_h, c, old_c, F(dh), dc, grads).value;
    if (!keeps) direct = 0;
    if (Cell::kHasCell) write(p.dc, e.index, keeps ? dc.value : A(0));
#pragma unroll
    for (int k = 0; k < K; k++) write(p.dgates, row * K * H + k * H + e.unit, T(grads[k].value));
  }
  if (p.dh) write(p.dh, e.index, direct);
#pragma unroll
  for (int gate = 0; gate < G; gate++) {
    write(p.da, (e.d * p.sequence.N + e.n) * G * H + gate * H + e.unit,
          keeps ? T(grads[Cell::hidden(gate)].value) : T(0));
  }
}

template <class T>
__global__ void __launch_bounds__(kStepThreads) project_forward(const __grid_constant__ ProjectForward p) {
  const Element e(p, p.P);
  if (!e.valid) return;
  const T h = read<T>(p.projected, e.index);
  write(p.h, e.index, h);
  write(p.y, e.output(p, p.P, e.t), h);
}

template <class T>
__global__ void __launch_bounds__(kStepThreads) project_backward(const __grid_constant__ ProjectBackward p) {
  using A = Sum<T>;
  const Element e(p, p.P);
  if (!e.exists) return;
  A dh = read<A>(p.dh, e.index) + A(read<T>(p.through, e.index));
  write(p.dh, e.index, e.valid ? A(0) : dh);
  if (e.valid && p.dy) dh += A(read<T>(p.dy, e.output(p, p.P, e.t)));
  const T d = e.valid ? T(dh) : T(0);
  write(p.dprojected, e.index, d);
  if (e.valid) write(p.dprojections, (e.d * p.sequence.R + e.row(p)) * p.P + e.unit, d);
}

template <class T>
__global__ void __launch_bounds__(kStepThreads) accumulate(const __grid_constant__ Accumulate p) {
  const int64_t i = thread_index();
  if (i < p.count) write(p.to, i, read<Sum<T>>(p.to, i) + Sum<T>(read<T>(p.from, i)));
}

// All steps at once: p.step is not read.
template <class T>
__global__ void __launch_bounds__(kStepThreads) states_before(const __grid_constant__ StatesBefore p) {
  StepArguments at = p;
  const int64_t state = p.D * p.sequence.N * p.P, index = thread_index();
  Element e(at, p.P);
  e.index = index % state, e.d = e.index / p.P / p.sequence.N, e.t = index / state;
  if (e.t >= p.sequence.T) return;
  e.length = p.sequence.length(e.n);
  e.valid = e.t < e.length;
  if (p.sequence.offsets && !e.valid) return;
  T h = 0;
  if (e.valid && e.keeps(p)) {
    const int64_t before = e.output_before(p, p.P);
    h = before >= 0 ? read<T>(p.y, before) : p.h0 ? read<T>(p.h0, e.index) : T(0);
  }
  write(p.out, (e.d * p.sequence.R + e.row(p)) * p.P + e.unit, h);
}

template <class T>
constexpr StepKernels kernels_of() {
#define RNNFAST_FORWARD(Cell) forward_step<Cell, T>,
#define RNNFAST_BACKWARD(Cell) backward_step<Cell, T>,
  return {{RNNFAST_CELLS(RNNFAST_FORWARD)},
          {RNNFAST_CELLS(RNNFAST_BACKWARD)},
          project_forward<T>,
          project_backward<T>,
          accumulate<T>,
          states_before<T>};
}

}  // namespace

const StepKernels step_kernels[4] = {kernels_of<float>(), kernels_of<double>(), kernels_of<BFloat16>(),
                                     kernels_of<Half>()};

}  // namespace rnnfast
