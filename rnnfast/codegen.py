"""The kernels' cells, printed from those declared in ``cells.py``.

``python -m rnnfast.codegen`` writes csrc/cells.h and rnnfast/triton/cells.py anew, and csrc/schemas.h from records.py.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import records
from .cells import CELLS, MODES, Cell, Program, Value, reachable, unlike

_INFIX = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/", "less": "<", "less_equal": "<="}
_STRENGTH = {"<": 0, "<=": 0, "+": 1, "-": 1, "*": 2, "/": 2}  # with which operators bind
_ATOM, _NEGATION = 4, 3


class Statement(NamedTuple):
    value: Value
    name: str
    text: str
    reads: frozenset[Value]  # what it names
    is_read: bool  # by other statements or by what is returned


class Printer:
    """The expressions of a language, in which what has a name is written by it."""

    functions: dict[str, str]  # a primitive's format

    def __init__(self, known: Mapping[Value, str], hints: Mapping[Value, str] | None = None) -> None:
        self.known, self.hints, self.reads = dict(known), hints or {}, set[Value]()
        self.incoming: set[str] = set()
        # Of a backward: by gradient what it is of, and the names of the forward's values.
        self.gradients_of: dict[Value, Value] = {}
        self.forward: dict[Value, str] = {}

    def text(self, value: Any) -> str:
        return self._text(value)[0]

    def _text(self, value: Any) -> tuple[str, int]:
        if not isinstance(value, Value):
            return self.number(value), _ATOM
        if value in self.known:
            self.reads.add(value)
            return self.known[value], _ATOM
        if value.op in _INFIX:
            sign = _INFIX[value.op]
            (left, of_left), (right, of_right) = map(self._text, value.args)
            strength = _STRENGTH[sign]
            left = left if of_left >= strength else f"({left})"
            return f"{left} {sign} {right if of_right > strength else f'({right})'}", strength
        if value.op == "negate":
            inner, strength = self._text(value.args[0])
            return f"-{inner if strength > _NEGATION else f'({inner})'}", _NEGATION
        if value.op not in self.functions:
            raise NotImplementedError(f"{type(self).__name__} has no {value.op or value.name}")
        return self.functions[value.op].format(*map(self.text, value.args)), _ATOM

    def number(self, number: float) -> str:
        return str(number)

    def statements(self, wanted: list[Any], returned: Iterable[Value] = ()) -> list[Statement]:
        """Wanted values, and what has to have a name on the way to them and to those that are returned."""
        returned = list(returned)
        unnamed = reachable([*wanted, *returned], self.known)
        uses = Counter(arg for value in unnamed for arg in value.args if isinstance(arg, Value))
        uses.update(returned)
        return [s for value in [*wanted, *returned] for s in self._statements(value, uses, value in wanted)]

    def _statements(self, value: Any, uses: Counter[Value], is_wanted: bool) -> Iterator[Statement]:
        if not isinstance(value, Value) or value in self.known:
            return
        for arg in value.args:
            yield from self._statements(arg, uses, False)
        if is_wanted or value.name or uses[value] > 1:
            self.reads = set()
            text = self.text(value)
            self.known[value] = name = value.name or self._hinted(value) or self._name(value)
            yield Statement(value, name, text, frozenset(self.reads), uses[value] > 0)

    def _hinted(self, value: Value) -> str | None:
        """A gradient's name. That of a state takes the place of the part of it that comes in."""
        name = self.hints.get(value)
        return name and unlike(name, set(self.known.values()) - self.incoming)

    def _name(self, value: Value) -> str:
        """As tanh_c of tanh(c)."""
        if len(value.args) == 1 and value.args[0] in self.known:
            return f"{value.op}_{self.known[value.args[0]]}"
        if value in self.gradients_of:
            of = type(self)(self.forward).text(self.gradients_of[value])
            raise NotImplementedError(f"{of} needs a name, for its gradient is read twice")
        raise NotImplementedError(f"what is read twice needs a name: {self.text(value)}")


class Cpp(Printer):
    functions = {name: name + "({})" for name in ("sigmoid", "tanh", "relu")}
    functions["where_positive"] = "zero_where_not_positive({}, {})"

    def number(self, number: float) -> str:
        return str(number) if isinstance(number, int) else f"F({number})"


