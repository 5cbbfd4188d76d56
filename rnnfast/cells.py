"""The cells, each declared once: its names, and one step of it as a function that reads as its paper's equations do.

Of a step a cell sees, by name:

    x.i    gate i of ``W_ih x + b_ih``
    a.i    gate i of ``W_hh h + b_hh``
    s.h    a state as it was before the step
    w.i    a weight of each unit's own, or a scalar of the layer's, where the cell declares some

and returns its states after the step, h first. The function runs on tensors as it stands. Traced, it
is a list of operations; reverse mode over that list gives the gradients; and what those need of the forward, and cannot
make of the states before and after the step, is what a forward saves. ``codegen.py`` prints the kernels' cells from it,
and ``flex.py`` runs any of them.

Torch is not imported here: the installation reads the names of the cells.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import keyword
import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextvars import ContextVar
from types import FunctionType, TracebackType
from typing import Any, NamedTuple, TypeVar


class Value:
    """What an operation makes of others; or, with no operation, an input of a step. In order of ``number``."""

    __slots__ = ("args", "name", "number", "of_row", "op")
    op: str
    of_row: bool  # one number for all units of a row, for it is made of means

    def __init__(self, op: str, *args: Any, name: str = "") -> None:
        for place, arg in enumerate(args):
            if not isinstance(arg, (Value, int, float)):
                kind = type(arg).__name__
                raise TypeError(f"a cell computes with its values and Python's numbers, not with a {kind}: {_BRING_IN}")
            is_condition = isinstance(arg, Value) and arg.op in _COMPARISONS
            if is_condition != (op == "where" and place == 0):
                raise TypeError(
                    _NO_NUMBER if is_condition else "where() needs a comparison, such as a > 0, to choose by"
                )
            if not isinstance(arg, Value):
                float(arg)  # of an int beyond all floats an error, which names the line
        self.op, self.args, self.name = op, args, name
        self.number = next(_numbers)
        by_unit = [arg for arg in args if isinstance(arg, Value) and not arg.of_row]
        self.of_row = op == "mean" or (not by_unit and any(isinstance(arg, Value) for arg in args))

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

    def __abs__(self) -> Value:
        return Value("abs", self)

    def __pow__(self, exponent: Any) -> Value:
        return _power(self, exponent)

    def __rpow__(self, base: Any) -> Value:
        return _power(base, self)

    # The rest is what a cell is refused, and torch's functions and methods.

    __array_ufunc__ = None  # numbers of NumPy's leave the operators to Value

    def __repr__(self) -> str:
        if _in_cell.get():
            raise TypeError("a cell cannot print a value: it runs once, before there are any numbers")
        return f"<{self.op or self.name} of a cell>"

    def __format__(self, _: str) -> str:
        return repr(self)

    def _refuse_in_place(self, *_: Any) -> Any:
        raise TypeError("a cell cannot change a value in place: make a new one, as in b = a + 1")

    __iadd__ = __isub__ = __imul__ = __itruediv__ = __ipow__ = __setitem__ = _refuse_in_place

    def _refuse_logic(self, *_: Any) -> Any:
        raise TypeError("a cell has no &, | and ~: put where() into where(), as in where(p, where(q, a, b), b)")

    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __invert__ = _refuse_logic

    def _refuse_rest(self, *_: Any) -> Any:
        raise TypeError("a cell has no % and //: their steps have no gradient")

    __mod__ = __rmod__ = __floordiv__ = __rfloordiv__ = _refuse_rest

    def _refuse_elements(self, *_: Any) -> Any:
        raise TypeError(f"a cell cannot look into a value: {_BY_ITSELF}")

    __iter__ = __len__ = __getitem__ = __matmul__ = __rmatmul__ = _refuse_elements

    def _refuse_number(self, *_: Any, **__: Any) -> Any:
        raise TypeError("a cell cannot make a number of a value: use torch's functions, which take values")

    __float__ = __int__ = __index__ = __array__ = _refuse_number

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in ("item", "tolist", "numpy"):
            self._refuse_number()
        _known(name)  # at once: whatever it is, an attribute would be true
        return functools.partial(_of_torch, name, self)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _of_torch(function.__name__, *args, **(kwargs or {}))


_BRING_IN = "bring it in with the input, or declare it in weights or scalars"
_BY_ITSELF = "it is a step of each unit of each row by itself"  # but for means, which are in the list of functions
_COMPARISONS = ("less", "less_equal")
_NO_NUMBER = "a cell cannot compute with what a comparison gives: use where(condition, 1.0, 0.0)"
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
    "minimum": Primitive(lambda a, b: _of_two("minimum", a, b), lambda d, y, a, b: _shared(a < b, b < a, d)),
    "maximum": Primitive(lambda a, b: _of_two("maximum", a, b), lambda d, y, a, b: _shared(b < a, a < b, d)),
    "where": Primitive(lambda c, a, b: _where(c, a, b), lambda d, y, c, a, b: (None, *_either(c, d))),
    "less": Primitive(lambda a, b: a < b, lambda *_: (None, None)),
    "less_equal": Primitive(lambda a, b: a <= b, lambda *_: (None, None)),
    # y and d -> d where y is positive or a NaN, and 0 elsewhere: relu's gradient
    "where_positive": Primitive(lambda y, d: _where(y <= 0, 0.0, d), _not_derived),
    # over the units of a row, for each of them
    "mean": Primitive(lambda a: a.mean(-1, keepdim=True).expand_as(a), lambda d, y, a: (mean(d),)),
    # a value whose gradient is known to add up to nothing; a program has the value itself
    "held": Primitive(lambda a: a, lambda *_: (None,)),
}


def _either(condition: Value, d: Value) -> tuple[Value, Value]:
    return where(condition, d, 0.0), where(condition, 0.0, d)


def _shared(is_first: Value, is_second: Value, d: Value) -> tuple[Value, Value]:
    """Of equal ones each gets a half, as torch has it."""
    half = 0.5 * d
    return where(is_first, d, where(is_second, 0.0, half)), where(is_second, d, where(is_first, 0.0, half))


def _of_two(method: str, a: Any, b: Any) -> Any:
    """A method of tensors, where one may be a number."""
    like = b if isinstance(a, (int, float)) else a
    return getattr(_tensor(a, like), method)(_tensor(b, like))


def _tensor(value: Any, like: Any) -> Any:
    return like.new_zeros(like.shape) + value if isinstance(value, (int, float)) else value


def _where(condition: Any, a: Any, b: Any) -> Any:
    """Of a tensor, and of tensors or numbers."""
    like = next((value for value in (a, b) if not isinstance(value, (int, float))), condition + 0.0)
    return _tensor(a, like).where(condition, _tensor(b, like))


def _primitive(op: str, *args: Any) -> Any:
    if any(isinstance(arg, Value) for arg in args):
        return Value(op, *args)
    if all(isinstance(arg, (int, float)) for arg in args):
        raise TypeError(f"{op} takes a value: of numbers alone Python computes it")
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


def mean(value: Any) -> Any:
    """The mean of a value over all units of a row, for each of them: ``value.mean(-1, keepdim=True)`` of torch's."""
    if not isinstance(value, Value):
        return _primitive("mean", value)
    if value.of_row:
        return value
    # Linear as it is: what is one number for the whole row is a factor of one number then.
    if value.op == "negate":
        return -mean(*value.args)
    if value.op in ("multiply", "divide"):
        a, b = value.args
        if not isinstance(b, Value) or b.of_row:
            return Value(value.op, mean(a), b)
        if value.op == "multiply" and (not isinstance(a, Value) or a.of_row):
            return a * mean(b)
    return Value("mean", value)


