// What every device's operators share: the arguments of a layer, checked.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cells.h"
#include "stack.h"

namespace rnnfast {

using torch::headeronly::ScalarType;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;  // that belong to somebody else

// The sizes of a tensor of ours, in no memory of their own, as a vector's are: a small call has a dozen of them.
class Shape {
 public:
  static constexpr size_t kMost = 4;
  Shape() = default;
  Shape(std::initializer_list<int64_t> sizes) : Shape(Sizes(sizes.begin(), sizes.size())) {}
  Shape(Sizes sizes) {
    for (int64_t size : sizes) push_back(size);
  }
  void push_back(int64_t size) {
    STD_TORCH_CHECK(count_ < kMost, "rnnfast: a tensor of more than ", kMost, " dimensions");
    sizes_[count_++] = size;
  }
  size_t size() const { return count_; }
  const int64_t* data() const { return sizes_; }
  int64_t& operator[](size_t i) { return sizes_[i]; }
  int64_t operator[](size_t i) const { return sizes_[i]; }

 private:
  int64_t sizes_[kMost];
  size_t count_ = 0;
};

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
  OptionalTensor h0, c0, batch_sizes, lengths, resets;
  bool bidirectional;
  std::string names;            // of the weights of one direction
  std::vector<Tensor> weights;  // those of one direction after those of the other

  explicit Inputs(Stack& stack)
      : mode(stack.text()),
        x(stack.tensor()),
        h0(stack.optional_tensor()),
        c0(stack.optional_tensor()),
        batch_sizes(stack.optional_tensor()),
        lengths(stack.optional_tensor()),
        resets(stack.optional_tensor()),
        bidirectional(stack.flag()),
        names(stack.text()),
        weights(stack.tensors()) {}
};

// The weights of a direction, in the order in which those that there are follow each other.
enum WeightName { kInputWeight, kHiddenWeight, kInputBias, kHiddenBias, kProjection, kWeightOfUnits, kWeightNames };

// The sizes of a layer, by their letters in README.md, and what else its arguments say.
struct Dimensions {
  CellKind cell;
  ScalarType dtype, acc_dtype;  // of the tensors; of sums and of the cell state
  int64_t T, N, I, H, P, D, G, R;
  int64_t saved_gates;
  bool packed, has_cell;
  int weights;              // of a direction
  int place[kWeightNames];  // of each among them; or -1

  bool has(WeightName name) const { return place[name] >= 0; }
  // One of direction d's; null where it is absent.
  template <class OfWeight>
  const OfWeight* weight(const OfWeight* all, int64_t d, WeightName name) const {
    return has(name) ? &all[d * weights + place[name]] : nullptr;
  }
  // The shape of a tensor that has a row for every row of x.
  Shape rows(int64_t features) const { return packed ? Shape{R, features} : Shape{T, N, features}; }
  Shape state(int64_t features) const { return {D, N, features}; }
};

CellKind parse_cell(const std::string& mode);

// The type of sums over values of this one; only a type that has kernels.
ScalarType accumulated(ScalarType dtype);

// Checks the arguments of a layer's forward, and returns what they say.
Dimensions check_layer(const Inputs& inputs);

// The parts of this check, for plain calls: the cell and dtype; T, N and I, once they are known; which weights a
// direction has, where their number tells it; their shapes, which say H and P.
Dimensions read_cell(int64_t cell, const Tensor& x, bool bidirectional);
void check_sizes(const Dimensions& n);
void count_weights(Dimensions& n, int64_t weights);
void check_weights(Dimensions& n, const Tensor* weights);

void check_tensor(const char* name, const Tensor& tensor, Sizes shape, ScalarType dtype);

inline void check_tensor(const char* name, const OptionalTensor& tensor, Sizes shape, ScalarType dtype) {
  if (tensor) check_tensor(name, *tensor, shape, dtype);
}

}  // namespace rnnfast