class Triton(Printer):
    functions = {name: name + "({})" for name in ("sigmoid", "tanh", "relu")}
    functions |= {name: f"tl.{name}({{}})" for name in ("exp", "log", "sqrt", "abs")}
    functions |= {"log1p": "log1p({})", "where": "tl.where({}, {}, {})"}
    functions |= {name: name + "({}, {})" for name in ("minimum", "maximum", "where_positive")}


def _forward(cell: Cell, printer: Printer) -> list[Statement]:
    """What is saved, then the states, the last one first: h is made of the others. A state takes the place of the one
    before the step, and so may be computed only when that is read no more."""
    if set(cell.after) & printer.known.keys():
        raise NotImplementedError(f"{cell}: a state is no more than a sum")
    statements = printer.statements([*cell.saved, *cell.after[::-1]])
    for old, state in zip(cell.inputs["s"], cell.after):
        done = [s.value for s in statements].index(state)
        if any(old in s.reads for s in statements[done + 1 :]):
            raise NotImplementedError(f"{cell}: {state.name} is computed before the old one is read for the last time")
    return statements


def _backward(cell: Cell, printer: type[Printer]) -> tuple[Printer, list[Statement]]:
    """The gradients at the gates and what else needs a name, in an order in which they can be computed."""
    known = {v: v.name for v in [*cell.inputs["s"], *cell.after, *cell.saved, *cell.incoming]} | _unit_weights(cell)
    hints = {gradient: f"d{value.name}" for value, gradient in cell.adjoints.items() if value.name}
    made = printer(known, hints)
    made.incoming = {value.name for value in cell.incoming}
    made.gradients_of = {gradient: value for value, gradient in cell.adjoints.items()}
    made.forward = {value: value.name for value in reachable(cell.after) if value.name}
    returned = [v for v in [*cell.weight_gradients, *cell.before] if isinstance(v, Value)]
    return made, made.statements([g.value for g in cell.gradients], returned)


def _unit_weights(cell: Cell) -> dict[Value, str]:
    return {value: f"w[{k}]" for k, value in enumerate(cell.inputs["w"])}


# C++


def _check(cell: Cell) -> None:
    """Whether the kernels can run a cell."""
    gates, gradients, saved, is_common = len(cell.gates), len(cell.gradients), len(cell.saved), cell.mode in CELLS
    for holds, what in (
        (cell.states in (["h"], ["h", "c"]), f"no room for states {' '.join(cell.states)}"),
        (all(isinstance(gradient.value, Value) for gradient in cell.gradients), "no room for gates that are not read"),
        (all(isinstance(value, Value) for value in cell.weight_gradients), "no room for weights that are not read"),
        (gates <= 4, f"no room for {gates} gates"),
        (cell.apart in ([], [gates - 1]), "x and a apart in the last gate only"),
        (
            not is_common or (gradients in (1, 4) and saved in (0, gradients)),
            f"stacks of one gradient or of four, and none or as many saved: not {gradients} and {saved}",
        ),
    ):
        if not holds:
            raise NotImplementedError(f"{cell}: the kernels have {what}")


def _cpp_cell(cell: Cell) -> str:
    _check(cell)
    of_a = [cell.hidden(gate) for gate in range(len(cell.gates))]
    sizes = {"kGates": len(cell.gates), "kSaved": len(cell.saved), "kGrads": len(cell.gradients)}
    sizes |= {"kUnitWeights": len(cell.weights), "kColumns": len(cell.gradients) + len(cell.weights)}
    has = {"kHasCell": "c" in cell.states, "kHasDirect": cell.before[0] is not None, "kProjects": cell.projects}
    reads = {"kReadsH": cell.inputs["s"][0] in reachable(cell.after)}  # by the forward; the others by the backward
    reads |= {"kNeedsH": cell.reads("h"), "kNeedsOldH": cell.reads("old_h")}
    lines = [f'static constexpr const char* kMode = "{cell.mode}";']
    has |= {"kIsCommon": cell.mode in CELLS}
    for kind, values in ("int", sizes), ("bool", has), ("bool", reads):
        lines.append(f"static constexpr {kind} {', '.join(f'{k} = {str(v).lower()}' for k, v in values.items())};")
    lines += ["", f"static constexpr RNNFAST_INLINE int hidden(int gate) {{ return {_cpp_hidden(of_a)}; }}", ""]
    lines += [*_cpp_forward(cell), *_cpp_backward(cell)]
    if cell.projects:
        known = {v: f"s[{j}]" for j, v in enumerate(cell.saved)} | {v: v.name for v in cell.after[1:]}
        output = f"return {Cpp(known).text(cell.after[0])};"
        lines += ["", *_cpp_function("F", "output", {"s": "const F*", "c": "F"}, [output])]
    body = "\n".join(f"  {line}" if line else "" for line in lines)
    return f"struct {cell.cpp_name} {{\n{body}\n}};\n"