def normalize(value: Any, eps: float = 1e-5) -> Any:
    """A value less its mean over all units of a row, divided by its standard deviation there; as
    ``torch.nn.functional.layer_norm`` of whole rows (Ba et al., "Layer Normalization", 2016), without gain and bias.
    """
    middle = mean(value)
    # A mean is where the squares' sum is least, so nothing comes to it from them.
    variance = mean(_square(value - _primitive("held", middle)))
    return (value - middle) * (1 / sqrt(variance + eps))


def _square(value: Any) -> Any:
    return value * value


def _torchs_mean(value: Any, dim: Any, keepdim: bool = False) -> Any:
    if dim != -1 or keepdim is not True:
        raise TypeError("a cell has torch's mean over the units of a row alone: mean(-1, keepdim=True)")
    return mean(value)


def logsigmoid(value: Any) -> Any:
    """log(sigmoid(value)), by the logarithm of a number from 1 to 2; smooth at 0, in all derivatives."""
    is_negative = value < 0
    return where(is_negative, value, 0.0) - log1p(exp(where(is_negative, value, -value)))


def softplus(value: Any) -> Any:
    return -logsigmoid(-value)


def clamp(value: Any, min: Any = None, max: Any = None) -> Any:
    """As torch's, which passes the gradient on at the bounds, where minimum and maximum pass a half."""
    if min is None and max is None:
        raise TypeError("clamp needs a bound")
    if min is not None:
        value = where(value < min, min, value) if isinstance(min, (int, float)) else maximum(value, min)
    if max is not None:
        value = where(value > max, max, value) if isinstance(max, (int, float)) else minimum(value, max)
    return value


