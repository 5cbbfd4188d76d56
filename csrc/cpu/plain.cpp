// Inference of a whole stack of layers, or of a cell, in one call of an operator, as torch.nn's modules are called:
// checks, layers, directions and layouts. What does not fit is left to rnnfast/functional.py, which says in torch's
// words what is wrong: no tensor is returned then.
#include "arguments.h"
#include "instruction_sets.h"

namespace rnnfast {
namespace {

struct PlainInputs {
  Form form;                    // of a kind of cell
  Tensor x;                     // [T, N, I], [N, T, I], [T, I]; a cell's: [N, I], [I]
  std::vector<Tensor> weights;  // layer by layer, direction by direction
  OptionalTensor h0, c0;        // [L*D, N, P] and [L*D, N, H], [L*D, P] and [L*D, H]; a cell's: [N, H], [H]

  explicit PlainInputs(Stack& stack)
      : form(stack.number()),
        x(stack.tensor()),
        weights(stack.tensors()),
        h0(stack.optional_tensor()),
        c0(stack.optional_tensor()) {}
};

struct Outputs {
  Tensor y, h_n, c_n;  // as torch.nn has them; a cell has no y, and but for an LSTM there is no c_n
};

Outputs run(const PlainInputs& in) {
  const auto& [layers, kind, layout, D] = in.form;
  Dimensions n = read_cell(kind, in.x, D == 2);
  const bool is_cell = layout == kCell;
  const int64_t dims = in.x.dim(), batched = is_cell ? 2 : 3;
  RNNFAST_CHECK(layers > 0 && layout < kLayouts && (!is_cell || (layers == 1 && D == 1)), "there is no such form");
  RNNFAST_CHECK(dims == batched || dims == batched - 1, "x has ", dims, " dimensions");
  // Without a batch the input lies as if it was the only row.
  const int64_t steps_at = layout == kBatchFirst && dims == batched ? 1 : 0;
  n.T = is_cell ? 1 : in.x.size(steps_at);
  n.N = dims == batched ? in.x.size(is_cell ? 0 : 1 - steps_at) : 1;
  n.I = in.x.size(dims - 1);
  n.R = n.T * n.N;
  RNNFAST_CHECK(n.T > 0, "x has no steps");
  check_sizes(n);
  const int64_t weights = in.weights.size() / layers;
  RNNFAST_CHECK(int64_t(in.weights.size()) == weights * layers, "the layers have unlike weights");
  count_weights(n, weights);
  check_weights(n, in.weights.data());

  const auto state = [&](int64_t features) {
    if (is_cell) return dims == batched ? Shape{n.N, features} : Shape{features};
    return dims == batched ? Shape{layers * n.D, n.N, features} : Shape{layers * n.D, features};
  };
  const Shape of_h = state(n.P), of_c = state(n.H);
  check_tensor("h0", in.h0, of_h, n.dtype);
  check_tensor("c0", in.c0, of_c, n.dtype);
  RNNFAST_CHECK(!in.c0 || n.has_cell, "no such cell has a cell state");
  RNNFAST_CHECK(!is_cell || !n.has(kProjection), "no cell has a projection");

  Reader read;
  const bool turned = steps_at == 1 && n.N > 1 && n.T > 1;
  const void* x = turned ? read(torch::stable::transpose(in.x, 0, 1)) : read(in.x);
  const char *h0 = static_cast<const char*>(read(in.h0)), *c0 = static_cast<const char*>(read(in.c0));
  Outputs out;
  out.h_n = empty(of_h, n.dtype);
  if (n.has_cell) out.c_n = empty(of_c, n.dtype);
  char *h_n = static_cast<char*>(out.h_n.data_ptr()), *c_n = n.has_cell ? static_cast<char*>(out.c_n.data_ptr()) : h_n;
  const StepTable table(n, nullptr, nullptr, nullptr);
  const int64_t H = n.H, P = n.P, width = n.D * P;
  const int64_t h_bytes = n.D * n.N * P * in.x.element_size(), c_bytes = n.D * n.N * H * in.x.element_size();
  const auto kernel = chosen_kernels().forward[n.cell][storage_of(n.dtype)];
  for (int64_t k = 0; k < layers; k++) {
    const Tensor* of_layer = &in.weights[k * weights];
    if (k) {
      n.I = width;
      check_weights(n, of_layer);
      RNNFAST_CHECK(n.H == H && n.P == P, "layers of several sizes");
    }
    const Tensor before = out.y;  // lives until the layer has read it
    if (!is_cell && dims < batched) {
      out.y = empty({n.T, width}, n.dtype);
    } else if (steps_at == 1 && k == layers - 1) {
      out.y = empty({n.N, n.T, width}, {width, std::max<int64_t>(n.N, 1) * width, 1}, n.dtype);
    } else if (!is_cell) {
      out.y = empty({n.T, n.N, width}, n.dtype);
    }
    Forward f{};
    fill(f, n, table, read, of_layer);
    f.x = x, f.h0 = h0 ? h0 + k * h_bytes : nullptr, f.c0 = c0 ? c0 + k * c_bytes : nullptr;
    f.h_n = h_n + k * h_bytes, f.c_n = c_n + k * c_bytes, f.y = is_cell ? f.h_n : out.y.data_ptr();
    kernel(f);
    x = f.y;
  }
  return out;
}

void plain(StableIValue* values, uint64_t arguments, uint64_t results) {
  Stack stack(values, arguments, results);
  const PlainInputs in(stack);
  Outputs out;
  try {
    out = run(in);
  } catch (const std::exception&) {
  }
  stack.give(out.y, out.h_n, out.c_n);
}

// Of tensors that lie elsewhere, however few.
void not_plain(StableIValue* values, uint64_t arguments, uint64_t results) {
  Stack stack(values, arguments, results);
  const PlainInputs in(stack);
  stack.give(Tensor(), Tensor(), Tensor());
}

}  // namespace
}  // namespace rnnfast

STABLE_TORCH_LIBRARY_FRAGMENT(rnnfast, m) {
  m.def(
      "cpu_plain(int form, Tensor x, Tensor[] weights, Tensor? h0=None, Tensor? c0=None) -> (Tensor y, Tensor h_n, "
      "Tensor c_n)");
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CPU, m) { m.impl("cpu_plain", rnnfast::plain); }

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CompositeExplicitAutograd, m) { m.impl("cpu_plain", rnnfast::not_plain); }