def _cpp_hidden(of_a: list[int]) -> str:
    text = "gate"
    for gate in reversed(range(len(of_a))):
        if of_a[gate] != gate:
            text = f"gate == {gate} ? {of_a[gate]} : {text}"
    return text


def _cpp_function(result: str, name: str, parameters: dict[str, str], lines: list[str]) -> list[str]:
    """Parameters that are not read have no names."""
    words = set(re.findall(r"\w+", " ".join(lines)))
    listed = ", ".join(f"{kind} {name}" if name in words else kind for name, kind in parameters.items())
    head = f"static RNNFAST_INLINE {result} {name}({listed}) {{"
    return ["template <class F>", head, *(f"  {line}" for line in lines), "}"]


def _cpp_forward(cell: Cell) -> list[str]:
    of_gates = {value: f"{which}[{k}]" for which in "xa" for k, value in enumerate(cell.inputs[which])}
    slots, lines = {value: f"s[{j}] = " for j, value in enumerate(cell.saved)}, []
    given = {value: value.name for value in slots if value.op == ""}
    lines += [f"F {name} = {slots[value]}{of_gates[value]};" for value, name in given.items()]
    printer = Cpp({**of_gates, **_unit_weights(cell), **dict(zip(cell.inputs["s"], cell.states)), **given})
    for s in _forward(cell, printer):
        lines.append(f"{'' if s.value in cell.after else 'F '}{s.name} = {slots.get(s.value, '')}{s.text};")
    parameters = {"x": "const F*", "a": "const F*", "w": "const F*", "h": "F&", "c": "F&", "s": "F*"}
    return _cpp_function("void", "forward", parameters, lines)


def _cpp_backward(cell: Cell) -> list[str]:
    lines = [f"F {', '.join(f'{v.name} = s[{j}]' for j, v in enumerate(cell.saved))};"] if cell.saved else []
    printer, statements = _backward(cell, Cpp)
    gradients, incoming = [g.value for g in cell.gradients], [value.name for value in cell.incoming]
    for s in statements:
        slot = "".join(f"d[{k}] = " for k, value in enumerate(gradients) if value is s.value)
        name = s.name if s.name in incoming else f"F {s.name}"
        lines.append(f"{f'{name} = ' if s.is_read or not slot else ''}{slot}{s.text};")
    computed = [s.value for s in statements]
    lines += [f"d[{k}] = {printer.text(v)};" for k, v in enumerate(gradients) if v not in computed]
    lines += [f"d[{k}] = {printer.text(v)};" for k, v in enumerate(cell.weight_gradients, len(gradients))]
    direct, *others = ("F(0)" if value is None else printer.text(value) for value in cell.before)
    if others and direct != "F(0)":  # it may be made of what the next lines overwrite
        lines.append(f"F direct = {direct};")
        direct = "direct"
    lines += [f"d{state} = {text};" for state, text in zip(cell.states[1:], others)]
    parameters = {"s": "const F*", "w": "const F*"} | dict.fromkeys(("h", "old_h", "c", "old_c", "dh"), "F")
    parameters |= {"dc": "F&", "d": "F*"}
    return _cpp_function("F", "backward", parameters, [*lines, f"return {direct};"])


