// The CPU operators of a layer: checks and translates their arguments, allocates the results, and calls the kernels.
#include <cstring>
#include <deque>

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

// ---- members of an ensemble, which are alike: each tensor but batch_sizes begins with a dimension of them

int64_t members_of(const Inputs& all) {
  RNNFAST_CHECK(all.x.defined() && all.x.dim() && all.x.size(0), "x has to begin with a dimension of members");
  return all.x.size(0);
}

Tensor part(const Tensor& all, int64_t member, int64_t members) {
  if (all.defined() && all.dim() == 1 && all.size(0) == 0) return all;  // what is absent is so of all
  RNNFAST_CHECK(all.defined() && all.dim() && all.size(0) == members,
                "each tensor but batch_sizes has to begin with a dimension of ", members, " members, as x does");
  return torch::stable::select(all, 0, member);
}

OptionalTensor part(const OptionalTensor& all, int64_t member, int64_t members) {
  return all ? OptionalTensor(part(*all, member, members)) : all;
}

Inputs part(Inputs all, int64_t member, int64_t members) {
  for (OptionalTensor* tensor : {&all.h0, &all.c0, &all.lengths, &all.resets}) *tensor = part(*tensor, member, members);
  for (Tensor& weight : all.weights) weight = part(weight, member, members);
  all.x = part(all.x, member, members);
  return all;
}

// A tensor to be returned; where it is not wanted, of shape [0].
struct Result {
  const bool wanted;
  const Tensor tensor;
  const int64_t bytes;  // of a member

  // Members: 0 of a call that is of none.
  Result(bool wanted, Sizes shape, ScalarType dtype, int64_t members)
      : wanted(wanted),
        tensor(empty_if(wanted, with(members, shape), dtype)),
        bytes(tensor.numel() / std::max<int64_t>(members, 1) * tensor.element_size()) {}

  void* data(int64_t member) const { return wanted ? static_cast<char*>(tensor.data_ptr()) + member * bytes : nullptr; }

 private:
  static Shape with(int64_t members, Sizes shape) {
    Shape all;
    if (members) all.push_back(members);
    for (int64_t size : shape) all.push_back(size);
    return all;
  }
};

// Runs calls that are alike: as many at a time as there are threads, and what that leaves one after the other.
template <class Call>
void run(std::deque<Call>& calls) {
  const int64_t threads = torch::stable::get_num_threads(), alone = calls.size() / threads * threads;
  for (int64_t i = 0; i < alone; i++) calls[i].f.threads = 1;
  const auto body = [](void* context, int64_t begin, int64_t end) {
    for (; begin < end; begin++) (*static_cast<std::deque<Call>*>(context))[begin].run();
  };
  if (alone) parallel_tasks(alone, body, &calls);
  body(&calls, alone, calls.size());
}

// ---- forward

struct Outputs {
  const Result y, h_n, c_n, c, gates;

  Outputs(const Dimensions& n, bool keep_c, bool keep_gates, int64_t members = 0)
      : y(true, n.rows(n.D * n.P), n.dtype, members),
        h_n(true, n.state(n.P), n.dtype, members),
        c_n(n.has_cell, n.state(n.H), n.dtype, members),
        c(keep_c && n.has_cell, n.rows(n.D * n.H), n.acc_dtype, members),
        gates(keep_gates && n.saved_gates > 0, {n.D, n.R, n.saved_gates * n.H}, n.dtype, members) {}

  void give(Stack& stack) const { stack.give(y.tensor, h_n.tensor, c_n.tensor, c.tensor, gates.tensor); }
};

struct ForwardCall {
  const Dimensions n;
  Reader read;
  const StepTable table;
  Forward f{};

  ForwardCall(const Inputs& in, const Dimensions& n, const Outputs& out, int64_t member = 0)
      : n(n), table(make_table(n, read, in)) {
    fill(f, n, table, read, in);
    f.y = out.y.data(member), f.h_n = out.h_n.data(member), f.c_n = out.c_n.data(member);
    f.c = out.c.data(member), f.gates = out.gates.data(member);
  }

