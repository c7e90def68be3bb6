#!/bin/sh
# Runs compute-sanitizer over a small case of every kernel. Needs a CUDA device and the CUDA toolkit. racecheck sees
# shared memory only: what the threads of sample_step hand each other through global memory no tool checks. Usage:
#   tests/sanitize.sh [python]
set -eu
cd "$(dirname "$0")/.."
python=${1:-python}
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # an allocation of its own for every tensor, so that each has bounds
small='identical_logits and 500 or graph_that_holds or selection or gathered or decode and (64 or 80) or soft_caps'
for tool in memcheck racecheck initcheck; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
        "$python" -m pytest -m gpu tests/test_gpu_kernels.py -k "$small"
done
