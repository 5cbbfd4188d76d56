"""The cells, each declared once: its names, and one step of it as a function that reads as its paper's equations do.

Of a step a cell sees, by name:

    x.i    gate i of ``W_ih x + b_ih``
    a.i    gate i of ``W_hh h + b_hh``
    s.h    a state as it was before the step
    w.i    a weight of each unit's own, where the cell declares some

and returns its states after the step, h first. The function runs on tensors as it stands. Traced, it
is a list of operations; reverse mode over that list gives the gradients; and what those need of the forward, and cannot
make of the states before and after the step, is what a forward saves. ``codegen.py`` prints the kernels' cells from it.

Torch is not imported here: the installation reads the names of the cells.
"""

from __future__ import annotations

import functools
import itertools
import keyword
import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextvars import ContextVar
from types import FrameType
from typing import Any, NamedTuple, TypeVar


class Value:
    """What an operation makes of others; or, with no operation, an input of a step. In order of ``number``."""

    __slots__ = ("args", "name", "number", "op")

    def __init__(self, op: str, *args: Any, name: str = "") -> None:
        self.op, self.args, self.name = op, args, name
        self.number = next(_numbers)

    def __add__(self, other: Any) -> Value:
        return Value("add", self, other)

    def __radd__(self, other: Any) -> Value:
        return Value("add", other, self)

    def __sub__(self, other: Any) -> Value:
        return Value("subtract", self, other)

    def __rsub__(self, other: Any) -> Value:
        return Value("subtract", other, self)

    def __mul__(self, other: Any) -> Value:
        return Value("multiply", self, other)

    def __rmul__(self, other: Any) -> Value:
        return Value("multiply", other, self)

    def __truediv__(self, other: Any) -> Value:
        return Value("divide", self, other)

    def __rtruediv__(self, other: Any) -> Value:
        return Value("divide", other, self)

    def __neg__(self) -> Value:
        return Value("negate", self)

    def __lt__(self, other: Any) -> Value:
        return Value("less", self, other)

    def __le__(self, other: Any) -> Value:
        return Value("less_equal", self, other)

    def __gt__(self, other: Any) -> Value:
        return Value("less", other, self)

    def __ge__(self, other: Any) -> Value:
        return Value("less_equal", other, self)

    def __eq__(self, other: object) -> bool:
        if _in_cell.get():
            raise TypeError("a cell cannot ask whether values are equal: compare them with < or <=, and use where()")
        return self is other

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        raise TypeError("a cell cannot branch on a value: use where(condition, this, that)")


_numbers = itertools.count()
_in_cell = ContextVar("_in_cell", default=False)  # whether the function of a cell is being traced


class Primitive(NamedTuple):
    """An operation: how it is done with tensors, and the gradients of its arguments."""

    on_tensors: Callable[..., Any]
    # d, the result and the arguments -> the gradient of each argument, or None
    gradients: Callable[..., Sequence[Value | None]]


def _not_derived(*_: Any) -> Sequence[Value | None]:
    raise TypeError("the gradient of a gradient is plain torch's to take")


PRIMITIVES = {
    "add": Primitive(lambda a, b: a + b, lambda d, y, a, b: (d, d)),
    "subtract": Primitive(lambda a, b: a - b, lambda d, y, a, b: (d, -d)),
    "multiply": Primitive(lambda a, b: a * b, lambda d, y, a, b: (d * b, d * a)),
    "divide": Primitive(lambda a, b: a / b, lambda d, y, a, b: (d / b, -(d * y / b))),
    "negate": Primitive(lambda a: -a, lambda d, y, a: (-d,)),
    "sigmoid": Primitive(lambda a: a.sigmoid(), lambda d, y, a: (d * y * (1 - y),)),
    "tanh": Primitive(lambda a: a.tanh(), lambda d, y, a: (d * (1 - y * y),)),
    "relu": Primitive(lambda a: a.relu(), lambda d, y, a: (Value("where_positive", y, d),)),
    "exp": Primitive(lambda a: a.exp(), lambda d, y, a: (d * y,)),
    "log": Primitive(lambda a: a.log(), lambda d, y, a: (d / a,)),
    "log1p": Primitive(lambda a: a.log1p(), lambda d, y, a: (d / (1 + a),)),
    "sqrt": Primitive(lambda a: a.sqrt(), lambda d, y, a: (d / (2 * y),)),
    "abs": Primitive(lambda a: a.abs(), lambda d, y, a: (where(a < 0, -d, where(a > 0, d, 0.0)),)),
    # Of equal ones the first gets all: torch gives each a half, as good a subgradient.
    "minimum": Primitive(lambda a, b: _where(a <= b, a, b), lambda d, y, a, b: _either(a <= b, d)),
    "maximum": Primitive(lambda a, b: _where(b <= a, a, b), lambda d, y, a, b: _either(b <= a, d)),
    "where": Primitive(lambda c, a, b: _where(c, a, b), lambda d, y, c, a, b: (None, *_either(c, d))),
    "less": Primitive(lambda a, b: a < b, lambda *_: (None, None)),
    "less_equal": Primitive(lambda a, b: a <= b, lambda *_: (None, None)),
    # y and d -> d where y is positive or a NaN, and 0 elsewhere: relu's gradient
    "where_positive": Primitive(lambda y, d: _where(y <= 0, 0.0, d), _not_derived),
}


