"""The Triton backend: kernels for GPUs, which Triton's interpreter also runs on a CPU, for tests."""

from .layer import Layer, plan_on, reason

__all__ = ["Layer", "plan_on", "reason"]
