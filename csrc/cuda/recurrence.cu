// The GPU operators: the recurrence of one layer, between the products over the whole sequence, which are torch's.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <map>
#include <mutex>

#include "../ops.h"
#include "blas.h"
#include "plan.h"

namespace rnnfast {
namespace {

// A Regime, and of a persistent one, added to it, kCuts * (1 + the number of one of its cuts).
constexpr int64_t kCuts = 16;
std::atomic<int64_t> forced_regime{kByTable};

int64_t cuda_regime(std::optional<int64_t> use) {
  if (use) {
    const int64_t regime = *use % kCuts;
    const bool is_cut = *use >= kCuts;
    RNNFAST_CHECK(
        *use >= 0 && regime < kRegimes && *use < 64 * kCuts && (!is_cut || (regime != kByTable && regime != kStepwise)),
        "no regime has number ", *use);
    forced_regime = *use;
  }
  return forced_regime;
}

const CellKernels& kernels_of(CellKind cell) {
#define RNNFAST_ADDRESS(Cell) &Cell##_persistent,
  static const CellKernels* const all[] = {RNNFAST_CELLS(RNNFAST_ADDRESS)};
#undef RNNFAST_ADDRESS
  return *all[cell];
}

const JointKernels& joint_of(const Layer& layer) {
#define RNNFAST_ADDRESS(Cell) Cell##_joint,
  static const JointKernels* const all[] = {RNNFAST_CELLS(RNNFAST_ADDRESS)};
#undef RNNFAST_ADDRESS
  return all[layer.cell][layer.arithmetic];
}

const StepKernels& step_kernels_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return step_kernels[0];
    case ScalarType::Double:
      return step_kernels[1];
    case ScalarType::BFloat16:
      return step_kernels[2];
    default:
      return step_kernels[3];
  }
}

// What serves a layer's forward or backward, beside kernels of single elements.
template <class Arguments>
Plan make_plan(const Layer& layer, Regime forced, std::optional<int> only) {
  const Chip of = chip(layer.device);
  const CellKernels& kernels = kernels_of(layer.cell);
  const bool has_persistent = layer.arithmetic < kPersistentArithmetics;
  if constexpr (std::is_same<Arguments, ForwardArguments>::value) {
    return make_plan(has_persistent ? kernels.forward[layer.arithmetic] : nullptr, joint_of(layer).forward, layer, of,
                     forced, only);
  } else {
    return make_plan(has_persistent ? kernels.backward[layer.arithmetic] : nullptr, joint_of(layer).backward, layer, of,
                     forced, only);
  }
}

// The plan of a layer's forward or backward, found once: it asks the driver what the device can hold.
template <class Arguments>
Plan plan_of(Layer layer, bool projected, int64_t steps) {
  layer.N = round_up(layer.N, kRows);  // blocks differ by whole row blocks alone
  const int64_t asked_for = forced_regime;
  const Regime forced = Regime(asked_for % kCuts);
  Plan plan;
  const bool only_stepwise = projected || layer.H == 0;
  if (!only_stepwise && forced != kStepwise) {
    using Key = std::array<int64_t, 7>;
    static std::map<Key, Plan> plans;
    static std::mutex mutex;
    const Key key = {layer.cell, layer.arithmetic, layer.N, layer.H, layer.D, layer.device, asked_for};
    std::lock_guard<std::mutex> lock(mutex);
    auto found = plans.find(key);
    if (found == plans.end()) {
      const auto only = asked_for < kCuts ? std::nullopt : std::optional<int>(asked_for / kCuts - 1);
      found = plans.emplace(key, make_plan<Arguments>(layer, forced, only)).first;
    }
    plan = found->second;
  }
  if (plan.regime == kJoint && forced == kByTable && steps < kFewestJointSteps) plan = {};
  RNNFAST_CHECK(forced == kByTable || forced == plan.regime || (forced == kJoint && only_stepwise),
                "the regime asked for cannot serve this call");
  if (plan.regime == kStepwise || plan.regime == kJoint) {
    std::string why = "the chip does not hold W_hh, or not so quickly";
    if (layer.arithmetic == kOfDouble) why = "float64 has no fast products";
    if (layer.H == 0) why = "there are no units";
    if (projected) why = "a projection makes another product a step";
    if (forced == plan.regime) why = "asked for";
    explain_steps(plan, why);
  }
  return plan;
}

