// The kernels that persistent.cu and stepwise.cu compile, for recurrence.cu to launch.
#pragma once

#include "backward.cuh"
#include "forward.cuh"
#include "stepwise.cuh"

namespace rnnfast {

// Numbered as cuda_regime() numbers them.
enum Regime { kByTable, kMultiprocessor, kCluster, kChip, kStepwise, kRegimes };

enum Arithmetic { kOfBFloat16, kOfHalf, kOfTf32, kOfExact, kArithmetics };

// A kernel of a persistent regime, and what its geometry depends on.
template <class Arguments>
struct Persistent {
  void (*kernel)(Arguments);
  int tiles, kept;  // of a warp's matrix: M, and the pairs in registers
  int gates;        // of an exchanged vector
  int states;       // numbers kept for each element
  int threads;      // at most
  int split;        // warps that share a tile
};

struct CellKernels {
  Persistent<ForwardArguments> forward[kArithmetics][kStepwise];  // by Regime
  Persistent<BackwardArguments> backward[kArithmetics][kStepwise];
};

extern const CellKernels tanh_kernels, relu_kernels, lstm_kernels, gru_kernels;

}  // namespace rnnfast
