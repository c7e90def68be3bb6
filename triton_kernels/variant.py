"""What the ahead-of-time compiler needs to know of a kernel."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Variant(NamedTuple):
    """One kernel as a real model needs it.

    A module of this folder that has a function ``variants(target)``, which returns a list of these for a
    ``triton.backends.compiler.GPUTarget``, is compiled and gated by :mod:`stars_fast.kernels.aot`.
    """

    name: str  # unique within a target; with what tells variants apart in brackets, as in "tree_attention[d128,m64]"
    kernel: Any  # what @triton.jit made
    types: Mapping[str, str]  # of run-time arguments, as in "*fp32" or "i32"; "i32:16" for a multiple of 16
    constexprs: Mapping[str, Any]  # the other arguments; None and 1 where a call would pass these
    num_warps: int = 4
    num_stages: int | None = None  # the backend's own
    fp_fusion: bool = False  # of products and sums: off where results must round as those of C++ do
    maxnreg: int | None = None  # CUDA only: keeps ptxas from spilling for the sake of occupancy
    needs_matrix: bool = False  # whether it must use a matrix instruction
    pipelined: bool = False  # whether its first loop must load the next block while it works on one
