// What a block of a persistent kernel owns: 8 or more batch rows of one direction, and some tiles of hidden units.
#pragma once

#include <cstring>

#include "../cells.h"
#include "exchange.cuh"
#include "sequence.cuh"

namespace rnnfast {

// Threads of a block at most, and registers of each that hold the matrix. Of a multiprocessor's 64 K registers each of
// 256 threads gets 255, each of 512 gets 128; beside the matrix the kernels need 50 to 120.
template <class Cell, class Exchange>
constexpr int kThreads =
    std::is_same<Exchange, Local<4>>::value || (Cell::kGates == 1 && std::is_same<Exchange, Local<1>>::value) ? 512
                                                                                                              : 256;
template <class Cell, class Math, class Exchange, int kBlocks, int M>
constexpr int matrix_registers() {
  if (std::is_same<Exchange, Local<4>>::value) return Math::kParts > 1 ? 48 : 32;
  if (kThreads<Cell, Exchange> == 512) return 24;
  if (std::is_same<Exchange, Local<1>>::value) return M > 1 ? 96 : 104;
  if (std::is_same<Exchange, Cluster>::value && kBlocks == 4) return M > 1 ? 64 : 96;
  if (std::is_same<Exchange, Cluster>::value && kBlocks == 2 && sizeof(typename Math::Stored) == 4) return 96;
  return Cell::kUnitWeights > 0 ? 96 : 128;  // such weights are in registers, too
}

// The pairs that a warp keeps in registers of a matrix of M tiles.
template <class Cell, class Math, class Exchange, int kBlocks, int M>
constexpr int kKeptPairs =
    matrix_registers<Cell, Math, Exchange, kBlocks, M>() / (M * 2 * kLaneBytes / 4 * Math::kParts);

// Which unit of a tile its row is. Rows 8 apart are one lane's: they are units side by side.
RNNFAST_DEVICE int unit_of(int row) { return row % 8 * 2 + row / 8; }

// Whether the 16 rows of a tile are all gates of 4 units: the warps that share 16 units then need not share sums, but
// each reads the whole vector. On a multiprocessor with few units that is quicker by a quarter, in clusters slower.
template <class Cell, class Exchange>
constexpr bool kMixesGates = Cell::kGates > 1 && std::is_same<Exchange, Local<4>>::value;

// A product leaves 4 sums of a tile with each lane: rows lane / 4 and 8 below, of batch rows 2 (lane % 4) and the next.
// The warps that share 16 units add up their parts, and each owns some of the sums: all gates of them, so that a cell
// is computed where its sums are. A thread owns kMine batch rows, and of each kUnits units that lie together.
template <class Exchange, int kBlocks, bool kMixed>
class Block {
  static constexpr int kSplit = Exchange::kSplit, kShares = kMixed ? 1 : kSplit;
  static constexpr int kRowsOfBlock = kSplit == 1 ? 2 : 1;
  static constexpr int kStride = kSplit == 8 ? 2 : 1;  // of the row blocks in which a thread owns a row

 public:
  static constexpr int kMine = (kBlocks + kStride - 1) / kStride * kRowsOfBlock;
  static constexpr int kUnits = kSplit == 1 ? 2 : 1;

  const Geometry& g;
  Member member;
  int direction, steps, warp, lane, split, first_unit, unit;  // unit: the first of its own
  int64_t first_row;

