// The CPU operators of a layer: checks and translates their arguments, allocates the results, and calls the kernels.
#include <cstring>

#include "../schemas.h"
#include "arguments.h"
#include "instruction_sets.h"

namespace rnnfast {
namespace {

StepTable make_table(const Dimensions& n, Reader& read, const Inputs& in) {
  return StepTable(n, static_cast<const int64_t*>(read(in.batch_sizes)), static_cast<const int64_t*>(read(in.lengths)),
                   static_cast<const uint8_t*>(read(in.resets)));
}

void fill(Layer& layer, const Dimensions& n, const StepTable& table, Reader& read, const Inputs& in) {
  fill(layer, n, table, read, in.weights.data());
  layer.x = read(in.x), layer.h0 = read(in.h0), layer.c0 = read(in.c0);
}

// Of what a layer returns; absent where nobody uses it.
struct OutputGradients {
  OptionalTensor dy, dh_n, dc_n, dc;

  explicit OutputGradients(Stack& stack)
      : dy(stack.optional_tensor()),
        dh_n(stack.optional_tensor()),
        dc_n(stack.optional_tensor()),
        dc(stack.optional_tensor()) {}
};

// What a forward leaves for the backward.
struct Saved {
  Tensor y, c, gates;

  explicit Saved(Stack& stack) : y(stack.tensor()), c(stack.tensor()), gates(stack.tensor()) {}
};

void cpu_forward(StableIValue* values, uint64_t arguments, uint64_t results) {
  Stack stack(values, arguments, results);
  const Inputs in(stack);
  bool keep_c = stack.flag(), keep_gates = stack.flag();

  const Dimensions n = check_layer(in);
  keep_c = keep_c && n.has_cell;
  keep_gates = keep_gates && n.saved_gates > 0;
  Tensor y = empty(n.rows(n.D * n.P), n.dtype), h_n = empty(n.state(n.P), n.dtype);
  Tensor c_n = empty_if(n.has_cell, n.state(n.H), n.dtype);
  Tensor c = empty_if(keep_c, n.rows(n.D * n.H), n.acc_dtype);
  Tensor gates = empty_if(keep_gates, {n.D, n.R, n.saved_gates * n.H}, n.dtype);

  Reader read;
  const StepTable table = make_table(n, read, in);
  Forward f{};
  fill(f, n, table, read, in);
  f.y = y.data_ptr(), f.h_n = h_n.data_ptr(), f.c_n = c_n.data_ptr();
  f.c = data_if(keep_c, c), f.gates = data_if(keep_gates, gates);
  chosen_kernels().forward[n.cell][storage_of(n.dtype)](f);
  stack.give(y, h_n, c_n, c, gates);
}

// What a backward is called with, checked, and what every one of them computes.
struct BackwardCall {
  const Inputs in;
  const OutputGradients gradients;
  const Saved saved;
  const Dimensions n;
  Reader read;
  const StepTable table;
  Tensor dh0, dc0;
  Backward f{};

  explicit BackwardCall(Stack& stack)
      : in(stack),
        gradients(stack),
        saved(stack),
        n(checked()),
        table(make_table(n, read, in)),
        dh0(empty_if(in.h0.has_value(), n.state(n.P), n.dtype)),
        dc0(empty_if(in.c0.has_value(), n.state(n.H), n.dtype)) {
    fill(f, n, table, read, in);
    f.dy = read(gradients.dy), f.dh_n = read(gradients.dh_n), f.y = read(saved.y);
    if (n.has_cell) f.dc_n = read(gradients.dc_n), f.dc = read(gradients.dc), f.c = read(saved.c);
    if (n.saved_gates) f.gates = read(saved.gates);
    f.dh0 = data_if(in.h0.has_value(), dh0), f.dc0 = data_if(in.c0.has_value(), dc0);
  }