def _hardtanh(value: Any, min_val: float = -1.0, max_val: float = 1.0) -> Any:
    return where(value <= min_val, min_val, where(value >= max_val, max_val, value))


def _elu(value: Any, alpha: float = 1.0) -> Any:
    return where(value > 0, value, alpha * (exp(where(value > 0, 0.0, value)) - 1))


_POWERS: dict[float, Callable[[Any], Value]] = {
    2: lambda a: a * a,
    3: lambda a: a * a * a,
    0.5: sqrt,
    -1: lambda a: 1 / a,
    -0.5: lambda a: 1 / sqrt(a),
}


def _power(base: Any, exponent: Any) -> Value:
    if not isinstance(base, Value) or not isinstance(exponent, (int, float)) or exponent not in _POWERS:
        got = exponent if isinstance(exponent, (int, float)) else f"a {type(exponent).__name__}"
        raise TypeError(f"a cell raises its values to the powers {', '.join(map(str, _POWERS))}, not {got}")
    return _POWERS[exponent](base)


# What a cell may use of torch, by torch's names for its functions and methods.
def _unary(op: str) -> Callable[..., Any]:
    return lambda a: _primitive(op, a)


def _binary(op: str) -> Callable[..., Any]:
    return lambda a, b: _primitive(op, a, b)


def _extreme(op: str) -> Callable[..., Any]:
    """Torch's max and min, which of a value and a number, that of a dimension, are reductions."""

    def of(a: Any, b: Any) -> Any:
        if not isinstance(a, Value) or not isinstance(b, Value):
            raise TypeError(f"a cell cannot look along a dimension: {_BY_ITSELF}; clamp() takes numbers")
        return _primitive(op, a, b)

    return of


_OF_TORCH: dict[str, Callable[..., Any]] = {
    **{op: _unary(op) for op in ("sigmoid", "tanh", "relu", "exp", "log", "log1p", "sqrt", "abs", "negate")},
    **{op: _binary(op) for op in ("add", "subtract", "multiply", "divide", "minimum", "maximum", *_COMPARISONS)},
    "max": _extreme("maximum"),
    "min": _extreme("minimum"),
    "greater": lambda a, b: _primitive("less", b, a),
    "greater_equal": lambda a, b: _primitive("less_equal", b, a),
    "where": lambda condition, a, b: where(condition, a, b),
    "rsqrt": lambda a: 1 / sqrt(a),
    "square": _square,
    "mean": _torchs_mean,
    "reciprocal": lambda a: 1 / a,
    "pow": lambda a, b: _power(a, b),
    "lerp": lambda a, b, weight: a + weight * (b - a),
    "clamp": clamp,
    "zeros_like": lambda a: 0.0,
    "ones_like": lambda a: 1.0,
    "logsigmoid": logsigmoid,
    "softplus": softplus,
    "silu": lambda a: a * sigmoid(a),
    "leaky_relu": lambda a, negative_slope=0.01: where(a > 0, a, negative_slope * a),
    "elu": _elu,
    "hardtanh": _hardtanh,
    "hardsigmoid": lambda a: _hardtanh(a, -3.0, 3.0) / 6 + 0.5,
}
_ALIASES = {"absolute": "abs", "neg": "negate", "negative": "negate", "sub": "subtract", "mul": "multiply"}
_ALIASES |= {"div": "divide", "true_divide": "divide", "clip": "clamp"}
_ALIASES |= {"lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal"}
_ALIASES |= {"log_sigmoid": "logsigmoid", "special_expit": "sigmoid"}
_RANDOM = {"rand_like", "randn_like", "randint_like", "bernoulli", "normal", "multinomial", "poisson", "binomial"}
_RANDOM |= {
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "alpha_dropout",
    "feature_alpha_dropout",
    "native_dropout",
}
_RANDOM |= {"feature_dropout", "gumbel_softmax", "rrelu", "new_rand", "new_randn"}


