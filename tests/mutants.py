"""A check of the tests: small mistakes, put into a copy of the tree one at a time, each to be caught.

    python tests/mutants.py --jobs 2 --table build/mutants.md

A mistake that no test catches is a missing test, and one that does not build a mistake of the table: either makes the
exit status 1. Every mistake changes a result or a refusal; one that only changes the speed, or that nothing can reach,
would be no mistake. Instruction sets are those of this machine: mistakes in the code for AVX-512 or AMX alone are not
in the table.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Mutant(NamedTuple):
    """A text that stands once in a file, and what it becomes."""

    file: str
    name: str
    first: str  # arguments of pytest: the tests to run first, so that most mutants need no others
    old: str
    new: str


# Where a mistake is likely to be caught, {} being the backend.
NUMBERS = "test_recurrence.py -k 'error_is_at_most and {}'"
LENGTHS = "test_recurrence.py -k '(lengths or error_is_at_most) and {}'"
RESETS = "test_recurrence.py -k '(resets or error_is_at_most) and {}'"
STATES = "test_recurrence.py -k 'return_states and {}'"
DERIVATIVES = "test_recurrence.py -k '(derivatives or transforms or forward_mode) and {} or through_states'"
THREADS = "test_threads.py test_recurrence.py -k 'thread or error_is_at_most and {}'"
OPERATORS = "test_cuda.py test_errors.py test_border.py"
REGIMES = "test_cuda.py -k 'order or chip'"
FINITE = "test_cuda.py test_errors.py -k 'finite and {}'"
CELL = "test_cells.py"
FLEX = "test_flex.py"
FLEX_TRITON = "test_flex_triton.py"
FLEX_CUDA = "test_flex_cuda.py"
MEANS = "test_means.py"
PLAIN = "test_plain.py"
STREAM = "test_stream.py"
VARIANTS = "test_variants.py"
UNITS = "test_peephole.py -k {}"
# What is caught means little if these fail without a mistake.
SMOKE = "test_recurrence.py test_triton.py -k 'opcheck or plan'"

# By file: a name, the tests to run first, the text, and what it becomes.
TABLE: dict[str, list[tuple[str, str, str, str]]] = {
    "csrc/cells.h": [
        (
            "forget gate of another product",
            NUMBERS,
            "sigmoid(x[1] + a[1]);\n    F g = s[2] = tanh",
            "sigmoid(x[1] + a[0]);\n    F g = s[2] = tanh",
        ),
        (
            "LSTM backward swaps i and f",
            NUMBERS,
            "F i = s[0], f = s[1], g = s[2], o = s[3];\n    F tanh_c = tanh(c);\n    dc",
            "F i = s[1], f = s[0], g = s[2], o = s[3];\n    F tanh_c = tanh(c);\n    dc",
        ),
        ("GRU z the other way round", NUMBERS, "h = n + z * (h - n);", "h = h + z * (n - h);"),
        ("GRU reset of x, too", NUMBERS, "tanh(x[2] + r * q)", "tanh(r * (x[2] + q))"),
        ("GRU dn for dn r", NUMBERS, "d[3] = dn * r;", "d[3] = dn;"),
    ],
    "csrc/cpu/forward.h": [
        ("own weights of another unit", UNITS, "w_units + k * u.H + unit", "w_units + k * u.H"),
        ("b_ih for b_hh", NUMBERS, "f.weights[d].b_hh)", "f.weights[d].b_ih)"),
        ("GRU reads h of the step before", NUMBERS, "old_h(g.h[s & 1])", "old_h(g.h[(s + 1) & 1])"),
        ("reset leaves c", RESETS, "memset(g.c +", "if (false) memset(g.c +"),
        ("h_n of a reverse row at the wrong end", LENGTHS, "steps = g.d ? f.steps.T : f.steps", "steps = f.steps"),
        (
            "x of a later stretch of steps",
            "test_recurrence.py -k long",
            "projection(g, p, g.base[s] - g.base[s0])",
            "projection(g, p, s0 ? 0 : g.base[s])",
        ),
        ("x of later rows of a block", NUMBERS, "x + (i0 * V + b) * U", "x + b * U"),
    ],
    "csrc/cpu/kernels.h": [
        ("border of the reverse direction", RESETS, "resets[(t + d) * N", "resets[t * N"),
        ("border beyond a row's end", RESETS, "j < active[t + d] && resets", "t + d < T && j < active[t] && resets"),
    ],
    "csrc/cpu/backward_pass.h": [
        ("dW_hh of the state across a border", RESETS, "if (f.steps.cut(d, t, rank)) return nullptr;", ""),
    ],
    "csrc/cpu/backward_sweep.h": [
        ("dc crosses a border", RESETS, "cut ? Vec<Sum>(0) : dc", "dc"),
    ],
    "csrc/cpu/input_gradient.h": [
        (
            "dx of one direction",
            NUMBERS,
            "true, d ? sum : kZeros<Sum>, d ? V * U : 0, sum",
            "true, kZeros<Sum>, 0, sum",
        ),
    ],
    "csrc/cpu/weight_gradients.h": [
        ("own weights' gradients of the gates", UNITS, "(Pass::kGrads + k) * padded", "k * padded"),
        ("no b_hh gradient", NUMBERS, "f.dw[d].w_hh, f.dw[d].b_hh}", "f.dw[d].w_hh, nullptr}"),
    ],
    "csrc/cpu/transposed_product.h": [
        ("dW of the last stretch of rows", THREADS, "q ? sum : kZeros<Sum>, q ? kSide : 0, sum", "kZeros<Sum>, 0, sum"),
    ],
    "csrc/cpu/sweep.h": [
        ("batch rows in the order of their ranks", LENGTHS, "return steps.order[rank(i)];", "return rank(i);"),
        ("fro from the end of all panels", NUMBERS, "panels.begin + panels.end - 1 - p", "panels.end - 1 - p"),
        (
            "units shared in one direction only",
            THREADS,
            "stage(task / parts, task % parts, parts)",
            "stage(0, task % parts, parts)",
        ),
        ("no barrier between stages", THREADS, "          barrier();\n", ""),
    ],
    "csrc/cpu/parallel.h": [
        ("shares lose what is left over", NUMBERS, "n * (part + 1) / parts}", "n / parts * (part + 1)}"),
        ("one of a crew alone does its share", "test_threads.py", "if (next == kAlone) begin = 0, end = tasks_;", ""),
    ],
    "csrc/cpu/gemm.h": [
        ("GRU's direct part of the first rows", NUMBERS, "init + i * is, is, out", "init, is, out"),
        ("few rows without a bias", NUMBERS, "load(init + v * U) + sums_of_rows(sums)", "sums_of_rows(sums)"),
    ],
    "csrc/cpu/operands.h": [
        ("bias of the first gate", NUMBERS, "load(vector + panels.column(p, v)", "load(vector + panels.unit(p, v)"),
    ],
    "csrc/cpu/simd.h": [
        ("relu of NaN is 0", FINITE, "x.v < 0 ? Vec<Number>(0).v : x.v;", "x.v > 0 ? x.v : Vec<Number>(0).v;"),
        (
            "relu's gradient at NaN is 0",
            FINITE,
            "h.v <= 0 ? Vec<Number>(0).v : dh.v",
            "h.v > 0 ? dh.v : Vec<Number>(0).v",
        ),
        (
            "bfloat16 is cut off",
            NUMBERS,
            "UBits rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;",
            "UBits rounded = u >> 16;",
        ),
    ],
    "csrc/cpu/recurrence.cpp": [
        ("dx past a row's end", LENGTHS, "table.steps.start[n.T] < n.R", "false"),
        ("all members write to the first one's place", "test_samples.py -k members", "+ member * bytes", ""),
        ("members that threads leave over", "test_samples.py -k threads", "body(&calls, alone, calls.size());", ""),
    ],
    "csrc/cpu/plain.cpp": [
        ("c_0 of the first layer", PLAIN, "c0 ? c0 + k * c_bytes", "c0 ? c0"),
        (
            "turned input as it lies",
            PLAIN,
            "turned ? read(torch::stable::transpose(in.x, 0, 1))",
            "turned ? read(in.x)",
        ),
        ("layers of other sizes", PLAIN, "n.H == H && n.P == P", "n.H == H"),
        ("batch first as time first", PLAIN, "k == layers - 1) {", "false) {"),
    ],
    "csrc/cpu/arguments.h": [
        ("a packed row is a step shorter", LENGTHS, "length[j] = t;", "length[j] = t - 1;"),
        (
            "strides are not looked at",
            "test_recurrence.py test_modules.py -k 'layouts or strides'",
            "if (tensor.is_contiguous()) return",
            "if (true) return",
        ),
    ],
    "csrc/cpu/threads.cpp": [
        ("a fork is not noticed", "test_threads.py", "if (forked) return body(context, 0, tasks);", ""),
    ],
    "csrc/ops.cpp": [
        (
            "shape of weight_hh",
            OPERATORS,
            "d < n.D && n.has(name)",
            "d < n.D && n.has(name) && name != kHiddenWeight",
        ),
        ("dtypes of tensors", OPERATORS, "RNNFAST_CHECK(tensor.scalar_type() == dtype,", "RNNFAST_CHECK(true,"),
        ("batch_sizes that increase", OPERATORS, "size > 0 && size <= sizes", "size > 0 && 0 <= sizes"),
    ],
    "csrc/cuda/forward.cuh": [
        ("b_hh by the block's units", NUMBERS, "b[gate * H + unit + w]", "b[gate * 16 + unit + w]"),
        (
            "others hear of steps that a row has not",
            LENGTHS,
            "operands[w] = Math::operand(h[r][w]);",
            "operands[w] = Math::operand(float(Stored(new_h.value)));",
        ),
        ("forward sends before all have written", REGIMES, "    sync_block();\n    if (more)", "    if (more)"),
        (
            "x of another row block",
            REGIMES,
            "x_at + Owner::further(r) * (G * H);",
            "x_at;",
        ),
    ],
    "csrc/cuda/backward.cuh": [
        ("dh crosses a border", RESETS, "Math::operand(keeps ? float", "Math::operand(now[r].valid ? float"),
        (
            "state before a reverse row's last step",
            LENGTHS,
            "block.time(s) < length[r] &&",
            "block.time(s) < steps &&",
        ),
        (
            "gradients of another row block",
            REGIMES,
            "unit + Owner::further(r) * (count * H);",
            "unit;",
        ),
    ],
    "csrc/cuda/exchange.cuh": [
        ("cluster expects no second step", REGIMES, "if (m.thread == 0) expect(g, m, step + kSets);", ""),
        ("grid takes half a pair", REGIMES, "two[j][0] >> 32 != uint32_t(step) || two[j][1] >> 32", "two[j][0] >> 32"),
        (
            "flags of the step before",
            "test_cuda.py -k 'every_cut and chip'",
            "< uint32_t(step);) patience",
            "< uint32_t(step - 1);) patience",
        ),
    ],
    "csrc/cuda/block.cuh": [
        (
            "lengths of the first row block",
            "test_cuda.py test_recurrence.py",
            "owns(r) ? lengths_[row(r)] : 0;",
            "owns(r) ? lengths_[row(r) % kRows] : 0;",
        ),
    ],
    "csrc/cuda/products.cuh": [
        (
            "float32 of two products",
            "test_cuda.py -k tf32",
            "      mma(sum, c0, c1, c2, c3, rest(b0), rest(b1), Value());\n",
            "",
        ),
        ("infinity times a rest", FINITE, "if_finite(d0), if_finite(d1)", "d0, d1"),
    ],
    "csrc/cuda/real.cuh": [
        ("own weights of another unit", UNITS, "weights[k * H + unit + u]", "weights[k * H + u]"),
        ("relu's gradient at 0", NUMBERS, "h.value <= 0 ? 0 : dh.value", "h.value < 0 ? 0 : dh.value"),
    ],
    "csrc/cuda/element.cuh": [
        ("dh crosses a border", RESETS, "keeps ? Stored(grads", "at.valid ? Stored(grads"),
    ],
    "csrc/cuda/stepwise.cu": [
        ("rows that begin later", LENGTHS, "turn < 2; turn++", "turn < 1; turn++"),
        ("projection loses dh_n of short rows", LENGTHS, "e.valid ? Sum(0) : dh)", "Sum(0))"),
        (
            "dW_hh of states before a reset",
            RESETS,
            "if (e.valid && e.keeps(p)) {\n    const int64_t before",
            "if (e.valid) {\n    const int64_t before",
        ),
    ],
    "csrc/cuda/joint.cu": [
        ("gradients of one gate alone", NUMBERS, "const int k = gate * p_.gate_bytes +", "const int k = "),
        ("a half of the depth", NUMBERS, "pair += kJointWarps", "pair += 2 * kJointWarps"),
    ],
    "csrc/cuda/sequence.cuh": [
        ("border of the reverse direction", RESETS, "border = t + direction;", "border = t;"),
        ("border beyond a row's end", RESETS, "border >= length ||", "border >= T ||"),
    ],
    "csrc/cuda/recurrence.cu": [
        ("TF32 is not asked for", "test_cuda.py -k tf32", "tf32 ? kOfTf32 : kOfExact", "kOfExact"),
        (
            "h_n over an h_0 that is still read",
            "test_cuda.py test_recurrence.py",
            "plan.regime == kChip ? torch::stable::clone(in.h) : in.h",
            "in.h",
        ),
        ("layout of operands", OPERATORS, "tensor.is_contiguous() && tensor", "tensor"),
        ("nothing comes back to h_0", NUMBERS, "f.step >= -1; f.step--", "f.step >= 0; f.step--"),
        ("steps that read what they write", NUMBERS, "    std::swap(product_.vectors, product_.next);\n", ""),
    ],
    "csrc/cuda/plan.h": [
        (
            "sums of one row block",
            "test_cuda.py -k every_cut",
            "warps * row_blocks * 4 * sums_together",
            "warps * 4 * sums_together",
        ),
    ],
    "rnnfast/cells.py": [
        ("gradient of a divisor", CELL, "-(d * y / b)", "-(d / b)"),
        ("maximum of the smaller", CELL, '_of_two("maximum", a, b)', '_of_two("minimum", a, b)'),
        ("one gradient of a value that is read twice", CELL, "_sum(found[arg], gradient) if arg in found else", ""),
        ("a difference for a sum", CELL, "a * (1 - b.args[1]) if", "a * (1 + b.args[1]) if"),
        ("gates of a for those of x", CELL, "if of.gate == name and of.of_a", "if of.gate == name"),
        ("a cell may branch", CELL, 'raise TypeError("a cell cannot branch on a value', 'return ("'),
        ("numbers that change", CELL, "if repr(self.program) != repr(again):", "if False:"),
        ("a kernel whatever the initial state", FLEX, "len(self.scalars), self.initial,", "len(self.scalars),"),
    ],
    "rnnfast/evaluator.py": [
        ("initial values of zero", FLEX, "sequence.cut(t, state, value)", "sequence.cut(t, state)"),
        ("gates where they are read", FLEX, "zip(cell.gates_of_a, _recurrent", "zip(cell.gates_of_x, _recurrent"),
        ("a projection of heads", FLEX, "F.linear(h, w_hh, b_hh)", "F.linear(h, w_hh.T, b_hh)"),
        ("clipped on one side", VARIANTS, "minimum(maximum(d, -bound), bound)", "minimum(d, bound)"),
        ("a clip that is not derived", VARIANTS, "return grad.clamp(-bound, bound), None", "return grad, None"),
        ("biases by head", FLEX, "view(w_hh.size(0), -1, w_hh.size(2)).transpose(0, 1).flatten()", "flatten()"),
        ("scalars by value", FLEX, "tuple(float(scalar).hex() for scalar in scalars)", "tuple(scalars)"),
        ("one gradient of x and a, whatever is given", VARIANTS, "heads == 1 and made >= len(a) and", "heads == 1 and"),
        ("operations in one that are read twice", FLEX, "if uses[arg] == 1 and (both", "if (both"),
        (
            "a result that is written over",
            FLEX,
            "isinstance(of, Value) and of.op else",
            "isinstance(of, Value) else",
        ),
        (
            "scalars after the numbers",
            FLEX,
            "[*map(float.fromhex, scalars), *program.numbers]",
            "[*program.numbers, *scalars]",
        ),
    ],
    "csrc/cpu/flex_kernels.cpp": [
        ("gradient across a border", FLEX, "!rows.valid(t, n) || !rows.cut(t, n)", "true"),
        ("border of the reverse direction", FLEX, "l.reverse ? t + 1 : t", "t"),
        ("the first head's h", FLEX, "state(0, n, step) + piece.head * rows.blocks * U", "state(0, n, step)"),
        ("the first head's gradient", FLEX, "live.begin) * of_a + head * columns", "live.begin) * of_a"),
        (
            "chunks that begin anew",
            FLEX,
            "row_at<Number>(f.x, rows.time(s) *",
            "row_at<Number>(f.x, rows.time(s - s0) *",
        ),
        ("the first head's W_hh", FLEX, "const int64_t first = k * b.A * width;", "const int64_t first = 0;"),
        ("a head's end of another row", FLEX, "return from + i * stride;", "return from;"),
        ("memory that is in use still", FLEX, "last[arg] != k", "false"),
        (
            "a mean of what lies beyond a head",
            MEANS,
            "from.block, strip.lanes);\n      store(total",
            "from.block);\n      store(total",
        ),
        ("means of the pass before, too", MEANS, ", totals_[at + lane] = 0", ""),
        (
            "a mean of the first row",
            MEANS,
            "means_ + (schedule_[k].slot * pass_rows_ + strip.pass_row) * U",
            "means_ + (schedule_[k].slot * pass_rows_) * U",
        ),
        ("a number of a row where units are written", VARIANTS, " && !steps_[k].of_row", ""),
        ("relu of NaN", FLEX, "return zero_where_not_positive(a, b);", "return select(a.v > 0, b, zero);"),
        ("states before a border", FLEX, "if (rows_.cut(t, n)) return initial_ + s * b_.H;", ""),
        ("states where a reversed row begins", FLEX, "(b_.reverse && !rows_.valid(before, n))", "false"),
        ("states before those of the first row alone", FLEX, "(b_.reverse && !rows_.valid(", "(!rows_.valid("),
        ("memory of strips of another size", FLEX, "if (strip.blocks != blocks_) place", "if (!blocks_) place"),
        ("log1p without its rest", FLEX, "log(u) + (x - (u - Vec<Number>(1))) / u", "log(u)"),
    ],
    "csrc/cpu/flex.cpp": [
        ("places beyond", FLEX, "place < inputs + p.numbers + k", "place < inputs + p.numbers + k + 1"),
        ("results beyond", FLEX, "p.result[k] < p.places()", "true"),
        ("states that are inputs", FLEX, "k < made ? inputs : 0", "0"),
        ("states of the first layer", PLAIN, "at(of, (k * directions + d) * N * H)", "at(of, 0)"),
        ("both directions in one's columns", PLAIN, "every[0] = at(y, d * H);", "every[0] = at(y, 0);"),
    ],
    "rnnfast/stream.py": [("a cell's states begin with zero", STREAM, "state.fill_(value)", "state.fill_(0)")],
    "rnnfast/flex.py": [
        ("packed rows in order", FLEX, "state.index_select(1, back)", "state.index_select(1, order)"),
        ("no more to recompute", FLEX, "run = recomputed(run) if self.recompute else run", "run = run"),
        ("dropout before the first", FLEX, "if k and self.dropout:", "if self.dropout:"),
        ("scalars in half types", FLEX_CUDA, "self.scalars and dtype.itemsize < 4", "False"),
        ("a declared scalar for the layer's", FLEX_CUDA, "self.scalars[name]) for", "self.cell.scalars[name]) for"),
        ("dropout that is left out", PLAIN, "if self.dropout and self.training:", "if False:"),
    ],
    "rnnfast/triton/flex.py": [
        ("no episode begins first", FLEX_TRITON, "resets is not None and not plan.reverse", "False"),
        ("more programs than run at once", FLEX_TRITON, "programs <= chip.processors and", ""),
        (
            "rows beyond their ends",
            FLEX_TRITON,
            "x_gates.new_empty if lengths is None else x_gates.new_zeros",
            "x_gates.new_empty",
        ),
        ("means of a head", FLEX_TRITON, "width == hidden or not sees_rows", "True"),
        ("means of a tile of units", FLEX_TRITON, "    if not sees_rows:\n", "    if True:\n"),
    ],
    "rnnfast/triton/maths.py": [
        ("means of padding", FLEX_TRITON, "tl.where(is_unit, x, 0.0).to", "x.to"),
        ("means added up in float32", MEANS, "0.0).to(tl.float64)", "0.0)"),
    ],
    "rnnfast/triton/flex_kernels.py": [
        ("border of the reverse direction", FLEX_TRITON, "border = t + 1 - at.d", "border = t + 1"),
        ("gradient across a border", FLEX_TRITON, "where(is_cut(at, t) == 0, d_states, S)", "d_states"),
        ("h of the step before", FLEX_TRITON, "p_h + s % 2 * N * H", "p_h + (s + 1) % 2 * N * H"),
        (
            "the first head's W_hh",
            FLEX_TRITON,
            "head.to(tl.int64) * (A * W * W) + own * W + k[None, :]",
            "own * W + k[None, :]",
        ),
        ("gradient of the first step's h", FLEX_TRITON, "    if ENDS:\n", "    if False:\n"),
        ("gates beyond a row's end", FLEX_TRITON, "tl.where(t >= 0, t, at.T) < at.length", "at.is_row & (t >= 0)"),
        ("infinite padding", FLEX_TRITON, "h = tl.where(inside, states[0], 0.0)", "h = states[0]"),
        ("gradient of padding", FLEX_TRITON, "of_gate = tl.where(inside, da[j], 0.0)", "of_gate = da[j]"),
        ("the first head's product", FLEX_TRITON, "at.unit // W * (A * W) + at.unit % W", "at.unit % W"),
    ],
    "rnnfast/triton/cells.py": [
        (
            "df of the new c",
            NUMBERS,
            "(1 - tanh_c * tanh_c)\n    di = dc * g * i * (1 - i)\n    df = dc * old_c *",
            "(1 - tanh_c * tanh_c)\n    di = dc * g * i * (1 - i)\n    df = dc * c *",
        ),
    ],
    "rnnfast/triton/kernels.py": [
        (
            "own weights without their gradients' place",
            UNITS,
            "store(p + K * H + at.unit, of_units",
            "store(p + at.unit, of_units",
        ),
        ("reverse rows start at T", LENGTHS, "s, steps - 1 - s)", "s, at.T - 1 - s)"),
        ("border beyond a row's end", RESETS, "mask=border < at.length", "mask=border < tl.where(at.is_row, at.T, 0)"),
        ("NaN of padded units", FINITE, "tl.where(at.inside, new_h, 0.0).to(h.dtype)", "new_h.to(h.dtype)"),
        ("dh crosses a border", RESETS, "                through = through & is_kept\n", "                pass\n"),
        ("dW_hh of states before a reset", RESETS, "tl.where(valid & keep(at, t), before", "tl.where(valid, before"),
    ],
    "rnnfast/triton/layer.py": [
        ("stale h", NUMBERS, "(h, m) if step % 2 == 0 else (m, h)", "(h, m)"),
        ("h_n of an even T", NUMBERS, "if T % 2 and not self.projected:", "if not self.projected:"),
        ("dh_0 of the step after", NUMBERS, "(other if T % 2 and not self.projected else da)[d]", "da[d]"),
    ],
    "rnnfast/triton/plan.py": [
        ("float32 is TF32", "test_triton.py", '"tf32" if tf32 else "tf32x3"', '"tf32"'),
    ],
    "rnnfast/gpu.py": [
        (
            "own weights' gradients of the gates",
            UNITS,
            "sums[GRADIENTS[k.mode] * H :]",
            "sums[: UNIT_WEIGHTS[k.mode] * H]",
        ),
        ("a packed row is a step shorter", NUMBERS, "torch.arange(1, len(ends) + 1)", "torch.arange(len(ends))"),
        ("b_hh for b_ih", NUMBERS, "add=w.b_ih)", "add=w.b_hh)"),
        ("GRU dW_hh of dn", NUMBERS, "_part(at_h, at * H,", "_part(at_h, gate * H,"),
        ("c in the low dtype", NUMBERS, "k.state(inputs.c0, k.H, k.acc)", "k.state(inputs.c0, k.H, x.dtype)"),
        ("h_0 for c_0", NUMBERS, "gates, y, cs, h0, c0, dh", "gates, y, cs, c0, h0, dh"),
    ],
    "rnnfast/functional.py": [
        (
            "dropout of the input",
            "test_modules.py -k dropout",
            "if k and dropout and training:",
            "if dropout and training:",
        ),
        ("dropout in eval", "test_modules.py -k dropout", "if k and dropout and training:", "if k and dropout:"),
        ("hx of another layer", NUMBERS, "slice(k * directions, (k + 1) * directions)", "slice(k, k + directions)"),
        ("c of every step without autograd", STATES, "keep_c=return_states", "keep_c=False"),
        ("resets of another dtype", "test_errors.py", "if resets.dtype != torch.bool:", "if False:"),
        (
            "operands of another device",
            "test_errors.py",
            "(t.dtype != dtype or t.device != device)",
            "t.dtype != dtype",
        ),
    ],
    "rnnfast/variants.py": [
        ("the states wanted without the dropped one", FLEX, "plan.wanted + (p is not None)", "plan.wanted"),
        ("masks that are not scaled", VARIANTS, "1 / (1 - p) if p < 1 else 0.0", "1.0"),
        (
            "another mask for the first step",
            VARIANTS,
            "torch.where(of_rows < p, 0, scale",
            "torch.where(of_rows > p, 0, scale",
        ),
        ("a state that changes where it stays", VARIANTS, "< p, old, after[k])", "< p, after[k], old)"),
        (
            "another mask at each step",
            VARIANTS,
            "random.append(of_rows.expand_as(like))",
            "random.append(torch.rand_like(like))",
        ),
        ("a GRU normalised in one", VARIANTS, "if gate not in cell.apart]", "]"),
        ("W_hh as it is", VARIANTS, "part + part.sum(0) * (-1 / part.size(0))", "part"),
        ("c that is not normalised", VARIANTS, "w.gain * normalize(c)", "w.gain * c"),
        (
            "the mask of another direction",
            VARIANTS,
            "(False, True)[: len(directions)]",
            "(True, False)[: len(directions)]",
        ),
    ],
    "rnnfast/modules.py": [
        ("autocast is not looked at", PLAIN, " or _is_any_autocast()", ""),
        ("modes are not looked at", PLAIN, "or _dispatch_modes()", "or False"),
        ("kinds of tensors are not looked at", PLAIN, "not _TYPES.issuperset(map(type, (*states, *weights)))", "False"),
        ("checks of a subclass are left out", PLAIN, "not self._checks_as_ours or (self", "(self"),
        (
            "recurrent dropout in eval",
            VARIANTS,
            "if training and self.recurrent_dropout else None",
            "if self.recurrent_dropout else None",
        ),
        ("states of the first layer", VARIANTS, "state.split(sizes, 2)[k]", "state.split(sizes, 2)[0]"),
        (
            "h_n of a packed sequence sorted twice",
            "test_modules.py -k packed",
            "self.permute_hidden(self._to_hidden(final), input.unsorted_indices)",
            "self.permute_hidden(self._to_hidden(final), input.sorted_indices)",
        ),
        (
            "flat weights are overlooked",
            "test_tools.py -k weights",
            "            weights = flat\n",
            "            pass\n",
        ),
        (
            "resets are not batch first",
            "test_errors.py",
            "if batched and resets is not None and resets.dim() == 2:",
            "if False:",
        ),
    ],
    "rnnfast/convert.py": [
        ("revert leaves the option", "test_convert.py", 'module.__dict__.pop("recompute", None)', "pass"),
        ("no instance of torch's", "test_convert.py", "bases = (_OURS[cls], cls) if", "bases = (_OURS[cls],) if"),
        ("no key as torch's", "test_convert.py", 'vars(cls).get("stands_for") is other', "False"),
        ("a forward of the user's is lost", "test_convert.py", "if cls.forward is not base.forward or", "if"),
    ],
    "rnnfast/aten.py": [
        (
            "LSTM's states swapped",
            "test_tools.py -k backend_torch",
            "(h, torch.zeros_like(h) if c is None else c)",
            "(h if c is None else c, h)",
        ),
        (
            "a row without steps keeps a state",
            "test_tools.py -k backend_torch",
            "finals[i].index_select(1, inverse), initial)",
            "finals[i].index_select(1, inverse), 0)",
        ),
        (
            "rows in the order of their lengths",
            "test_tools.py -k backend_torch",
            "finals[i].index_select(1, inverse), initial)",
            "finals[i], initial)",
        ),
        (
            "double backward without the last state",
            "test_tools.py -k twice",
            "finals.append(final[:states])",
            "finals.append([f.detach() for f in final[:states]])",
        ),
    ],
    "rnnfast/onnx.py": [
        (
            "gates of ONNX's LSTM in torch's order",
            "test_tools.py -k onnx",
            '"LSTM": (0, 3, 1, 2)',
            '"LSTM": (0, 1, 2, 3)',
        ),
        (
            "GRU resets before the product",
            "test_tools.py -k onnx",
            'attributes["linear_before_reset"] = int(reset_after)',
            "pass",
        ),
        (
            "lengths are left out",
            "test_tools.py -k onnx",
            "None if lengths is None else lengths.to(torch.int32)",
            "None",
        ),
    ],
    "rnnfast/flops.py": [
        ("backward of the first step", "test_tools.py -k flops", "flops -= first * of_h", "pass"),
        (
            "flops of one direction",
            "test_tools.py -k flops",
            "R, D = _rows(x, lengths), 1 + bidirectional",
            "R, D = _rows(x, lengths), 1",
        ),
    ],
    "rnnfast/border.py": [
        ("lengths beyond the steps", OPERATORS, "if low < 0 or high > len(x):", "if low < 0:"),
        (
            "batch_sizes that increase",
            OPERATORS,
            "sizes[-1] <= 0 or sizes != sorted(sizes, reverse=True)",
            "sizes[-1] <= 0",
        ),
        (
            "gates of another shape",
            OPERATORS,
            "(D, R, saved_gates * H) if saved_gates else (0,), dtype, device)",
            "gates.shape, dtype, device)",
        ),
    ],
    "rnnfast/backends.py": [
        (
            "use_backend forgets the one around it",
            "test_errors.py -k backend",
            "        _ask_for(before, is_traced)\n",
            "        _ask_for(_asked_for, is_traced)\n",
        ),
    ],
    "rnnfast/timings.py": [
        ("a tie is ours", "test_choice.py -k tie", "times[name] >= NOISE *", "times[name] > 1.1 *"),
        ("another driver's times", "test_choice.py -k driver", "json.dumps(self.fingerprint)", "json.dumps(self.name)"),
        ("times of other processes are lost", "test_choice.py -k merged", "**read(self.path, self.fingerprint), ", ""),
    ],
    "rnnfast/contest.py": [
        ("NaN passes the check", "test_choice.py -k fails", "if not off <= 2 *", "if off > 2 *"),
    ],
    "rnnfast/choice.py": [
        ("a race in a capture", "test_choice.py -k capture", "if _is_captured(call.x) or", "if"),
        ("a race in a backward", "test_choice.py -k backward", " or torch._C._current_graph_task_id() != -1", ""),
        ("every rank measures", "test_choice.py -k ranks", "and distributed.get_rank())", "and False)"),
        (
            "the caller's modes hold",
            "test_choice.py -k hooks",
            "threading.Thread(target=work, daemon=True).start()",
            "work()",
        ),
        (
            "times decide where results have to be the same",
            "test_choice.py -k deterministic",
            "_has_cudnn(), not _is_deterministic(),",
            "_has_cudnn(), True,",
        ),
    ],
    "rnnfast/ops.py": [
        ("a backend runs what it has no kernels of", FLEX_CUDA, "mode not in BACKENDS[backend].modes", "False"),
        (
            "fake c in a half type",
            "test_compile.py test_recurrence.py -k 'opcheck or compile'",
            "else (0,)), dtype=acc)",
            "else (0,)))",
        ),
    ],
    "rnnfast/explain.py": [
        ("explain takes steps for rows", "test_cuda.py -k explain", "0 if module.batch_first else 1", "1"),
    ],
    "rnnfast/recurrence.py": [
        ("dx if h_0 asks for it", NUMBERS, "needs.x, any(needs.weights), 0", "needs.h0, any(needs.weights), 0"),
        ("no dW for W_ih alone", "test_recurrence.py -k alone", "any(needs.weights)", "any(needs.weights[1:])"),
        (
            "h_0 and c_0 swapped in backward",
            NUMBERS,
            "dx, dh0, dc0, *dweights = apply(",
            "dx, dc0, dh0, *dweights = apply(",
        ),
        (
            "recompute keeps the gates",
            "test_recurrence.py -k recompute",
            "of_flat(inputs), True, not recompute",
            "of_flat(inputs), True, True",
        ),
        (
            "double backward without dc_n",
            DERIVATIVES,
            "or v.is_complex())]",
            "or v.is_complex()) and i != 2]",
        ),
        (
            "double backward without dc",
            DERIVATIVES,
            "or v.is_complex())]",
            "or v.is_complex()) and i != 3]",
        ),
        ("an absent state is saved in another's place", NUMBERS, "values.insert(i, value)", "values.insert(0, value)"),
        (
            "batched gradients in the wrong order",
            "test_tools.py -k batches",
            "for i in range(size)]",
            "for i in reversed(range(size))]",
        ),
        (
            "c of an exported program's backward",
            "test_tools.py -k exported",
            "c = c if is_kept else again",
            "c = again if is_kept else c",
        ),
        (
            "forward mode through a backend",
            DERIVATIVES,
            "(forward_ad._current_level >= 0 or is_recorded())",
            "is_recorded()",
        ),
        (
            "h_0 alone asks for no gradient",
            "test_recurrence.py -k alone",
            "for t in (x, h0, c0, *weights))",
            "for t in (x, *weights))",
        ),
    ],
    "rnnfast/samples.py": [
        (
            "vmap along the first dimension",
            "test_recurrence.py -k vmap",
            "value.movedim(dim, axis",
            "value.movedim(0, axis",
        ),
        (
            "no state enters a reset step",
            "test_samples.py -k gradients",
            "torch.where(border.unsqueeze(2), 0, before)",
            "before",
        ),
        (
            "second derivatives of the first member",
            "test_samples.py -k derivatives",
            "None if of is inputs.batch_sizes else 0",
            "None",
        ),
        ("beyond a row's end", "test_samples.py -k gradients", "(step == lengths - 1)", "(step == lengths)"),
    ],
    "rnnfast/jagged.py": [
        ("a row of the next sequence", "test_jagged.py", "bounds[1:], row, right=True", "bounds[1:], row"),
        ("cu_seqlens that begin late", "test_jagged.py", "values[0] != 0 or ", ""),
        (
            "places in another order",
            "test_jagged.py",
            "(begins + step[:, None]).flatten()",
            "(begins[:, None] + step).flatten()",
        ),
    ],
    "rnnfast/reference.py": [
        ("border of the reverse direction", RESETS, "at = t + 1 if self.reverse else t", "at = t"),
        ("border beyond a row's end", RESETS, "border if self.valid is None else border & self.valid[at]", "border"),
        (
            "complex without a conjugate",
            "test_modules.py -k dtypes",
            "t.conj() if isinstance(t, Tensor) and t.is_complex() else t for",
            "t for",
        ),
        ("c in a half type", NUMBERS, "    acc = torch.promote_types(x.dtype, torch.float32)\n", "    acc = x.dtype\n"),
    ],
}


def _backend(file: str) -> str:
    """Whose tests are the quickest to see a file's mistakes."""
    named = [name for name in ("cuda", "triton", "reference") if name in file]
    return named[0] if named else "cuda" if file == "rnnfast/gpu.py" else "cpu"