def _either(condition: Value, d: Value) -> tuple[Value, Value]:
    return where(condition, d, 0.0), where(condition, 0.0, d)


def _tensor(value: Any, like: Any) -> Any:
    return like.new_zeros(like.shape) + value if isinstance(value, (int, float)) else value


def _where(condition: Any, a: Any, b: Any) -> Any:
    """Of tensors or numbers, of which the condition need not be one."""
    if isinstance(condition, bool):
        return a if condition else b
    like = next((value for value in (a, b) if not isinstance(value, (int, float))), condition + 0.0)
    return _tensor(a, like).where(condition, _tensor(b, like))


def _primitive(op: str, *args: Any) -> Any:
    if any(isinstance(arg, Value) for arg in args):
        return Value(op, *args)
    return PRIMITIVES[op].on_tensors(*args)


sigmoid = functools.partial(_primitive, "sigmoid")
tanh = functools.partial(_primitive, "tanh")
relu = functools.partial(_primitive, "relu")
exp = functools.partial(_primitive, "exp")
log = functools.partial(_primitive, "log")
log1p = functools.partial(_primitive, "log1p")
sqrt = functools.partial(_primitive, "sqrt")
absolute = functools.partial(_primitive, "abs")
minimum = functools.partial(_primitive, "minimum")
maximum = functools.partial(_primitive, "maximum")
where: Callable[..., Any] = functools.partial(_primitive, "where")


class Named:
    """Values by name."""

    def __init__(self, what: str, names: Sequence[str], values: Sequence[Any]) -> None:
        self.__dict__.update(zip(names, values))
        self._what = what

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{self._what} has no {name!r}")


class _Watched(Named):
    """Values by name, and the frame of the function that read one last."""

    def __init__(self, what: str, names: Sequence[str], values: Sequence[Any]) -> None:
        self._what, self._values = what, dict(zip(names, values))
        self._reader: FrameType | None = None

    def __getattr__(self, name: str) -> Any:
        if name not in self._values:
            super().__getattr__(name)
        self._reader = sys._getframe(1)
        return self._values[name]


_Names = TypeVar("_Names", bound=Named)

# What printed cells have for themselves, and what their languages do.
_RESERVED = {"x", "a", "s", "w", "d", "F", "sums", "tl", "triton", "direct", *keyword.kwlist}
_RESERVED |= {
    "auto",
    "bool",
    "case",
    "char",
    "const",
    "default",
    "do",
    "double",
    "enum",
    "float",
    "goto",
    "int",
    "long",
}
_RESERVED |= {"new", "short", "switch", "this", "sigmoid", "tanh", "relu", "where_positive"}


