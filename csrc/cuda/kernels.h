// The kernels that persistent.cu, stepwise.cu and joint.cu compile, for recurrence.cu to launch.
#pragma once

#include "backward.cuh"
#include "forward.cuh"
#include "joint.cuh"
#include "stepwise.cuh"

namespace rnnfast {

// Numbered as cuda_regime() numbers them.
enum Regime { kByTable, kMultiprocessor, kCluster, kChip, kStepwise, kJoint, kRegimes };

constexpr int kBlockings = 3;

// Of float64, the last one, there are no persistent kernels.
enum Arithmetic {
  kOfBFloat16,
  kOfHalf,
  kOfTf32,
  kOfExact,
  kOfDouble,
  kArithmetics,
  kPersistentArithmetics = kOfDouble
};

// Calls USE with the Math of each.
#define RNNFAST_MATHS(USE) \
  USE(Products<BFloat16>) USE(Products<Half>) USE(Products<float>) USE(Products<float, true>) USE(Products<double>)

// Kernels of a persistent regime, and what their geometry depends on.
template <class Arguments>
struct Persistent {
  Regime regime;
  void (*kernels[kBlockings])(Arguments);  // for 1, 2, 4 row blocks; or null
  int kept[kBlockings];                    // pairs of a warp's matrix in its registers
  int tiles;                               // of a warp's matrix: M
  int gates;                               // of an exchanged vector
  int threads;                             // at most
  int split, shares;                       // warps that share 16 units, and of these, shares of a vector
};

constexpr int kVariants = 4;  // a multiprocessor with 1 or 4 warps a tile, a cluster, the chip

struct CellKernels {
  Persistent<ForwardArguments> forward[kPersistentArithmetics][kVariants];
  Persistent<BackwardArguments> backward[kPersistentArithmetics][kVariants];
};

#define RNNFAST_DECLARE(Cell)                 \
  extern const CellKernels Cell##_persistent; \
  extern const JointKernels Cell##_joint[];
RNNFAST_CELLS(RNNFAST_DECLARE)
#undef RNNFAST_DECLARE

}  // namespace rnnfast