def _known(name: str) -> Callable[..., Any]:
    """What stands for a function or method of torch."""
    if name in _RANDOM:
        raise TypeError(f"a cell cannot draw random numbers, as torch's {name} does: bring them in with the input")
    if name.endswith("_"):
        raise TypeError(f"a cell cannot change a value in place, as torch's {name} does: make a new one")
    if name == "layer_norm":
        raise TypeError(
            "a cell cannot use torch's layer_norm: rnnfast.cells.normalize takes whole rows, whatever their size"
        )
    function = _OF_TORCH.get(_ALIASES.get(name, name))
    if function is None:
        raise TypeError(f"a cell cannot use torch's {name}: {_BY_ITSELF}, made of {', '.join(_OF_TORCH)}")
    return function


def _of_torch(name: str, *args: Any, **kwargs: Any) -> Any:
    """A function or method of torch, applied to values of a cell."""
    function = _known(name)
    if kwargs.pop("inplace", False) or "out" in kwargs:
        raise TypeError(f"a cell cannot change a value in place, as torch's {name} does: make a new one")
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"a cell cannot call torch's {name} so ({error}): {_BY_ITSELF}") from None
    return function(*args, **kwargs)


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
        self.__dict__.update(_what=what, _values=dict(zip(names, values)), _reader=None)

    def __getattr__(self, name: str) -> Any:
        if name not in self._values:
            raise AttributeError(f"{self._what} has no {name!r}, it has {', '.join(self._values) or 'nothing'}")
        self.__dict__["_reader"] = sys._getframe(1)
        return self._values[name]

    def __setattr__(self, name: str, value: Any) -> None:
        raise TypeError(f"a cell cannot set {self._what}.{name}: give the new value a name of its own")


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

    def __init__(
        self,
        function: FunctionType,
        gates: Sequence[str],
        states: Sequence[str],
        weights: Sequence[str],
        scalars: Mapping[str, float],
        initial: Mapping[str, float],
    ) -> None:
        self.name, self.function = function.__name__, function
        self.mode = self.name.upper()  # torch's name
        self.cpp_name = self.name.title().replace("_", "")
        self.gates, self.states, self.weights = list(gates), list(states), list(weights)
        self.scalars = dict(scalars)
        self.initial = [float(initial.get(state, 0.0)) for state in states]
        # As of the function, in whose place the cell stands: by these it is pickled.
        self.__module__, self.__qualname__, self.__doc__ = function.__module__, function.__qualname__, function.__doc__
        self.origin: str | tuple[Any, ...] = function.__qualname__  # as ``__reduce__`` returns it
        self.twin: str | None = None  # the mode of a cell that the kernels have, of the very same operations

    def __repr__(self) -> str:
        return f"cell {self.name}"

    def __reduce__(self) -> str | tuple[Any, ...]:
        """A cell is pickled by its name, as functions are; so it is one and the same after a copy."""
        return self.origin

    def step(
        self, x: Sequence[Any], a: Sequence[Any], states: Sequence[Any], weights: Sequence[Any] = ()
    ) -> tuple[Any, ...]:
        """The states after a step, from the gates of W_ih x + b_ih and of W_hh h + b_hh, the states before it, and the
        weights of the units' own, then the scalars."""
        return self._step(self.function, Named, x, a, states, weights)[0]

    def _step(
        self, function: Callable[..., Any], named: type[_Names], *values: Sequence[Any]
    ) -> tuple[tuple[Any, ...], list[_Names]]:
        names = self.gates, self.gates, self.states, [*self.weights, *self.scalars]
        given = [named(which, *of) for which, *of in zip("xasw", names, values)]
        after = function(*given[: 4 if names[-1] else 3])
        after = tuple(after) if isinstance(after, (tuple, list)) else (after,)
        if len(after) != len(self.states):
            raise TypeError(f"it returns {len(after)} states, but has {' and '.join(self.states)}")
        return after, given

    def traced(self) -> tuple[list[Value], list[_Watched]]:
        """The states after a step, each a value of its own, and what was given to the function."""
        # A copy, so that it sees another print than the rest of its module does.
        function = FunctionType(
            self.function.__code__,
            {**self.function.__globals__, "print": _refuse_to_print},
            self.name,
            self.function.__defaults__,
            self.function.__closure__,
        )
        function.__kwdefaults__ = self.function.__kwdefaults__
        inputs = self.inputs
        before = _in_cell.set(True)
        try:
            found, given = self._step(
                function, _Watched, inputs["x"], inputs["a"], inputs["s"], [*inputs["w"], *inputs["scalars"]]
            )
            after: list[Value] = []
            for state, value in zip(self.states, found):
                if not isinstance(value, Value):
                    kind = type(value).__name__
                    raise TypeError(f"{state} after the step is no value made of the cell's, but a {kind}")
                if value.op in _COMPARISONS:
                    raise TypeError(_NO_NUMBER)
                after.append(value + 0.0 if value.op == "" or any(value is other for other in after) else value)
            own = {*itertools.chain(*inputs.values())}
            if any(value.op == "" and value not in own for value in reachable(after)):
                raise TypeError(f"it reads a value of another cell: {_BRING_IN}")
        except Exception as error:
            why = str(error) if isinstance(error, (TypeError, AttributeError)) else f"{type(error).__name__}: {error}"
            raise self._refusal(why, error.__traceback__) from error
        finally:
            _in_cell.reset(before)
        return after, given

    def _refusal(self, why: str, traceback: TracebackType | None = None) -> TypeError:
        """Why the cell is refused, and the line where its function was when that was raised; or its first."""
        code = self.function.__code__
        line = code.co_firstlineno
        while traceback is not None:
            line = traceback.tb_lineno if traceback.tb_frame.f_code is code else line
            traceback = traceback.tb_next
        return TypeError(f"{self}, {code.co_filename}:{line}: {why}")

    def check(self) -> None:
        """Refuse what cannot be run as a cell, and find all that a layer asks for: a compiler that looks into a layer's
        first call must not have to trace a cell."""
        again = Program.of(self.traced()[0], itertools.chain(*self.inputs.values()))
        if repr(self.program) != repr(again):  # as text, in which a NaN is itself
            raise self._refusal("it computes something else each time: random numbers have to come in with the input")
        if not self.gates_of_x:
            raise self._refusal("it reads no gate of x, so the input would be nothing to it")
        _ = self.gates_of_a
        self.twin = next((mode for mode, of in MODES.items() if of._form == self._form), None)

    @functools.cached_property
    def inputs(self) -> dict[str, list[Value]]:
        """A step's ``x`` and ``a`` by gate, its states ``s``, the units' weights ``w``, and the ``scalars``."""
        names = {which: [f"{which}.{gate}" for gate in self.gates] for which in "xa"}
        names["s"] = [f"old_{state}" for state in self.states]
        names["w"] = [f"w.{weight}" for weight in self.weights]
        names["scalars"] = [f"w.{scalar}" for scalar in self.scalars]
        return {which: [Value("", name=name) for name in of] for which, of in names.items()}

    @functools.cached_property
    def after(self) -> list[Value]:
        """The states after a step, traced; the function's variables have given the values their names."""
        (after, given), inputs = self.traced(), self.inputs
        for state, value in zip(self.states, after):
            value.name = state
        taken = self._names_of_states
        for reader in filter(None, {of._reader for of in given}):
            for name, value in reader.f_locals.items():  # of the function, which has returned
                if isinstance(value, Value) and (value.name == "" or value in inputs["x"] + inputs["a"]):
                    value.name = unlike(name, taken)
                    taken = {*taken, value.name}
        for of in given:
            of.__dict__["_reader"] = None  # it holds what was read
        return after

    @functools.cached_property
    def gates_of_x(self) -> list[int]:
        """The gates whose part of W_ih x is read."""
        return self._are_read("x")

    @functools.cached_property
    def gates_of_a(self) -> list[int]:
        """The gates whose part of W_hh h is read."""
        return self._are_read("a")

    def _are_read(self, which: str) -> list[int]:
        read = set(reachable(self.after))
        return [gate for gate, value in enumerate(self.inputs[which]) if value in read]

    @property
    def _form(self) -> tuple[Any, ...]:
        """By which two cells are told to be one: a scalar is then a weight that all units have alike."""
        return len(self.gates), len(self.states), len(self.weights) + len(self.scalars), self.initial, self.program

    @property
    def sees_rows(self) -> bool:
        """Whether a step makes means over the units of a row."""
        return any(op == "mean" for op, _ in self.program.operations)

    @functools.cached_property
    def program(self) -> Program:
        """A step, from x and a by gate, the states before it, the units' weights and the scalars."""
        return Program.of(self.after, itertools.chain(*self.inputs.values()))

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
        reached = set(reachable(self.after))
        needed = self._read(reached)
        of_rows = {value for value in reached if value.of_row and value.op != "held"}
        # As they are computed; an input, which is there before them, last: the gates keep their places.
        kept = sorted(needed, key=lambda value: (value.op == "", value.number))
        for value in kept[::-1]:
            others = known | {other for other in kept if other is not value}
            given = others if value.of_row else others | of_rows  # of which there are few numbers
            if value in known or is_made_of(value, given):
                kept.remove(value)
                read = {arg for of in reachable([value], given) for arg in of.args if isinstance(arg, Value)}
                kept += sorted((read & of_rows) - {*kept}, key=lambda of: of.number)
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
        made = [*(gradient.value for gradient in self.gradients), *self.before, *self.weight_gradients]
        rest = set(reachable(made, among))
        return among & {*made, *itertools.chain.from_iterable(value.args for value in rest)}

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