// ---- arguments

// Records of an operator's arguments, as rnnfast/records.py has them.

// Of each direction; absent ones: none.
struct StepWeights {
  std::vector<Tensor> w_hh, b_hh, w_hr, w_units;

  explicit StepWeights(Stack& stack)
      : w_hh(stack.tensors()), b_hh(stack.tensors()), w_hr(stack.tensors()), w_units(stack.tensors()) {}
};

struct ForwardSteps {
  Tensor x_gates, h;
  OptionalTensor c;
  Tensor y;
  OptionalTensor cs, gates;

  explicit ForwardSteps(Stack& stack)
      : x_gates(stack.tensor()),
        h(stack.tensor()),
        c(stack.optional_tensor()),
        y(stack.tensor()),
        cs(stack.optional_tensor()),
        gates(stack.optional_tensor()) {}
  const Tensor& rows() const { return x_gates; }  // [D, R, ...] and [D, N, P]: they tell the sizes
  const Tensor& state() const { return h; }
};

struct BackwardSteps {
  OptionalTensor dy, dcs;
  Tensor gates, y, cs;
  OptionalTensor h0, c0;
  Tensor dh;
  OptionalTensor dc;
  Tensor dgates;
  OptionalTensor dprojections;

  explicit BackwardSteps(Stack& stack)
      : dy(stack.optional_tensor()),
        dcs(stack.optional_tensor()),
        gates(stack.tensor()),
        y(stack.tensor()),
        cs(stack.tensor()),
        h0(stack.optional_tensor()),
        c0(stack.optional_tensor()),
        dh(stack.tensor()),
        dc(stack.optional_tensor()),
        dgates(stack.tensor()),
        dprojections(stack.optional_tensor()) {}
  const Tensor& rows() const { return dgates; }
  const Tensor& state() const { return dh; }
};

// How rows and steps lie. Packed rows have offsets, of each step, and lengths.
struct Tables {
  OptionalTensor offsets, lengths, resets;

  explicit Tables(Stack& stack)
      : offsets(stack.optional_tensor()), lengths(stack.optional_tensor()), resets(stack.optional_tensor()) {}
};

// All arguments of an operator of steps.
template <class Steps>
struct OfOperator {
  std::string mode;
  StepWeights weights;
  Steps of;
  Tables tables;
  int64_t steps;
  bool tf32;
  int64_t stream;

  explicit OfOperator(Stack& stack)
      : mode(stack.text()),
        weights(stack),
        of(stack),
        tables(stack),
        steps(stack.number()),
        tf32(stack.flag()),
        stream(stack.number()) {}
};

struct Call {
  CellKind cell;
  ScalarType dtype, acc_dtype;
  int64_t T, N, R, H, P, D, G, saved, columns, stream;
  int32_t device;
  bool has_cell, projected, tf32;
  Arithmetic arithmetic;
  Sequence sequence;
  const void *b_hh[2], *w_units[2];  // of each direction; or null

  Layer layer() const { return {cell, arithmetic, N, H, D, device}; }
};

Arithmetic arithmetic_of(ScalarType dtype, bool tf32) {
  if (dtype == ScalarType::BFloat16) return kOfBFloat16;
  if (dtype == ScalarType::Half) return kOfHalf;
  if (dtype == ScalarType::Double) return kOfDouble;
  return tf32 ? kOfTf32 : kOfExact;
}

// Kernels assume what this checks: shape, dtype, device and layout.
class Checker {
 public:
  explicit Checker(int32_t device) : device_(device) {}

  void* operator()(const char* name, const Tensor& tensor, const Shape& shape, ScalarType dtype) const {
    check_tensor(name, tensor, shape, dtype);
    RNNFAST_CHECK(tensor.is_contiguous() && tensor.get_device_index() == device_, name,
                  " has to be contiguous, and on the device of the others");
    return tensor.data_ptr();
  }
  void* operator()(const char* name, const OptionalTensor& tensor, const Shape& shape, ScalarType dtype) const {
    return tensor ? (*this)(name, *tensor, shape, dtype) : nullptr;
  }
  // What a cell may not have: given, even so, it has shape [0].
  template <class MaybeTensor>
  void* if_has(bool has, const char* name, const MaybeTensor& tensor, const Shape& shape, ScalarType dtype) const {
    return (*this)(name, tensor, has ? shape : Shape{0}, dtype);
  }
  // What a cell that has it cannot do without.
  void* required_if(bool has, const char* name, const OptionalTensor& tensor, const Shape& shape,
                    ScalarType dtype) const {
    RNNFAST_CHECK(tensor || !has, name, " is missing");
    return if_has(has, name, tensor, shape, dtype);
  }