  void run() const { chosen_kernels().forward[n.cell][storage_of(n.dtype)](f); }
};

void cpu_forward(StableIValue* values, uint64_t arguments, uint64_t results) {
  Stack stack(values, arguments, results);
  const Inputs in(stack);
  const bool keep_c = stack.flag(), keep_gates = stack.flag();

  const Dimensions n = check_layer(in);
  const Outputs out(n, keep_c, keep_gates);
  ForwardCall(in, n, out).run();
  out.give(stack);
}

void cpu_forward_members(StableIValue* values, uint64_t arguments, uint64_t results) {
  Stack stack(values, arguments, results);
  const Inputs all(stack);
  const bool keep_c = stack.flag(), keep_gates = stack.flag();

  const int64_t members = members_of(all);
  const Dimensions n = check_layer(part(all, 0, members));
  const Outputs out(n, keep_c, keep_gates, members);
  std::deque<ForwardCall> calls;
  for (int64_t i = 0; i < members; i++) calls.emplace_back(part(all, i, members), n, out, i);
  run(calls);
  out.give(stack);
}

// ---- backward

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

// What every backward is called with.
struct BackwardArguments {
  Inputs in;
  OutputGradients gradients;
  Saved saved;

  explicit BackwardArguments(Stack& stack) : in(stack), gradients(stack), saved(stack) {}

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

BackwardArguments part(BackwardArguments all, int64_t member, int64_t members) {
  auto& [in, gradients, saved] = all;
  in = part(std::move(in), member, members);
  for (OptionalTensor* tensor : {&gradients.dy, &gradients.dh_n, &gradients.dc_n, &gradients.dc}) {
    *tensor = part(*tensor, member, members);
  }
  for (Tensor* tensor : {&saved.y, &saved.c, &saved.gates}) *tensor = part(*tensor, member, members);
  return all;
}

// What every backward returns.
struct StateGradients {
  const Result dh0, dc0;

  StateGradients(const Inputs& in, const Dimensions& n, int64_t members = 0)
      : dh0(in.h0.has_value(), n.state(n.P), n.dtype, members),
        dc0(in.c0.has_value(), n.state(n.H), n.dtype, members) {}
};

struct BackwardCall {
  const Dimensions n;
  Reader read;
  const StepTable table;
  Backward f{};

  BackwardCall(const BackwardArguments& of, const Dimensions& n, const StateGradients& out, int64_t member = 0)
      : n(n), table(make_table(n, read, of.in)) {
    fill(f, n, table, read, of.in);
    f.dy = read(of.gradients.dy), f.dh_n = read(of.gradients.dh_n), f.y = read(of.saved.y);
    if (n.has_cell) f.dc_n = read(of.gradients.dc_n), f.dc = read(of.gradients.dc), f.c = read(of.saved.c);
    if (n.saved_gates) f.gates = read(of.saved.gates);
    f.dh0 = out.dh0.data(member), f.dc0 = out.dc0.data(member);
  }

  // Where a result over the rows lies; those outside of every sequence are zero in it.
  void* over_rows(const Result& result, int64_t member = 0) const {
    void* data = result.data(member);
    if (data && table.steps.start[n.T] < n.R) std::memset(data, 0, result.bytes);
    return data;
  }

  void run() const { chosen_kernels().backward[n.cell][storage_of(n.dtype)](f); }
};

struct InputGradients : StateGradients {
  const Result dx;
  std::vector<Result> dweights;

  // First: of the only call or the first member.
  InputGradients(const Inputs& first, const Dimensions& n, bool need_dx, bool need_dw, int64_t members = 0)
      : StateGradients(first, n, members), dx(need_dx, n.rows(n.I), n.dtype, members) {
    for (size_t i = 0; need_dw && i < first.weights.size(); i++) {
      dweights.emplace_back(true, first.weights[i].sizes(), n.dtype, members);
    }
  }

