// The four forms of a sequence, as one time-step table.
#pragma once

#include "device.cuh"

namespace rnnfast {

// A row beyond the batch has no steps. Nobody has checked the values of the tables, because that would mean to wait for
// the device: so lengths are clamped here, and an offset never leads out of the sequence. Letters as in ../README.md.
struct Sequence {
  int64_t T, N, R;
  const int64_t* offsets;  // [T]: where step t begins in packed rows; or null
  const int64_t* lengths;  // [N]; or null
  const uint8_t* resets;   // [T, N]; or null

  RNNFAST_DEVICE int length(int64_t n) const {
    if (n >= N) return 0;
    const int64_t steps = lengths ? lengths[n] : T;
    return int(steps < 0 ? 0 : steps < T ? steps : T);
  }

  RNNFAST_DEVICE int64_t row(int64_t t, int64_t n) const {
    if (!offsets) return t * N + n;
    const uint64_t row = uint64_t(offsets[t]) + n;
    return row < uint64_t(R) ? row : 0;
  }

  // Where step t begins among the rows, and whether a row of it lies within the sequence.
  RNNFAST_DEVICE int64_t begin(int64_t t) const { return offsets ? offsets[t] : t * N; }
  RNNFAST_DEVICE bool has(int64_t begin, int64_t n) const { return !offsets || uint64_t(begin + n) < uint64_t(R); }

  // Whether the state enters step t, and is not zeroed: seen from the end, an episode's border lies above t.
  RNNFAST_DEVICE bool keeps(int64_t t, int64_t n, int length, int direction) const {
    if (!resets) return true;
    const int64_t border = t + direction;
    return border >= length || !resets[border * N + n];
  }
};

}  // namespace rnnfast