  RNNFAST_DEVICE Block(const Geometry& g, const Sequence& sequence, int first_group, int value_bytes, uint64_t* words,
                       bool sends_last)
      : g(g),
        member{thread_of_block()},
        warp(member.thread / kWarp),
        lane(member.thread % kWarp),
        split(warp % kSplit) {
    const int group = first_group + blockIdx.x / g.size;
    direction = group / g.direction_groups;
    first_row = int64_t(group % g.direction_groups) * kBlocks * kRows;
    member.rank = Exchange::rank(g);
    member.unit_bytes = g.tiles * kTile * value_bytes;
    first_unit = (member.rank * g.tiles + warp / kSplit) * kTile;
    unit = first_unit + (kMixed ? split * 4 + lane / 4 % 4 : lane / 4 * 2 + (kSplit == 1 ? 0 : split % 4 / 2));
    char* shared = shared_memory();
    member.barriers = reinterpret_cast<uint64_t*>(shared);
    member.vectors = shared + g.vectors;
    member.words = words + int64_t(group) * kSets * (g.set_bytes / Grid::kData);
    partials_ = reinterpret_cast<float*>(shared + g.partials);
    lengths_ = reinterpret_cast<int*>(shared + g.lengths);

#pragma unroll 1
    for (int i = member.thread; i < kBlocks * kRows; i += blockDim.x) lengths_[i] = sequence.length(first_row + i);
    uint4* vectors = reinterpret_cast<uint4*>(member.vectors);
    const int count = kSets * g.set_bytes / kLaneBytes;
#pragma unroll 1
    for (int i = member.thread; i < count; i += blockDim.x) vectors[i] = make_uint4(0, 0, 0, 0);
    sync_block();
    steps = 0;
#pragma unroll 1
    for (int i = 0; i < kBlocks * kRows; i++) steps = steps < lengths_[i] ? lengths_[i] : steps;
    member.last = sends_last ? steps : steps - 1;
  }

  // Of a cluster some blocks may be left without units.
  RNNFAST_DEVICE bool is_idle() const { return member.rank >= g.members; }

  // The s-th step in the order of the direction.
  RNNFAST_DEVICE int time(int s) const { return direction ? steps - 1 - s : s; }

  // Of the thread's own row r: its number in the block, how much that is more than the first own row's, whether the
  // thread has it at all, its place in the batch, and its length.
  RNNFAST_DEVICE int row(int r) const {
    const int second = kSplit == 1 ? 0 : kMixed ? lane / 16 : split % 2;
    return (kStride == 2 ? split / 4 : 0) * kRows + lane % 4 * 2 + second + further(r);
  }
  static constexpr RNNFAST_DEVICE int further(int r) { return r / kRowsOfBlock * kStride * kRows + r % kRowsOfBlock; }
  RNNFAST_DEVICE bool owns(int r) const { return kBlocks % kStride == 0 || row(r) < kBlocks * kRows; }
  RNNFAST_DEVICE int64_t batch(int r) const { return first_row + row(r); }
  RNNFAST_DEVICE int length(int r) const { return owns(r) ? lengths_[row(r)] : 0; }

  // Of a tile with all gates: the gate of a row, and its unit.
  RNNFAST_DEVICE int mixed_gate(int row) const { return row / 4 % 2 + row / 8 * 2; }
  RNNFAST_DEVICE int mixed_unit(int row) const { return first_unit + split * 4 + row % 4; }

  // In such a tile the lower half of the warp has gates 0 and 2 of two batch rows, and the upper half gates 1 and 3.
  // Each half gives the other its gates of one row, and then has all gates of the other row.
  template <int G>
  RNNFAST_DEVICE void swap_gates(int b, const float (&sum)[1][4], float (&owned)[kMine][1][G]) const {
    const bool upper = lane >= 16;
    const float low = swap_halves(upper ? sum[0][0] : sum[0][1]), high = swap_halves(upper ? sum[0][2] : sum[0][3]);
    owned[b][0][0] = upper ? low : sum[0][0];
    owned[b][0][1] = upper ? sum[0][1] : low;
    if (G > 2) owned[b][0][G > 2 ? 2 : 0] = upper ? high : sum[0][2];
    if (G > 3) owned[b][0][G > 3 ? 3 : 0] = upper ? sum[0][3] : high;
  }

  // Hands the sums of a row block to the threads that own them, the M sums of an element together. What this thread
  // owns is in `owned` after collect(), in which all threads take part.
  template <int M>
  RNNFAST_DEVICE void hand_over(int b, const float (&sum)[M][4], float (&owned)[kMine][kUnits][M]) const {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      Together<M> values;
#pragma unroll
      for (int m = 0; m < M; m++) {
        if constexpr (kSplit == 1) {
          owned[b * 2 + i % 2][i / 2][m] = sum[m][i];
        } else {
          values.of[m] = sum[m][i];
        }
      }
      if constexpr (kSplit > 1) partials<M>(warp, b, i) = values;
    }
  }