class Program(NamedTuple):
    """Values as a list of operations. The places of what they read: first the inputs, then the numbers, then what each
    operation makes."""

    numbers: tuple[float, ...]
    operations: tuple[tuple[str, tuple[int, ...]], ...]  # a primitive and the places of its arguments
    results: tuple[int, ...]

    @classmethod
    def of(cls, results: Sequence[Value], inputs: Iterable[Value]) -> Program:
        places: dict[Any, int] = {value: place for place, value in enumerate(inputs)}
        values: dict[Value, None] = {}  # in an order that says nothing of the one in which they were made
        waiting = [value for value in reversed(results) if value not in places]
        while waiting:
            value = waiting[-1]
            args = [arg for arg in value.args if isinstance(arg, Value) and arg not in places]
            missing = [arg for arg in args if arg not in values]
            waiting += missing[::-1]
            if not missing:
                values[waiting.pop()] = None
        # By their text: 0.0 and -0.0 are equal.
        texts = dict.fromkeys(repr(float(arg)) for v in values for arg in v.args if not isinstance(arg, Value))
        places |= {of: place for place, of in enumerate(texts, len(places))}
        place: Callable[[Any], int] = lambda arg: places[arg if isinstance(arg, Value) else repr(float(arg))]
        first, operations = len(places), dict[tuple[str, tuple[int, ...]], int]()  # each once, by place
        before = _means_before(values)
        for of in sorted(values, key=before.__getitem__):
            made = of.op, tuple(map(place, of.args))
            places[of] = made[1][0] if of.op == "held" else operations.setdefault(made, first + len(operations))
        return cls(tuple(map(float, texts)), tuple(operations), tuple(map(place, results)))

    def tensors(self, like: Any) -> list[Any]:
        """The numbers, of a tensor's dtype and device."""
        return [like.new_full((), number) for number in self.numbers]

    def run(self, inputs: Sequence[Any], numbers: Sequence[Any]) -> list[Any]:
        """The results, of tensors."""
        made = [*inputs, *numbers]
        for op, places in self.operations:
            made.append(PRIMITIVES[op].on_tensors(*[made[place] for place in places]))
        return [made[place] for place in self.results]


