// What every device's operators share: the arguments of a layer, checked.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cells.h"
#include "stack.h"

namespace rnnfast {

using torch::headeronly::ScalarType;
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

// What a layer computes its output from. The mode, torch's name of the cell, is the first argument of every operator.
struct Inputs {
  std::string mode;
  Tensor x;
  OptionalTensor h0, c0;
  std::vector<Tensor> weights;
  OptionalTensor batch_sizes, lengths, resets;
  bool bidirectional;

  explicit Inputs(Stack& stack) : Inputs(stack.text(), stack) {}
  Inputs(std::string mode, Stack& stack)
      : mode(std::move(mode)),
        x(stack.tensor()),
        h0(stack.optional_tensor()),
        c0(stack.optional_tensor()),
        weights(stack.tensors()),
        batch_sizes(stack.optional_tensor()),
        lengths(stack.optional_tensor()),
        resets(stack.optional_tensor()),
        bidirectional(stack.flag()) {}
};

// The sizes of a layer, by their letters in README.md, and what else its arguments say.
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

CellKind parse_cell(const std::string& mode);

// The type of sums over values of this one; only a type that has kernels.
ScalarType accumulated(ScalarType dtype);

// Checks the arguments of a layer's forward, and returns what they say.
Dimensions check_layer(const Inputs& inputs);

void check_tensor(const char* name, const Tensor& tensor, const Shape& shape, ScalarType dtype);

inline void check_tensor(const char* name, const OptionalTensor& tensor, const Shape& shape, ScalarType dtype) {
  if (tensor) check_tensor(name, *tensor, shape, dtype);
}

}  // namespace rnnfast
