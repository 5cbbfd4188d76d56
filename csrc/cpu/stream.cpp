// Steps of a stack of layers, one at a time. rnnfast/stream.py calls these functions by ctypes, as an operator's call
// takes longer than a small step; it has checked what it hands over.
#include <vector>

#include "arguments.h"
#include "instruction_sets.h"

namespace rnnfast {
namespace {

// All that a step needs but its input. What it points to belongs to the caller.
class Stream {
 public:
  // weights: of each layer w_ih, w_hh, then b_ih and b_hh if there are biases, then w_hr if there is a projection; h is
  // [L,N,P] and c [L,N,H] or null.
  Stream(const char* mode, int storage, int64_t layers, int64_t N, int64_t I, int64_t H, int64_t P, bool biased,
         bool projected, void* const* weights, char* h, char* c)
      : cell_(parse_cell(mode)), storage_(storage), table_(one_step(N), nullptr, nullptr, nullptr) {
    static constexpr int64_t kBytes[kStorages] = {4, 8, 2, 2};
    for (int64_t k = 0; k < layers; k++) {
      Forward f{};
      f.steps = table_.steps;
      f.I = k ? P : I, f.H = H, f.P = P, f.R = N, f.D = 1, f.projected = projected;
      f.weights[0].w_ih = *weights++, f.weights[0].w_hh = *weights++;
      if (biased) f.weights[0].b_ih = *weights++, f.weights[0].b_hh = *weights++;
      if (projected) f.weights[0].w_hr = *weights++;
      // A step reads a state before it writes it, row by row, so both may be in one place; of a single step the output
      // is the state, and it is what the layer above reads.
      f.h0 = f.h_n = f.y = h + k * N * P * kBytes[storage];
      if (c) f.c0 = f.c_n = c + k * N * H * kBytes[storage];
      f.x = k ? layers_.back().y : nullptr;
      layers_.push_back(f);
    }
  }
  Stream(const Stream&) = delete;

  ~Stream() { free_kept(); }

  void step(const void* x) {
    const Kernels& kernels = chosen_kernels();
    if (kept_by_ != &kernels) make_room(kernels);
    const int threads = torch::stable::get_num_threads();
    layers_.front().x = x;
    for (Forward& layer : layers_) {
      layer.threads = threads;
      kernels.forward[cell_][storage_](layer);
      layer.packed = layer.kept;
    }
  }

 private:
  static Dimensions one_step(int64_t N) {
    Dimensions n{};
    n.T = 1, n.N = N;
    return n;
  }

  // For packed weights: each instruction set packs in its own way.
  void make_room(const Kernels& kernels) {
    free_kept();
    for (Forward& layer : layers_) {
      if (const size_t bytes = kernels.kept_bytes[cell_][storage_](layer)) layer.kept = allocate(bytes);
    }
    kept_by_ = &kernels;
  }

  void free_kept() {
    kept_by_ = nullptr;
    for (Forward& layer : layers_) {
      release(layer.kept);
      layer.kept = nullptr, layer.packed = false;
    }
  }

  const CellKind cell_;
  const int storage_;
  const StepTable table_;
  std::vector<Forward> layers_;
  const Kernels* kept_by_ = nullptr;  // whose packed weights the layers have
};

}  // namespace
}  // namespace rnnfast

#define RNNFAST_EXPORT extern "C" __attribute__((visibility("default")))

// Null where there is no memory, or no such cell.
RNNFAST_EXPORT void* rnnfast_stream_new(const char* mode, int storage, int64_t layers, int64_t N, int64_t I, int64_t H,
                                        int64_t P, int biased, int projected, void* const* weights, void* h, void* c) {
  try {
    return new rnnfast::Stream(mode, storage, layers, N, I, H, P, biased, projected, weights, static_cast<char*>(h),
                               static_cast<char*>(c));
  } catch (const std::exception&) {
    return nullptr;
  }
}

// Zero where it went well; else there was no memory.
RNNFAST_EXPORT int rnnfast_stream_step(void* stream, const void* x) {
  try {
    static_cast<rnnfast::Stream*>(stream)->step(x);
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

RNNFAST_EXPORT void rnnfast_stream_delete(void* stream) { delete static_cast<rnnfast::Stream*>(stream); }
