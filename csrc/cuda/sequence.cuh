// The four forms of a sequence, as one time-step table.
#pragma once

#include "device.cuh"

namespace rnnfast {

// T steps, N batch, R rows of the sequence. A row beyond the batch has no steps.
struct Sequence {
  int64_t T, N, R;
  const int64_t* offsets;  // [T]: where step t begins in packed rows; or null
  const int64_t* lengths;  // [N]; or null
  const uint8_t* resets;   // [T, N]; or null

  RNNFAST_DEVICE int length(int64_t n) const { return n >= N ? 0 : int(lengths ? lengths[n] : T); }

  RNNFAST_DEVICE int64_t row(int64_t t, int64_t n) const { return (offsets ? offsets[t] : t * N) + n; }

  // Whether the state enters step t, and is not zeroed: seen from the end, an episode's border lies above t.
  RNNFAST_DEVICE bool keeps(int64_t t, int64_t n, int length, int direction) const {
    const int64_t border = t + direction;
    return !resets || border >= length || !resets[border * N + n];
  }
};

}  // namespace rnnfast
