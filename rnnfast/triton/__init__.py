"""The Triton backend: kernels for GPUs, which Triton's interpreter also runs on a CPU, for tests."""

from .layer import backward, forward, gate_gradients, plan_on, reason

__all__ = ["backward", "forward", "gate_gradients", "plan_on", "reason"]
