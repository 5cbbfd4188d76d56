// The CPU operators of a direction of any cell's recurrence: checks and translates their arguments, allocates the
// results, and calls the kernels. The products with W_ih, and what the weights' gradients are made of, are the
// caller's.
#include "flex.h"

#include <cstring>

#include "arguments.h"
#include "instruction_sets.h"

namespace rnnfast {
namespace {

constexpr int64_t kMost = int64_t(1) << 31;

// What forward and backward have in common, with the memory that it points to.
class Arguments {
 public:
  Arguments(const Tensor& operations, const Tensor& numbers, const Tensor& results, const Tensor& x_gates,
            const OptionalTensor& w_hh, const std::vector<Tensor>& units, const OptionalTensor& lengths,
            const OptionalTensor& resets, bool reverse, int64_t H, int64_t S)
      : x_gates_(x_gates) {
    RNNFAST_CHECK(x_gates.defined() && x_gates.dim() == 3, "x_gates has to be [T, N, X * H]");
    dtype = x_gates.scalar_type();
    RNNFAST_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "x_gates has to be float32 or float64");
    l.T = x_gates.size(0), l.N = x_gates.size(1), l.H = H, l.S = S, l.U = units.size(), l.K = 1;
    RNNFAST_CHECK(H > 0 && x_gates.size(2) % H == 0 && x_gates.size(2) > 0, "x_gates has to be [T, N, X * H]");
    l.X = x_gates.size(2) / H;
    if (w_hh) {
      RNNFAST_CHECK(w_hh->dim() == 3 && w_hh->size(0) > 0 && H % w_hh->size(0) == 0, "w_hh has to be [K, A*H/K, H/K]");
      l.K = w_hh->size(0), l.A = w_hh->size(1) / (H / l.K);
      check_tensor("w_hh", *w_hh, {l.K, l.A * (H / l.K), H / l.K}, dtype);
    }
    RNNFAST_CHECK(std::max({l.T, l.N, x_gates.size(2), l.A * H}) < kMost, "a size is 2^31 or more");
    for (const Tensor& unit : units) {
      check_tensor("a weight of units", unit, {H}, dtype);
      units_.push_back(read(unit));
    }
    check_tensor("lengths", lengths, {l.N}, ScalarType::Long);
    check_tensor("resets", resets, {l.T, l.N}, ScalarType::Bool);
    l.lengths = static_cast<const int64_t*>(read(lengths));
    for (int64_t n = 0; lengths && n < l.N; n++) {
      RNNFAST_CHECK(l.lengths[n] >= 0 && l.lengths[n] <= l.T, "lengths have to be between 0 and ", l.T);
    }
    l.resets = static_cast<const uint8_t*>(read(resets));
    l.reverse = reverse, l.threads = torch::stable::get_num_threads();
    l.x_gates = read(x_gates), l.w_hh = read(w_hh), l.units = units_.data();

    RNNFAST_CHECK(operations.defined() && operations.dim() == 2, "operations has to be [operations, 4]");
    check_tensor("operations", operations, {operations.size(0), 4}, ScalarType::Long);
    RNNFAST_CHECK(numbers.defined() && numbers.dim() == 1, "numbers has to be a vector");
    check_tensor("numbers", numbers, {numbers.size(0)}, ScalarType::Double);
    RNNFAST_CHECK(results.defined() && results.dim() == 1, "results has to be a vector");
    check_tensor("results", results, {results.size(0)}, ScalarType::Long);
    static_assert(sizeof(Operation) == 4 * sizeof(int64_t));
    l.program = {0,
                 numbers.size(0),
                 operations.size(0),
                 results.size(0),
                 static_cast<const double*>(read(numbers)),
                 static_cast<const Operation*>(read(operations)),
                 static_cast<const int64_t*>(read(results))};
  }

