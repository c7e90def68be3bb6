#include "ops.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>

#include "philox.h"
#include "row_math.h"
#include "sample_step.h"
#include "select_and_commit.h"
#include "skinny_product.h"
#include "tree_attention.h"
#include "vector.h"

namespace py = pybind11;

namespace {

using namespace stars_fast;

// Tensors come as addresses (tensor.data_ptr()): the Python side has checked dtype, shape and contiguity.
template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Float float_of(int code) {
    if (code < 0 || code > static_cast<int>(Float::kBf16)) throw std::invalid_argument("not a float type's code");
    return static_cast<Float>(code);
}

void bind_random_numbers(py::module_& m) {
    m.def("philox4x32", &philox4x32, py::arg("key"), py::arg("counter"));
    m.def("gumbel", [](uint32_t bits) { return gumbel(bits); }, py::arg("bits"));
}

// Each kernel, and beside it the check that it begins with, for tensors of another device: the same arguments.
void bind_sampling(py::module_& m) {
    const auto sampling = [&](const char* name, auto run) {
        m.def(name, [run](uintptr_t logits, int type, int64_t rows, int64_t vocab, uintptr_t keys, uintptr_t segment,
                          uintptr_t attempt, uintptr_t position, uintptr_t alive, uintptr_t limit,
                          uintptr_t temperature, uintptr_t top_k, uintptr_t top_p, uintptr_t min_p,
                          uintptr_t repetition_penalty, uintptr_t seen, uintptr_t eos, int64_t eos_count,
                          uintptr_t token, uintptr_t logprob, uintptr_t sampling_logprob, uintptr_t entropy,
                          int threads) {
            const py::gil_scoped_release release;
            run(SampleStep{at<void>(logits), float_of(type), rows, vocab, at<int64_t>(keys), at<int32_t>(segment),
                           at<int32_t>(attempt), at<int32_t>(position), at<bool>(alive), at<int32_t>(limit),
                           at<float>(temperature), at<int32_t>(top_k), at<float>(top_p), at<float>(min_p),
                           at<float>(repetition_penalty), at<bool>(seen), at<int64_t>(eos), eos_count,
                           at<int64_t>(token), at<float>(logprob), at<float>(sampling_logprob), at<float>(entropy)},
                threads);
        });
    };
    sampling("sample_step", sample_step);
    sampling("check_sample_step", [](const SampleStep& step, int) { check(step); });
    const auto gathering = [&](const char* name, auto run) {
        m.def(name, [run](uintptr_t logits, int type, int64_t rows, int64_t vocab, uintptr_t tokens, uintptr_t out,
                          int threads) {
            const py::gil_scoped_release release;
            run(GatherLogprobs{at<void>(logits), float_of(type), rows, vocab, at<int64_t>(tokens), at<float>(out)},
                threads);
        });
    };
    gathering("gather_logprobs", gather_logprobs);
    gathering("check_gather_logprobs", [](const GatherLogprobs& gather, int) { check(gather); });
}

void bind_selection(py::module_& m) {
    const auto selection = [&](const char* name, void (*run)(const SelectAndCommit&)) {
        m.def(name, [run](int64_t rows, int64_t groups, uintptr_t reward, uintptr_t length, uintptr_t ended,
                          uintptr_t group_indptr, uintptr_t keys, uintptr_t segment, uintptr_t attempts,
                          uintptr_t committed, uintptr_t max_new_tokens, uintptr_t max_attempts, uintptr_t base,
                          uintptr_t target, uintptr_t beta, uintptr_t ramp, uintptr_t best_reward,
                          uintptr_t best_attempt, uintptr_t best_length, uintptr_t best_ended, uintptr_t winner,
                          uintptr_t accepted, uintptr_t threshold, uintptr_t finish) {
            const py::gil_scoped_release release;
            run({rows, groups, at<float>(reward), at<int32_t>(length), at<bool>(ended), at<int32_t>(group_indptr),
                 at<int64_t>(keys), at<int32_t>(segment), at<int32_t>(attempts), at<int32_t>(committed),
                 at<int32_t>(max_new_tokens), at<int32_t>(max_attempts), at<double>(base), at<double>(target),
                 at<double>(beta), at<bool>(ramp), at<float>(best_reward), at<int32_t>(best_attempt),
                 at<int32_t>(best_length), at<bool>(best_ended), at<int32_t>(winner), at<bool>(accepted),
                 at<float>(threshold), at<int32_t>(finish)});
        });
    };
    selection("select_and_commit", select_and_commit);
    selection("check_select_and_commit", check);
}

void bind_attention(py::module_& m) {
    const auto attention = [&](const char* name, auto run) {
        m.def(name, [run](uintptr_t q, int64_t q_token_stride, int64_t q_head_stride, uintptr_t k_pool,
                          uintptr_t v_pool, uintptr_t out, int type, int64_t tokens, int64_t heads, int64_t kv_heads,
                          int64_t head_size, int64_t value_size, int64_t slots, uintptr_t trunk_slots,
                          uintptr_t trunk_len, int64_t groups, int64_t trunk_width, uintptr_t branch_slots,
                          uintptr_t branch_len, int64_t rows, int64_t branch_width, uintptr_t group_indptr,
                          uintptr_t query_indptr, double scale, int64_t window, double softcap, uintptr_t sinks,
                          int threads) {
            const py::gil_scoped_release release;
            run(TreeAttention{at<void>(q), q_token_stride, q_head_stride, at<void>(k_pool), at<void>(v_pool),
                              at<void>(out), float_of(type), tokens, heads, kv_heads, head_size, value_size, slots,
                              at<int32_t>(trunk_slots), at<int32_t>(trunk_len), groups, trunk_width,
                              at<int32_t>(branch_slots), at<int32_t>(branch_len), rows, branch_width,
                              at<int32_t>(group_indptr), at<int32_t>(query_indptr), static_cast<float>(scale), window,
                              static_cast<float>(softcap), at<float>(sinks)},
                threads);
        });
    };
    attention("tree_attention", tree_attention);
    attention("check_tree_attention", [](const TreeAttention& call, int) { check(call); });
    const auto append = [&](const char* name, void (*run)(const Append&)) {
        m.def(name, [run](uintptr_t k, int64_t k_token_stride, int64_t k_head_stride, uintptr_t k_pool,
                          int64_t k_bytes, uintptr_t v, int64_t v_token_stride, int64_t v_head_stride,
                          uintptr_t v_pool, int64_t v_bytes, uintptr_t slots, int64_t tokens, int64_t heads,
                          int64_t pool_slots) {
            const py::gil_scoped_release release;
            run({{at<char>(k), k_token_stride, k_head_stride, at<char>(k_pool), k_bytes},
                 {at<char>(v), v_token_stride, v_head_stride, at<char>(v_pool), v_bytes},
                 at<int32_t>(slots), tokens, heads, pool_slots});
        });
    };
    append("kv_append", kv_append);
    append("check_kv_append", check);
}

void bind_products(py::module_& m) {
    m.def("skinny_product", [](uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t out, int64_t rows,
                               int64_t inputs, int64_t outputs, int threads) {
        const py::gil_scoped_release release;
        skinny_product({at<float>(x), at<float>(weight), at<float>(bias), at<float>(out), rows, inputs, outputs},
                       threads);
    });
}

void bind_machine(py::module_& m) {
    m.def("floats_of_registers", &floats_of_registers);
    m.def("cpu_is_amd", [] {
#if defined(__x86_64__) && defined(__GNUC__)
        __builtin_cpu_init();
        return __builtin_cpu_is("amd") != 0;
#else
        return false;
#endif
    });
}

}  // namespace

void bind_ops(py::module_& m) {
    bind_machine(m);
    bind_random_numbers(m);
    bind_sampling(m);
    bind_selection(m);
    bind_attention(m);
    bind_products(m);
}
