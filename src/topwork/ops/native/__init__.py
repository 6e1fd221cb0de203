"""Kernels in C for the CPU: compiled at first use with the system's compiler, torch without one."""

from topwork.ops.native.build import available, library, why_not

__all__ = ["available", "library", "why_not"]