def _means_before(values: Iterable[Value]) -> dict[Value, int]:
    """How many means have to be made one after the other before each of some values, which are in order."""
    found: dict[Value, int] = {}
    for value in values:
        of_args = [found[arg] + (arg.op == "mean") for arg in value.args if isinstance(arg, Value) and arg in found]
        found[value] = max(of_args, default=0)
    return found


def _refuse_to_print(*_: Any, **__: Any) -> None:
    raise TypeError("a cell cannot print: it runs once, before there are any numbers")


def check_numbers(what: str, values: Mapping[str, float] | None) -> dict[str, float]:
    """Numbers by name; none are given as None."""
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        raise TypeError(f"{what} have to be numbers by name, in a dict, got {type(values).__name__}")
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{what} have to be numbers, got a {type(value).__name__} for {name}")
    return {name: float(value) for name, value in values.items()}


def cell(
    *,
    gates: str | Sequence[str],
    states: str | Sequence[str] = "h",
    weights: str | Sequence[str] = (),
    scalars: Mapping[str, float] | None = None,
    initial: Mapping[str, float] | None = None,
) -> Callable[[Callable[..., Any]], Cell]:
    """Declare a recurrent cell: names, above a function of one step that reads as its paper's equations do.

    The function takes ``(x, a, s)``, or ``(x, a, s, w)`` where there are weights or scalars, and returns the states
    after the step, as a tuple if there are several. Of gate i, ``x.i`` is its part of ``W_ih x + b_ih`` and ``a.i``
    that of ``W_hh h + b_hh``; ``s.h`` is a state before the step. All are values of a unit in a row: the function
    computes with operators, Python's numbers and torch's elementwise functions (or those of this module), and branches
    by ``torch.where``. Over the units of a row, all heads together, it may take means, as ``value.mean(-1,
    keepdim=True)`` or ``cells.mean(value)``, and so ``cells.normalize``. It runs once, here; what it did is then done
    at every step.

    Args:
        gates, states, weights: names, in their order, as a sequence or in one string with spaces between. The first
            state is the output h. Weights are vectors ``[H]``, a number for each unit, read as ``w.NAME``. A gate whose
            ``x`` or ``a`` the function does not read has no rows in W_ih or W_hh.
        scalars: numbers by name, read as ``w.NAME``, that a layer may have others of.
        initial: by state its value at the beginning of a sequence, where that is not 0.

    Raises:
        TypeError: the function does what no cell can (draw random numbers, branch on a value, change one in place,
            print, look across rows, or across units but for means, use a tensor from outside, ...), reads a name that
            is not declared, or returns another number of states: the message names the cell and the line. Or names are
            in no string, list or tuple, or values of scalars and initial are no numbers.
        ValueError: names are no identifiers, or not distinct, or initial has one that is no state.
    """
    for what, names in {"gates": gates, "states": states, "weights": weights}.items():
        if not isinstance(names, (str, list, tuple)):  # others may have no order, or another in each process
            raise TypeError(f"{what} have to be a string, a list or a tuple, got {type(names).__name__}")
    gates, states, weights = (of.split() if isinstance(of, str) else list(of) for of in (gates, states, weights))
    scalars, initial = check_numbers("scalars", scalars), check_numbers("initial", initial)
    for what, of in {"gates": gates, "states": states, "weights and scalars": [*weights, *scalars]}.items():
        wrong = [name for name in of if not isinstance(name, str) or not name.isidentifier() or name.startswith("_")]
        if wrong or len(set(of)) < len(of):
            raise ValueError(f"{what} have to be distinct identifiers with no underscore in front, got {of}")
    if not gates or not states:
        raise ValueError(f"a cell has one gate and one state at least, got gates {gates} and states {states}")
    if unknown := initial.keys() - set(states):
        raise ValueError(f"initial has values of {sorted(unknown)}, which are no states: those are {states}")

    def declare(function: Callable[..., Any]) -> Cell:
        if not isinstance(function, FunctionType):
            raise TypeError(f"cell() declares a function of one step, got {function!r}")
        declared = Cell(function, gates, states, weights, scalars, initial)
        declared.check()
        return declared

    return declare


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
    """Whether a value is one of these, or can be computed from them alone, unit by unit."""
    return all(of.op not in ("", "mean") for of in reachable([value], given))


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