  template <int M>
  RNNFAST_DEVICE void collect(float (&owned)[kMine][kUnits][M]) const {
    if constexpr (kSplit > 1) {
      sync_block();
#pragma unroll
      for (int r = 0; r < kMine; r++) {
        if (!owns(r)) break;
        Together<M> sum = partials<M>(warp - split, row(r) / kRows, split % 4);
#pragma unroll
        for (int part = 1; part < kSplit; part++) {
          const Together<M> values = partials<M>(warp - split + part, row(r) / kRows, split % 4);
#pragma unroll
          for (int m = 0; m < M; m++) sum.of[m] += values.of[m];
        }
#pragma unroll
        for (int m = 0; m < M; m++) owned[r][0][m] = sum.of[m];
      }
    }
  }

  // Where the warp's share of a row block's vector begins.
  RNNFAST_DEVICE const char* share(int step, int b) const {
    return member.at(g, step) + b * g.vector_bytes + first_pair() * kPair;
  }
  RNNFAST_DEVICE int first_pair() const { return kShares == 1 ? 0 : split * g.pairs; }
  RNNFAST_DEVICE int share_pairs() const {
    const int left = g.gates * g.gate_bytes / kPairBytes - first_pair();
    return left < g.pairs ? (left > 0 ? left : 0) : g.pairs;
  }

  // The thread's own units in the vector of a step.
  template <class Stored>
  RNNFAST_DEVICE Stored* vector(int step, int r, int gate) const {
    const int row = this->row(r);
    return reinterpret_cast<Stored*>(member.at(g, step) + row / kRows * g.vector_bytes + gate * g.gate_bytes * kRows +
                                     place(row % kRows, unit * int(sizeof(Stored))));
  }

 private:
  template <int M>
  struct alignas(M == 1   ? 4
                 : M == 2 ? 8
                          : 16) Together {
    float of[M];
  };
  template <int M>
  RNNFAST_DEVICE Together<M>& partials(int warp, int b, int i) const {
    return reinterpret_cast<Together<M>*>(partials_)[((warp * kBlocks + b) * 4 + i) * kWarp + lane];
  }

  float* partials_;
  int* lengths_;
};

// The units of a row that a thread owns, one or two side by side. `wide` says that the layer's rows are aligned for two
// values: then both are read or written at once, otherwise one by one, and the second only if `both` says that the
// layer has such a unit.
template <class Stored, int kUnits>
RNNFAST_DEVICE void read(Stored (&to)[kUnits], const Stored* from, bool wide, bool both) {
  using Word = std::conditional_t<sizeof(Stored) == 2, uint32_t, uint64_t>;
  if constexpr (kUnits == 1) {
    to[0] = from[0];
  } else if (wide) {
    const Word word = *reinterpret_cast<const Word*>(from);
    memcpy(to, &word, sizeof(word));
  } else {
    to[0] = from[0];
    if (both) to[1] = from[1];
  }
}

template <class Stored, int kUnits>
RNNFAST_DEVICE void write(Stored* to, const Stored (&from)[kUnits], bool wide, bool both) {
  using Word = std::conditional_t<sizeof(Stored) == 2, uint32_t, uint64_t>;
  if constexpr (kUnits == 1) {
    to[0] = from[0];
  } else if (wide) {
    Word word;
    memcpy(&word, from, sizeof(word));
    *reinterpret_cast<Word*>(to) = word;
  } else {
    to[0] = from[0];
    if (both) to[1] = from[1];
  }
}

// 16 bytes of values, each from get(j).
template <class Stored, class Get>
RNNFAST_DEVICE uint4 gather(const Get& get) {
  constexpr int kCount = kLaneBytes / sizeof(Stored);
  Stored values[kCount];
#pragma unroll
  for (int j = 0; j < kCount; j++) values[j] = get(j);
  uint4 out;
  memcpy(&out, values, kLaneBytes);
  return out;
}

}  // namespace rnnfast
