"""Float32 linear layers through oneDNN on CPUs where torch's default, Intel's MKL, leaves speed behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from stars_fast._C import cpu_is_amd

# Measured on an EPYC of the Zen 4 generation: 0.9 to 3 times as fast as MKL for 1 to 64 rows, mostly above 1.2. A fixed
# rule and not a measurement on the spot, so that a machine always rounds alike.
_WORTHWHILE = cpu_is_amd() and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


# oneDNN compiles a kernel of about half a megabyte for every number of rows and shape of weights, and it and torch's
# binding keep 1,024 of them each: what one drops the other holds, so both are told. Fewer hold what recurs: the time is
# the same, and padding the rows instead costs a fifth to a half of it.
_KEPT_KERNELS = "128"
_CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # read when a thread first uses oneDNN


class _OneDnnLinear(nn.Linear):
    """A class and not a function put in place of each layer's ``forward``: compiled code is shared by class."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float32 or torch.is_grad_enabled():
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], None)


@contextmanager
def onednn_linears(model: nn.Module) -> Iterator[None]:
    """Run the plain float32 linear layers of ``model`` through oneDNN inside; no weights are copied.

    Layers of other classes (quantised ones), with weights elsewhere or in another dtype, and those whose ``forward``
    somebody has replaced are left alone. On other machines nothing is changed. The oneDNN of the process, and of its
    later children, keeps fewer kernels from then on, unless the environment says how many.
    """
    layers = [module for module in model.modules() if _WORTHWHILE and _is_plain(module)]
    if layers:
        for name in _CAPACITIES:
            os.environ.setdefault(name, _KEPT_KERNELS)
    for layer in layers:
        layer.__class__ = _OneDnnLinear
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Linear


def _is_plain(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    weight = module.weight
    return type(weight) is nn.Parameter and weight.dtype == torch.float32 and weight.device.type == "cpu"
