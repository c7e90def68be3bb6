"""Programmatic dependent launch: a kernel's programs are made while the kernel before it still runs.

Off unless ``STARS_FAST_PDL`` is 1, and on NVIDIA's GPUs from Hopper on only. What a kernel reads may not be written
yet, and what it writes may still be read, so all of its programs wait first of all; that also orders it behind
everything before the kernel it waits for, which has waited likewise. The next kernel may begin from then on.
"""

import os
from typing import Any

import torch
import triton
import triton.language as tl

enabled = os.environ.get("STARS_FAST_PDL") == "1"


@triton.jit
def begin_dependent(PDL: tl.constexpr):
    """Before anything else of a kernel, in all of its programs."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def dependent(device: torch.device) -> dict[str, Any]:
    """What a launch is given besides."""
    hopper = enabled and device.type == "cuda" and torch.version.hip is None
    if hopper and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}
