// The forward recurrence in one launch, W_hh on the chip from the first step to the last.
//
//   T steps, N batch, R rows of the sequence, H units, D directions, G gates, S saved tensors
//
// A block keeps the gate rows of its units: G tiles of 16 rows for every 16 units, so that all gates of a unit end up
// in one thread. Where what lies:
//   registers      fragments of W_hh as far as they go; the sums of a step; the input gates of the next one
//   shared memory  the rest of W_hh; h of this step and the next, [8 rows] of all units; h and c of the own elements
//   L2             h on its way to other blocks (Grid only)
// Floors of a step of a block with U units and 8 rows: G U H multiply-adds a row, at 1024 (16 bit) or 512 (TF32) a
// cycle; the bytes of W_hh beyond the registers and of h, H values a row, at 128 bytes a cycle; of memory 8 rows (G +
// 1) U values, when training (G + 1 + S) U and c. At 8 rows none of them is near a microsecond: the latency of the
// chain is what counts.
#pragma once

#include "block.cuh"
#include "real.cuh"

namespace rnnfast {

struct ForwardArguments {
  Sequence sequence;
  Geometry geometry;
  int first_group, H, D;
  const void* x;     // [D, R, G*H]: W_ih x + b_ih
  const void* w[2];  // [G*H, H] of each direction: W_hh
  const void* b[2];  // [G*H]: b_hh; or null
  const void* h0;    // [D, N, H]
  void* h_n;         // [D, N, H]
  float* c;          // [D, N, H]: before on entry, after on return
  void* y;           // [R, D*H]
  float* cs;         // [R, D*H]: c after every step; or null
  void* gates;       // [D, R, S*H]; or null. An LSTM's may be x
  uint64_t* words;   // of Grid
};

template <class Cell, class P, class Exchange>
__global__ void __launch_bounds__(kThreads<Cell, Exchange>, 1) forward(const __grid_constant__ ForwardArguments p) {
  using T = typename P::Value;
  using F = Real<float, sizeof(T) == 2>;
  using Owner = Block<Exchange>;
  constexpr int G = Cell::kGates, S = Cell::kSaved, K = Owner::kOwned;
  constexpr int kH = 0, kC = 1;  // states
  const Geometry& g = p.geometry;
  const Owner block(g, p.sequence, p.first_group, sizeof(T), p.words, false);
  const Member& member = block.member;
  if (block.is_idle()) {
    Exchange::begin(g, member);
    return Exchange::end();
  }
  const int H = p.H, direction = block.direction;
  const int64_t R = p.sequence.R, N = p.sequence.N;

  const T* w = static_cast<const T*>(p.w[direction]);
  constexpr int kLane = kLaneBytes / sizeof(T);
  const bool aligned = H % kLane == 0 && reinterpret_cast<uintptr_t>(w) % kLaneBytes == 0;
  const auto load_w = [&](int gate, int row, int k) {
    const int unit = block.first_unit + row, column = (block.split * g.pairs * kPairBytes + k) / int(sizeof(T));
    if (unit >= H || column >= H) return make_uint4(0, 0, 0, 0);
    const T* from = w + (int64_t(gate) * H + unit) * H + column;
    if (aligned) return *reinterpret_cast<const uint4*>(from);
    return gather<T>([&](int j) { return column + j < H ? from[j] : T(0); });
  };
  const Matrix<P, G, kKeptPairs<Cell, P, Exchange, G>> matrix(
      shared_memory() + g.matrix + block.warp * g.matrix_of_warp, block.share_pairs(), block.lane, load_w);

  float* bias = reinterpret_cast<float*>(shared_memory() + g.biases);  // [G][units of the block]
  const int units = g.tiles * kTile, first_unit = member.rank * units;
#pragma unroll 1
  for (int i = threadIdx.x; i < G * units; i += blockDim.x) {
    const int unit = first_unit + i % units;
    const T* b = static_cast<const T*>(p.b[direction]);
    bias[i] = b && unit < H ? float(b[i / units * H + unit]) : 0;
  }
  const T* h0 = static_cast<const T*>(p.h0) + (direction * N + block.first_row) * H;
  const int rows = int(N - block.first_row < g.row_blocks * kRows ? N - block.first_row : g.row_blocks * kRows);
#pragma unroll 1
  for (int n = 0; n < rows; n++, h0 += H) {
    char* vectors = member.at(g, 0, n / kRows);
#pragma unroll 4
    for (int unit = threadIdx.x; unit < H; unit += blockDim.x) {
      *reinterpret_cast<T*>(vectors + place(n % kRows, unit * int(sizeof(T)))) = P::operand(float(h0[unit]));
    }
  }
#pragma unroll 1
  for (int b = 0; b < g.row_blocks; b++) {
#pragma unroll
    for (int i = 0; i < K; i++) {
      const int64_t n = block.batch(b, i), at = (direction * N + n) * H + block.unit(i);
      const bool inside = n < N && block.unit(i) < H;
      block.state(kH, b, i) = inside ? float(static_cast<const T*>(p.h0)[at]) : 0;
      if (Cell::kHasCell) block.state(kC, b, i) = inside ? p.c[at] : 0;
    }
  }
  sync_block();
  Exchange::begin(g, member);

  T x_ahead[G][K];
  bool keeps_ahead[K];
  const auto load_x = [&](int s, int b) {
    const int t = block.time(s);
#pragma unroll
    for (int i = 0; i < K; i++) {
      const int64_t n = block.batch(b, i);
      const bool inside = t < block.length(b, i) && block.unit(i) < H;
      keeps_ahead[i] = inside && p.sequence.keeps(t, n, block.length(b, i), direction);
      const T* from = static_cast<const T*>(p.x);
      if (inside) from += (direction * R + p.sequence.row(t, n)) * (G * H) + block.unit(i);
#pragma unroll
      for (int gate = 0; gate < G; gate++) x_ahead[gate][i] = inside ? from[gate * H] : T(0);
    }
  };
  if (block.steps) load_x(0, 0);

#pragma unroll 1
  for (int s = 0; s < block.steps; s++) {
    const int t = block.time(s);
#pragma unroll 1
    for (int b = 0; b < g.row_blocks; b++) {
      Exchange::wait(g, member, s, b);
      float sum[G][4], a[G][K];
      matrix.product(sum, block.share(s, b), block.lane);
      block.own(sum, a);

      F x[G][K];
      bool keeps[K];
#pragma unroll
      for (int i = 0; i < K; i++) {
        keeps[i] = keeps_ahead[i];
#pragma unroll
        for (int gate = 0; gate < G; gate++) x[gate][i] = float(x_ahead[gate][i]);
      }
      const bool last = b + 1 == g.row_blocks;
      if (s + last < block.steps) load_x(s + last, last ? 0 : b + 1);

      float h[K], c[K];
      F saved[K][S ? S : 1];
#pragma unroll
      for (int i = 0; i < K; i++) {
        const int unit = block.unit(i);
        F of_x[G], of_h[G], new_h = keeps[i] ? block.state(kH, b, i) : 0, new_c = 0;
        if (Cell::kHasCell && keeps[i]) new_c = block.state(kC, b, i);
#pragma unroll
        for (int gate = 0; gate < G; gate++) {
          of_x[gate] = x[gate][i];
          of_h[gate] = (keeps[i] ? a[gate][i] : 0) + bias[gate * units + unit - first_unit];
        }
        Cell::forward(of_x, of_h, new_h, new_c, saved[i]);
        h[i] = float(T(new_h.value)), c[i] = new_c.value;
        if (t < block.length(b, i) && unit < H) {
          block.state(kH, b, i) = h[i];
          if (Cell::kHasCell) block.state(kC, b, i) = c[i];
        }
        block.template vector<T>(s + 1, b, i, 0) = P::operand(block.state(kH, b, i));
      }
      sync_block();
      if (s + 1 < block.steps) Exchange::send(g, member, s + 1, b);

#pragma unroll
      for (int i = 0; i < K; i++) {
        const int unit = block.unit(i);
        if (t >= block.length(b, i) || unit >= H) continue;
        const int64_t row = p.sequence.row(t, block.batch(b, i)), at = (row * p.D + direction) * H + unit;
        static_cast<T*>(p.y)[at] = T(h[i]);
        if (Cell::kHasCell && p.cs) p.cs[at] = c[i];
        if (S && p.gates) {
          T* to = static_cast<T*>(p.gates) + (direction * R + row) * (S * H) + unit;
#pragma unroll
          for (int k = 0; k < S; k++) to[k * H] = T(saved[i][k].value);
        }
      }
    }
  }

#pragma unroll 1
  for (int b = 0; b < g.row_blocks; b++) {
#pragma unroll
    for (int i = 0; i < K; i++) {
      const int64_t n = block.batch(b, i), at = (direction * N + n) * H + block.unit(i);
      if (n >= N || block.unit(i) >= H) continue;
      static_cast<T*>(p.h_n)[at] = T(block.state(kH, b, i));
      if (Cell::kHasCell) p.c[at] = block.state(kC, b, i);
    }
  }
  Exchange::end();
}

}  // namespace rnnfast