MUTANTS = [
    Mutant(file, name, first.format(_backend(file)), old, new)
    for file, rows in TABLE.items()
    for name, first, old, new in rows
]


def mutated(text: str, mutant: Mutant) -> str:
    """The text of a mutant's file with the mistake in it."""
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.file}: {mutant.name}: {mutant.old!r} stands there {text.count(mutant.old)} times")
    return text.replace(mutant.old, mutant.new)


class Outcome(NamedTuple):
    verdict: str  # caught, survived, does not build, does not run
    by: str = ""  # a test's id
    reason: str = ""


# Run within a copy: the libraries of the CPU's kernels and of the emulation. Of the instruction sets only the first, as
# many as this machine has; for the kernels of the others, which nothing will call, stand the portable ones.
BUILD = """
import os, sys
from pathlib import Path
sys.path[:0] = [".", "tests"]
import setup
from emulation import build
missing = list(setup.INSTRUCTION_SETS)[int(sys.argv[1]):]
symbol = lambda name, table: f"_ZN7rnnfast{len(name)}{name}{len(table)}{table}E"
tables = [(name, table) for name in missing for table in ("kernels", "flex")]
stand_ins = [f"-Wl,--defsym={symbol(name, table)}={symbol('portable', table)}" for name, table in tables]
os.environ |= {"CXXFLAGS": "-O1", "LDFLAGS": " ".join(stand_ins)}
for name in missing:
    del setup.INSTRUCTION_SETS[name]
setup.build(Path("build/cpu").resolve(), cpu=Path("rnnfast/_cpu.so").resolve())
build.library()
"""


