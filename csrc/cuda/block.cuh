// What a block of a persistent kernel owns: 8 or more batch rows of one direction, and some tiles of hidden units.
#pragma once

#include <cstring>

#include "../cells.h"
#include "exchange.cuh"
#include "sequence.cuh"

namespace rnnfast {

// Threads of a block at most, and registers of each that hold the matrix. Of a multiprocessor's 64 K registers each of
// 256 threads gets 255, each of 512 gets 128; beside the matrix the kernels need 75 to 120.
template <class Cell, class Exchange>
constexpr int kThreads = Cell::kGates == 1 && Exchange::kSplit == 1 ? 512 : 256;
template <class Cell, class Exchange>
constexpr int kMatrixRegisters = kThreads<Cell, Exchange> == 512 ? 32 : 128;

// The pairs that a warp keeps in registers of a matrix of M tiles.
template <class Cell, class P, class Exchange, int M>
constexpr int kKeptPairs = kMatrixRegisters<Cell, Exchange> / (M * 2 * kLaneBytes / 4 * P::kParts);

// A product leaves 4 sums of a tile with each lane: units lane / 4 and 8 above, of batch rows 2 (lane % 4) and the
// next. The warps that share a tile add up their parts, and each owns some of the sums: all gates of them, so that a
// cell is computed where its sums are.
template <class Exchange>
class Block {
 public:
  static constexpr int kOwned = 4 / Exchange::kSplit;

  const Geometry& g;
  Member member;
  int direction, steps, warp, lane, split, first_unit;
  int64_t first_row;

  RNNFAST_DEVICE Block(const Geometry& g, const Sequence& sequence, int first_group, int value_bytes, uint64_t* words,
                       bool sends_last)
      : g(g), warp(threadIdx.x / kWarp), lane(threadIdx.x % kWarp), split(warp % Exchange::kSplit) {
    const int group = first_group + blockIdx.x / g.size;
    direction = group / g.direction_groups;
    first_row = int64_t(group % g.direction_groups) * g.row_blocks * kRows;
    member.rank = Exchange::rank(g);
    member.unit_bytes = g.tiles * kTile * value_bytes;
    first_unit = (member.rank * g.tiles + warp / Exchange::kSplit) * kTile;
    char* shared = shared_memory();
    member.barriers = reinterpret_cast<uint64_t*>(shared);
    member.vectors = shared + g.vectors;
    member.words = words + int64_t(group) * kSets * g.row_blocks * (g.vector_bytes / Grid::kData);
    partials_ = reinterpret_cast<float*>(shared + g.partials);
    states_ = reinterpret_cast<float*>(shared + g.states) + threadIdx.x;
    lengths_ = reinterpret_cast<int*>(shared + g.lengths);

#pragma unroll 1
    for (int i = threadIdx.x; i < g.row_blocks * kRows; i += blockDim.x) lengths_[i] = sequence.length(first_row + i);
    uint4* vectors = reinterpret_cast<uint4*>(member.vectors);
    const int count = kSets * g.row_blocks * g.vector_bytes / kLaneBytes;
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += blockDim.x) vectors[i] = make_uint4(0, 0, 0, 0);
    sync_block();
    steps = 0;
#pragma unroll 1
    for (int i = 0; i < g.row_blocks * kRows; i++) steps = steps < lengths_[i] ? lengths_[i] : steps;
    member.last = sends_last ? steps : steps - 1;
  }

  // Of a cluster some blocks may be left without units.
  RNNFAST_DEVICE bool is_idle() const { return member.rank >= g.members; }

  // The s-th step in the order of the direction.
  RNNFAST_DEVICE int time(int s) const { return direction ? steps - 1 - s : s; }

  RNNFAST_DEVICE int unit(int i) const { return first_unit + lane / 4 + (split * kOwned + i) / 2 * 8; }
  RNNFAST_DEVICE int row(int i) const { return lane % 4 * 2 + (split * kOwned + i) % 2; }
  RNNFAST_DEVICE int64_t batch(int b, int i) const { return first_row + b * kRows + row(i); }
  RNNFAST_DEVICE int length(int b, int i) const { return lengths_[b * kRows + row(i)]; }

  // The k-th number that the thread keeps for one of its elements.
  RNNFAST_DEVICE float& state(int k, int b, int i) const {
    return states_[((k * g.row_blocks + b) * kOwned + i) * blockDim.x];
  }

  // The thread's own sums out of its warp's; all threads take part.
  template <int M>
  RNNFAST_DEVICE void own(const float (&sum)[M][4], float (&owned)[M][kOwned]) const {
    if constexpr (Exchange::kSplit == 1) {
#pragma unroll
      for (int m = 0; m < M; m++) {
#pragma unroll
        for (int i = 0; i < kOwned; i++) owned[m][i] = sum[m][i];
      }
    } else {
#pragma unroll
      for (int m = 0; m < M; m++) {
#pragma unroll
        for (int i = 0; i < 4; i++) partials_[((warp * M + m) * 4 + i) * kWarp + lane] = sum[m][i];
      }
      sync_block();
#pragma unroll
      for (int m = 0; m < M; m++) {
#pragma unroll
        for (int i = 0; i < kOwned; i++) {
          owned[m][i] = 0;
#pragma unroll
          for (int part = 0; part < Exchange::kSplit; part++) {
            const int of = warp - split + part;
            owned[m][i] += partials_[((of * M + m) * 4 + split * kOwned + i) * kWarp + lane];
          }
        }
      }
    }
  }

  // Where the warp's share of a vector begins.
  RNNFAST_DEVICE const char* share(int step, int b) const { return member.at(g, step, b) + split * g.pairs * kPair; }
  RNNFAST_DEVICE int share_pairs() const {
    const int left = g.gates * g.gate_bytes / kPairBytes - split * g.pairs;
    return left < g.pairs ? (left > 0 ? left : 0) : g.pairs;
  }

  // An element of the block's units in the vector of a step.
  template <class T>
  RNNFAST_DEVICE T& vector(int step, int b, int i, int gate) const {
    return *reinterpret_cast<T*>(member.at(g, step, b) + place(row(i), gate * g.gate_bytes + unit(i) * int(sizeof(T))));
  }

 private:
  float *partials_, *states_;
  int* lengths_;
};

// 16 bytes of values, each from get(j).
template <class T, class Get>
RNNFAST_DEVICE uint4 gather(const Get& get) {
  constexpr int kCount = kLaneBytes / sizeof(T);
  T values[kCount];
#pragma unroll
  for (int j = 0; j < kCount; j++) values[j] = get(j);
  uint4 out;
  memcpy(&out, values, kLaneBytes);
  return out;
}

}  // namespace rnnfast