CPP = r"""
// The cells, printed by rnnfast/codegen.py from rnnfast/cells.py: there they are to be changed.
//
// A cell is a policy over a value type F: one float on a GPU, a vector of hidden units on a CPU. The device supplies
// sigmoid(F), tanh(F), relu(F) and zero_where_not_positive(F h, F dh) beside F. Names:
//   x[g]  gate g of W_ih x + b_ih            a[g]  gate g of W_hh h + b_hh
//   s[j]  what the backward needs of a step  d[j]  gradient at the gates: d[0..kGates) are those of x[g], and
//   w[k]  a weight of the unit's own                d[hidden(g)] is that of a[g]; then what is to be added up over
//                                                  rows and steps to the gradient of w[k], d[kGrads + k]
// h and c are the states: before the step on entry, after it on return. dh is the gradient of the new h; dc that of the
// new c on entry, of the old c on return; the old h gets W_hh^T d[hidden(g)] plus what backward() returns. Where h may
// be projected output() makes it again, for the projection's gradient.
#pragma once

#ifdef __CUDACC__
#define RNNFAST_INLINE __host__ __device__ __forceinline__
#else
#define RNNFAST_INLINE inline __attribute__((always_inline))
#endif

namespace rnnfast {

%(cells)s
// Calls CELL with the name of each: of the common ones, of which every backend has kernels; of CUDA's own; of all.
#define RNNFAST_COMMON_CELLS(CELL) %(common)s
#define RNNFAST_CUDA_CELLS(CELL) %(others)s
#define RNNFAST_CELLS(CELL) RNNFAST_COMMON_CELLS(CELL) RNNFAST_CUDA_CELLS(CELL)

#define RNNFAST_KIND(Cell) k##Cell,
enum CellKind { RNNFAST_CELLS(RNNFAST_KIND) kCellKinds };
#undef RNNFAST_KIND

constexpr int kCommonKinds = %(count)d;  // the first ones

struct CellFacts {
  const char* mode;  // torch's name
  int gates, saved, grads, unit_weights;
  bool has_cell, projects;
};

#define RNNFAST_FACTS(Cell) \
  {Cell::kMode, Cell::kGates, Cell::kSaved, Cell::kGrads, Cell::kUnitWeights, Cell::kHasCell, Cell::kProjects},
constexpr CellFacts kCells[] = {RNNFAST_CELLS(RNNFAST_FACTS)};  // by kind
#undef RNNFAST_FACTS

}  // namespace rnnfast
"""


def cpp() -> str:
    """``csrc/cells.h``."""
    calls = {mode: f"CELL({cell.cpp_name})" for mode, cell in MODES.items()}
    return CPP.lstrip() % {
        "cells": "\n".join(map(_cpp_cell, MODES.values())),
        "common": " ".join(calls[mode] for mode in CELLS),
        "count": len(CELLS),
        "others": " ".join(call for mode, call in calls.items() if mode not in CELLS),
    }


# Triton


TRITON = '''\
"""The cells, printed by rnnfast/codegen.py from rnnfast/cells.py: there they are to be changed.

Tiles are [units, rows] of the accumulation dtype. Of a step:
    sums   W_ih x + b_ih + W_hh h + b_hh by gate; where a cell reads the two apart that of x, and last that of h
    s      what the backward needs
    w      weights of the units' own, [units, 1]
    d      gradients at the sums
Forward: the sums, w, h and c before the step -> h, c after it, s.
Backward: dh and dc of the state after the step -> d, what is to be added up over rows and steps to the gradients of w,
what of dh goes straight to the h before it, dc before it.
"""

import triton
import triton.language as tl

from .maths import relu, sigmoid, tanh, where_positive


@triton.jit
def forward(MODE: tl.constexpr, sums, w, h, c):
%(forward)s


@triton.jit
def backward(MODE: tl.constexpr, s, w, h, old_h, c, old_c, dh, dc):
%(backward)s
%(cells)s'''


def triton() -> str:
    """``rnnfast/triton/cells.py``."""
    return TRITON % {
        "forward": _triton_choice("forward(sums, w, h, c)"),
        "backward": _triton_choice("backward(s, w, h, old_h, c, old_c, dh, dc)"),
        "cells": "".join(map(_triton_cell, CELLS.values())),
    }


def _triton_choice(call: str) -> str:
    *others, last = CELLS.values()
    lines = []
    for i, cell in enumerate(others):
        lines += [f'{"elif" if i else "if"} MODE == "{cell.mode}":', f"    return {cell.name}_{call}"]
    return "\n".join(f"    {line}" for line in [*lines, "else:", f"    return {last.name}_{call}"])


