#!/bin/sh
# Kernels and the tree of slots under tools that see what tests cannot. Usage:
#   tests/sanitize.sh cpu [steps]    the C++, without torch or Python: a random state machine of so many steps against
#                                    its model and the kernels with several callers, under the compiler's sanitizers
#   tests/sanitize.sh cross          the same programs for another processor, compared with this one:
#                                    CXX=aarch64-linux-gnu-g++ RUN=qemu-aarch64-static tests/sanitize.sh cross
#   tests/sanitize.sh gpu [python]   a small case of every Triton kernel under compute-sanitizer, from the CUDA toolkit
# ThreadSanitizer sees the C++ only. racecheck sees shared memory only: what the threads of sample_step hand each other
# through global memory no tool checks.
set -eu
cd "$(dirname "$0")/.."

built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT
kernels='tests/native/kernels.cpp csrc/row_math.cpp csrc/sample_step.cpp csrc/select_and_commit.cpp
    csrc/skinny_product.cpp csrc/tree_attention.cpp'

cpu() {
    steps=${1:-1000000}
    # target_clones are off: what chooses a clone runs before ThreadSanitizer does.
    options='-std=c++17 -O1 -g -pthread -ffp-contract=off -DSTARS_FAST_CLONES= -Icsrc -fno-sanitize-recover=all'
    undefined='-fsanitize=undefined -fno-sanitize=null,alignment,object-size,vptr' # what AddressSanitizer sees anyway
    compiler=${CXX:-g++}

    echo "== address and undefined behaviour"
    # shellcheck disable=SC2086 # lists of words
    $compiler $options -O2 -fsanitize=address,undefined tests/native/tree_machine.cpp csrc/segment_tree.cpp \
        -o "$built/tree_machine"
    "$built/tree_machine" "$steps"
    # shellcheck disable=SC2086
    $compiler $options -fsanitize=address $undefined $kernels -o "$built/kernels"
    "$built/kernels" >"$built/results"
    echo "== threads"
    # shellcheck disable=SC2086
    $compiler $options -fsanitize=thread $kernels -o "$built/kernels"
    "$built/kernels" 10 "$built/results"
}

cross() {
    options='-std=c++17 -O3 -pthread -ffp-contract=off -Icsrc'
    # shellcheck disable=SC2086
    g++ $options $kernels -o "$built/kernels"
    "$built/kernels" 1 >"$built/results"
    # shellcheck disable=SC2086
    "${CXX:?the other processor's compiler}" $options -static $kernels -o "$built/kernels"
    # shellcheck disable=SC2086
    "$CXX" $options -static tests/native/tree_machine.cpp csrc/segment_tree.cpp -o "$built/tree_machine"
    "${RUN:?what runs its programs}" "$built/tree_machine" 100000
    "$RUN" "$built/kernels" 2 "$built/results"
}

gpu() {
    python=${1:-python}
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # an allocation of its own for every tensor, so that each has bounds
    small='identical_logits and 500 or graph_that_holds or selection or gathered or decode and (64 or 80) or soft_caps'
    for tool in memcheck racecheck initcheck; do
        echo "== $tool"
        compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
            "$python" -m pytest -m gpu tests/test_gpu_kernels.py -k "$small"
    done
}

case ${1:-} in
cpu | cross | gpu) "$@" ;;
*)
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