 private:
  int32_t device_;
};

Sequence checked_sequence(const Checker& check, int64_t T, int64_t N, int64_t R, const Tables& tables) {
  const auto& [offsets, lengths, resets] = tables;
  RNNFAST_CHECK(offsets ? lengths && !resets : R == T * N, R, " rows are not ", T, " steps of ", N);
  return {T,
          N,
          R,
          static_cast<const int64_t*>(check("offsets", offsets, {T}, ScalarType::Long)),
          static_cast<const int64_t*>(check("lengths", lengths, {N}, ScalarType::Long)),
          static_cast<const uint8_t*>(check("resets", resets, {T, N}, ScalarType::Byte))};
}

// Numbers of a block's geometry are ints: the largest counts the bytes of 32 rows' gradients, 512 a unit.
void check_sizes(int64_t rows, int64_t units) {
  RNNFAST_CHECK(rows >= 0 && rows < INT32_MAX && units >= 0 && units < INT32_MAX / 1024, "no kernel for ", rows,
                " rows and ", units, " units");
}

// Pointers to a weight of each direction, of which there may be none.
void put(const void* (&to)[2], const Checker& check, const char* name, const std::vector<Tensor>& weights,
         const Shape& shape, const Call& c) {
  RNNFAST_CHECK(weights.empty() || int64_t(weights.size()) == c.D, "got ", weights.size(), " ", name, " for ", c.D,
                " direction(s)");
  for (size_t d = 0; d < weights.size(); d++) to[d] = check(name, weights[d], shape, c.dtype);
}

template <class Steps>
Call make_call(const Checker& check, const OfOperator<Steps>& in) {
  const Tensor &rows = in.of.rows(), &state = in.of.state();
  const int64_t T = in.steps, N = state.size(1), R = rows.size(1), P = state.size(2);
  const auto& [w_hh, b_hh, w_hr, w_units] = in.weights;
  Call c{};
  c.cell = parse_cell(in.mode);
  c.dtype = rows.scalar_type();
  c.acc_dtype = accumulated(c.dtype);
  c.arithmetic = arithmetic_of(c.dtype, in.tf32), c.tf32 = in.tf32;
  const CellFacts& facts = kCells[c.cell];
  c.G = facts.gates, c.saved = facts.saved, c.columns = facts.grads + facts.unit_weights, c.has_cell = facts.has_cell;
  c.D = w_hh.size(), c.device = rows.get_device_index(), c.stream = in.stream;
  RNNFAST_CHECK((c.D == 1 || c.D == 2) && w_hh[0].dim() == 2 && w_hh[0].size(0) % c.G == 0, "weight_hh has to be [",
                c.G, " * hidden_size, ...], for one direction or two");
  c.T = T, c.N = N, c.R = R, c.P = P, c.H = w_hh[0].size(0) / c.G;
  c.projected = !w_hr.empty();
  RNNFAST_CHECK(!c.projected || facts.projects, "no ", in.mode, " has a projection");
  RNNFAST_CHECK(w_units.empty() == (facts.unit_weights == 0), "got ", w_units.size(), " weight_units for a ", in.mode);
  check_sizes(N, std::max(c.H, P));
  RNNFAST_CHECK(T > 0 && T < INT32_MAX && N > 0 && R > 0, "no kernel for ", T, " steps of ", N, " rows, ", R,
                " in all");
  RNNFAST_CHECK(c.projected || P == c.H, "without a projection h has ", P, " units, but weight_hh is for ", c.H);
  const void* unused[2] = {};
  put(unused, check, "weight_hh", w_hh, {c.G * c.H, c.P}, c);
  put(unused, check, "weight_hr", w_hr, {c.P, c.H}, c);
  put(c.b_hh, check, "bias_hh", b_hh, {c.G * c.H}, c);
  put(c.w_units, check, "weight_units", w_units, {facts.unit_weights * c.H}, c);
  c.sequence = checked_sequence(check, T, N, R, in.tables);
  return c;
}