  // Whether a program reads only what is there before, and makes what is asked for anew.
  void check_program(int64_t inputs, int64_t results) {
    Program& p = l.program;
    p.inputs = inputs;
    RNNFAST_CHECK(p.results == results, "the program has ", p.results, " results, expected ", results);
    RNNFAST_CHECK(p.numbers + p.operations < kMost / 1024, "the program is too long");
    for (int64_t k = 0; k < p.operations; k++) {
      const Operation& o = p.operation[k];
      RNNFAST_CHECK(o.op >= 0 && o.op < kOps, "the program has no operation ", o.op);
      for (int64_t place : o.args) {
        RNNFAST_CHECK(place >= 0 && place < inputs + p.numbers + k, "operation ", k, " reads place ", place);
      }
    }
    for (int64_t k = 0; k < p.results; k++) {
      RNNFAST_CHECK(p.result[k] >= inputs && p.result[k] < p.places(), "result ", k, " is place ", p.result[k]);
    }
  }

  std::vector<Tensor> make(int64_t count, const Shape& shape) const {
    std::vector<Tensor> made;
    for (int64_t k = 0; k < count; k++) made.push_back(empty(shape, dtype));
    return made;
  }
  // Of tensors of a shape; null where one has no elements though the shape has.
  std::vector<const void*> pointers(const char* name, const std::vector<Tensor>& tensors, const Shape& shape,
                                    bool optional = false) {
    RNNFAST_CHECK(int64_t(tensors.size()) == l.S, "got ", tensors.size(), " ", name, ", expected ", l.S);
    std::vector<const void*> found;
    for (const Tensor& t : tensors) {
      const bool absent = optional && t.defined() && t.dim() == 1 && t.size(0) == 0;
      if (!absent) check_tensor(name, t, shape, dtype);
      found.push_back(absent ? nullptr : read(t));
    }
    return found;
  }

  Reader read;
  FlexLayer l{};
  ScalarType dtype;

