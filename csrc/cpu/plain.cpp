// Inference of whole stacks of layers, and of cells, each in one call of an operator, as torch.nn's modules are called:
// checks, layers, directions and layouts. What does not fit is left to rnnfast/functional.py, which says in torch's
// words what is wrong: no tensor is returned then.
#include "plain.h"

#include "arguments.h"
#include "instruction_sets.h"

namespace rnnfast {
namespace {

// A stack's, or a cell's, which is one layer of one step.
struct PlainInputs {
  std::string mode;
  Tensor x;                     // [T, N, I], [N, T, I], [T, I]; a cell's: [N, I], [I]
  OptionalTensor h0, c0;        // [L*D, N, P] and [L*D, N, H], [L*D, P] and [L*D, H]; a cell's: [N, H], [H]
  std::string names;            // of the weights of one direction
  std::vector<Tensor> weights;  // layer by layer, direction by direction

  explicit PlainInputs(Stack& stack)
      : mode(stack.text()),
        x(stack.tensor()),
        h0(stack.optional_tensor()),
        c0(stack.optional_tensor()),
        names(stack.text()),
        weights(stack.tensors()) {}
};

enum Form { kTimeFirst, kBatchFirst, kCell };

// [output, h_n], and c_n of a cell that has it; of kCell h, and c.
std::vector<Tensor> run(const PlainInputs& in, int64_t layers, bool bidirectional, Form form) {
  Dimensions n = read_cell(in.mode, in.x, bidirectional);
  const int64_t dims = in.x.dim(), batched = form == kCell ? 2 : 3;
  RNNFAST_CHECK(layers > 0 && (dims == batched || dims == batched - 1), "x has ", dims, " dimensions");
  // Without a batch the input lies as if it was the only row.
  const int64_t steps_at = form == kBatchFirst && dims == batched ? 1 : 0;
  n.T = form == kCell ? 1 : in.x.size(steps_at);
  n.N = dims == batched ? in.x.size(form == kCell ? 0 : 1 - steps_at) : 1;
  n.I = in.x.size(dims - 1);
  n.R = n.T * n.N;
  RNNFAST_CHECK(n.T > 0, "x has no steps");
  check_sizes(n);
  RNNFAST_CHECK(in.weights.size() % layers == 0, "got ", in.weights.size(), " weights for ", layers, " layers");
  read_names(n, in.mode, in.names, in.weights.size() / layers);
  check_weights(n, in.weights.data());

  const auto state = [&](int64_t features) {
    Shape shape;
    if (form != kCell) shape.push_back(layers * n.D);
    if (dims == batched) shape.push_back(n.N);
    shape.push_back(features);
    return shape;
  };
  check_tensor("h0", in.h0, state(n.P), n.dtype);
  check_tensor("c0", in.c0, state(n.H), n.dtype);
  RNNFAST_CHECK(!in.c0 || n.has_cell, "no ", in.mode, " has a cell state");
  RNNFAST_CHECK(form != kCell || !n.has(kProjection), "no cell has a projection");

  Reader read;
  const bool turned = steps_at == 1 && n.N > 1 && n.T > 1;
  const void* x = turned ? read(torch::stable::transpose(in.x, 0, 1)) : read(in.x);
  const char *h0 = static_cast<const char*>(read(in.h0)), *c0 = static_cast<const char*>(read(in.c0));
  Tensor h_n = empty(state(n.P), n.dtype), c_n = n.has_cell ? empty(state(n.H), n.dtype) : h_n, y;
  char *h_end = static_cast<char*>(h_n.data_ptr()), *c_end = static_cast<char*>(c_n.data_ptr());
  const StepTable table(n, nullptr, nullptr, nullptr);
  const int64_t H = n.H, P = n.P, width = n.D * P;
  const int64_t h_bytes = n.D * n.N * P * in.x.element_size(), c_bytes = n.D * n.N * H * in.x.element_size();
  const auto kernel = chosen_kernels().forward[n.cell][storage_of(n.dtype)];
  for (int64_t k = 0; k < layers; k++) {
    const Tensor* weights = &in.weights[k * n.D * n.weights];
    if (k) {
      n.I = width;
      check_weights(n, weights);
      RNNFAST_CHECK(n.H == H && n.P == P, "layers of several sizes");
    }
    const Tensor before = y;  // lives until the layer has read it
    if (form == kCell) {
      y = h_n;
    } else if (dims < batched) {
      y = empty({n.T, width}, n.dtype);
    } else if (steps_at == 1 && k == layers - 1) {
      y = empty({n.N, n.T, width}, {width, std::max<int64_t>(n.N, 1) * width, 1}, n.dtype);
    } else {
      y = empty({n.T, n.N, width}, n.dtype);
    }
    Forward f{};
    fill(f, n, table, read, weights);
    f.x = x, f.h0 = h0 ? h0 + k * h_bytes : nullptr, f.c0 = c0 ? c0 + k * c_bytes : nullptr;
    f.y = y.data_ptr(), f.h_n = h_end + k * h_bytes, f.c_n = c_end + k * c_bytes;
    kernel(f);
    x = f.y;
  }
  std::vector<Tensor> outputs;
  if (form != kCell) outputs.push_back(y);
  outputs.push_back(h_n);
  if (n.has_cell) outputs.push_back(c_n);
  return outputs;
}

std::vector<Tensor> run_if_right(const PlainInputs& in, int64_t layers, bool bidirectional, Form form) {
  try {
    return run(in, layers, bidirectional, form);
  } catch (const std::exception&) {
    return {};
  }
}

}  // namespace

void plain_stack(StableIValue* values, uint64_t arguments, uint64_t results) {
  Stack stack(values, arguments, results);
  const PlainInputs in(stack);
  const int64_t layers = stack.number();
  const bool bidirectional = stack.flag(), batch_first = stack.flag();
  stack.give(run_if_right(in, layers, bidirectional, batch_first ? kBatchFirst : kTimeFirst));
}

void plain_cell(StableIValue* values, uint64_t arguments, uint64_t results) {
  Stack stack(values, arguments, results);
  const PlainInputs in(stack);
  stack.give(run_if_right(in, 1, false, kCell));
}

}  // namespace rnnfast
