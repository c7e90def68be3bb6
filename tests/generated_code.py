"""What torch's compiler makes of a decoder layer for a CUDA device, where there need be none.

A layer is traced on a CPU; then its tensors are said to lie on an H100, and Inductor writes the code that it would run
there: which of its own kernels, and what else, it launches in what order. Nothing is compiled further, or run.
"""

import re
from contextlib import ExitStack
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch._inductor.scheduler
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._dynamo.exc import BackendCompilerFailed, TensorifyScalarRestartAnalysis
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.exc import InductorError
from torch._inductor.graph import GraphLowering
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from triton.backends.compiler import GPUTarget

from stars_fast.tree.attention import plugged, tree_mask
from stars_fast.tree.compiled import CompiledLayers
from stars_fast.tree.joined import join

_DEVICE = torch.device("cuda:0")
_H100 = SimpleNamespace(
    name="NVIDIA H100",
    gcnArchName="",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    L2_cache_size=50 << 20,
    total_memory=80 << 30,
)
_LAUNCH = re.compile(r"(triton_\w+)\.run\(|extern_kernels\.(\w+)\(|torch\.ops\.(stars_fast\.\w+)\.default\(")


class _Written(Exception):
    """Carries the code; there is no device to run it on."""


def _written(graph):
    raise _Written(graph.codegen()[0].value)


def _for_cuda(module, inputs, **options):
    """Inductor's part behind autograd's, with every tensor on the device."""
    mode = torch._guards.detect_fake_mode(inputs)
    with mode:
        there = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=_DEVICE) if torch.is_tensor(x) else x
            for x in inputs
        ]
    FakeTensorProp(module, mode).propagate_dont_convert_inputs(*there)
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: _DEVICE,
    )
    active, properties = triton.runtime.driver, lambda device=None: _H100
    with ExitStack() as stack:
        for target, name, value in (
            (GraphLowering, "compile_to_module", _written),
            (CudaInterface, "is_available", staticmethod(lambda: True)),
            (CudaInterface, "get_compute_capability", staticmethod(lambda device=None: 90)),
            (CudaInterface, "get_device_properties", staticmethod(properties)),
            (CudaInterface.Worker, "get_device_properties", staticmethod(properties)),
            (torch.cuda, "get_device_properties", properties),
            (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
            (torch.cuda, "current_device", lambda: 0),
            (CudaInterface, "is_bf16_supported", staticmethod(lambda including_emulation=False: True)),
            (torch._inductor.scheduler, "has_triton", lambda: True),
            (active, "_active", driver),
        ):
            stack.enter_context(patch.object(target, name, value))
        compile_fx_inner(module, there, **options)


def code_of_a_layer(model, *, rows=7, joined=True):
    """Inductor's code for the first decoder layer of ``model`` (on a CPU, in the dtype of its weights)."""
    found = []

    def backend(module, inputs):
        if joined:
            join(module)
        try:
            compile_fx(module, inputs, inner_compile=_for_cuda)
        except TensorifyScalarRestartAnalysis:
            raise  # Dynamo traces once more
        except Exception as error:
            cause = error
            while cause is not None and not isinstance(cause, _Written):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            found.append(str(cause))
        raise RuntimeError("there is no device")

    base, config = model.base_model, model.config
    hidden = torch.zeros(1, rows, config.hidden_size, dtype=model.dtype)
    places = torch.arange(rows)[None]
    angles = base.rotary_emb(hidden, places)
    layers = CompiledLayers(model, backend=backend)
    inductor = inductor_config.patch(fx_graph_cache=False, compile_threads=1)  # no processes that begin to compile
    caches = inductor, functorch_config.patch(enable_autograd_cache=False)
    with ExitStack() as stack, torch.no_grad():
        for context in (*caches, plugged(model), layers.running()):
            stack.enter_context(context)
        try:
            base.layers[0](
                hidden, position_embeddings=angles, position_ids=places, attention_mask=tree_mask(hidden.device)
            )
        except (BackendCompilerFailed, InductorError):
            if not found:
                raise
    (code,) = found
    return code


def launches(code):
    """What the code launches, in order: names of Inductor's kernels, of torch's products, and of our operators."""
    return [next(filter(None, names)) for names in _LAUNCH.findall(code.rpartition("def call(")[2])]