 private:
  const Tensor& x_gates_;
  std::vector<const void*> units_;
};

std::vector<void*> data(const std::vector<Tensor>& tensors) {
  std::vector<void*> found;
  for (const Tensor& t : tensors) found.push_back(t.data_ptr());
  return found;
}

// New tensors with the values of others.
std::vector<Tensor> copied(const Arguments& given, const std::vector<const void*>& from, const Shape& shape) {
  std::vector<Tensor> made = given.make(from.size(), shape);
  for (size_t k = 0; k < made.size(); k++) {
    if (made[k].numel()) std::memcpy(made[k].data_ptr(), from[k], made[k].numel() * made[k].element_size());
  }
  return made;
}

void flex_forward(StableIValue* values, uint64_t arguments, uint64_t results_) {
  Stack stack(values, arguments, results_);
  const Tensor operations = stack.tensor(), numbers = stack.tensor(), results = stack.tensor();
  const Tensor x_gates = stack.tensor();
  const OptionalTensor w_hh = stack.optional_tensor(), b_hh = stack.optional_tensor();
  const std::vector<Tensor> states = stack.tensors(), units = stack.tensors();
  const Tensor initial = stack.tensor();
  const OptionalTensor lengths = stack.optional_tensor(), resets = stack.optional_tensor();
  const bool reverse = stack.flag(), keep = stack.flag();

  RNNFAST_CHECK(!states.empty() && states[0].defined() && states[0].dim() == 2, "states have to be [N, H]");
  Arguments given(operations, numbers, results, x_gates, w_hh, units, lengths, resets, reverse, states[0].size(1),
                  states.size());
  const FlexLayer& l = given.l;
  given.check_program(l.X + l.A + l.S + l.U, l.S);
  check_tensor("b_hh", b_hh, {l.A * l.H}, given.dtype);
  check_tensor("initial", initial, {l.S}, ScalarType::Double);
  const Shape of_state{l.N, l.H}, of_steps{l.T, l.N, l.H};
  const std::vector<Tensor> after = copied(given, given.pointers("states", states, of_state), of_state);
  const std::vector<Tensor> every = given.make(l.S, of_steps), before = given.make(keep ? l.S : 0, of_steps);
  const Tensor a_gates = empty_if(keep, {l.T, l.N, l.A * l.H}, given.dtype);
  const auto to_states = data(after), to_every = data(every), to_before = data(before);

  FlexForward f{l};
  f.b_hh = given.read(b_hh), f.initial = static_cast<const double*>(given.read(initial));
  f.states = to_states.data(), f.every = to_every.data(), f.before = keep ? to_before.data() : nullptr;
  f.a_gates = data_if(keep, a_gates);
  chosen_flex().forward[given.dtype == ScalarType::Double](f);
  stack.give(after, every, before, a_gates);
}

void flex_backward(StableIValue* values, uint64_t arguments, uint64_t results_) {
  Stack stack(values, arguments, results_);
  const Tensor operations = stack.tensor(), numbers = stack.tensor(), results = stack.tensor();
  const Tensor x_gates = stack.tensor();
  const OptionalTensor w_hh = stack.optional_tensor();
  const std::vector<Tensor> before = stack.tensors(), units = stack.tensors();
  const Tensor a_gates = stack.tensor();
  const OptionalTensor lengths = stack.optional_tensor(), resets = stack.optional_tensor();
  const std::vector<Tensor> d_every = stack.tensors(), d_final = stack.tensors();
  const bool reverse = stack.flag();

  RNNFAST_CHECK(!before.empty() && before[0].defined() && before[0].dim() == 3, "before has to be [T, N, H]");
  Arguments given(operations, numbers, results, x_gates, w_hh, units, lengths, resets, reverse, before[0].size(2),
                  before.size());
  const FlexLayer& l = given.l;
  given.check_program(l.X + l.A + 2 * l.S + l.U, l.X + l.A + l.S + l.U);
  const Shape of_state{l.N, l.H}, of_steps{l.T, l.N, l.H};
  check_tensor("a_gates", a_gates, {l.T, l.N, l.A * l.H}, given.dtype);
  const auto from_before = given.pointers("before", before, of_steps);
  const auto from_every = given.pointers("d_every", d_every, of_steps, true);
  const std::vector<Tensor> d_states = copied(given, given.pointers("d_final", d_final, of_state), of_state);
  const auto to_states = data(d_states);
  const auto rows = [&](int64_t columns) { return empty({l.T, l.N, columns * l.H}, given.dtype); };
  const Tensor dx_gates = rows(l.X), da_gates = rows(l.A), d_units = rows(l.U);

  FlexBackward b{l};
  b.before = from_before.data(), b.a_gates = given.read(a_gates), b.d_every = from_every.data();
  b.d_states = to_states.data();
  b.dx_gates = dx_gates.data_ptr(), b.da_gates = da_gates.data_ptr(), b.d_units = d_units.data_ptr();
  chosen_flex().backward[given.dtype == ScalarType::Double](b);
  stack.give(dx_gates, da_gates, d_states, d_units);
}

}  // namespace
}  // namespace rnnfast

STABLE_TORCH_LIBRARY_FRAGMENT(rnnfast, m) {
  m.def(
      "cpu_flex_forward(Tensor operations, Tensor numbers, Tensor results, Tensor x_gates, Tensor? w_hh, Tensor? b_hh, "
      "Tensor[] states, Tensor[] units, Tensor initial, Tensor? lengths, Tensor? resets, bool reverse, bool keep) -> "
      "(Tensor[] states_after, Tensor[] every, Tensor[] before, Tensor a_gates)");
  m.def(
      "cpu_flex_backward(Tensor operations, Tensor numbers, Tensor results, Tensor x_gates, Tensor? w_hh, "
      "Tensor[] before, Tensor[] units, Tensor a_gates, Tensor? lengths, Tensor? resets, Tensor[] d_every, "
      "Tensor[] d_final, bool reverse) -> (Tensor dx_gates, Tensor da_gates, Tensor[] d_states, Tensor d_units)");
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CPU, m) {
  m.impl("cpu_flex_forward", rnnfast::flex_forward);
  m.impl("cpu_flex_backward", rnnfast::flex_backward);
}