CELLS: dict[str, Cell] = {}  # by mode: those of which every backend has kernels,
MODES: dict[str, Cell] = {}  # and these and others, of which CUDA's has them


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


CELLS |= {declared.mode: declared for declared in (rnn_tanh, rnn_relu, lstm, gru, peephole_lstm)}


# Others, of which FlexRNN makes layers.


# Greff et al., "LSTM: A Search Space Odyssey", 2015: what is not forgotten is written.
@cell(gates="f g o", states="h c")
def cifg(x, a, s):
    """An LSTM with coupled input and forget gates."""
    f = sigmoid(x.f + a.f)
    g = tanh(x.g + a.g)
    o = sigmoid(x.o + a.o)
    c = f * s.c + (1 - f) * g
    return o * tanh(c), c


# As Le et al., "A Simple Way to Initialize Recurrent Networks of Rectified Linear Units", 2015, have it in RNNs.
@cell(gates="i f g o", states="h c")
def relu_lstm(x, a, s):
    """An LSTM with relu for tanh."""
    i = sigmoid(x.i + a.i)
    f = sigmoid(x.f + a.f)
    g = relu(x.g + a.g)
    o = sigmoid(x.o + a.o)
    c = f * s.c + i * g
    return o * relu(c), c


# Beck et al., "xLSTM: Extended Long Short-Term Memory", 2024, equations 8 to 17. The gates are exponentials, kept
# within bounds by m; the normaliser n is 0 before the first step only, where m is that step's own and bounds no log_f.
# The authors' code takes no f above 1; it is the exponent that is held here, so that the gradient is finite too.
@cell(gates="i f z o", states="h c n m")
def slstm(x, a, s):
    """The sLSTM of xLSTM, whose heads are ``num_heads`` of FlexRNN."""
    log_i = x.i + a.i
    log_f = logsigmoid(x.f + a.f) + s.m
    m = where(s.n > 0, maximum(log_f, log_i), log_i)
    i = exp(log_i - m)
    f = exp(minimum(log_f - m, 0.0))
    c = f * s.c + i * tanh(x.z + a.z)
    n = f * s.n + i
    return sigmoid(x.o + a.o) * (c / n), c, n, m


