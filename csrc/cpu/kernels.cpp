// The table of kernels: compiled once per instruction set, each time into a namespace of its own.
#include "backward.h"
#include "forward.h"

namespace rnnfast {
namespace RNNFAST_ISA {
namespace {

// Whether the fast math is faster for a layer. Numbers in parts are more to write and to read: it takes long sums, and
// rows that share the reading of the weights, to pay.
template <class Stored>
bool is_fast(const Layer& l) {
  constexpr int kParts = FastMath<Stored>::Exact::kParts;
  if (kParts == 1) return l.R > kUnpackedRows;
  return min(l.I, l.P) >= (kParts == 3 ? 256 : 64) && l.steps.N >= (kParts == 3 ? 16 : 8);
}

// Calls pass(an object of the math to use).
template <class Stored, class Pass>
void with_math(const Layer& l, const Pass& pass) {
  if constexpr (!std::is_base_of_v<PlainMath<Stored>, FastMath<Stored>>) {
    if (is_fast<Stored>(l)) return pass(FastMath<Stored>());
  }
  pass(PlainMath<Stored>());
}

template <class Cell, class Stored>
void forward(const Forward& f) {
  with_math<Stored>(f, [&](auto math) { ForwardPass<Cell, Stored, decltype(math)>(f).run(); });
}

template <class Cell, class Stored>
size_t kept_bytes(const Forward& f) {
  size_t bytes = 0;
  with_math<Stored>(f, [&](auto math) { bytes = ForwardPass<Cell, Stored, decltype(math)>::kept_bytes(f); });
  return bytes;
}

template <class Cell, class Stored>
void backward(const Backward& f) {
  with_math<Stored>(f, [&](auto math) { backward_pass<Cell, Stored, decltype(math)>(f); });
}

template <class Stored>
constexpr void add(Kernels& table, Storage storage) {
#define RNNFAST_ADD(Cell)                                                                                             \
  table.forward[k##Cell][storage] = forward<Cell, Stored>, table.backward[k##Cell][storage] = backward<Cell, Stored>, \
  table.kept_bytes[k##Cell][storage] = kept_bytes<Cell, Stored>;
  RNNFAST_COMMON_CELLS(RNNFAST_ADD)
#undef RNNFAST_ADD
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