// ---- whether rows begin at multiples of two values

bool begin_so(std::initializer_list<const void*> pointers, size_t bytes) {
  return std::all_of(pointers.begin(), pointers.end(),
                     [=](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; });
}

// Whether rows of such tensors of the layer's dtype do so, and those of c, which is float32.
bool is_wide(const Call& c, std::initializer_list<const void*> values, const void* cs) {
  return c.H % 2 == 0 && begin_so(values, c.dtype == ScalarType::Float ? 8 : 4) && begin_so({cs}, 8);
}

// ---- persistent: one launch, or a few where the chip cannot hold all groups at once

template <class Arguments>
void run(const Call& c, const Plan& plan, Arguments& arguments, const Tensor& like) {
  const Geometry& g = plan.geometry;
  arguments.sequence = c.sequence, arguments.geometry = g;
  arguments.H = c.H, arguments.D = c.D;
  std::copy_n(c.w_units, 2, arguments.w_units);
  std::optional<Tensor> words;
  if (plan.regime == kChip) {  // zero is no step's number
    const int64_t bytes = plan.groups * kSets * g.set_bytes / Grid::kData * sizeof(uint64_t);
    words = torch::stable::new_zeros(like, Shape{bytes}, ScalarType::Byte);
    arguments.words = static_cast<uint64_t*>(words->data_ptr());
  }
  Launch launch = plan.launch;
  launch.stream = c.stream;
  const auto kernel = reinterpret_cast<void (*)(Arguments)>(const_cast<void*>(plan.kernel));
  for (int64_t first = 0; first < plan.groups; first += plan.groups_at_once) {
    arguments.first_group = first;
    launch.blocks = std::min(plan.groups_at_once, plan.groups - first) * g.size;
    rnnfast::launch(kernel, launch, arguments);
  }
}

// ---- products

std::optional<Operand> operand_of(const Tensor& t) {
  return rnnfast::operand_of(t.data_ptr(), t.size(0), t.size(1), t.stride(0), t.stride(1));
}

BlasType blas_type(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return BlasType::kFloat;
    case ScalarType::Double:
      return BlasType::kDouble;
    case ScalarType::Half:
      return BlasType::kHalf;
    default:
      return BlasType::kBFloat16;
  }
}

// cuBLAS with its workspace, for the products of one call: bound to the stream once, not at every step.
class Multiplier {
 public:
  Multiplier(const Tensor& like, bool tf32, int64_t stream)
      : tf32_(tf32),
        device_(like.get_device_index()),
        stream_(stream),
        blas_(RNNFAST_ON_GPU ? Blas::find() : nullptr) {}

  // out = a b, matrices, or out += a b; whether cuBLAS could.
  bool by_blas(const Tensor& a, const Tensor& b, const Tensor& out, bool accumulate) const {
    const int64_t m = out.size(0), n = out.size(1), k = a.size(1);
    if (!blas_ || std::min({m, n, k}) == 0 || std::max({m, n, k}) >= INT32_MAX) return false;
    const auto of_out = operand_of(out), of_a = operand_of(a), of_b = operand_of(b);
    if (!of_out || !of_a || !of_b || of_out->is_transposed()) return false;
    if (std::max({of_out->stride(), of_a->stride(), of_b->stride()}) >= INT32_MAX) return false;
    OnDevice on(device_);
    if (!handle_) {
      workspace_ = torch::stable::new_empty(out, Shape{Blas::kWorkspace}, ScalarType::Byte);
      handle_.emplace(*blas_, device_, stream_, workspace_->data_ptr());
    }
    return handle_->multiply(*of_out, *of_a, *of_b, m, n, k, blas_type(out.scalar_type()), accumulate, tf32_);
  }

  // out = a b; by torch where cuBLAS can't.
  void operator()(const Tensor& a, const Tensor& b, const Tensor& out) const {
    if (by_blas(a, b, out, false)) return;
    std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                      torch::stable::detail::from(out)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);
  }

  // out[d] = a[d] w[d], of each direction
  void operator()(const std::vector<Tensor>& a, const std::vector<Tensor>& w, const std::vector<Tensor>& out) const {
    for (size_t d = 0; d < w.size(); d++) (*this)(a[d], w[d], out[d]);
  }

 private:
  bool tf32_;
  int device_;
  int64_t stream_;
  Blas* blas_;
  mutable std::optional<Tensor> workspace_;
  mutable std::optional<Blas::Handle> handle_;
};

