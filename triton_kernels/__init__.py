"""Triton implementations of the operators, imported as ``stars_fast.kernels``, and only where there is a GPU.

Modules of this folder import each other by relative imports only: from the repository's root
``import triton_kernels`` would succeed too, and give a second copy of everything.
"""
