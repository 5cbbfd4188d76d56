// The schemas of a layer's operators, printed by rnnfast/codegen.py from the records of rnnfast/records.py.
#pragma once

namespace rnnfast {

constexpr const char* kForwardSchema =
    "(str mode, Tensor x, Tensor? h0, Tensor? c0, Tensor? batch_sizes, Tensor? lengths, Tensor? resets, "
    "bool bidirectional, str names, Tensor[] weights, bool keep_c, bool keep_gates) -> (Tensor y, Tensor "
    "h_n, Tensor c_n, Tensor c, Tensor gates)";

constexpr const char* kBackwardSchema =
    "(str mode, Tensor x, Tensor? h0, Tensor? c0, Tensor? batch_sizes, Tensor? lengths, Tensor? resets, "
    "bool bidirectional, str names, Tensor[] weights, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc, "
    "Tensor y, Tensor c, Tensor gates, bool need_dx, bool need_dw) -> (Tensor dx, Tensor dh0, Tensor dc0, "
    "Tensor[] dweights)";

constexpr const char* kGateGradientsSchema =
    "(str mode, Tensor x, Tensor? h0, Tensor? c0, Tensor? batch_sizes, Tensor? lengths, Tensor? resets, "
    "bool bidirectional, str names, Tensor[] weights, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc, "
    "Tensor y, Tensor c, Tensor gates) -> (Tensor dgates, Tensor dh0, Tensor dc0)";

}  // namespace rnnfast