class Copy:
    """A copy of the working tree, in which mutants are built and tested one after the other."""

    def __init__(self, folder: Path, instruction_sets: int, timeout: int) -> None:
        self.folder, self.instruction_sets, self.timeout = folder, instruction_sets, timeout
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.check_output(listed, cwd=ROOT, text=True).split("\0"):
            if name and (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes((ROOT / name).read_bytes())

    def run(self, *command: str, timeout: int | None = None) -> tuple[int | None, str]:
        """The exit status of a Python, None after the timeout, and what it printed. None of its children stays."""
        environment = os.environ | {"PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"}
        environment["COLUMNS"] = "400"  # else pytest leaves out the reasons
        with tempfile.TemporaryFile("w+", errors="replace") as printed:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=self.folder, env=environment, stdin=subprocess.DEVNULL,
                stdout=printed, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout)
            status = process.poll()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            printed.seek(0)
            return status, printed.read()

    def test(self, what: str) -> Outcome:
        """Of a run of pytest that ends with the first failure, or with a test that takes too long."""
        # The tests of the table and of what is printed would catch mutants by their text.
        fixed = "-m pytest -x -v -m 'not full' -p no:cacheprovider -p no:randomly --ignore=tests/test_mutants.py"
        fixed += " --deselect tests/test_cells.py::test_printed_cells_are_those_declared"
        fixed += f" -o faulthandler_timeout={self.timeout} -o faulthandler_exit_on_timeout=true"
        words = [f"tests/{word}" if word.endswith(".py") else word for word in shlex.split(what)]
        status, printed = self.run(*shlex.split(fixed), *words, timeout=20 * self.timeout)
        if status in (0, 5):  # 5: nothing was selected
            return Outcome("survived")
        last = re.findall(r"^(tests/\S+::.*?)(?: (?:PASSED|SKIPPED|FAILED|ERROR)\b.*)?$", printed, re.MULTILINE)[-1:]
        if status is None or "\nTimeout (" in printed:
            return Outcome("caught", *last, "timeout")
        if failed := re.findall(r"^(?:FAILED|ERROR) (tests/.*?)(?: - (.*))?$", printed, re.MULTILINE):
            return Outcome("caught", *failed[-1])
        if last and status not in (3, 4):  # pytest's own troubles
            return Outcome("caught", *last, f"the process ended with status {status}")
        return Outcome("does not run", reason=printed[-400:])

    def build(self) -> Outcome | None:
        """None, or what the compiler says."""
        status, printed = self.run("-c", BUILD, str(self.instruction_sets))
        errors = [line for line in printed.splitlines() if "error" in line.lower()]
        return Outcome("does not build", reason=(errors or [printed[-400:]])[0]) if status else None

    def judge(self, mutant: Mutant) -> Outcome:
        path = self.folder / mutant.file
        right = path.read_text()
        try:
            path.write_text(mutated(right, mutant))
            outcome = self.build() or self.test(mutant.first)
            return self.test("tests") if outcome.verdict == "survived" else outcome
        finally:
            path.write_text(right)


