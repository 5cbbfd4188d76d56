// What every device's operators share: the arguments of a layer, checked.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cells.h"

namespace rnnfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

template <class... Parts>
std::runtime_error refusal(const Parts&... parts) {
  std::ostringstream text;
  ((text << "rnnfast: ") << ... << parts);
  return std::runtime_error(text.str());
}

// As STD_TORCH_CHECK, but without the line of the source: rnnfast/border.py says the same for the other backends.
#define RNNFAST_CHECK(condition, ...) \
  if (condition) {                    \
  } else                              \
    throw refusal(__VA_ARGS__)

// T steps, N batch, I input size, H hidden size, P output size, D directions, G gates, R rows of x.
struct Dimensions {
  CellKind cell;
  ScalarType dtype, acc_dtype;  // of the tensors; of sums and of the cell state
  int64_t T, N, I, H, P, D, G, R;
  int64_t saved_gates;
  bool packed, has_bias, has_projection, has_cell;

  int64_t weights() const { return 2 + 2 * has_bias + has_projection; }  // per direction
  // The shape of a tensor that has a row for every row of x.
  Shape rows(int64_t features) const { return packed ? Shape{R, features} : Shape{T, N, features}; }
  Shape state(int64_t features) const { return {D, N, features}; }
};

// By torch's name of the cell.
CellKind parse_cell(const std::string& cell);

// The type of sums over values of this one; only a type that has kernels.
ScalarType accumulated(ScalarType dtype);

// Checks the arguments of a layer's forward, and returns what they say.
Dimensions check_layer(const std::string& cell, const Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                       const std::vector<Tensor>& weights, const OptionalTensor& batch_sizes,
                       const OptionalTensor& lengths, const OptionalTensor& resets, bool bidirectional);

void check_tensor(const char* name, const Tensor& tensor, const Shape& shape, ScalarType dtype);

inline void check_tensor(const char* name, const OptionalTensor& tensor, const Shape& shape, ScalarType dtype) {
  if (tensor) check_tensor(name, *tensor, shape, dtype);
}

}  // namespace rnnfast