bool cuda_multiply(Tensor a, Tensor b, Tensor out, bool accumulate, bool tf32, int64_t stream) {
  RNNFAST_CHECK(a.defined() && b.defined() && out.defined() && a.dim() == 2 && b.dim() == 2 && out.dim() == 2 &&
                    a.size(0) == out.size(0) && a.size(1) == b.size(0) && b.size(1) == out.size(1),
                "a, b and out have to be matrices that fit");
  accumulated(out.scalar_type());
  for (const Tensor* t : {&a, &b}) {
    RNNFAST_CHECK(t->scalar_type() == out.scalar_type() && t->get_device_index() == out.get_device_index(),
                  "a, b and out have to be of one dtype and on one device");
  }
  return Multiplier(out, tf32, stream).by_blas(a, b, out, accumulate);
}

// ---- stepwise: a product, and what is between it and the next one

std::vector<Tensor> directions_of(const Tensor& t) {
  std::vector<Tensor> out;
  for (int64_t d = 0; d < t.size(0); d++) out.push_back(torch::stable::select(t, 0, d));
  return out;
}

std::vector<Tensor> transposed(const std::vector<Tensor>& weights) {
  std::vector<Tensor> out;
  for (const Tensor& w : weights) out.push_back(torch::stable::transpose(w, 0, 1));
  return out;
}

template <class Arguments>
void over(int64_t elements, const Call& c, void (*kernel)(Arguments), const Arguments& arguments) {
  if (elements == 0) return;
  launch(kernel, {divide_up(elements, kStepThreads), kStepThreads, 0, 1, false, c.device, c.stream}, arguments);
}

void set(StepArguments& step, const Call& c) {
  step.sequence = c.sequence;
  step.H = c.H, step.P = c.P, step.D = c.D;
  std::copy_n(c.w_units, 2, step.w_units);
}

void forward_stepwise(const Call& c, ForwardStep f, const StepWeights& weights, const ForwardSteps& in) {
  const StepKernels& k = step_kernels_of(c.dtype);
  const auto w = transposed(weights.w_hh), projection = transposed(weights.w_hr);
  const Tensor a = torch::stable::new_empty(in.x_gates, {c.D, c.N, c.G * c.H});
  const Tensor m = torch::stable::new_zeros(in.x_gates, {c.projected ? c.D : 0, c.N, c.H}),
               p = torch::stable::empty_like(in.h);
  ProjectForward project{};
  set(f, c), set(project, c);
  f.a = a.data_ptr();
  if (c.projected) f.h = m.data_ptr(), f.y = nullptr;
  project.projected = p.data_ptr(), project.h = in.h.data_ptr(), project.y = in.y.data_ptr();
  const Multiplier multiply(in.x_gates, c.tf32, c.stream);
  const auto hs = directions_of(in.h), as = directions_of(a), ms = directions_of(m), ps = directions_of(p);
  for (int64_t step = 0; step < c.T; step++) {
    f.step = project.step = step;
    multiply(hs, w, as);
    over(c.D * c.N * c.H, c, k.forward[c.cell], f);
    if (!c.projected) continue;
    multiply(ms, projection, ps);
    over(c.D * c.N * c.P, c, k.project_forward, project);
  }
}

void backward_stepwise(const Call& c, BackwardStep f, const StepWeights& weights, const BackwardSteps& in) {
  const StepKernels& k = step_kernels_of(c.dtype);
  const Tensor da = torch::stable::new_empty(in.dgates, {c.D, c.N, c.G * c.H});
  const Tensor through = torch::stable::new_zeros(in.dgates, {c.D, c.N, c.P});
  const Tensor projected = torch::stable::empty_like(through);
  const Tensor through_projection = torch::stable::new_empty(in.dgates, {c.projected ? c.D : 0, c.N, c.H});
  ProjectBackward project{};
  set(f, c), set(project, c);
  project.dy = f.dy, project.dh = f.dh, project.through = through.data_ptr();
  project.dprojected = projected.data_ptr();
  project.dprojections = in.dprojections ? in.dprojections->data_ptr() : nullptr;
  f.da = da.data_ptr(), f.through = through.data_ptr();
  if (c.projected) f.through = through_projection.data_ptr(), f.dh = nullptr, f.dy = nullptr;
  const Multiplier multiply(in.dgates, c.tf32, c.stream);
  const auto das = directions_of(da), throughs = directions_of(through), projecteds = directions_of(projected),
             through_projections = directions_of(through_projection);
  for (int64_t step = c.T - 1; step >= 0; step--) {
    f.step = project.step = step;
    if (c.projected) {
      over(c.D * c.N * c.P, c, k.project_backward, project);
      multiply(projecteds, weights.w_hr, through_projections);
    }
    over(c.D * c.N * c.H, c, k.backward[c.cell], f);
    multiply(das, weights.w_hh, throughs);
  }
  const int64_t count = c.D * c.N * c.P;
  over(count, c, k.accumulate, Accumulate{through.data_ptr(), in.dh.data_ptr(), count});
}

