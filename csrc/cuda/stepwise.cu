// The kernels between the products of steps, an element of a state a thread, and those that arrange what a step in one
// launch reads.
#include "block.cuh"
#include "element.cuh"
#include "kernels.h"

namespace rnnfast {
namespace {

RNNFAST_DEVICE int64_t thread_index() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }

// The thread's own.
RNNFAST_DEVICE Element element(const StepArguments& p, int64_t units) {
  const int64_t i = thread_index();
  return {p, units, i % units, i / units % p.sequence.N, i / units / p.sequence.N};
}

template <class Cell, class Stored>
__global__ void __launch_bounds__(kStepThreads) forward_step(const __grid_constant__ ForwardStep p) {
  ForwardElement<Cell, Stored> of;
  of.load(p, element(p, p.H));
  if (!of.at.valid) return;
  const int64_t first = (of.at.d * p.sequence.N + of.at.n) * Cell::kGates * p.H + of.at.unit;
  of.finish(p, [&](int gate) { return read<Stored>(p.a, first + gate * p.H); });
}

template <class Cell, class Stored>
__global__ void __launch_bounds__(kStepThreads) backward_step(const __grid_constant__ BackwardStep p) {
  BackwardElement<Cell, Stored> of;
  of.load(p, element(p, p.H));
  if (!of.at.exists) return;
  const int64_t first = (of.at.d * p.sequence.N + of.at.n) * Cell::kGates * p.H + of.at.unit;
  of.finish(p, read<Stored>(p.through, of.at.index), [&](int gate, Stored d) { write(p.da, first + gate * p.H, d); });
}

template <class Stored>
__global__ void __launch_bounds__(kStepThreads) project_forward(const __grid_constant__ ProjectForward p) {
  const Element e = element(p, p.P);
  if (!e.valid) return;
  const Stored h = read<Stored>(p.projected, e.index);
  write(p.h, e.index, h);
  write(p.y, e.output(p, p.P, e.row(p)), h);
}

template <class Stored>
__global__ void __launch_bounds__(kStepThreads) project_backward(const __grid_constant__ ProjectBackward p) {
  using Sum = SumOf<Stored>;
  const Element e = element(p, p.P);
  if (!e.exists) return;
  Sum dh = read<Sum>(p.dh, e.index) + Sum(read<Stored>(p.through, e.index));
  write(p.dh, e.index, e.valid ? Sum(0) : dh);
  if (e.valid && p.dy) dh += Sum(read<Stored>(p.dy, e.output(p, p.P, e.row(p))));
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
  const int64_t state = p.D * p.sequence.N * p.P, index = thread_index();
  Element e = element(p, p.P);
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

template <class Math>
__global__ void __launch_bounds__(kStepThreads) arrange_matrix(const __grid_constant__ ArrangeMatrix p) {
  using Stored = typename Math::Stored;
  const int64_t i = thread_index(), fragment = i / (2 * kWarp), tile = fragment / p.M / p.pairs;
  if (tile >= p.tiles) return;
  const int lane = i % kWarp, row = lane / 4 + i / kWarp % 2 * 8;
  const int of = (fragment / p.M % p.pairs * kPairBytes + lane % 4 * kLaneBytes) / int(sizeof(Stored));
  const int gate_units = p.gate_bytes / int(sizeof(Stored));
  const int64_t unit = tile * kTile + unit_of(row), gate = fragment % p.M + of / gate_units, from = of % gate_units;
  const Stored* w = static_cast<const Stored*>(p.w) + gate * p.H * p.H + unit * p.unit_stride;
  const uint4 values = gather<Stored>([&](int j) {
    const bool inside = unit < p.H && from + j < p.H;
    return inside ? Math::operand(typename Math::Sum(w[(from + j) * p.depth_stride])) : Stored(0);
  });
  write(p.matrix, i, values);
}

template <class Math>
__global__ void __launch_bounds__(kStepThreads) arrange_state(const __grid_constant__ ArrangeState p) {
  using Stored = typename Math::Stored;
  const int64_t i = thread_index(), d = i / p.H / p.N;
  if (d >= p.D) return;
  const int64_t at = place_of(p.pairs, p.row_blocks, d, i / p.H % p.N, int(i % p.H) * int(sizeof(Stored)));
  const Stored value = Math::operand(typename Math::Sum(read<Stored>(p.h, i)));
#pragma unroll
  for (int turn = 0; turn < 2; turn++) write(static_cast<char*>(p.vectors[turn]) + at, 0, value);
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

#define RNNFAST_ARRANGE(...) {arrange_matrix<__VA_ARGS__>, arrange_state<__VA_ARGS__>},
const ArrangeKernels arrange_kernels[] = {RNNFAST_MATHS(RNNFAST_ARRANGE)};

}  // namespace rnnfast