# Van der Westhuizen and Lasenby, "The Unreasonable Effectiveness of the Forget Gate", 2018.
@cell(gates="f g", scalars={"beta": 1.0})
def janet(x, a, s, w):
    """An LSTM with the forget gate alone."""
    u = x.f + a.f
    v = u - w.beta
    f = sigmoid(u)
    k = sigmoid(v)
    g = tanh(x.g + a.g)
    return f * s.h + (1 - k) * g


# Zhou et al., "Minimal Gated Unit for Recurrent Neural Networks", 2016; but f multiplies W_hh h, as in torch's GRU.
@cell(gates="f n")
def mgu(x, a, s):
    """The minimal gated unit: a GRU whose two gates are one."""
    f = sigmoid(x.f + a.f)
    q = a.n
    n = tanh(x.n + f * q)
    return (1 - f) * s.h + f * n


# Ravanelli et al., "Light Gated Recurrent Units for Speech Recognition", 2018, without its batch normalisation.
@cell(gates="z n")
def ligru(x, a, s):
    """A GRU with neither reset gate nor tanh."""
    z = sigmoid(x.z + a.z)
    n = relu(x.n + a.n)
    return z * s.h + (1 - z) * n


# Li et al., "Independently Recurrent Neural Network (IndRNN)", 2018.
@cell(gates="g", weights="u")
def indrnn(x, a, s, w):
    """A unit sees no other unit's past."""
    return relu(x.g + w.u * s.h)


# Lei et al., "Simple Recurrent Units for Highly Parallelizable Recurrence", 2018; the highway carries the input by a
# matrix of its own, gate k, as there where the sizes differ.
@cell(gates="g f r k", states="h c", weights="f r")
def sru(x, a, s, w):
    """The simple recurrent unit."""
    f = sigmoid(x.f + w.f * s.c)
    r = sigmoid(x.r + w.r * s.c)
    c = f * s.c + (1 - f) * x.g
    return r * c + (1 - r) * x.k, c


# Feng et al., "Were RNNs All We Needed?", 2024.
@cell(gates="z n")
def min_gru(x, a, s):
    """A GRU whose gates see the input alone."""
    z = sigmoid(x.z)
    return (1 - z) * s.h + z * x.n


# As of the same paper's appendix: sigmoid(f) / (sigmoid(f) + sigmoid(i)) by logarithms, for both may underflow.
@cell(gates="f i n")
def min_lstm(x, a, s):
    """An LSTM whose gates see the input alone, and sum to 1."""
    f = sigmoid(logsigmoid(x.f) - logsigmoid(x.i))
    return f * s.h + (1 - f) * x.n


# Jaeger et al., "Optimization and Applications of Echo State Networks with Leaky-Integrator Neurons", 2007; a CTRNN
# in steps of Euler's.
@cell(gates="g", scalars={"leak": 0.3})
def leaky_rnn(x, a, s, w):
    """A neuron of an echo state network, which leaks."""
    g = tanh(x.g + a.g)
    return (1 - w.leak) * s.h + w.leak * g


def _of_weights(of: Cell) -> Cell:
    """A cell with weights of the units' own for its scalars: kernels have none."""
    weights, initial = [*of.weights, *of.scalars], dict(zip(of.states, of.initial))
    return Cell(of.function, of.gates, of.states, weights, {}, initial) if of.scalars else of


_WITH_MODES = CELLS | {of.mode: of for of in (cifg, relu_lstm, janet, mgu, ligru, leaky_rnn)}
MODES |= {mode: _of_weights(of) for mode, of in _WITH_MODES.items()}
for _mode in MODES:
    _WITH_MODES[_mode].twin = _mode


# Of each cell, by torch's name of it: how many columns of H its gates have, what a forward keeps for the backward, and
# what a backward makes, at the gates and of the units' weights; whether there is a cell state; which states are read by
# its gradients; the ranges of Cell; and the gate whose x and a are read apart, or -1.
GATES = {mode: len(declared.gates) for mode, declared in MODES.items()}
SAVED_GATES = {mode: len(declared.saved) for mode, declared in MODES.items()}
GRADIENTS = {mode: len(declared.gradients) for mode, declared in MODES.items()}
UNIT_WEIGHTS = {mode: len(declared.weights) for mode, declared in MODES.items()}
HAS_CELL_STATE = {mode: "c" in declared.states for mode, declared in MODES.items()}
READS = {mode: tuple(n for n in ("h", "old_h") if declared.reads(n)) for mode, declared in MODES.items()}
RANGES_OF_A = {mode: declared.ranges_of_a() for mode, declared in MODES.items()}
APART = {mode: declared.apart[0] if declared.apart else -1 for mode, declared in MODES.items()}
