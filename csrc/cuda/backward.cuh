// The backward recurrence in one launch: the gate gradients of every step, and nothing else. Letters as in
// ../README.md.
//
// dh = W_hh^T da needs the columns of W_hh, so a block keeps those of its units: one tile of 16 for 16 units, over all
// G H gate rows. Where what lies:
//   registers      fragments of W_hh^T as far as they go; the sums of a step; dh, dc and c of the own elements; what
//                  was saved of the next step
//   shared memory  the rest of W_hh^T; da, the gradients at W_hh h, of this step and the next, [8 rows] of all gates
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
  bool wide;               // rows of all tensors begin at multiples of two values
  const void* dy;          // [R, D*H]; or null
  const float* dcs;        // [R, D*H]: of c after every step; or null
  const void* gates;       // [D, R, S*H]
  const void* y;           // [R, D*H]
  const float* cs;         // [R, D*H]
  const void* h0;          // [D, N, H]; or null
  const void* c0;          // [D, N, H]; or null
  const void* w[2];        // [G*H, H] of each direction: W_hh
  float* dh;               // [D, N, H]: of the final state on entry, of the initial one on return
  float* dc;               // [D, N, H]
  const void* w_units[2];  // [kUnitWeights*H] of each direction; or null
  void* dgates;            // [D, R, kColumns*H]
  uint64_t* words;         // of Grid
};

