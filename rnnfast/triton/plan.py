"""Which kernel serves a layer, on which tiles: one table, the reason beside each number."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..cells import GRADIENTS, UNIT_WEIGHTS

_KB = 1024


class Chip(NamedTuple):
    """What the plan has to know of a GPU."""

    shared_memory: int  # bytes that a program may have
    processors: int
    generation: int = 0  # of NVIDIA's, the compute capability's first digits; 0 is AMD
    warp_size: int = 32

    @property
    def is_amd(self) -> bool:
        return self.generation == 0

    @property
    def is_rdna(self) -> bool:
        return self.is_amd and self.warp_size == 32

    @property
    def is_blackwell(self) -> bool:
        return self.generation >= 10

    @property
    def room(self) -> int:
        """Bytes of a layer's W_hh that stay on one multiprocessor without spills."""
        if self.is_rdna:  # W_hh stays in registers there, several times: 8 KB of an LSTM spill
            return 6 * _KB
        # Beside W_hh there are h and tiles on their way to another layout. And W_hh comes in through the registers,
        # which spill at more than half of their 256 KB.
        # On Blackwell W_hh stays in the registers, as it has no products like Hopper's: beside 128 KB up to 500 bytes
        # spill.
        return min(self.shared_memory - 16 * _KB, (64 if self.is_blackwell else 128) * _KB)


class Plan(NamedTuple):
    """How a layer runs: fused, all steps in one launch, or stepwise; and on which tiles."""

    fused: bool
    units: int  # of a tile
    rows: int
    options: dict[str, Any]  # of the launch
    precision: str  # of the fused products, in tl.dot's words
    reason: str


def plan(mode: str, dtype: torch.dtype, hidden: int, batch: int, projected: bool, tf32: bool, chip: Chip) -> Plan:
    """The plan for the H, N and dtype of a layer; ``tf32``: whether float32 products may be made of TF32.

    A tile's sides are powers of two, of 16 units at least, as the tensor cores want them. Units beyond H are zeros, so
    65 units do the products of 128: four times the work, of a step that waits more than it multiplies.
    """
    units = max(16, 1 << (hidden - 1).bit_length())
    options = {"num_warps": 4, "enable_fp_fusion": True}
    precision = "ieee"
    if dtype == torch.float32 and not chip.is_amd:
        precision = "tf32" if tf32 else "tf32x3"  # three products of TF32 parts are as exact as one of float32
    # What stays on the chip: a stack of tiles, a GRU's with one of zeros; tf32x3 keeps the parts.
    size = GRADIENTS[mode] * units * units * dtype.itemsize * (2 if precision == "tf32x3" else 1)
    if projected:
        reason = "a projection makes another product a step"
    elif dtype == torch.float64 and (units > 32 or chip.is_amd):
        reason = "float64 has no fast products: above 32 units they spill"
    elif UNIT_WEIGHTS[mode] and chip.is_rdna:
        reason = "with weights of the units' own the registers spill"
    elif size > chip.room:
        reason = (
            f"W_hh, padded to {units} units, is {size // _KB} KB a direction, more than the {chip.room // _KB} of room"
        )
    else:
        # 4 warps make a wgmma; 8 hold the tiles of larger layers without spills.
        if units * dtype.itemsize > 128:
            options["num_warps"] = 8
        if not chip.is_amd:
            options["maxnreg"] = 255  # one program a multiprocessor: nothing is gained by spilling for more
        # 8 rows are the least that a product takes (16 on AMD). More only for more tiles than multiprocessors, and of
        # half types: others spill. Not on Blackwell, where 16 rows by 64 units go to asynchronous products in tensor
        # memory, with which other recurrences had wrong results, and which nobody has tried with these.
        many = batch > 8 * chip.processors and dtype.itemsize == 2 and not chip.is_blackwell
        if chip.generation == 8 and GRADIENTS[mode] * units > 256:  # without Hopper's products these spill, too
            many = False
        if UNIT_WEIGHTS[mode]:  # so do those with tiles for the gradients of such weights
            many = False
        reason = f"fused: W_hh, padded to {units} units, is {size // _KB} KB a direction and stays on a multiprocessor"
        return Plan(True, units, 16 if chip.is_amd or many else 8, options, precision, reason)
    # Every program reads its part of W_hh anew in each step, so the more programs the less each waits for it: the large
    # tiles only where they leave one for every multiprocessor. What larger ones spill is bench/resources.py's to say.
    rows = 16 if batch <= 16 else min(128 // dtype.itemsize, 32 if chip.is_amd else 64)
    large = 16 if chip.is_amd or precision == "tf32x3" or dtype == torch.float64 else 32
    if chip.generation == 9 and dtype.itemsize == 2 and not UNIT_WEIGHTS[mode]:  # Hopper's products read shared memory
        large = 64
    units = large if -(-hidden // large) * -(-batch // rows) >= chip.processors else 16
    options["num_warps"] = 4 if units * rows < 1024 else 8
    if chip.is_rdna:  # larger ones spill hundreds of registers
        units, rows, options["num_warps"] = 16, 16, 8
    return Plan(False, units, rows, options, precision, f"stepwise: {reason}")