def table(outcomes: dict[Mutant, tuple[Outcome, float]]) -> str:
    cell = lambda text: " ".join(text.split()).replace("|", r"\|")[:200]
    lines = ["| mistake | file | outcome | by | seconds |", "| --- | --- | --- | --- | --- |"]
    for mutant, (outcome, seconds) in outcomes.items():
        by = ": ".join(cell(text) for text in outcome[1:] if text)
        lines.append(f"| {cell(mutant.name)} | {mutant.file} | {outcome.verdict} | {by} | {seconds:.0f} |")
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="mistakes with such a text in FILE: NAME"
    )
    parser.add_argument("--jobs", type=int, default=1, help="mistakes at the same time, each in a copy of its own")
    parser.add_argument("--table", type=Path, help="where to write the outcomes")
    parser.add_argument("--timeout", type=int, default=600, help="seconds that one test may take")
    parser.add_argument("--list", action="store_true", help="print the mistakes, and run nothing")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if any(text in f"{m.file}: {m.name}" for text in options.only)]
    if options.list:
        print("\n".join(f"{m.file}: {m.name}" for m in chosen))
        return 0

    import torch

    import rnnfast  # noqa: F401  its library knows the machine's instruction sets

    instruction_sets = torch.ops.rnnfast.cpu_isa(None) + 1
    copies: queue.SimpleQueue[Copy] = queue.SimpleQueue()
    outcomes: dict[Mutant, tuple[Outcome, float]] = {}

    def make(k: int) -> Outcome:
        """A copy, and whether tests that fail with a mistake pass without: all of them, in one of the copies."""
        copy = Copy(Path(folder, str(k)), instruction_sets, options.timeout)
        outcome = copy.build() or copy.test("tests" if k == 0 and len(chosen) == len(MUTANTS) else SMOKE)
        _, where = copy.run("-c", "import rnnfast; print(rnnfast.__file__)")
        copies.put(copy)
        return outcome if where.startswith(str(copy.folder)) else Outcome("does not run", reason=f"imports {where}")

    def judge(mutant: Mutant) -> None:
        copy, start = copies.get(), time.monotonic()
        try:
            outcomes[mutant] = copy.judge(mutant), time.monotonic() - start
        finally:
            copies.put(copy)
        print(*table({mutant: outcomes[mutant]}).splitlines()[2:], flush=True)
        if options.table:
            options.table.write_text(table({m: outcomes[m] for m in chosen if m in outcomes}))

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        for outcome in pool.map(make, range(options.jobs)):
            if outcome.verdict != "survived":
                print("without a mistake:", *outcome)
                return 1
        list(pool.map(judge, chosen))
    return int(any(outcome.verdict != "caught" for outcome, _ in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
