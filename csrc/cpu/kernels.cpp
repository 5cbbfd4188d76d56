// The table of kernels: compiled once per instruction set, each time into a namespace of its own.
#include "backward.h"
#include "forward.h"

namespace rnnfast {
namespace RNNFAST_ISA {
namespace {

template <class Cell, class S>
void forward(const Forward& f) {
  ForwardPass<Cell, S>(f).run();
}

template <class Cell, class S>
void backward(const Backward& f) {
  BackwardPass<Cell, S>(f).run();
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