  void fill(BackwardCall& call, int64_t member = 0) const {
    call.f.dx = call.over_rows(dx, member), call.f.need_dw = !dweights.empty();
    for (int64_t d = 0; call.f.need_dw && d < call.n.D; d++) {
      call.f.dw[d] = parameters<void*>(call.n, dweights.data(), d, [=](const Result& of) { return of.data(member); });
    }
  }

  void give(Stack& stack) const {
    std::vector<Tensor> of_weights;
    for (const Result& of : dweights) of_weights.push_back(of.tensor);
    stack.give(dx.tensor, dh0.tensor, dc0.tensor, of_weights);
  }
};

void cpu_backward(StableIValue* values, uint64_t arguments, uint64_t results) {
  Stack stack(values, arguments, results);
  const BackwardArguments of(stack);
  const bool need_dx = stack.flag(), need_dw = stack.flag();

  const Dimensions n = of.checked();
  const InputGradients out(of.in, n, need_dx, need_dw);
  BackwardCall call(of, n, out);
  out.fill(call);
  call.run();
  out.give(stack);
}

void cpu_backward_members(StableIValue* values, uint64_t arguments, uint64_t results) {
  Stack stack(values, arguments, results);
  const BackwardArguments all(stack);
  const bool need_dx = stack.flag(), need_dw = stack.flag();

  const int64_t members = members_of(all.in);
  const BackwardArguments first = part(all, 0, members);
  const Dimensions n = first.checked();
  const InputGradients out(first.in, n, need_dx, need_dw, members);
  std::deque<BackwardCall> calls;
  for (int64_t i = 0; i < members; i++) out.fill(calls.emplace_back(part(all, i, members), n, out, i), i);
  run(calls);
  out.give(stack);
}

void cpu_gate_gradients(StableIValue* values, uint64_t arguments, uint64_t results) {
  Stack stack(values, arguments, results);
  const BackwardArguments of(stack);

  const Dimensions n = of.checked();
  const StateGradients out(of.in, n);
  BackwardCall call(of, n, out);
  const int64_t columns = (kCells[n.cell].grads + kCells[n.cell].unit_weights) * n.H;
  const Result dgates(true, {n.D, n.R, columns + (call.f.projected ? n.P : 0)}, n.dtype, 0);
  call.f.dgates = call.over_rows(dgates);
  call.run();
  stack.give(dgates.tensor, out.dh0.tensor, out.dc0.tensor);
}

}  // namespace
}  // namespace rnnfast

// Defined here, so that a program that holds these operators runs where there is this library alone.
STABLE_TORCH_LIBRARY_FRAGMENT(rnnfast, m) {
  m.def((std::string("cpu_forward") + rnnfast::kForwardSchema).c_str());
  m.def((std::string("cpu_layer") + rnnfast::kForwardSchema).c_str());
  m.def((std::string("cpu_backward") + rnnfast::kBackwardSchema).c_str());
  m.def((std::string("cpu_forward_members") + rnnfast::kForwardSchema).c_str());
  m.def((std::string("cpu_backward_members") + rnnfast::kBackwardSchema).c_str());
  m.def((std::string("cpu_gate_gradients") + rnnfast::kGateGradientsSchema).c_str());
  m.def("cpu_isa(int? use) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CPU, m) {
  m.impl("cpu_forward", rnnfast::cpu_forward);
  m.impl("cpu_layer", rnnfast::cpu_forward);
  m.impl("cpu_backward", rnnfast::cpu_backward);
  m.impl("cpu_forward_members", rnnfast::cpu_forward_members);
  m.impl("cpu_backward_members", rnnfast::cpu_backward_members);
  m.impl("cpu_gate_gradients", rnnfast::cpu_gate_gradients);
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&rnnfast::instruction_set));
}
