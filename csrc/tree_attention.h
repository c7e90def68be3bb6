#pragma once

#include <cstdint>

#include "row_math.h"

namespace stars_fast {

// As in stars_fast/ops/tree_attention.py, whose docstring is the specification. Strides are in elements.
struct TreeAttention {
    const void* q;  // [T, Hq, D]
    int64_t q_token_stride, q_head_stride;
    const void* k_pool;  // [N, Hkv, D]
    const void* v_pool;  // [N, Hkv, Dv]
    void* out;           // [T, Hq, Dv]
    Float type;          // of q, k_pool, v_pool and out
    int64_t tokens, heads, kv_heads, head_size, value_size;
    const int32_t* trunk_slots;  // [G, P]
    const int32_t* trunk_len;    // [G]
    int64_t groups, trunk_width;
    const int32_t* branch_slots;  // [B, S]
    const int32_t* branch_len;    // [B]
    int64_t rows, branch_width;
    const int32_t* group_indptr;  // [G + 1]
    const int32_t* query_indptr;  // [B + 1]
    float scale;
    int64_t window;
    float softcap;
    const float* sinks;  // [Hq] or null
};

void tree_attention(const TreeAttention& call, int threads);

// Copies rows of `bytes` bytes to their slots. The source's tokens and heads may be strided (in bytes).
struct Append {
    const char* source;
    int64_t token_stride, head_stride;
    char* pool;
    const int32_t* slots;
    int64_t tokens, heads, bytes;
};

void kv_append(const Append& call);

}  // namespace stars_fast
