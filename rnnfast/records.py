"""What crosses the border of a layer's operators: records, whose fields are the operators' arguments and results.

An operator takes the fields one by one; within the package the records travel whole. The schemas are printed from them,
for Python here and for the libraries by ``codegen.py``. Letters as in ``reference.py``; S columns of H are saved of a
step, K are the gradients that it makes at the gates, and U the weights of each unit's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .cells import MODES

if TYPE_CHECKING:  # nothing is computed here
    from torch import Tensor

    Written = Tensor  # an argument that the operator writes to


class Weights(NamedTuple):
    """The weights of one direction, in torch's flat order and then others; None where absent."""

    w_ih: Tensor  # [G*H, I]
    w_hh: Tensor  # [G*H, P]
    b_ih: Tensor | None = None  # [G*H]
    b_hh: Tensor | None = None  # [G*H]
    w_hr: Tensor | None = None  # [P, H]
    w_units: Tensor | None = None  # [U*H]: U weights of each unit's own, as many as the cell declares


# Of each cell the names that the weights of one direction may have, and how many they are.
NAMES = {
    mode: {
        names: len(names.split())
        for biases in ("", " b_ih b_hh")
        for projection in (("", " w_hr") if declared.projects else ("",))
        for names in ["w_ih w_hh" + biases + projection + (" w_units" if declared.weights else "")]
    }
    for mode, declared in MODES.items()
}


# The names by how many they are.
BY_COUNT = {mode: {size: names for names, size in of_mode.items()} for mode, of_mode in NAMES.items()}


def names_of(mode: str, count: int) -> str:
    """The names of so many weights of one direction in torch's flat order, where their number alone tells."""
    names = BY_COUNT[mode].get(count)
    if names is None:
        raise RuntimeError(f"rnnfast: no {mode} has {count} weights in a direction")
    return names


class Inputs(NamedTuple):
    """What a layer is computed from."""

    mode: str  # torch's name of the cell
    x: Tensor  # [T, N, I]; packed [R, I]
    h0: Tensor | None  # [D, N, P]
    c0: Tensor | None  # [D, N, H]
    batch_sizes: Tensor | None  # int64 [T] on the CPU
    lengths: Tensor | None  # int64 [N]
    resets: Tensor | None  # bool [T, N]
    bidirectional: bool
    names: str  # of the weights of one direction
    weights: Sequence[Tensor]  # those of one direction after those of the other

    def flat(self) -> tuple[Any, ...]:
        """As the arguments of an autograd Function, which looks for tensors in no list."""
        return (*self[:-1], *self.weights)

    @classmethod
    def of_flat(cls, values: Sequence[Any]) -> Inputs:
        last = len(cls._fields) - 1
        return cls._make([*values[:last], values[last:]])

    def directions(self) -> list[Weights]:
        names, weights = self.names.split(), self.weights
        starts = range(0, len(weights), len(names))
        return [Weights(**dict(zip(names, weights[start : start + len(names)]))) for start in starts]


class Outputs(NamedTuple):
    """What a layer's forward makes; what is absent, or not asked for, has shape [0]."""

    y: Tensor  # [T, N, D*P]; packed [R, D*P]
    h_n: Tensor  # [D, N, P]
    c_n: Tensor  # [D, N, H]
    c: Tensor  # [T, N, D*H]; packed [R, D*H]: after every step, in the accumulation dtype
    gates: Tensor  # [D, R, S*H]: what the backward needs of every step


class OutputGradients(NamedTuple):
    """Of a layer's outputs; None where there is none."""

    dy: Tensor | None
    dh_n: Tensor | None
    dc_n: Tensor | None
    dc: Tensor | None


class Saved(NamedTuple):
    """Of a layer's outputs those that its backward needs."""

    y: Tensor
    c: Tensor
    gates: Tensor


class InputGradients(NamedTuple):
    """Of a layer's inputs; what is absent, or not asked for, has shape [0] or, of the weights, is an empty list."""

    dx: Tensor
    dh0: Tensor
    dc0: Tensor
    dweights: Sequence[Tensor]