template <class Cell, class Math, class Exchange, int kBlocks>
__global__ void __launch_bounds__(kThreads<Cell, Exchange>, 1) backward(const __grid_constant__ BackwardArguments p) {
  using Stored = typename Math::Stored;
  using Number = Real<float, sizeof(Stored) == 2>;
  using Owner = Block<Exchange, kBlocks, false>;
  constexpr int G = Cell::kGates, S = Cell::kSaved, kColumns = Cell::kColumns;
  constexpr int kMine = Owner::kMine, kUnits = Owner::kUnits;
  const Geometry& g = p.geometry;
  const Owner block(g, p.sequence, p.first_group, sizeof(Stored), p.words, true);
  const Member& member = block.member;
  if (block.is_idle()) {
    Exchange::begin(g, member);
    return Exchange::end();
  }
  const int H = p.H, direction = block.direction, steps = block.steps, unit = block.unit;
  const int64_t R = p.sequence.R, N = p.sequence.N;

  const Stored* w = static_cast<const Stored*>(p.w[direction]);
  const int gate_units = g.gate_bytes / int(sizeof(Stored));
  const auto load_w = [&](int, int row, int k) {
    const int unit = block.first_unit + unit_of(row), of = (block.first_pair() * kPairBytes + k) / int(sizeof(Stored));
    const int gate = of / gate_units, from = of % gate_units;
    return gather<Stored>(
        [&](int j) { return unit < H && from + j < H ? w[(int64_t(gate) * H + from + j) * H + unit] : Stored(0); });
  };
  const Matrix<Math, 1, kKeptPairs<Cell, Math, Exchange, kBlocks, 1>> matrix(
      shared_memory() + g.matrix + block.warp * g.matrix_of_warp, block.share_pairs(), block.lane, load_w);

  // The thread's own: gradients at its states, c after the step in hand, and where its rows' data lie.
  const bool wide = p.wide, both = unit + 1 < H;
  float dh[kMine][kUnits], dc[kMine][kUnits], c[kMine][kUnits] = {};
  int length[kMine];
  bool exists[kMine];
#pragma unroll
  for (int r = 0; r < kMine; r++) {
    const int64_t n = block.batch(r);
    length[r] = unit < H ? block.length(r) : 0;
    exists[r] = block.owns(r) && n < N && unit < H;
#pragma unroll
    for (int w = 0; w < kUnits; w++) {
      const int64_t at = (direction * N + n) * H + unit + w;
      const bool inside = exists[r] && unit + w < H;
      dh[r][w] = inside ? p.dh[at] : 0;
      dc[r][w] = inside && Cell::kHasCell ? p.dc[at] : 0;
    }
  }
  // Where the thread's units of row r lie, in outputs [R, D*H] and in what is kept for each gate.
  const auto output_at = [&](int64_t begin, int r) {
    return ((begin + block.batch(0)) * p.D + direction) * H + unit + Owner::further(r) * (p.D * H);
  };
  const auto columns_at = [&](int count, int64_t begin, int r) {
    return (direction * R + begin + block.batch(0)) * (count * H) + unit + Owner::further(r) * (count * H);
  };
  // Where the s-th step begins; 0 for steps before the first one, of which nothing is read.
  const auto begin_of = [&](int s) { return s >= 0 ? p.sequence.begin(block.time(s)) : int64_t(0); };
  const auto is_valid = [&](int s, int64_t begin, int r) {
    return s >= 0 && block.time(s) < length[r] && p.sequence.has(begin, block.batch(r));
  };
  int64_t begin = begin_of(steps - 1), before = begin_of(steps - 2), first_begin = begin;
  if (Cell::kHasCell) {
#pragma unroll
    for (int r = 0; r < kMine; r++) {
      if (is_valid(steps - 1, first_begin, r)) read(c[r], p.cs + output_at(first_begin, r), wide, both);
    }
  }
  const UnitWeights<Cell, Number, kUnits> own(static_cast<const Stored*>(p.w_units[direction]), unit, H);
  sync_block();
  Exchange::begin(g, member);

  // What a step needs is read while the step after it is computed.
  struct Ahead {
    Stored saved[S ? S : 1][kUnits], h[kUnits], old_h[kUnits], dy[kUnits];
    float old_c[kUnits];
    bool valid, keeps;
  } ahead[kMine] = {};
  const auto initial = [&](auto& to, const void* states, int r) {
    const int64_t at = (direction * N + block.batch(r)) * H + unit;
#pragma unroll
    for (int w = 0; w < kUnits; w++) {
      to[w] = states && unit + w < H ? static_cast<const Stored*>(states)[at + w] : Stored(0);
    }
  };
  const auto load = [&](int s, int64_t begin, int64_t before) {
#pragma unroll
    for (int r = 0; r < kMine; r++) {
      Ahead& to = ahead[r];
      to.valid = is_valid(s, begin, r);
      to.keeps = to.valid && p.sequence.keeps(block.time(s), block.batch(r), length[r], direction);
      const bool has_before = is_valid(s - 1, before, r);
      if (Cell::kHasCell && exists[r]) {  // also before a row's first valid step, for the step done next
        if (has_before) {
          read(to.old_c, p.cs + output_at(before, r), wide, both);
        } else {
          initial(to.old_c, p.c0, r);
        }
      }
      if (!to.valid) continue;
      if (Cell::kNeedsOldH) {
        if (has_before) {
          read(to.old_h, static_cast<const Stored*>(p.y) + output_at(before, r), wide, both);
        } else {
          initial(to.old_h, p.h0, r);
        }
      }
      const Stored* saved = static_cast<const Stored*>(p.gates) + columns_at(S, begin, r);
#pragma unroll
      for (int k = 0; k < S; k++) read(to.saved[k], saved + k * H, wide, both);
      const int64_t at = output_at(begin, r);
      if (Cell::kNeedsH) read(to.h, static_cast<const Stored*>(p.y) + at, wide, both);
      if (p.dy) read(to.dy, static_cast<const Stored*>(p.dy) + at, wide, both);
    }
  };
  if (steps) load(steps - 1, begin, before);

#pragma unroll 1
  for (int done = 0; done <= steps; done++) {
    const int s = steps - 1 - done;
    const int64_t before_that = begin_of(s - 2);
    if (done) {
      Exchange::wait(g, member, done);
      float through[kMine][kUnits][1];
#pragma unroll
      for (int b = 0; b < kBlocks; b++) {
        float sum[1][4];
        matrix.product(sum, block.share(done, b), block.lane);
        block.template hand_over<1>(b, sum, through);
      }
      block.template collect<1>(through);
#pragma unroll
      for (int r = 0; r < kMine; r++) {
        if (!block.owns(r)) break;
#pragma unroll
        for (int w = 0; w < kUnits; w++) dh[r][w] += through[r][w][0];
      }
    }
    if (s < 0) break;

    Ahead now[kMine];
#pragma unroll
    for (int r = 0; r < kMine; r++) now[r] = ahead[r];
    if (s > 0) load(s - 1, before, before_that);

    float d[kMine][kUnits][kColumns];
#pragma unroll
    for (int r = 0; r < kMine; r++) {
      if (!block.owns(r)) break;
      Stored da[G][kUnits];
#pragma unroll
      for (int w = 0; w < kUnits; w++) {
        Number saved[S ? S : 1], grads[kColumns];
#pragma unroll
        for (int k = 0; k < S; k++) saved[k] = float(now[r].saved[k][w]);
        const bool keeps = now[r].keeps && (w == 0 || both);
        const float old_h = keeps ? float(now[r].old_h[w]) : 0, old_c = keeps ? now[r].old_c[w] : 0;
        Number new_dc = dc[r][w];
        if (Cell::kHasCell && p.dcs && now[r].valid && (w == 0 || both)) {
          new_dc = new_dc + p.dcs[output_at(begin, r) + w];
        }
        const Number direct = Cell::backward(saved, own[w], Number(float(now[r].h[w])), Number(old_h), Number(c[r][w]),
                                             Number(old_c), Number(dh[r][w] + float(now[r].dy[w])), new_dc, grads);
        if (Cell::kHasCell) c[r][w] = now[r].old_c[w];
#pragma unroll
        for (int k = 0; k < kColumns; k++) d[r][w][k] = grads[k].value;
        if (now[r].valid) {
          dh[r][w] = keeps ? direct.value : 0;
          if (Cell::kHasCell) dc[r][w] = keeps ? new_dc.value : 0;
        }
#pragma unroll
        for (int gate = 0; gate < G; gate++) {
          da[gate][w] = Math::operand(keeps ? float(Stored(grads[Cell::hidden(gate)].value)) : 0);
        }
      }
#pragma unroll
      for (int gate = 0; gate < G; gate++) {
        write(block.template vector<Stored>(done + 1, r, gate), da[gate], true, true);
      }
    }
    sync_block();
    Exchange::send(g, member, done + 1);

#pragma unroll
    for (int r = 0; r < kMine; r++) {
      if (!now[r].valid) continue;
      Stored* to = static_cast<Stored*>(p.dgates) + columns_at(kColumns, begin, r);
#pragma unroll
      for (int k = 0; k < kColumns; k++) {
        Stored values[kUnits];
#pragma unroll
        for (int w = 0; w < kUnits; w++) values[w] = Stored(d[r][w][k]);
        write(to + k * H, values, wide, both);
      }
    }
    begin = before, before = before_that;
  }

#pragma unroll
  for (int r = 0; r < kMine; r++) {
#pragma unroll
    for (int w = 0; w < kUnits; w++) {
      const int64_t at = (direction * N + block.batch(r)) * H + unit + w;
      if (!exists[r] || unit + w >= H) continue;
      p.dh[at] = dh[r][w];
      if (Cell::kHasCell) p.dc[at] = dc[r][w];
    }
  }
  Exchange::end();
}

}  // namespace rnnfast
