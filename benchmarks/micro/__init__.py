"""Microbenchmarks: every operator on every backend that the machine has, beside what else does the same work.

    python -m pytest benchmarks/micro            # -k cuda, -k tree_attention; --benchmark-json FILE writes it all down

A result is compared with the operator's reference before it is timed. Times are quoted with the bandwidth reached, as a
share of what a plain copy reaches in the same run. Beside the operators stand the tree of slots, heartbeats and whole
generations. Regression limits are ratios of two things that alternate in one run (:mod:`limits`); the end lists them.
Only :mod:`conftest` and the ``test_`` files know of pytest: :mod:`cases` and :mod:`timing` serve any other program.
"""
