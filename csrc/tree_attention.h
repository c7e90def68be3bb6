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
    int64_t tokens, heads, kv_heads, head_size, value_size, slots;
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

// Copies keys and values to their slots. A source's tokens and heads may be strided (in bytes).
struct Append {
    struct Part {
        const char* source;
        int64_t token_stride, head_stride;
        char* pool;
        int64_t bytes;  // of a head
    };
    Part k, v;
    const int32_t* slots;
    int64_t tokens, heads, pool_slots;
};

void kv_append(const Append& call);

// Throw std::invalid_argument for what would reach memory that is not the caller's. They read integers only, so that
// what the other addresses point to may lie on another device.
void check(const TreeAttention& call);
void check(const Append& call);

}  // namespace stars_fast
