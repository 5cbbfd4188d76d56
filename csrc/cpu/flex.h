// The recurrence of any cell: what its traced function does, as a list of operations that an evaluator goes through.
// Letters as in ../README.md; and X gates are made of W_ih x, Z more are given beside them, A are made of W_hh h, S
// states, U weights of each unit's own, K heads. Sums and states are in Number, float or double.
#pragma once

#include <cstdint>

namespace rnnfast {

// As rnnfast/evaluator.py numbers them.
enum Op {
  kAdd,
  kSubtract,
  kMultiply,
  kDivide,
  kNegate,
  kSigmoid,
  kTanh,
  kRelu,
  kExp,
  kLog,
  kLog1p,
  kSqrt,
  kAbs,
  kMinimum,
  kMaximum,
  kWhere,
  kLess,
  kLessEqual,
  kWherePositive,
  kMean,  // over the units of a row: a program is cut before what reads one
  kSigmoidOfSum,
  kTanhOfSum,
  kMultiplyAdd,
  kSubtractProduct,
  kMultiplyDifference,
  kMultiplyTwice,
  kOps
};

struct Operation {
  int64_t op, args[3];  // places of what it reads; those that it has not are 0
};

// Values by place: the inputs, the numbers, then what each operation makes.
struct Program {
  int64_t inputs, numbers, operations, results;
  int64_t row_inputs[2];       // the inputs from one to before the other are a number a row
  const double* number;        // [numbers]
  const Operation* operation;  // [operations]
  const int64_t* result;       // [results]
  int64_t places() const { return inputs + numbers + operations; }
};

// Steps whose gradients of the units' weights are added up as they are made; a stretch by itself, for accuracy.
constexpr int64_t kUnitSteps = 64;

struct FlexLayer {
  Program program;
  int64_t T, N, I, H, X, Z, A, S, U, K;
  int64_t Y, R;  // values that the forward saves for the backward: of each unit, and of each row
  bool reverse;
  int threads;
  const int64_t* lengths;    // [N]    or null
  const uint8_t* resets;     // [T,N]  or null
  const void* x;             // [T,N,I]
  const void* w_ih;          // [X*H,I]
  const void* w_hh;          // [K,A*H/K,H/K]  null where A is 0
  const void* const* units;  // U of [H]
  const double* initial;     // [S]: of states at borders
};

// The inputs of the program are the gates of x, those that are given, those of a, the states before the step, and the
// units' weights; its results are the states after it, and then what is saved.
struct FlexForward : FlexLayer {
  const void* b_ih;     // [X*H]  or null
  const void* z_gates;  // [T,N,Z*H]
  const void* b_hh;     // [A*H]  or null
  void* const* states;  // S of [N,H]: before all steps on entry, after them on return
  void* const* every;   // S of [T,N,E]: after every step, in the first H columns; or null each
  int64_t E;
  void* saved;  // [T,N,Y*H+R]
};

// The inputs of the program are what the forward saved, the states before the step and after it, the units' weights,
// and the gradients of the states after it; its results are the gradients of x's gates, of those that are given, of
// a's, of the states before the step, and of the units' weights.
struct FlexBackward : FlexLayer {
  const void* const* states;  // before all steps
  const void* const* every;
  const void* saved;
  const void* const* d_every;  // S of [T,N,H]  or null each
  void* const* d_states;       // S of [N,H]: of the final states on entry, of the initial ones on return
  bool shares_gates;           // the gradients of a's gates are those of x's first ones, and no results; needs K = 1
  bool need_dw;                // of W_ih, W_hh and the biases, which are set even where the layer has none
  void* dx;                    // [T,N,I]        or null
  void* dw_ih;                 // [X*H,I]
  void* db_ih;                 // [X*H]
  void* dz_gates;              // [T,N,Z*H]      or null
  void* dw_hh;                 // [K,A*H/K,H/K]
  void* db_hh;                 // [K,A*H/K]
  void* d_units;               // [stretches of T,N,U*H], 0 on entry: what the steps of a row add
};

struct FlexKernels {
  void (*forward[2])(const FlexForward&);  // float, double
  void (*backward[2])(const FlexBackward&);
};

// Of each instruction set, as the table of kernels.h.
namespace portable {
extern const FlexKernels flex;
}
namespace avx2 {
extern const FlexKernels flex;
}
namespace avx512 {
extern const FlexKernels flex;
}
namespace avx512_bf16 {
extern const FlexKernels flex;
}
namespace amx {
extern const FlexKernels flex;
}

}  // namespace rnnfast
