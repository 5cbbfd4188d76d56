// What a step does beside its matrix products, an element a thread: for layers whose W_hh the chip does not hold, that
// are projected, or in float64. Letters as in ../README.md.
//
// Floors of a step: the bytes of W_hh, G H P values, if the L2 does not keep them, and its G H P multiply-adds a row,
// both cuBLAS's; here what is read and written once, N D H (2 G + S + 3) values forward.
#pragma once

#include "../cells.h"
#include "real.cuh"
#include "sequence.cuh"

namespace rnnfast {

struct StepArguments {
  Sequence sequence;
  int64_t step;  // 0..T-1 in the order of the direction
  int64_t H, P, D;
  const void* w_units[2];  // [kUnitWeights*H] of each direction; or null
};

struct ForwardStep : StepArguments {
  const void* x;     // [D, R, G*H]: W_ih x + b_ih
  const void* a;     // [D, N, G*H]: W_hh h
  const void* b[2];  // [G*H]: b_hh; or null
  void* h;           // [D, N, H]: before on entry, after on return; if h is projected, only what is to be
  void* c;           // [D, N, H]: before on entry, after on return
  void* y;           // [R, D*H]; null if h is projected
  void* cs;          // [R, D*H]: c after every step; or null
  void* gates;       // [D, R, S*H]; or null. May be x where S is G
};

struct BackwardStep : StepArguments {
  const void* dy;       // [R, D*H]; or null
  const void* dcs;      // [R, D*H]; or null
  const void* gates;    // [D, R, S*H]
  const void* y;        // [R, D*H]
  const void* cs;       // [R, D*H]
  const void* h0;       // [D, N, H]; or null
  const void* c0;       // [D, N, H]; or null
  const void* through;  // [D, N, H]: what comes back through a product
  void* dh;             // [D, N, H]: of the state after on entry, before on return, without what goes through a product
  void* dc;             // [D, N, H]: of the state after on entry, before on return
  void* da;             // [D, N, G*H]: the gradients at W_hh h
  void* dgates;         // [D, R, kColumns*H]
};

struct ProjectForward : StepArguments {
  const void* projected;  // [D, N, P]
  void* h;                // [D, N, P]: before on entry, after on return
  void* y;                // [R, D*P]
};

struct ProjectBackward : StepArguments {
  const void* dy;       // [R, D*P]; or null
  const void* through;  // [D, N, P]: what comes back through W_hh
  void* dh;             // [D, N, P]: of the state after on entry, before on return, without what goes through W_hh
  void* dprojected;     // [D, N, P]: the gradient at the projection of this step
  void* dprojections;   // [D, R, P]: and of every step
};

struct Accumulate {
  const void* from;  // [count]
  void* to;          // [count], of the accumulation type
  int64_t count;
};

struct StatesBefore : StepArguments {
  const void* y;   // [R, D*P]
  const void* h0;  // [D, N, P]; or null
  void* out;       // [D, R, P]: the state that entered each step
};

struct StepKernels {
  void (*forward[kCellKinds])(ForwardStep);
  void (*backward[kCellKinds])(BackwardStep);
  void (*project_forward)(ProjectForward);
  void (*project_backward)(ProjectBackward);
  void (*accumulate)(Accumulate);
  void (*states_before)(StatesBefore);
};

constexpr int kStepThreads = 256;

extern const StepKernels step_kernels[4];  // of float, double, BFloat16 and Half

}  // namespace rnnfast
