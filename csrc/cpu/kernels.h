// What the operators hand to the kernels, and the table of kernels that each instruction set provides.
// Letters as in ../README.md.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../cells.h"

namespace rnnfast {

enum Storage { kFloat, kDouble, kBFloat16, kHalf, kStorages };

// One table behind every sequence form. Batch rows are known by their rank j, longest sequence first, so that the rows
// alive at step t are the ranks below active[t]. The valid (t, j), counted in that order, are the rows q of the scratch
// of a backward pass.
struct Steps {
  int64_t T, N;
  const int64_t* offset;  // [T]    memory row of step t and batch row 0
  const int64_t* active;  // [T+1]  rows alive at step t; 0 at T
  const int64_t* start;   // [T+1]  first q of step t
  const int64_t* order;   // [N]    batch row of rank j
  const int64_t* length;  // [N]    steps of rank j
  const uint8_t* resets;  // [T,N]  or null; of a bool tensor, whose bytes need not be 0 or 1

  // Always inlined, so that no copy built for one instruction set serves another.
  RNNFAST_INLINE int64_t row(int64_t t, int64_t j) const { return offset[t] + order[j]; }
  // The memory row of the step that direction d takes before t; -1 if t is its first.
  RNNFAST_INLINE int64_t previous(int d, int64_t t, int64_t j) const {
    if (d == 0) return t > 0 ? row(t - 1, j) : -1;
    return j < active[t + 1] ? row(t + 1, j) : -1;
  }
  // Whether an episode border lies between t and the step that direction d takes before it.
  RNNFAST_INLINE bool cut(int d, int64_t t, int64_t j) const {
    return resets && j < active[t + d] && resets[(t + d) * N + order[j]];
  }
};

template <class Pointer>
struct Parameters {
  Pointer w_ih;     // [G*H,I]
  Pointer w_hh;     // [G*H,P]
  Pointer b_ih;     // [G*H]  or null
  Pointer b_hh;     // [G*H]  or null
  Pointer w_hr;     // [P,H]  or null
  Pointer w_units;  // [kUnitWeights*H]  or null
};

// All tensors are contiguous and in the storage type, but c and dc, which are in the accumulation type.
struct Layer {
  Steps steps;
  int64_t I, H, P, R;
  int D, threads;
  bool projected;  // w_hr is there, though null where it is empty
  Parameters<const void*> weights[2];
  const void* x;   // [R,I]
  const void* h0;  // [D,N,P]  or null
  const void* c0;  // [D,N,H]  or null
};

struct Forward : Layer {
  void* y;      // [R,D*P]
  void* h_n;    // [D,N,P]
  void* c_n;    // [D,N,H]
  void* c;      // [R,D*H]    or null
  void* gates;  // [D,R,S*H]  or null
  void* kept;   // memory for packed weights that outlives the call, of kept_bytes, or null
  bool packed;  // whether they are there, of a call before with the same kernels, weights and sizes
};

struct Backward : Layer {
  const void* dy;     // [R,D*P]  or null
  const void* dh_n;   // [D,N,P]  or null
  const void* dc_n;   // [D,N,H]  or null
  const void* dc;     // [R,D*H]  or null
  const void* y;      // [R,D*P]
  const void* c;      // [R,D*H]
  const void* gates;  // [D,R,S*H]
  void* dx;           // [R,I]    or null; rows outside of every sequence are already zero
  void* dh0;          // [D,N,P]  or null
  void* dc0;          // [D,N,H]  or null
  void* dgates;       // [D,R,kColumns*H], and P more columns, dh of every step, under a projection; or null, as dx
  bool need_dw;
  Parameters<void*> dw[2];
};

struct Kernels {
  void (*forward[kCommonKinds][kStorages])(const Forward&);
  void (*backward[kCommonKinds][kStorages])(const Backward&);
  size_t (*kept_bytes[kCommonKinds][kStorages])(const Forward&);  // 0 where weights are read as they lie
};

namespace portable {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
namespace amx {
extern const Kernels kernels;
}

// Services of the operators' side, here as plain functions so that the kernels include nothing of torch.
// parallel_tasks calls body with ranges that make up [0, tasks), each on a thread of its own where that can be had.
void parallel_tasks(int64_t tasks, void (*body)(void* context, int64_t begin, int64_t end), void* context);
void* allocate(size_t bytes);
void release(void* memory);

}  // namespace rnnfast