class GateGradients(NamedTuple):
    """Those from which a layer's other gradients are products over rows, and those of its states."""

    dgates: Tensor  # [D, R, (K+U)*H], with a projection and P columns more: as dgates and dprojections of BackwardSteps
    dh0: Tensor
    dc0: Tensor


class StepWeights(NamedTuple):
    """Those that the steps read, by direction; absent ones: none."""

    w_hh: Sequence[Tensor]
    b_hh: Sequence[Tensor]
    w_hr: Sequence[Tensor]
    w_units: Sequence[Tensor]


class ForwardSteps(NamedTuple):
    """What all steps of all directions read and write."""

    x_gates: Tensor  # [D, R, G*H]: W_ih x + b_ih
    h: Written  # [D, N, P]: before all steps on entry, after them on return
    c: Written | None  # [D, N, H], likewise
    y: Written  # [R, D*P]
    cs: Written | None  # [R, D*H]: c after every step
    gates: Written | None  # [D, R, S*H]: what the backward needs; may be x_gates


class BackwardSteps(NamedTuple):
    """What all steps of all directions read and write, from the last to the first."""

    dy: Tensor | None  # [R, D*P]
    dcs: Tensor | None  # [R, D*H]
    gates: Tensor  # [D, R, S*H]
    y: Tensor  # [R, D*P]
    cs: Tensor  # [R, D*H]
    h0: Tensor | None  # [D, N, P]
    c0: Tensor | None  # [D, N, H]
    dh: Written  # [D, N, P]: of the final state on entry, of the initial one on return
    dc: Written | None  # [D, N, H], likewise
    dgates: Written  # [D, R, (K+U)*H]: at the gates' sums, and where x and a are read apart that of a after the others;
    # then what is to be added up over the rows to the gradients of w_units
    dprojections: Written | None  # [D, R, P]: at W_hr m


class Tables(NamedTuple):
    """The form of a sequence on the device."""

    offsets: Tensor | None  # [T]: where step t begins in packed rows
    lengths: Tensor | None  # [N]
    resets: Tensor | None  # [T, N], of bytes


class Switches(NamedTuple):
    steps: int  # T
    tf32: bool  # whether float32 products may be made of TF32
    stream: int


# Schemas

_TYPES = {"str": "str", "bool": "bool", "int": "int", "Tensor": "Tensor", "Sequence[Tensor]": "Tensor[]"}


def _fields(record: type[NamedTuple], letters: Any) -> list[str]:
    found = []
    for name, annotation in record.__annotations__.items():
        kind, _, none = str(getattr(annotation, "__forward_arg__", annotation)).partition(" | ")
        of_torch = f"Tensor({next(letters)}!)" if kind == "Written" else _TYPES[kind]
        found.append(f"{of_torch}{'?' if none else ''} {name}")
    return found


def schema(name: str, *arguments: Any, results: type[NamedTuple] | None = None) -> str:
    """An operator's: of the fields of records, and of arguments in torch's words."""
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    listed = [text for of in arguments for text in ([of] if isinstance(of, str) else _fields(of, letters))]
    returned = ", ".join(_fields(results, letters)) if results else ""
    return f"{name}({', '.join(listed)}) -> ({returned})"


FORWARD = schema("", Inputs, "bool keep_c", "bool keep_gates", results=Outputs)
BACKWARD = schema("", Inputs, OutputGradients, Saved, "bool need_dx", "bool need_dw", results=InputGradients)
GATE_GRADIENTS = schema("", Inputs, OutputGradients, Saved, results=GateGradients)
# Gates may be x_gates itself. For calls under no_grad only.
CUDA = (
    schema("cuda_forward_steps", "str mode", StepWeights, ForwardSteps, Tables, Switches),
    schema("cuda_backward_steps", "str mode", StepWeights, BackwardSteps, Tables, Switches),
    schema("cuda_states_before", "Tensor y", "Tensor? h0", "Tensor(z!) out", Tables, "int steps", "int stream"),
    "cuda_multiply(Tensor a, Tensor b, Tensor(a!) out, bool accumulate, bool tf32, int stream) -> bool",
    "cuda_plan(str mode, ScalarType dtype, int batch, int hidden, bool bidirectional, bool projected, bool tf32, "
    "bool backward, int device) -> str",
    "cuda_regime(int? use) -> int",
)
