// A step in one launch: W_hh h and the cell, or in the backward da W_hh of the step done before and the cell. For
// layers whose W_hh the chip does not hold, and which are small enough that a step of them takes the GPU no longer than
// two launches take the host. Letters as in ../README.md.
//
// A block has 16 units, with all their gates, of 8 or 32 rows (float64: 16); its warps share the depth of the product,
// pair by pair. Nothing is shared but the sums: W_hh and the vectors lie in global memory in the order in which warps
// read them, so that a warp loads each fragment straight into its registers, 512 bytes that lie together at a time.
// W_hh is put into that order once a call, and so is the initial state; each step then leaves the vectors of the next
// one, in turns in one of two places.
//
// Floors of a step, beside those of stepwise.cuh: each block reads its rows of W_hh and its vectors from L2, in all D
// (H / 16) (N / rows) (16 G + rows) H values forward and D (H / 16) (N / rows) (16 + rows) G H backward.
#pragma once

#include "products.cuh"
#include "stepwise.cuh"

namespace rnnfast {

constexpr int kJointThreads = 256, kJointWarps = kJointThreads / kWarp;
// Of 8 rows of a block: one, or so many that their sums fill its registers.
constexpr int kJointBlockings = 2;
constexpr int joint_row_blocks(int blocking, int sum_bytes) { return blocking ? 16 / sum_bytes : 1; }

// How a layer is cut into blocks, and the operands of its product.
struct JointProduct {
  int64_t tiles, groups;  // of 16 units, and of a block's rows in one direction
  int pairs;              // of the depth: H values forward, G H backward
  int gate_bytes;         // of one gate of a vector, whole pairs
  const void* matrix;     // [D][tiles][pairs][M][2][32 lanes] of 16 bytes
  void* vectors;          // [D][groups][row blocks][pairs][8 rows][64 bytes]
  void* next;             // those of the step that comes after this one
};

struct JointForward : ForwardStep {
  JointProduct product;
};

struct JointBackward : BackwardStep {
  JointProduct product;
};

// W_hh in the order of the products: [G*H, H], of which the forward takes the rows of units, a tile for each gate, and
// the backward their columns, one tile over all gates.
struct ArrangeMatrix {
  const void* w;  // [G*H, H]
  void* matrix;   // of one direction
  int64_t H, tiles, unit_stride, depth_stride;
  int pairs, gate_bytes, M;
};

// The initial state as vectors of both turns.
struct ArrangeState {
  const void* h;  // [D, N, H]
  void* vectors[2];
  int64_t D, N, H, row_blocks;
  int pairs;
};

// Where byte k of row n lies in vectors.
RNNFAST_DEVICE int64_t place_of(int pairs, int64_t row_blocks, int64_t d, int64_t n, int k) {
  return (d * row_blocks + n / kRows) * pairs * kPair + place(int(n % kRows), k);
}

struct JointKernels {
  void (*forward[kJointBlockings])(JointForward);
  void (*backward[kJointBlockings])(JointBackward);
};

struct ArrangeKernels {
  void (*matrix)(ArrangeMatrix);
  void (*state)(ArrangeState);
};

extern const ArrangeKernels arrange_kernels[];  // by Arithmetic

// Bytes of a block's sums in shared memory: of two row blocks at a time, of M tiles.
constexpr size_t joint_shared(int row_blocks, int tiles, int sum_bytes) {
  return size_t(kJointWarps) * (row_blocks < 2 ? 1 : 2) * tiles * 4 * kWarp * sum_bytes;
}

}  // namespace rnnfast