  // Rows outside of every sequence: zero in a result over the rows.
  void clear(const Tensor& rows) const {
    if (table.steps.start[n.T] < n.R) std::memset(rows.data_ptr(), 0, rows.numel() * rows.element_size());
  }

  void run() const { chosen_kernels().backward[n.cell][storage_of(n.dtype)](f); }

 private:
  Dimensions checked() const {
    const Dimensions n = check_layer(in);
    const Shape absent{0};
    check_tensor("y", saved.y, n.rows(n.D * n.P), n.dtype);
    check_tensor("c", saved.c, n.has_cell ? n.rows(n.D * n.H) : absent, n.acc_dtype);
    check_tensor("gates", saved.gates, n.saved_gates ? Shape{n.D, n.R, n.saved_gates * n.H} : absent, n.dtype);
    check_tensor("dy", gradients.dy, n.rows(n.D * n.P), n.dtype);
    check_tensor("dh_n", gradients.dh_n, n.state(n.P), n.dtype);
    check_tensor("dc_n", gradients.dc_n, n.has_cell ? n.state(n.H) : absent, n.dtype);
    check_tensor("dc", gradients.dc, n.has_cell ? n.rows(n.D * n.H) : absent, n.acc_dtype);
    return n;
  }
};

void cpu_backward(StableIValue* values, uint64_t arguments, uint64_t results) {
  Stack stack(values, arguments, results);
  BackwardCall call(stack);
  const bool need_dx = stack.flag(), need_dw = stack.flag();

  const Dimensions& n = call.n;
  Tensor dx = empty_if(need_dx, n.rows(n.I), n.dtype);
  std::vector<Tensor> dweights;
  for (size_t i = 0; need_dw && i < call.in.weights.size(); i++) {
    auto sizes = call.in.weights[i].sizes();
    dweights.push_back(empty(Shape(sizes.begin(), sizes.end()), n.dtype));
  }
  call.f.dx = data_if(need_dx, dx), call.f.need_dw = need_dw;
  for (int64_t d = 0; need_dw && d < n.D; d++) {
    call.f.dw[d] = parameters<void*>(n, dweights.data(), d, [](const Tensor& t) { return t.data_ptr(); });
  }
  if (call.f.dx) call.clear(dx);
  call.run();
  stack.give(dx, call.dh0, call.dc0, dweights);
}

void cpu_gate_gradients(StableIValue* values, uint64_t arguments, uint64_t results) {
  Stack stack(values, arguments, results);
  BackwardCall call(stack);

  const Dimensions& n = call.n;
  const int64_t columns = (kCells[n.cell].grads + kCells[n.cell].unit_weights) * n.H;
  Tensor dgates = empty({n.D, n.R, columns + (call.f.projected ? n.P : 0)}, n.dtype);
  call.f.dgates = dgates.data_ptr();
  if (call.f.dgates) call.clear(dgates);
  call.run();
  stack.give(dgates, call.dh0, call.dc0);
}

}  // namespace
}  // namespace rnnfast

// Defined here, so that a program that holds these operators runs where there is this library alone.
STABLE_TORCH_LIBRARY_FRAGMENT(rnnfast, m) {
  m.def((std::string("cpu_forward") + rnnfast::kForwardSchema).c_str());
  m.def((std::string("cpu_layer") + rnnfast::kForwardSchema).c_str());
  m.def((std::string("cpu_backward") + rnnfast::kBackwardSchema).c_str());
  m.def((std::string("cpu_gate_gradients") + rnnfast::kGateGradientsSchema).c_str());
  m.def("cpu_isa(int? use) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CPU, m) {
  m.impl("cpu_forward", rnnfast::cpu_forward);
  m.impl("cpu_layer", rnnfast::cpu_forward);
  m.impl("cpu_backward", rnnfast::cpu_backward);
  m.impl("cpu_gate_gradients", rnnfast::cpu_gate_gradients);
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&rnnfast::instruction_set));
}
