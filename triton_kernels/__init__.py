"""Triton kernels of the operators, imported as ``stars_fast.kernels``, and only where they run.

A module per operator: its kernels (``..._kernel``), and a launcher of the operator's name and arguments, which the
dispatcher in :mod:`stars_fast.ops` calls. Launchers read no value from the device: what they choose follows from shapes
alone, so that a CUDA graph can hold the launches.

Modules of this folder import each other by relative imports only: from the repository's root
``import triton_kernels`` would succeed too, and give a second copy of everything.
"""
