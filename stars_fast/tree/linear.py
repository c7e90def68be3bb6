"""Float32 linear layers on CPUs where torch's default, Intel's MKL, leaves speed behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import nn

from stars_fast._C import cpu_is_amd
from stars_fast.ops import skinny_product
from stars_fast.ops._library import native
from stars_fast.ops.skinny_product import MOST_ROWS_ON_CPU

# Fixed rules and not a measurement on the spot, so that a machine always rounds alike. oneDNN on an EPYC of the Zen 4
# generation is 0.9 to 3 times as fast as MKL for 1 to 64 rows, mostly above 1.2. Products of our own on a Xeon with
# AVX-512 are 1.03 to 7 times as fast as MKL for 2 to 48 rows (docs/findings/cpu-step.md). Neither was measured on the
# other's machine.
_MKL = torch.backends.mkl.is_available()
_ONEDNN = _MKL and cpu_is_amd() and torch.backends.mkldnn.is_available()
_SKINNY = _MKL and not cpu_is_amd() and MOST_ROWS_ON_CPU > 0 and native("skinny_product") is not None

# Numbers of a weight. A smaller one is soon read, from a near cache at that, and the call costs more than is won.
_LEAST_WEIGHT = 1 << 18

# oneDNN compiles a kernel of about half a megabyte for every number of rows and shape of weights, and it and torch's
# binding keep 1,024 of them each: what one drops the other holds, so both are told. Fewer hold what recurs: the time is
# the same, and padding the rows instead costs a fifth to a half of it.
_KEPT_KERNELS = "128"
_CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # read when a thread first uses oneDNN


# Classes and not a function put in place of each layer's ``forward``: compiled code is shared by class.
class _FasterLinear(nn.Linear):
    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copied or saved inside, it is torch's own there."""
        reduced: Any = super().__reduce_ex__(0)  # later protocols insist on the object's class
        make, (_, *rest), *state = reduced
        return (make, (nn.Linear, *rest), *state)


class _OneDnnLinear(_FasterLinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not _is_for_us(x):
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], None)


class _SkinnyLinear(_FasterLinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inputs = self.weight.shape[1]
        few = inputs < x.numel() <= MOST_ROWS_ON_CPU * inputs  # for one row MKL reads as fast, and is called sooner
        if not few or not _is_for_us(x) or not self.weight.is_contiguous():  # it may be another one by now
            return super().forward(x)
        return skinny_product(x, [self.weight], [] if self.bias is None else [self.bias])[0]


def _is_for_us(x: torch.Tensor) -> bool:
    """The model's ordinary users may call its layers meanwhile, with gradients or autocast."""
    return x.dtype == torch.float32 and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


@contextmanager
def faster_linears(model: nn.Module) -> Iterator[None]:
    """Run the plain float32 linear layers of ``model`` through what is faster than MKL inside; no weights are copied.

    On AMD's processors that is oneDNN, on others with AVX2 or AVX-512 a product of our own, for large weights and few
    rows. Layers of other classes (quantised ones), with weights elsewhere or in another dtype, and those whose
    ``forward`` somebody has replaced are left alone. On other machines nothing is changed. The oneDNN of an AMD
    machine's process, and of its later children, keeps fewer kernels from then on, unless the environment says how
    many.
    """
    layers = [
        module for module in model.modules() if _is_plain(module) and (_ONEDNN or (_SKINNY and _is_large(module)))
    ]
    if _ONEDNN and layers:
        for name in _CAPACITIES:
            os.environ.setdefault(name, _KEPT_KERNELS)
    for layer in layers:
        layer.__class__ = _OneDnnLinear if _ONEDNN else _SkinnyLinear
    try:
        yield
    finally:
        for layer in layers:
            if type(layer) in (_OneDnnLinear, _SkinnyLinear):  # parametrised inside, it has a class of its own
                layer.__class__ = nn.Linear


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    weight = module.weight
    return type(weight) is nn.Parameter and weight.dtype == torch.float32 and weight.device.type == "cpu"


def _is_large(layer: nn.Linear) -> bool:
    weight = layer.weight
    return weight.numel() >= _LEAST_WEIGHT and weight.shape[1] % 16 == 0 and weight.is_contiguous()