// ---- joint: the product and what comes after it in one launch

// The operands of the products, in the kernels' order. Vectors of two steps lie there in turns, at first zeros.
class JointOperands {
 public:
  JointOperands(const Call& c, const Plan& plan, const Tensor& like, const std::vector<Tensor>& w_hh, bool backward)
      : product_(plan.product), row_blocks_(product_.groups * plan.geometry.row_blocks) {
    const int M = backward ? 1 : int(c.G);
    const int64_t of_matrix = product_.tiles * product_.pairs * M * kTileBytes;
    const int64_t of_turn = c.D * row_blocks_ * product_.pairs * kPair;
    matrix_ = torch::stable::new_empty(like, Shape{c.D * of_matrix}, ScalarType::Byte);
    vectors_ = torch::stable::new_zeros(like, Shape{2 * of_turn}, ScalarType::Byte);
    product_.matrix = matrix_->data_ptr();
    product_.vectors = vectors_->data_ptr(), product_.next = static_cast<char*>(product_.vectors) + of_turn;
    ArrangeMatrix a{};
    a.H = c.H, a.tiles = product_.tiles, a.pairs = product_.pairs, a.gate_bytes = product_.gate_bytes, a.M = M;
    a.unit_stride = backward ? 1 : c.H, a.depth_stride = backward ? c.H : 1;
    for (int64_t d = 0; d < c.D; d++) {
      a.w = w_hh[d].data_ptr(), a.matrix = static_cast<char*>(matrix_->data_ptr()) + d * of_matrix;
      over(of_matrix / kLaneBytes, c, arrange_kernels[c.arithmetic].matrix, a);
    }
  }

  // The state that enters the first step, and rows that begin later.
  void begin_with(const Call& c, const void* h) const {
    over(c.D * c.N * c.H, c, arrange_kernels[c.arithmetic].state,
         ArrangeState{h, {product_.vectors, product_.next}, c.D, c.N, c.H, row_blocks_, product_.pairs});
  }

  // For the next step.
  JointProduct take_turns() {
    const JointProduct now = product_;
    std::swap(product_.vectors, product_.next);
    return now;
  }

 private:
  JointProduct product_;
  int64_t row_blocks_;
  std::optional<Tensor> matrix_, vectors_;
};

template <class Arguments>
void launch_step(const Call& c, const Plan& plan, const Arguments& arguments) {
  Launch one = plan.launch;
  one.stream = c.stream;
  launch(reinterpret_cast<void (*)(Arguments)>(const_cast<void*>(plan.kernel)), one, arguments);
}

void forward_jointly(const Call& c, const Plan& plan, const ForwardStep& step, const StepWeights& weights,
                     const ForwardSteps& in) {
  JointOperands operands(c, plan, in.x_gates, weights.w_hh, false);
  operands.begin_with(c, step.h);
  JointForward f{step, {}};
  set(f, c);
  for (f.step = 0; f.step < c.T; f.step++) {
    f.product = operands.take_turns();
    launch_step(c, plan, f);
  }
}

// One launch more than there are steps: the last one adds what the first step gives to the initial state.
void backward_jointly(const Call& c, const Plan& plan, const BackwardStep& step, const StepWeights& weights,
                      const BackwardSteps& in) {
  JointOperands operands(c, plan, in.dgates, weights.w_hh, true);
  JointBackward f{step, {}};
  set(f, c);
  for (f.step = c.T - 1; f.step >= -1; f.step--) {
    f.product = operands.take_turns();
    launch_step(c, plan, f);
  }
}