def unlike(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    return name


class Gradient(NamedTuple):
    """Of a gate: of its sums with W_ih x, with W_hh h, or of both, where the cell reads the two as one sum."""

    gate: str
    value: Any  # a Value; or 0, where the cell does not read the gate
    of_a: bool


class Cell:
    """A declared cell. Names are in the order in which they were declared, and so lie the gates in every tensor."""

    def __init__(self, function: Callable[..., Any], gates: str, states: str, weights: str) -> None:
        self.name, self.function = function.__name__, function
        self.mode = self.name.upper()  # torch's name
        self.cpp_name = self.name.title().replace("_", "")
        self.gates, self.states, self.weights = gates.split(), states.split(), weights.split()

    def __repr__(self) -> str:
        return f"cell {self.name}"

    def step(
        self, x: Sequence[Any], a: Sequence[Any], states: Sequence[Any], weights: Sequence[Any] = ()
    ) -> tuple[Any, ...]:
        """The states after a step, from the gates of W_ih x + b_ih and of W_hh h + b_hh, the states before it, and the
        weights of the units' own."""
        return self._step(Named, x, a, states, weights)[0]

    def _step(self, named: type[_Names], *values: Sequence[Any]) -> tuple[tuple[Any, ...], list[_Names]]:
        names = self.gates, self.gates, self.states, self.weights
        given = [named(f"cell {self.name}: {which}", *of) for which, *of in zip("xasw", names, values)]
        after = self.function(*given[: 4 if self.weights else 3])
        after = after if isinstance(after, tuple) else (after,)
        if len(after) != len(self.states):
            raise TypeError(f"{self} returns {len(after)} states, but has {' and '.join(self.states)}")
        return after, given

    @functools.cached_property
    def inputs(self) -> dict[str, list[Value]]:
        """A step's ``x`` and ``a`` by gate, its states ``s`` and the units' weights ``w``."""
        names = {which: [f"{which}.{gate}" for gate in self.gates] for which in "xa"}
        names["s"] = [f"old_{state}" for state in self.states]
        names["w"] = [f"w.{weight}" for weight in self.weights]
        return {which: [Value("", name=name) for name in of] for which, of in names.items()}

    @functools.cached_property
    def after(self) -> list[Value]:
        """The states after a step, traced; the function's variables have given the values their names."""
        inputs = self.inputs
        before = _in_cell.set(True)
        try:
            after, given = self._step(_Watched, *inputs.values())
        finally:
            _in_cell.reset(before)
        for k, (state, value) in enumerate(zip(self.states, after)):
            if not isinstance(value, Value) or value.op == "" or value in after[:k]:
                raise TypeError(f"{self}: {state} after the step is no value of its own")
            value.name = state
        taken = self._names_of_states
        for reader in filter(None, {of._reader for of in given}):
            for name, value in reader.f_locals.items():  # of the function, which has returned
                if isinstance(value, Value) and (value.name == "" or value in inputs["x"] + inputs["a"]):
                    value.name = unlike(name, taken)
                    taken = {*taken, value.name}
        for of in given:
            of._reader = None  # it holds what was read
        return list(after)

    @property
    def _names_of_states(self) -> set[str]:
        return {f"{of}{state}" for of in ("", "old_", "d") for state in (*self.states, "h", "c")} | _RESERVED

    @functools.cached_property
    def sums(self) -> list[Value | None]:
        """Of each gate its sum x + a, or None where the cell reads x and a apart."""
        users: dict[Value, list[Value]] = {}
        for value in reachable(self.after):
            for arg in value.args:
                users.setdefault(arg, []).append(value)
        found: list[Value | None] = []
        for x, a in zip(self.inputs["x"], self.inputs["a"]):
            by = users.get(x, [])
            joined = len(by) == 1 and by == users.get(a) and by[0].op == "add"
            found.append(by[0] if joined else None)
        return found

    @functools.cached_property
    def incoming(self) -> list[Value]:
        """The gradients of the states after a step, beside what comes to the others through h."""
        return [Value("", name=f"d{state}") for state in self.states]

    @functools.cached_property
    def adjoints(self) -> dict[Value, Value]:
        """The gradient of each value of a step."""
        return adjoints(dict(zip(self.after, self.incoming)))

    @functools.cached_property
    def gradients(self) -> list[Gradient]:
        """At the gates: first one for each, of x, then those of a that differ from them."""
        of_x, of_a = [], []
        for gate, total, x, a in zip(self.gates, self.sums, self.inputs["x"], self.inputs["a"]):
            if total is not None:
                of_x.append(Gradient(gate, self.adjoints.get(total, 0), True))
            else:
                of_x.append(Gradient(gate, self.adjoints.get(x, 0), False))
                of_a.append(Gradient(gate, self.adjoints.get(a, 0), True))
        taken = self._names_of_states | {value.name for value in reachable(self.after)}
        for gradient in of_x:
            if isinstance(gradient.value, Value) and not gradient.value.name:
                gradient.value.name = unlike(f"d{gradient.gate}", taken)
                taken = {*taken, gradient.value.name}
        return of_x + of_a

    @functools.cached_property
    def weight_gradients(self) -> list[Any]:
        """What a step adds to the gradients of the units' weights: Values; or 0, of one that the cell does not read."""
        return [self.adjoints.get(weight, 0) for weight in self.inputs["w"]]

    @functools.cached_property
    def before(self) -> list[Value | None]:
        """The gradients of the states before the step, of h beside what comes through W_hh; None: there is none."""
        return [self.adjoints.get(state) for state in self.inputs["s"]]

    @functools.cached_property
    def saved(self) -> list[Value]:
        """What the gradients need of the forward and cannot make of the states before and after the step."""
        known = {*self.after, *self.inputs["s"], *self.inputs["w"], *self.incoming}
        needed = self._read(set(reachable(self.after)))
        # As they are computed; an input, which is there before them, last: the gates keep their places.
        kept = sorted(needed, key=lambda value: (value.op == "", value.number))
        for value in kept[::-1]:
            others = known | {other for other in kept if other is not value}
            if value in known or is_made_of(value, others):
                kept.remove(value)
        for j, value in enumerate(kept):
            value.name = value.name or f"saved_{j}"
        return kept

    @functools.cached_property
    def projects(self) -> bool:
        """Whether h may be projected: then the h of the steps is another, and the cell's own, of which the projection's
        gradient is made, is computed again, of what is saved and of the other states after the step."""
        is_read = {self.after[0], self.inputs["s"][0]} & self.read_by_gradients
        return not is_read and is_made_of(self.after[0], {*self.saved, *self.after[1:]})

    def output(self, saved: Sequence[Any], after: Sequence[Any]) -> Any:
        """On tensors, h of what was saved and of the other states after the step."""
        return evaluate(self.after[0], dict(zip([*self.saved, *self.after[1:]], [*saved, *after])))

    @functools.cached_property
    def apart(self) -> list[int]:
        """The gates whose x and a are read apart."""
        return [k for k, total in enumerate(self.sums) if total is None]

    def reads(self, name: str) -> bool:
        """Whether the gradients are made of a state before the step, as ``old_h``, or after it, as ``h``."""
        return any(value.name == name for value in self.read_by_gradients)

    @functools.cached_property
    def read_by_gradients(self) -> set[Value]:
        """The states before and after a step, and what is saved, of which the gradients are made."""
        return self._read({*self.inputs["s"], *self.after, *self.saved})

    def _read(self, among: set[Value]) -> set[Value]:
        """Of some values those that the gradients are made of, not through others of them."""
        found: set[Value] = set()
        waiting: list[Any] = [*(gradient.value for gradient in self.gradients), *self.before, *self.weight_gradients]
        while waiting:
            value = waiting.pop()
            if value in among:
                found.add(value)
            elif isinstance(value, Value):
                waiting.extend(value.args)
        return found

    def hidden(self, gate: int) -> int:
        """Where among the gradients that of a gate of a is."""
        name = self.gates[gate]
        return next(i for i, of in enumerate(self.gradients) if of.gate == name and of.of_a)

    def ranges_of_a(self) -> list[tuple[int, int, int]]:
        """Where among the gradients those of a are, by range: its first gate, the place of that one, and how many."""
        found: list[tuple[int, int, int]] = []
        for gate in range(len(self.gates)):
            first, at, count = found[-1] if found else (0, 0, 0)
            if self.hidden(gate) == at + count:
                found[-1:] = [(first, at, count + 1)]
            else:
                found.append((gate, self.hidden(gate), 1))
        return found

    def backward(
        self,
        x: Sequence[Any],
        a: Sequence[Any],
        before: Sequence[Any],
        grads: Sequence[Any],
        weights: Sequence[Any] = (),
    ) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
        """On tensors, from the gradients of the states after a step: those of x and a, by gate, of the states before
        it, None where there is none, and what each row adds to those of the units' weights."""
        known = dict(zip(itertools.chain(*self.inputs.values()), [*x, *a, *before, *weights]))
        known |= zip(self.incoming, grads)
        likes = [*x, *(a[gate] for gate in self.apart)]
        gradients = [_tensor(evaluate(of.value, known), like) for of, like in zip(self.gradients, likes)]
        states = [None if state is None else evaluate(state, known) for state in self.before]
        of_a = [gradients[self.hidden(gate)] for gate in range(len(self.gates))]
        of_weights = [_tensor(evaluate(of, known), x[0]) for of in self.weight_gradients]
        return gradients[: len(self.gates)], of_a, states, of_weights


def cell(gates: str, states: str = "h", weights: str = "") -> Callable[[Callable[..., Any]], Cell]:
    """Declare a cell: the names of its gates, of its states, and of the weights beside W_ih and W_hh that are a vector
    of a number a unit, in their order; the first state is the output h. A cell with such weights takes them last."""
    return lambda function: Cell(function, gates, states, weights)


def reachable(values: Iterable[Any], known: Container[Value] = ()) -> list[Value]:
    """The values that these are made of, inputs and themselves among them, in the order of their making; but neither
    known ones nor what only those are made of."""
    found: set[Value] = set()
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if isinstance(value, Value) and value not in found and value not in known:
            found.add(value)
            waiting.extend(value.args)
    return sorted(found, key=lambda value: value.number)


def is_made_of(value: Any, given: set[Value]) -> bool:
    """Whether a value is one of these, or can be computed from them alone."""
    if not isinstance(value, Value) or value in given:
        return True
    return value.op != "" and all(is_made_of(arg, given) for arg in value.args)


def adjoints(of: Mapping[Value, Value]) -> dict[Value, Value]:
    """By value, its gradient, from those of some results."""
    found = dict(of)
    for value in reversed(reachable(of)):
        if value.op == "" or value not in found:
            continue
        for arg, gradient in zip(value.args, PRIMITIVES[value.op].gradients(found[value], value, *value.args)):
            if isinstance(arg, Value) and gradient is not None:
                found[arg] = _sum(found[arg], gradient) if arg in found else gradient
    return found


def _sum(a: Value, b: Value) -> Value:
    if b.op != "negate":
        return a + b
    (b,) = b.args
    return a * (1 - b.args[1]) if b.op == "multiply" and b.args[0] is a else a - b


def evaluate(value: Any, known: dict[Value, Any]) -> Any:
    """A value on tensors, from those known of it, to which is added what is met on the way."""
    if not isinstance(value, Value):
        return value
    if value not in known:
        known[value] = PRIMITIVES[value.op].on_tensors(*(evaluate(arg, known) for arg in value.args))
    return known[value]


# The cells of torch, by its names of them. Torch's pages of nn.RNN, nn.LSTM and nn.GRU have the equations.


@cell(gates="g")
def rnn_tanh(x, a, s):
    return tanh(x.g + a.g)


@cell(gates="g")
def rnn_relu(x, a, s):
    return relu(x.g + a.g)


@cell(gates="i f g o", states="h c")
def lstm(x, a, s):
    i = sigmoid(x.i + a.i)
    f = sigmoid(x.f + a.f)
    g = tanh(x.g + a.g)
    o = sigmoid(x.o + a.o)
    c = f * s.c + i * g
    return o * tanh(c), c


# The reset gate multiplies q, the hidden part of the candidate, so x and a differ in the candidate's gradient.
@cell(gates="r z n")
def gru(x, a, s):
    r = sigmoid(x.r + a.r)
    z = sigmoid(x.z + a.z)
    q = a.n
    n = tanh(x.n + r * q)
    return n + z * (s.h - n)


# Gers and Schmidhuber, "Recurrent Nets that Time and Count", 2000: the gates see their unit's cell state through
# "peepholes", the output gate the new one.
@cell(gates="i f g o", states="h c", weights="i f o")
def peephole_lstm(x, a, s, w):
    i = sigmoid(x.i + a.i + w.i * s.c)
    f = sigmoid(x.f + a.f + w.f * s.c)
    g = tanh(x.g + a.g)
    c = f * s.c + i * g
    o = sigmoid(x.o + a.o + w.o * c)
    return o * tanh(c), c


CELLS: dict[str, Cell] = {declared.mode: declared for declared in (rnn_tanh, rnn_relu, lstm, gru, peephole_lstm)}


# Of each cell, by torch's name of it: how many columns of H its gates have, what a forward keeps for the backward, and
# what a backward makes, at the gates and of the units' weights; whether there is a cell state; which states are read by
# its gradients; the ranges of Cell; and the gate whose x and a are read apart, or -1.
GATES = {mode: len(declared.gates) for mode, declared in CELLS.items()}
SAVED_GATES = {mode: len(declared.saved) for mode, declared in CELLS.items()}
GRADIENTS = {mode: len(declared.gradients) for mode, declared in CELLS.items()}
UNIT_WEIGHTS = {mode: len(declared.weights) for mode, declared in CELLS.items()}
HAS_CELL_STATE = {mode: "c" in declared.states for mode, declared in CELLS.items()}
READS = {mode: tuple(n for n in ("h", "old_h") if declared.reads(n)) for mode, declared in CELLS.items()}
RANGES_OF_A = {mode: declared.ranges_of_a() for mode, declared in CELLS.items()}
APART = {mode: declared.apart[0] if declared.apart else -1 for mode, declared in CELLS.items()}
