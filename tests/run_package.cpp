// Runs an AOTInductor package that holds rnnfast's operators, without Python: run_package MODEL.pt2 _cpu.so STEPS ROWS
// FEATURES. The input is 0, 1, 2, ... times 1/64, modulo 2; the sum of every output is printed, a line each.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdio>
#include <cstdlib>

int main(int argc, char** argv) {
  if (argc != 6) return std::fprintf(stderr, "usage: run_package MODEL.pt2 _cpu.so STEPS ROWS FEATURES\n"), 2;
  // The library registers its operators, with their schemas, when it is loaded.
  if (!dlopen(argv[2], RTLD_NOW | RTLD_GLOBAL)) return std::fprintf(stderr, "%s\n", dlerror()), 1;
  c10::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  const int64_t steps = std::atoll(argv[3]), rows = std::atoll(argv[4]), features = std::atoll(argv[5]);
  torch::Tensor x = torch::arange(steps * rows * features, torch::kFloat).div(64).fmod(2);
  for (const torch::Tensor& output : model.run({x.view({steps, rows, features})})) {
    std::printf("%.6f\n", output.sum().item<double>());
  }
}
