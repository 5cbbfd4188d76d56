// The value type of cells.h on this device: one number, with the functions that a cell needs.
#pragma once

#include <cmath>

#include "device.cuh"

namespace rnnfast {

// kApproximate: exp and division by the special function unit. Its error of a few float32 roundings is far below one of
// a 16-bit result, but not below one of float32.
template <class Value, bool kApproximate>
struct Real {
  Value value;

  RNNFAST_DEVICE Real(Value value = 0) : value(value) {}

  friend RNNFAST_DEVICE Real operator+(Real a, Real b) { return a.value + b.value; }
  friend RNNFAST_DEVICE Real operator-(Real a, Real b) { return a.value - b.value; }
  friend RNNFAST_DEVICE Real operator-(Real a) { return -a.value; }
  friend RNNFAST_DEVICE Real operator*(Real a, Real b) { return a.value * b.value; }

  friend RNNFAST_DEVICE Real sigmoid(Real x) {
    if constexpr (kApproximate) return fast_divide(1, 1 + fast_exp(-x.value));
    return 1 / (1 + std::exp(-x.value));
  }
  friend RNNFAST_DEVICE Real tanh(Real x) {
    if constexpr (kApproximate) return 1 - fast_divide(2, 1 + fast_exp(2 * x.value));
    return std::tanh(x.value);
  }
  friend RNNFAST_DEVICE Real relu(Real x) { return x.value < 0 ? 0 : x.value; }  // a NaN stays one
  friend RNNFAST_DEVICE Real zero_where_not_positive(Real h, Real dh) { return h.value <= 0 ? 0 : dh.value; }
};

// The weights of units' own, of some units that lie together; zero beyond the layer's H.
template <class Cell, class Number, int kUnits>
class UnitWeights {
 public:
  template <class Stored>
  RNNFAST_DEVICE UnitWeights(const Stored* weights, int64_t unit, int64_t H) {
#pragma unroll
    for (int u = 0; u < kUnits; u++) {
#pragma unroll
      for (int k = 0; k < Cell::kUnitWeights; k++) {
        if (unit + u < H) weights_[u][k] = decltype(Number::value)(weights[k * H + unit + u]);
      }
    }
  }
  RNNFAST_DEVICE const Number* operator[](int u) const { return weights_[u]; }

 private:
  Number weights_[kUnits][Cell::kUnitWeights + 1];
};

}  // namespace rnnfast
