// The backward recurrence in one launch: the gate gradients of every step, and nothing else.
//
//   T steps, N batch, R rows of the sequence, H units, D directions, G gates, S saved tensors, K gradients
//
// dh = W_hh^T da needs the columns of W_hh, so a block keeps those of its units: one tile of 16 for 16 units, over all
// G H gate rows. Where what lies:
//   registers      fragments of W_hh^T as far as they go; the sums of a step; what was saved of the next one
//   shared memory  the rest of W_hh^T; da, the gradients at W_hh h, of this step and the next, [8 rows] of all gates
//                  (dh, dc and c of the own elements, too)
//   L2             da on its way to other blocks (Grid only)
// Floors of a step of a block with U units and 8 rows: the multiply-adds and the bytes of W_hh are those of the
// forward; G H values of da a row are read, and G U are sent to each of the others, both G times the forward's.
#pragma once

#include "block.cuh"
#include "real.cuh"

namespace rnnfast {

struct BackwardArguments {
  Sequence sequence;
  Geometry geometry;
  int first_group, H, D;
  const void* dy;     // [R, D*H]; or null
  const float* dcs;   // [R, D*H]: of c after every step; or null
  const void* gates;  // [D, R, S*H]
  const void* y;      // [R, D*H]
  const float* cs;    // [R, D*H]
  const void* h0;     // [D, N, H]; or null
  const void* c0;     // [D, N, H]; or null
  const void* w[2];   // [G*H, H] of each direction: W_hh
  float* dh;          // [D, N, H]: of the final state on entry, of the initial one on return
  float* dc;          // [D, N, H]
  void* dgates;       // [D, R, K*H]
  uint64_t* words;    // of Grid
};

template <class Cell, class P, class Exchange>
__global__ void __launch_bounds__(kThreads<Cell, Exchange>, 1) backward(const __grid_constant__ BackwardArguments p) {
  using T = typename P::Value;
  using F = Real<float, sizeof(T) == 2>;
  using Owner = Block<Exchange>;
  constexpr int G = Cell::kGates, S = Cell::kSaved, K = Owner::kOwned, kGrads = Cell::kGrads;
  constexpr int kDh = 0, kDc = 1, kC = 2;  // states
  const Geometry& g = p.geometry;
  const Owner block(g, p.sequence, p.first_group, sizeof(T), p.words, true);
  const Member& member = block.member;
  if (block.is_idle()) {
    Exchange::begin(g, member);
    return Exchange::end();
  }
  const int H = p.H, direction = block.direction, steps = block.steps;
  const int64_t R = p.sequence.R, N = p.sequence.N;

  const T* w = static_cast<const T*>(p.w[direction]);
  const int gate_units = g.gate_bytes / int(sizeof(T));
  const auto load_w = [&](int, int row, int k) {
    const int unit = block.first_unit + row, of = (block.split * g.pairs * kPairBytes + k) / int(sizeof(T));
    const int gate = of / gate_units, from = of % gate_units;
    return gather<T>(
        [&](int j) { return unit < H && from + j < H ? w[(int64_t(gate) * H + from + j) * H + unit] : T(0); });
  };
  const Matrix<P, 1, kKeptPairs<Cell, P, Exchange, 1>> matrix(
      shared_memory() + g.matrix + block.warp * g.matrix_of_warp, block.share_pairs(), block.lane, load_w);

  // Of step s and row n: where a state of it lies; and that of the state before it, or -1: then it is the initial one.
  const auto place_of = [&](int t, int64_t n) { return (p.sequence.row(t, n) * p.D + direction) * H; };
  const auto place_before = [&](int t, int64_t n, int length) {
    const int before = t - 1 + 2 * direction;
    return before >= 0 && before < length ? place_of(before, n) : int64_t(-1);
  };

#pragma unroll 1
  for (int b = 0; b < g.row_blocks; b++) {
#pragma unroll
    for (int i = 0; i < K; i++) {
      const int64_t n = block.batch(b, i), at = (direction * N + n) * H + block.unit(i);
      const bool inside = n < N && block.unit(i) < H;
      block.state(kDh, b, i) = inside ? p.dh[at] : 0;
      if (Cell::kHasCell) {
        const int last = block.time(steps - 1);
        block.state(kDc, b, i) = inside ? p.dc[at] : 0;
        const bool valid = inside && steps > 0 && last < block.length(b, i);
        block.state(kC, b, i) = valid ? p.cs[place_of(last, n) + block.unit(i)] : 0;
      }
    }
  }
  sync_block();
  Exchange::begin(g, member);

  struct Ahead {
    T saved[S ? S : 1], h, old_h, dy;
    float old_c;
    bool valid, keeps;
  } ahead[K];
  const auto load = [&](int s, int b) {
    const int t = block.time(s);
#pragma unroll
    for (int i = 0; i < K; i++) {
      const int64_t n = block.batch(b, i);
      const int length = block.length(b, i), unit = block.unit(i);
      Ahead& to = ahead[i];
      to = {};
      to.valid = t < length && unit < H;
      to.keeps = to.valid && p.sequence.keeps(t, n, length, direction);
      if (!to.valid && !(Cell::kHasCell && unit < H && n < N)) continue;
      const int64_t before = place_before(t, n, length), initial = (direction * N + n) * H + unit;
      if (Cell::kHasCell) {  // also before a row's first valid step, for the step done next
        to.old_c = before >= 0 ? p.cs[before + unit] : p.c0 ? float(static_cast<const T*>(p.c0)[initial]) : 0;
      }
      if (!to.valid) continue;
      if (Cell::kNeedsOldH) {
        to.old_h = before >= 0 ? static_cast<const T*>(p.y)[before + unit]
                   : p.h0      ? static_cast<const T*>(p.h0)[initial]
                               : T(0);
      }
      const int64_t row = p.sequence.row(t, n), at = (row * p.D + direction) * H + unit;
      const T* saved = static_cast<const T*>(p.gates) + (direction * R + row) * (S * H) + unit;
#pragma unroll
      for (int k = 0; k < S; k++) to.saved[k] = saved[k * H];
      if (Cell::kNeedsH) to.h = static_cast<const T*>(p.y)[at];
      if (p.dy) to.dy = static_cast<const T*>(p.dy)[at];
    }
  };
  if (steps) load(steps - 1, 0);

#pragma unroll 1
  for (int done = 0; done <= steps; done++) {
    const int s = steps - 1 - done, t = block.time(s);
#pragma unroll 1
    for (int b = 0; b < g.row_blocks; b++) {
      if (done) {
        Exchange::wait(g, member, done, b);
        float sum[1][4], through[1][K];
        matrix.product(sum, block.share(done, b), block.lane);
        block.own(sum, through);
#pragma unroll
        for (int i = 0; i < K; i++) block.state(kDh, b, i) += through[0][i];
      }
      if (s < 0) {
        sync_block();  // the next row block's sums go where these are read
        continue;
      }

      Ahead now[K];
#pragma unroll
      for (int i = 0; i < K; i++) now[i] = ahead[i];
      const bool last = b + 1 == g.row_blocks;
      if (s - last >= 0) load(s - last, last ? 0 : b + 1);

      float d[K][kGrads];
#pragma unroll
      for (int i = 0; i < K; i++) {
        F saved[S ? S : 1], grads[kGrads];
#pragma unroll
        for (int k = 0; k < S; k++) saved[k] = float(now[i].saved[k]);
        const float h = float(now[i].h), old_h = now[i].keeps ? float(now[i].old_h) : 0;
        F dh = block.state(kDh, b, i) + float(now[i].dy), c = 0, old_c = 0, dc = 0;
        if (Cell::kHasCell) {
          c = block.state(kC, b, i);
          old_c = now[i].keeps ? now[i].old_c : 0;
          dc = block.state(kDc, b, i);
          if (p.dcs && now[i].valid) dc = dc + p.dcs[place_of(t, block.batch(b, i)) + block.unit(i)];
          block.state(kC, b, i) = now[i].old_c;
        }
        const F direct = Cell::backward(saved, F(h), F(old_h), c, old_c, dh, dc, grads);
#pragma unroll
        for (int k = 0; k < kGrads; k++) d[i][k] = grads[k].value;
        if (now[i].valid) {
          block.state(kDh, b, i) = now[i].keeps ? direct.value : 0;
          if (Cell::kHasCell) block.state(kDc, b, i) = now[i].keeps ? dc.value : 0;
        }
#pragma unroll
        for (int gate = 0; gate < G; gate++) {
          const float da = now[i].keeps ? float(T(d[i][Cell::hidden(gate)])) : 0;
          block.template vector<T>(done + 1, b, i, gate) = P::operand(da);
        }
      }
      sync_block();
      Exchange::send(g, member, done + 1, b);

#pragma unroll
      for (int i = 0; i < K; i++) {
        if (!now[i].valid) continue;
        const int64_t row = p.sequence.row(t, block.batch(b, i));
        T* to = static_cast<T*>(p.dgates) + (direction * R + row) * (kGrads * H) + block.unit(i);
#pragma unroll
        for (int k = 0; k < kGrads; k++) to[k * H] = T(d[i][k]);
      }
    }
  }

#pragma unroll 1
  for (int b = 0; b < g.row_blocks; b++) {
#pragma unroll
    for (int i = 0; i < K; i++) {
      const int64_t n = block.batch(b, i), at = (direction * N + n) * H + block.unit(i);
      if (n >= N || block.unit(i) >= H) continue;
      p.dh[at] = block.state(kDh, b, i);
      if (Cell::kHasCell) p.dc[at] = block.state(kDc, b, i);
    }
  }
  Exchange::end();
}

}  // namespace rnnfast
