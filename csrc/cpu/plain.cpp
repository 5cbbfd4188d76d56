// Inference of stacks of layers, and of cells, called by ctypes rather than as operators, whose calls take longer than
// a small step: rnnfast/plain.py has checked what it hands over.
#include <memory>
#include <vector>

#include "arguments.h"
#include "instruction_sets.h"

namespace rnnfast {
namespace {

StepTable table_of(int64_t T, int64_t N) {
  Dimensions n{};
  n.T = T, n.N = N;
  return StepTable(n, nullptr, nullptr, nullptr);
}

// Weights, which belong to the caller. A cell is a stack of one layer.
class Layers {
 public:
  // weights: of each layer and direction w_ih, w_hh, then b_ih and b_hh if there are biases, then w_hr if there is a
  // projection.
  Layers(const char* mode, int storage, int64_t count, int D, int64_t I, int64_t H, int64_t P, bool biased,
         bool projected, void* const* weights)
      : cell(parse_cell(mode)), storage(storage) {
    for (int64_t k = 0; k < count; k++) {
      Forward f{};
      f.I = k ? D * P : I, f.H = H, f.P = P, f.D = D, f.projected = projected;
      for (int d = 0; d < D; d++) {
        f.weights[d].w_ih = *weights++, f.weights[d].w_hh = *weights++;
        if (biased) f.weights[d].b_ih = *weights++, f.weights[d].b_hh = *weights++;
        if (projected) f.weights[d].w_hr = *weights++;
      }
      each.push_back(f);
    }
  }

  size_t bytes(int64_t numbers) const {
    static constexpr size_t kBytes[kStorages] = {4, 8, 2, 2};
    return numbers * kBytes[storage];
  }

  // x [T,N,I], h0 and h_n [L*D,N,P], c0 and c_n [L*D,N,H], y [T,N,D*P]; no h0 or c0 is zeros. A cell's y is its h_n.
  void run(int64_t T, int64_t N, const char* x, const char* h0, const char* c0, char* y, char* h_n, char* c_n) const {
    const StepTable table = table_of(T, N);
    const int64_t layers = each.size(), D = each[0].D, H = each[0].H, P = each[0].P;
    const size_t of_y = bytes(T * N * D * P), of_h = bytes(D * N * P), of_c = bytes(D * N * H);
    using Memory = std::unique_ptr<void, void (*)(void*)>;
    const Memory first(layers > 1 ? allocate(of_y) : nullptr, release);
    const Memory second(layers > 2 ? allocate(of_y) : nullptr, release);
    const auto kernel = chosen_kernels().forward[cell][storage];
    for (int64_t k = 0; k < layers; k++) {
      Forward f = each[k];
      f.steps = table.steps, f.R = T * N, f.threads = torch::stable::get_num_threads();
      f.x = x, f.h0 = h0 ? h0 + k * of_h : nullptr, f.c0 = c0 ? c0 + k * of_c : nullptr;
      f.y = k == layers - 1 ? y : (k % 2 ? second : first).get();
      f.h_n = h_n + k * of_h, f.c_n = c_n ? c_n + k * of_c : nullptr;
      kernel(f);
      x = static_cast<const char*>(f.y);
    }
  }

  const CellKind cell;
  const int storage;
  std::vector<Forward> each;  // with the sizes and weights alone
};

// Layers of one direction that keep their state, and weights packed for it, from step to step.
class Stream {
 public:
  // h is [L,N,P] and c [L,N,H] or null.
  Stream(const Layers& layers, int64_t N, char* h, char* c) : layers_(layers), table_(table_of(1, N)) {
    for (Forward& f : layers_.each) {
      f.steps = table_.steps, f.R = N;
      // A step reads a state before it writes it, row by row, so both may be in one place; of a single step the output
      // is the state, and it is what the layer above reads.
      f.h0 = f.h_n = f.y = h, f.c0 = f.c_n = c;
      f.x = &f == &layers_.each[0] ? nullptr : (&f - 1)->y;
      h += layers.bytes(N * f.P);
      if (c) c += layers.bytes(N * f.H);
    }
  }
  Stream(const Stream&) = delete;

  ~Stream() { free_kept(); }

  void step(const void* x) {
    const Kernels& kernels = chosen_kernels();
    if (kept_by_ != &kernels) make_room(kernels);
    const int threads = torch::stable::get_num_threads();
    layers_.each[0].x = x;
    for (Forward& layer : layers_.each) {
      layer.threads = threads;
      kernels.forward[layers_.cell][layers_.storage](layer);
      layer.packed = layer.kept;
    }
  }

 private:
  // For packed weights: each instruction set packs in its own way.
  void make_room(const Kernels& kernels) {
    free_kept();
    for (Forward& layer : layers_.each) {
      const size_t bytes = kernels.kept_bytes[layers_.cell][layers_.storage](layer);
      if (bytes) layer.kept = allocate(bytes);
    }
    kept_by_ = &kernels;
  }

  void free_kept() {
    kept_by_ = nullptr;
    for (Forward& layer : layers_.each) {
      release(layer.kept);
      layer.kept = nullptr, layer.packed = false;
    }
  }

  Layers layers_;
  const StepTable table_;
  const Kernels* kept_by_ = nullptr;  // whose packed weights the layers have
};

// What `of` makes; null where there is no memory.
template <class Of>
auto made_or_null(const Of& of) -> decltype(of()) {
  try {
    return of();
  } catch (const std::exception&) {
    return nullptr;
  }
}

// Zero where all went well; else there was no memory.
template <class Of>
int failed(const Of& of) {
  try {
    of();
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

}  // namespace
}  // namespace rnnfast

#define RNNFAST_EXPORT extern "C" __attribute__((visibility("default")))
using namespace rnnfast;

RNNFAST_EXPORT void* rnnfast_layers_new(const char* mode, int storage, int64_t count, int D, int64_t I, int64_t H,
                                        int64_t P, int biased, int projected, void* const* weights) {
  return made_or_null([&] { return new Layers(mode, storage, count, D, I, H, P, biased, projected, weights); });
}

RNNFAST_EXPORT int rnnfast_layers_run(const void* layers, int64_t T, int64_t N, const char* x, const char* h0,
                                      const char* c0, char* y, char* h_n, char* c_n) {
  return failed([&] { static_cast<const Layers*>(layers)->run(T, N, x, h0, c0, y, h_n, c_n); });
}

RNNFAST_EXPORT void rnnfast_layers_delete(void* layers) { delete static_cast<Layers*>(layers); }

RNNFAST_EXPORT void* rnnfast_stream_new(const void* layers, int64_t N, char* h, char* c) {
  return made_or_null([&] { return new Stream(*static_cast<const Layers*>(layers), N, h, c); });
}

RNNFAST_EXPORT int rnnfast_stream_step(void* stream, const void* x) {
  return failed([&] { static_cast<Stream*>(stream)->step(x); });
}

RNNFAST_EXPORT void rnnfast_stream_delete(void* stream) { delete static_cast<Stream*>(stream); }