// ---- the operators

void forward_steps(StableIValue* values, uint64_t arguments, uint64_t results) {
  Stack stack(values, arguments, results);
  const OfOperator<ForwardSteps> all(stack);
  stack.give();

  const ForwardSteps& in = all.of;
  RNNFAST_CHECK(in.x_gates.defined() && in.h.defined() && in.x_gates.dim() == 3 && in.h.dim() == 3,
                "x_gates and h have 3 dimensions");
  const Checker check(in.x_gates.get_device_index());
  const Call call = make_call(check, all);
  const auto [T, N, R, H, P, D, G] = std::tuple(call.T, call.N, call.R, call.H, call.P, call.D, call.G);
  const ScalarType dtype = call.dtype, acc = call.acc_dtype;
  const void* p_x = check("x_gates", in.x_gates, {D, R, G * H}, dtype);
  void* p_h = check("h", in.h, {D, N, P}, dtype);
  void* p_c = check.required_if(call.has_cell, "c", in.c, {D, N, H}, acc);
  void* p_y = check("y", in.y, {R, D * P}, dtype);
  void* p_cs = check.if_has(call.has_cell, "cs", in.cs, {R, D * H}, acc);
  void* p_gates = check.if_has(call.saved, "gates", in.gates, {D, R, call.saved * H}, dtype);

  const Plan plan = plan_of<ForwardArguments>(call.layer(), call.projected, T);
  if (plan.regime == kStepwise || plan.regime == kJoint) {
    ForwardStep f{};
    f.x = p_x, f.b[0] = call.b_hh[0], f.b[1] = call.b_hh[1], f.c = p_c, f.cs = p_cs, f.gates = p_gates;
    f.h = p_h, f.y = p_y;
    return plan.regime == kJoint ? forward_jointly(call, plan, f, all.weights, in)
                                 : forward_stepwise(call, f, all.weights, in);
  }
  ForwardArguments f{};
  f.x = p_x, f.c = static_cast<float*>(p_c), f.y = p_y, f.cs = static_cast<float*>(p_cs), f.gates = p_gates;
  for (int64_t d = 0; d < D; d++) f.w[d] = all.weights.w_hh[d].data_ptr(), f.b[d] = call.b_hh[d];
  // A block may be done with a single step before another has read the initial state.
  const Tensor h0 = plan.regime == kChip ? torch::stable::clone(in.h) : in.h;
  f.h0 = h0.data_ptr(), f.h_n = p_h;
  f.wide = is_wide(call, {p_x, p_y, p_gates}, p_cs);
  run(call, plan, f, in.x_gates);
}

void backward_steps(StableIValue* values, uint64_t arguments, uint64_t results) {
  Stack stack(values, arguments, results);
  const OfOperator<BackwardSteps> all(stack);
  stack.give();

  const BackwardSteps& in = all.of;
  RNNFAST_CHECK(in.dgates.defined() && in.dh.defined() && in.dgates.dim() == 3 && in.dh.dim() == 3,
                "dgates and dh have 3 dimensions");
  const Checker check(in.dgates.get_device_index());
  const Call call = make_call(check, all);
  const auto [T, N, R, H, P, D, G] = std::tuple(call.T, call.N, call.R, call.H, call.P, call.D, call.G);
  const ScalarType dtype = call.dtype, acc = call.acc_dtype;
  const void* p_dy = check("dy", in.dy, {R, D * P}, dtype);
  const void* p_dcs = check.if_has(call.has_cell, "dcs", in.dcs, {R, D * H}, acc);
  const void* p_gates = check.if_has(call.saved, "gates", in.gates, {D, R, call.saved * H}, dtype);
  const void* p_y = check("y", in.y, {R, D * P}, dtype);
  const void* p_cs = check.if_has(call.has_cell, "cs", in.cs, {R, D * H}, acc);
  const void* p_h0 = check("h0", in.h0, {D, N, P}, dtype);
  const void* p_c0 = check.if_has(call.has_cell, "c0", in.c0, {D, N, H}, dtype);
  void* p_dh = check("dh", in.dh, {D, N, P}, acc);
  void* p_dc = check.required_if(call.has_cell, "dc", in.dc, {D, N, H}, acc);
  void* p_dgates = check("dgates", in.dgates, {D, R, call.columns * H}, dtype);
  check.required_if(call.projected, "dprojections", in.dprojections, {D, R, P}, dtype);

  const Plan plan = plan_of<BackwardArguments>(call.layer(), call.projected, T);
  if (plan.regime == kStepwise || plan.regime == kJoint) {
    BackwardStep f{};
    f.dy = p_dy, f.dcs = p_dcs, f.gates = p_gates, f.y = p_y, f.cs = p_cs, f.h0 = p_h0, f.c0 = p_c0;
    f.dc = p_dc, f.dgates = p_dgates;
    f.dh = p_dh;
    return plan.regime == kJoint ? backward_jointly(call, plan, f, all.weights, in)
                                 : backward_stepwise(call, f, all.weights, in);
  }
  BackwardArguments f{};
  f.dy = p_dy, f.dcs = static_cast<const float*>(p_dcs), f.gates = p_gates, f.y = p_y;
  f.cs = static_cast<const float*>(p_cs), f.h0 = p_h0, f.c0 = p_c0;
  f.dh = static_cast<float*>(p_dh), f.dc = static_cast<float*>(p_dc), f.dgates = p_dgates;
  for (int64_t d = 0; d < D; d++) f.w[d] = all.weights.w_hh[d].data_ptr();
  f.wide = is_wide(call, {p_dy, p_gates, p_y, p_dgates}, p_cs);
  run(call, plan, f, in.dgates);
}