def _triton_cell(cell: Cell) -> str:
    known = dict(zip(cell.inputs["s"], cell.states)) | _unit_weights(cell)
    for k, (total, x, a) in enumerate(zip(cell.sums, cell.inputs["x"], cell.inputs["a"])):
        known |= {total: f"sums[{k}]"} if total is not None else {x: f"sums[{k}]", a: f"sums[{cell.hidden(k)}]"}
    given = {value: value.name for value in cell.saved if value.op == ""}
    forward = [f"{name} = {known[value]}" for value, name in given.items()]
    forward += [f"{s.name} = {s.text}" for s in _forward(cell, Triton({**known, **given}))]
    forward.append(f"return h, c, {_triton_tuple([value.name for value in cell.saved])}")

    printer, statements = _backward(cell, Triton)
    backward = [f"{', '.join(v.name for v in cell.saved)} = {', '.join(f's[{j}]' for j in range(len(cell.saved)))}"]
    backward = backward if cell.saved else []
    backward += [f"{s.name} = {s.text}" for s in statements]
    gradients = _triton_tuple([printer.text(g.value) for g in cell.gradients])
    before = [None if value is None else printer.text(value) for value in cell.before]
    dc = (before[1] or "tl.zeros_like(dc)") if "c" in cell.states else "dc"
    of_weights = _triton_tuple([printer.text(value) for value in cell.weight_gradients])
    backward.append(f"return {gradients}, {of_weights}, {before[0] or 'tl.zeros_like(dh)'}, {dc}")
    return "".join(
        f"\n\n@triton.jit\ndef {cell.name}_{name}:\n" + "".join(f"    {line}\n" for line in lines)
        for name, lines in (
            ("forward(sums, w, h, c)", forward),
            ("backward(s, w, h, old_h, c, old_c, dh, dc)", backward),
        )
    )


def _triton_tuple(texts: list[str]) -> str:
    return f"({', '.join(texts)}{',' if len(texts) == 1 else ''})"


TRITON_PROGRAM = """\
import triton
import triton.language as tl

from rnnfast.triton.maths import log1p, maximum, mean, minimum, relu, sigmoid, tanh, where_positive


@triton.jit
def step(%(given)s, is_unit, H):
%(lines)s
"""


def triton_program(program: Program, inputs: Mapping[str, int], results: Sequence[int]) -> str:
    """A module with the function ``step``, which runs a program operation by operation: on tuples of so many tiles by
    name, and to a tuple of its results, or where they are of several kinds to a tuple of each kind's.

    Tiles are [units, rows], but [1, rows] of what is one number for all units of a row, and [1, 1] of numbers.
    ``is_unit`` is [units, 1], and H how many such units there are; a tile has all of them where there are means."""
    names = [f"{which}[{k}]" for which, count in inputs.items() for k in range(count)]
    lines = []

    def named(text: str) -> None:
        lines.append(f"v{len(names)} = {text}")
        names.append(f"v{len(names)}")

    for number in program.numbers:  # tiles, for bare numbers are float32 in some places, and have no negative zero
        sign = "-1.0 * " if math.copysign(1, number) < 0 else ""
        named(f'{sign}tl.full([1, 1], float("{abs(number)!r}"), x[0].dtype)')
    formats = {**Triton.functions, **{op: f"{{}} {sign} {{}}" for op, sign in _INFIX.items()}}
    formats["negate"] = "-1.0 * {}"  # of 0 Triton's minus makes 0
    formats |= {"clip_gradient": "{}", "mean": "mean({}, is_unit, H)"}
    for op, places in program.operations:
        named(formats[op].format(*[names[place] for place in places]))
    found = iter([names[place] for place in program.results])
    kinds = [_triton_tuple(list(itertools.islice(found, count))) for count in results]
    lines.append(f"return {', '.join(kinds)}")
    return TRITON_PROGRAM % {"given": ", ".join(inputs), "lines": "\n".join(f"    {line}" for line in lines)}


# Schemas


SCHEMAS = """
// The schemas of a layer's operators, printed by rnnfast/codegen.py from the records of rnnfast/records.py.
#pragma once

namespace rnnfast {

constexpr const char* kForwardSchema =
%s;

constexpr const char* kBackwardSchema =
%s;

constexpr const char* kGateGradientsSchema =
%s;

}  // namespace rnnfast
"""


def schemas() -> str:
    """``csrc/schemas.h``."""
    printed = records.FORWARD, records.BACKWARD, records.GATE_GRADIENTS
    return SCHEMAS.lstrip() % tuple(map(_cpp_text, printed))


def _cpp_text(text: str) -> str:
    return "\n".join(f'    "{line}"' for line in re.findall(r".{1,100}(?: |$)", text))


ROOT = Path(__file__).parents[1]
FILES = {"csrc/cells.h": cpp, "csrc/schemas.h": schemas, "rnnfast/triton/cells.py": triton}


def main() -> None:
    for name, printed in FILES.items():
        (ROOT / name).write_text(printed())


if __name__ == "__main__":
    main()
