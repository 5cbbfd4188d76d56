// The table of kernels: compiled once per instruction set, each time into a namespace of its own.
#include "backward.h"
#include "forward.h"

namespace rnnfast {
namespace RNNFAST_ISA {
namespace {

// Calls pass(whole, step) with the math for products over many rows, and that for the recurrence. Floats in parts are
// more to write and to read than floats: they take long sums to pay, and in the recurrence rows that share the reading.
template <class S, class F>
void with_math(const Layer& l, const F& pass) {
  using Fast = FastMath<S>;
  using Plain = PlainMath<S>;
  constexpr int64_t kLongSum = Fast::Exact::kParts == 3 ? 256 : 64, kEnoughRows = Fast::Exact::kParts == 3 ? 16 : 8;
  if constexpr (std::is_base_of_v<Plain, Fast>) {
    pass(Plain(), Plain());
  } else if (l.R <= kUnpackedRows) {
    pass(Plain(), Plain());
  } else if constexpr (Fast::Exact::kParts == 1) {
    pass(Fast(), Fast());
  } else if (min(l.I, l.P) < kLongSum) {
    pass(Plain(), Plain());
  } else if (l.steps.N < kEnoughRows) {
    pass(Fast(), Plain());
  } else {
    pass(Fast(), Fast());
  }
}

template <class Cell, class S>
void forward(const Forward& f) {
  with_math<S>(f, [&](auto whole, auto step) { ForwardPass<Cell, S, decltype(whole), decltype(step)>(f).run(); });
}

template <class Cell, class S>
void backward(const Backward& f) {
  with_math<S>(f, [&](auto whole, auto step) { BackwardPass<Cell, S, decltype(whole), decltype(step)>(f).run(); });
}

template <class S>
constexpr void add(Kernels& table, Storage storage) {
  table.forward[kTanh][storage] = forward<Rnn<Tanh>, S>;
  table.forward[kRelu][storage] = forward<Rnn<Relu>, S>;
  table.forward[kLstm][storage] = forward<Lstm, S>;
  table.forward[kGru][storage] = forward<Gru, S>;
  table.backward[kTanh][storage] = backward<Rnn<Tanh>, S>;
  table.backward[kRelu][storage] = backward<Rnn<Relu>, S>;
  table.backward[kLstm][storage] = backward<Lstm, S>;
  table.backward[kGru][storage] = backward<Gru, S>;
}

constexpr Kernels all() {
  Kernels table{};
  add<float>(table, kFloat);
  add<double>(table, kDouble);
  add<BFloat16>(table, kBFloat16);
  add<Half>(table, kHalf);
  return table;
}

}  // namespace

const Kernels kernels = all();

}  // namespace RNNFAST_ISA
}  // namespace rnnfast