void states_before(StableIValue* values, uint64_t arguments, uint64_t results) {
  Stack stack(values, arguments, results);
  const Tensor y = stack.tensor();
  const OptionalTensor h0 = stack.optional_tensor();
  const Tensor out = stack.tensor();
  const Tables tables(stack);
  const int64_t steps = stack.number(), stream = stack.number();
  stack.give();

  RNNFAST_CHECK(out.defined() && out.dim() == 3 && (out.size(0) == 1 || out.size(0) == 2) && steps > 0,
                "out has to be [directions, rows, features], of a step or more");
  RNNFAST_CHECK(!tables.offsets || (tables.lengths && tables.lengths->dim() == 1), "offsets go with lengths, a vector");
  const Checker check(out.get_device_index());
  Call c{};
  c.dtype = out.scalar_type(), c.acc_dtype = accumulated(c.dtype), c.device = out.get_device_index(), c.stream = stream;
  c.D = out.size(0), c.R = out.size(1), c.P = out.size(2), c.T = steps;
  c.N = tables.offsets ? tables.lengths->size(0) : c.R / steps;
  c.sequence = checked_sequence(check, c.T, c.N, c.R, tables);
  StatesBefore s{};
  set(s, c);
  s.y = check("y", y, {c.R, c.D * c.P}, c.dtype);
  s.h0 = check("h0", h0, {c.D, c.N, c.P}, c.dtype);
  s.out = check("out", out, {c.D, c.R, c.P}, c.dtype);
  over(c.R > 0 ? c.D * c.T * c.N * c.P : 0, c, step_kernels_of(c.dtype).states_before, s);
}

std::string cuda_plan(std::string mode, ScalarType dtype, int64_t batch, int64_t hidden, bool bidirectional,
                      bool projected, bool tf32, bool backward, int64_t device) {
  accumulated(dtype);
  check_sizes(batch, hidden);
  const Layer layer = {parse_cell(mode), arithmetic_of(dtype, tf32), batch, hidden, 1 + bidirectional, int(device)};
  return (backward ? plan_of<BackwardArguments> : plan_of<ForwardArguments>)(layer, projected, kFewestJointSteps)
      .reason;
}

}  // namespace
}  // namespace rnnfast

STABLE_TORCH_LIBRARY_IMPL(rnnfast, RNNFAST_DEVICE_KEY, m) {
  m.impl("cuda_forward_steps", rnnfast::forward_steps);
  m.impl("cuda_backward_steps", rnnfast::backward_steps);
  m.impl("cuda_states_before", rnnfast::states_before);
  m.impl("cuda_multiply", TORCH_BOX(&rnnfast::cuda_multiply));
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CompositeExplicitAutograd, m) {
  m.impl("cuda_plan", TORCH_BOX(&rnnfast::cuda_plan));
  m.impl("cuda_regime", TORCH_BOX(&rnnfast::cuda_regime));
}
