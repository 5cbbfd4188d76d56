// The forward recurrence in one launch, W_hh on the chip from the first step to the last. Letters as in ../README.md.
//
// A block keeps the gate rows of its units: G tiles of 16 rows for every 16 units, so that all gates of a unit end up
// in one thread. Where what lies:
//   registers      fragments of W_hh as far as they go; the sums of a step; h and c of the own elements; the input
//                  gates of the next step
//   shared memory  the rest of W_hh; h of this step and the next, [8 rows] of all units
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
  bool wide;               // rows of all tensors begin at multiples of two values
  const void* x;           // [D, R, G*H]: W_ih x + b_ih
  const void* w[2];        // [G*H, H] of each direction: W_hh
  const void* b[2];        // [G*H]: b_hh; or null
  const void* w_units[2];  // [kUnitWeights*H]; or null
  const void* h0;          // [D, N, H]
  void* h_n;               // [D, N, H]
  float* c;                // [D, N, H]: before on entry, after on return
  void* y;                 // [R, D*H]
  float* cs;               // [R, D*H]: c after every step; or null
  void* gates;             // [D, R, S*H]; or null. May be x where S is G
  uint64_t* words;         // of Grid
};

template <class Cell, class Math, class Exchange, int kBlocks>
__global__ void __launch_bounds__(kThreads<Cell, Exchange>, 1) forward(const __grid_constant__ ForwardArguments p) {
  using Stored = typename Math::Stored;
  using Number = Real<float, sizeof(Stored) == 2>;
  constexpr bool kMixed = kMixesGates<Cell, Exchange>;
  using Owner = Block<Exchange, kBlocks, kMixed>;
  constexpr int G = Cell::kGates, S = Cell::kSaved, kMine = Owner::kMine, kUnits = Owner::kUnits, M = kMixed ? 1 : G;
  const Geometry& g = p.geometry;
  const Owner block(g, p.sequence, p.first_group, sizeof(Stored), p.words, false);
  const Member& member = block.member;
  if (block.is_idle()) {
    Exchange::begin(g, member);
    return Exchange::end();
  }
  const int H = p.H, direction = block.direction, steps = block.steps, unit = block.unit;
  const int64_t R = p.sequence.R, N = p.sequence.N;

  const Stored* w = static_cast<const Stored*>(p.w[direction]);
  constexpr int kLane = kLaneBytes / sizeof(Stored);
  const bool aligned = H % kLane == 0 && reinterpret_cast<uintptr_t>(w) % kLaneBytes == 0;
  const auto load_w = [&](int m, int row, int k) {
    const int gate = kMixed ? block.mixed_gate(row) : m;
    const int unit = kMixed ? block.mixed_unit(row) : block.first_unit + unit_of(row);
    const int column = (block.first_pair() * kPairBytes + k) / int(sizeof(Stored));
    if (gate >= G || unit >= H || column >= H) return make_uint4(0, 0, 0, 0);
    const Stored* from = w + (int64_t(gate) * H + unit) * H + column;
    if (aligned) return *reinterpret_cast<const uint4*>(from);
    return gather<Stored>([&](int j) { return column + j < H ? from[j] : Stored(0); });
  };
  const Matrix<Math, M, kKeptPairs<Cell, Math, Exchange, kBlocks, M>> matrix(
      shared_memory() + g.matrix + block.warp * g.matrix_of_warp, block.share_pairs(), block.lane, load_w);

  const Stored* h0 = static_cast<const Stored*>(p.h0) + (direction * N + block.first_row) * H;
  const int rows = int(N - block.first_row < kBlocks * kRows ? N - block.first_row : kBlocks * kRows);
#pragma unroll 1
  for (int n = 0; n < rows; n++, h0 += H) {
    char* vectors = member.at(g, 0) + n / kRows * g.vector_bytes;
#pragma unroll 4
    for (int i = member.thread; i < H; i += blockDim.x) {
      *reinterpret_cast<Stored*>(vectors + place(n % kRows, i * int(sizeof(Stored)))) = Math::operand(float(h0[i]));
    }
  }

  // The thread's own: its units' biases and states, and where its rows' data lie.
  const bool wide = p.wide, both = unit + 1 < H;
  float bias[G][kUnits], h[kMine][kUnits], c[kMine][kUnits];
  int length[kMine];             // 0 where there is nothing to compute
  int64_t x_at, y_at, gates_at;  // of the first row
#pragma unroll
  for (int w = 0; w < kUnits; w++) {
    const Stored* b = static_cast<const Stored*>(p.b[direction]);
#pragma unroll
    for (int gate = 0; gate < G; gate++) bias[gate][w] = b && unit + w < H ? float(b[gate * H + unit + w]) : 0;
  }
#pragma unroll
  for (int r = 0; r < kMine; r++) {
    const int64_t n = block.batch(r);
    length[r] = unit < H ? block.length(r) : 0;
#pragma unroll
    for (int w = 0; w < kUnits; w++) {
      const int64_t at = (direction * N + n) * H + unit + w;
      const bool inside = block.owns(r) && n < N && unit + w < H;
      h[r][w] = inside ? float(static_cast<const Stored*>(p.h0)[at]) : 0;
      c[r][w] = inside && Cell::kHasCell ? p.c[at] : 0;
    }
  }
  const UnitWeights<Cell, Number, kUnits> own(static_cast<const Stored*>(p.w_units[direction]), unit, H);
  sync_block();
  Exchange::begin(g, member);

  Stored x_ahead[kMine][G][kUnits] = {};
  bool valid_ahead[kMine], keeps_ahead[kMine];
  const auto load_x = [&](int t, int64_t begin) {
#pragma unroll
    for (int r = 0; r < kMine; r++) {
      const int64_t n = block.batch(r);
      valid_ahead[r] = t < length[r] && p.sequence.has(begin, n);
      keeps_ahead[r] = valid_ahead[r] && p.sequence.keeps(t, n, length[r], direction);
      if (!valid_ahead[r]) continue;
      const Stored* from = static_cast<const Stored*>(p.x) + x_at + Owner::further(r) * (G * H);
#pragma unroll
      for (int gate = 0; gate < G; gate++) read(x_ahead[r][gate], from + gate * H, wide, both);
    }
  };
  int64_t begin = 0;
  if (steps) begin = p.sequence.begin(block.time(0));
  const int64_t row = begin + block.batch(0);
  x_at = (direction * R + row) * (G * H) + unit;
  y_at = (row * p.D + direction) * H + unit;
  gates_at = (direction * R + row) * (S * H) + unit;
  if (steps) load_x(block.time(0), begin);

#pragma unroll 1
  for (int s = 0; s < steps; s++) {
    const bool more = s + 1 < steps;
    const int64_t next = more ? p.sequence.begin(block.time(s + 1)) : begin;

    Exchange::wait(g, member, s);
    float a[kMine][kUnits][G];
#pragma unroll
    for (int b = 0; b < kBlocks; b++) {
      float sum[M][4];
      matrix.product(sum, block.share(s, b), block.lane);
      if constexpr (kMixed) {
        block.template swap_gates<G>(b, sum, a);
      } else {
        block.template hand_over<G>(b, sum, a);
      }
    }
    if constexpr (!kMixed) block.template collect<G>(a);

    Number x[kMine][kUnits][G];
    bool valid[kMine], keeps[kMine];
#pragma unroll
    for (int r = 0; r < kMine; r++) {
      valid[r] = valid_ahead[r], keeps[r] = keeps_ahead[r];
#pragma unroll
      for (int gate = 0; gate < G; gate++) {
#pragma unroll
        for (int w = 0; w < kUnits; w++) x[r][w][gate] = float(x_ahead[r][gate][w]);
      }
    }
    x_at += (next - begin) * (G * H);
    if (more) load_x(block.time(s + 1), next);

    Number saved[kMine][kUnits][S ? S : 1];
#pragma unroll
    for (int r = 0; r < kMine; r++) {
      if (!block.owns(r)) break;
      Stored operands[kUnits];
#pragma unroll
      for (int w = 0; w < kUnits; w++) {
        Number of_h[G], new_h = h[r][w], new_c = c[r][w];
#pragma unroll
        for (int gate = 0; gate < G; gate++) of_h[gate] = a[r][w][gate];
        if (p.sequence.resets && !keeps[r]) {
          new_h = new_c = 0;
#pragma unroll
          for (int gate = 0; gate < G; gate++) of_h[gate] = 0;
        }
#pragma unroll
        for (int gate = 0; gate < G; gate++) of_h[gate] = of_h[gate] + bias[gate][w];
        Cell::forward(x[r][w], of_h, own[w], new_h, new_c, saved[r][w]);
        if (valid[r] && (w == 0 || both)) {
          h[r][w] = float(Stored(new_h.value));
          if (Cell::kHasCell) c[r][w] = new_c.value;
        }
        operands[w] = Math::operand(h[r][w]);
      }
      write(block.template vector<Stored>(s + 1, r, 0), operands, true, true);
    }
    sync_block();
    if (more) Exchange::send(g, member, s + 1);

#pragma unroll
    for (int r = 0; r < kMine; r++) {
      if (valid[r]) {
        Stored values[kUnits];
#pragma unroll
        for (int w = 0; w < kUnits; w++) values[w] = Stored(h[r][w]);
        const int64_t at = y_at + Owner::further(r) * (p.D * H);
        write(static_cast<Stored*>(p.y) + at, values, wide, both);
        if (Cell::kHasCell && p.cs) write(p.cs + at, c[r], wide, both);
        if (S && p.gates) {
          Stored* to = static_cast<Stored*>(p.gates) + gates_at + Owner::further(r) * (S * H);
#pragma unroll
          for (int k = 0; k < S; k++) {
#pragma unroll
            for (int w = 0; w < kUnits; w++) values[w] = Stored(saved[r][w][k].value);
            write(to + k * H, values, wide, both);
          }
        }
      }
    }
    y_at += (next - begin) * (p.D * H), gates_at += (next - begin) * (S * H);
    begin = next;
  }

#pragma unroll
  for (int r = 0; r < kMine; r++) {
#pragma unroll
    for (int w = 0; w < kUnits; w++) {
      const int64_t n = block.batch(r), at = (direction * N + n) * H + unit + w;
      if (!block.owns(r) || n >= N || unit + w >= H) continue;
      static_cast<Stored*>(p.h_n)[at] = Stored(h[r][w]);
      if (Cell::kHasCell) p.c[at] = c[r][w];
    }
  }
  Exchange::end();
}

}  // namespace rnnfast
