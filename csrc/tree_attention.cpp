// Attention over a tree: per request and key-value head one list of keys, the trunk's and then each branch's own.
//
// The queries of all rows of a request that share a head are one matrix, so a trunk's key is loaded once for all of
// them. Keys come in tiles, with a running maximum and sum per query, as in flash attention.
#include "tree_attention.h"

#include <algorithm>
#include <vector>

#include "parallel.h"

namespace stars_fast {

namespace {

constexpr int64_t kKeys = 32;    // keys of a tile
constexpr int64_t kBlock = 4;    // queries that share the loads of a tile
constexpr int64_t kVector = 16;  // floats of a Vector; compilers split it where registers are narrower

typedef float Vector __attribute__((vector_size(kVector * sizeof(float)), aligned(4), may_alias));

STARS_FAST_INLINE const Vector* vectors(const float* x) { return reinterpret_cast<const Vector*>(x); }
STARS_FAST_INLINE Vector* vectors(float* x) { return reinterpret_cast<Vector*>(x); }

STARS_FAST_INLINE float load(const void* data, Float type, int64_t i) {
    if (type == Float::k32) return static_cast<const float*>(data)[i];
    const uint16_t bits = static_cast<const uint16_t*>(data)[i];
    return type == Float::kBf16 ? from_bf16(bits) : from_half(bits);
}

// Keys that a query may see: [first, last) of the list it is attending to.
struct Span {
    int64_t first, last;
};

// The queries of one request and key-value head, and what has been summed up for each so far.
struct Queries {
    int64_t head_size, padded_values;
    std::vector<float> q, weighted, maximum, sum;  // [M, D], [M, Dv padded], [M], [M]
    std::vector<Span> trunk, branch;               // [M]
    std::vector<float> keys, values;               // a tile: [D, kKeys], [kKeys, Dv padded]

    void resize(int64_t count, const TreeAttention& call) {
        head_size = call.head_size;
        padded_values = (call.value_size + kVector - 1) / kVector * kVector;
        // Padded to whole blocks: a block reads, and never uses, what lies behind the last query.
        const int64_t padded = (count + kBlock - 1) / kBlock * kBlock;
        q.assign(padded * head_size, 0.0f);
        weighted.assign(padded * padded_values, 0.0f);
        maximum.assign(padded, -HUGE_VALF);
        sum.assign(padded, 0.0f);
        trunk.assign(padded, {0, 0});
        branch.assign(padded, {0, 0});
        keys.assign(head_size * kKeys, 0.0f);
        values.assign(kKeys * padded_values, 0.0f);
    }
};

STARS_FAST_INLINE void load_tile_of(const TreeAttention& call, Queries& state, const int32_t* slots, int64_t count,
                                    int64_t head) {
    for (int64_t n = 0; n < count; ++n) {
        const int64_t row = static_cast<int64_t>(slots[n]) * call.kv_heads + head;
        const int64_t key = row * call.head_size, value = row * call.value_size;
        for (int64_t d = 0; d < call.head_size; ++d) state.keys[d * kKeys + n] = load(call.k_pool, call.type, key + d);
        float* values = state.values.data() + n * state.padded_values;
        for (int64_t d = 0; d < call.value_size; ++d) values[d] = load(call.v_pool, call.type, value + d);
    }
}

// Scores [kBlock, kKeys] of a block of queries against the tile.
STARS_FAST_INLINE void score_block(const Queries& state, int64_t first, float (*scores)[kKeys]) {
    Vector low[kBlock] = {}, high[kBlock] = {};
    const float* q = state.q.data() + first * state.head_size;
    for (int64_t d = 0; d < state.head_size; ++d) {
        const Vector* keys = vectors(state.keys.data() + d * kKeys);
        for (int64_t m = 0; m < kBlock; ++m) {
            const float x = q[m * state.head_size + d];
            low[m] += x * keys[0];
            high[m] += x * keys[1];
        }
    }
    for (int64_t m = 0; m < kBlock; ++m) {
        vectors(scores[m])[0] = low[m];
        vectors(scores[m])[1] = high[m];
    }
}

// Turns a query's scores into weights relative to its new maximum, and rescales what it has summed up.
STARS_FAST_INLINE void weigh(const TreeAttention& call, Queries& state, int64_t query, Span seen, float* scores) {
    if (call.softcap != 0.0f) {
        for (int64_t n = 0; n < kKeys; ++n) scores[n] = call.softcap * std::tanh(scores[n] / call.softcap);
    }
    float maximum = state.maximum[query];
    bool bad = false;  // NaN or +inf, which the exponential below would take for a weight of 0
    for (int64_t n = 0; n < kKeys; ++n) {
        const bool visible = n >= seen.first && n < seen.last;
        scores[n] = visible ? scores[n] : -HUGE_VALF;
        bad |= !(scores[n] < HUGE_VALF);
        maximum = scores[n] > maximum ? scores[n] : maximum;
    }
    float sum = 0.0f;
    for (int64_t n = 0; n < kKeys; ++n) {
        scores[n] = exp_nonpositive(scores[n] - maximum);
        sum += scores[n];
    }
    const float factor = exp_nonpositive(state.maximum[query] - maximum);
    state.sum[query] = bad ? NAN : state.sum[query] * factor + sum;
    state.maximum[query] = maximum;
    float* weighted = state.weighted.data() + query * state.padded_values;
    for (int64_t d = 0; d < state.padded_values; ++d) weighted[d] *= factor;
}

STARS_FAST_INLINE void add_values(Queries& state, int64_t first, int64_t count, const float (*weights)[kKeys]) {
    for (int64_t d = 0; d < state.padded_values; d += kVector) {
        Vector sums[kBlock];
        float* weighted = state.weighted.data() + first * state.padded_values + d;
        for (int64_t m = 0; m < kBlock; ++m) sums[m] = *vectors(weighted + m * state.padded_values);
        for (int64_t n = 0; n < count; ++n) {
            const Vector value = *vectors(state.values.data() + n * state.padded_values + d);
            for (int64_t m = 0; m < kBlock; ++m) sums[m] += weights[m][n] * value;
        }
        for (int64_t m = 0; m < kBlock; ++m) *vectors(weighted + m * state.padded_values) = sums[m];
    }
}

// Queries [begin, end) attend to a list of keys, each to its own span of it.
STARS_FAST_INLINE void attend(const TreeAttention& call, Queries& state, const std::vector<Span>& spans, int64_t begin,
                              int64_t end, const int32_t* slots, int64_t length, int64_t head) {
    for (int64_t start = 0; start < length; start += kKeys) {
        const int64_t count = std::min(kKeys, length - start);
        bool loaded = false;
        for (int64_t first = begin; first < end; first += kBlock) {
            const int64_t queries = std::min(kBlock, end - first);
            bool any = false;
            for (int64_t m = first; m < first + queries; ++m) {
                any |= spans[m].first < start + count && spans[m].last > start;
            }
            if (!any) continue;
            if (!loaded) load_tile_of(call, state, slots + start, count, head);
            loaded = true;
            alignas(64) float weights[kBlock][kKeys] = {};
            score_block(state, first, weights);
            for (int64_t m = 0; m < kBlock; ++m) {
                const Span seen = m < queries ? spans[first + m] : Span{0, 0};
                const Span here{seen.first - start, std::min(seen.last - start, count)};
                if (here.last > std::max<int64_t>(here.first, 0)) {
                    weigh(call, state, first + m, here, weights[m]);
                } else {
                    std::fill_n(weights[m], kKeys, 0.0f);
                }
            }
            add_values(state, first, count, weights);
        }
    }
}

STARS_FAST_INLINE void load_queries(const TreeAttention& call, Queries& state, int64_t group, int64_t head) {
    const int64_t fold = call.heads / call.kv_heads, trunk = call.trunk_len[group];
    int64_t m = 0;
    for (int64_t row = call.group_indptr[group]; row < call.group_indptr[group + 1]; ++row) {
        const int64_t count = call.query_indptr[row + 1] - call.query_indptr[row];
        for (int64_t j = 0; j < count; ++j) {
            const int64_t index = call.branch_len[row] - count + j;
            const int64_t oldest = call.window ? trunk + index - call.window + 1 : 0;  // position
            const int64_t token = (call.query_indptr[row] + j) * call.q_token_stride;
            for (int64_t f = 0; f < fold; ++f, ++m) {
                const int64_t q = token + (head * fold + f) * call.q_head_stride;
                float* out = state.q.data() + m * call.head_size;
                for (int64_t d = 0; d < call.head_size; ++d) out[d] = load(call.q, call.type, q + d) * call.scale;
                state.trunk[m] = {oldest, trunk};
                state.branch[m] = {oldest - trunk, index + 1};
                if (call.sinks != nullptr) {
                    state.maximum[m] = call.sinks[head * fold + f];
                    state.sum[m] = 1.0f;
                }
            }
        }
    }
}

STARS_FAST_INLINE void store(const TreeAttention& call, const Queries& state, int64_t group, int64_t head) {
    const int64_t fold = call.heads / call.kv_heads;
    const int64_t first = call.query_indptr[call.group_indptr[group]];
    const int64_t last = call.query_indptr[call.group_indptr[group + 1]];
    int64_t m = 0;
    for (int64_t token = first; token < last; ++token) {
        for (int64_t f = 0; f < fold; ++f, ++m) {
            float* out = call.out + (token * call.heads + head * fold + f) * call.value_size;
            const float* weighted = state.weighted.data() + m * state.padded_values;
            const float inverse = state.sum[m] != 0.0f ? 1.0f / state.sum[m] : 0.0f;
            for (int64_t d = 0; d < call.value_size; ++d) out[d] = weighted[d] * inverse;
        }
    }
}

STARS_FAST_CLONES void attend_group(const TreeAttention& call, Queries& state, int64_t group, int64_t head) {
    const int64_t fold = call.heads / call.kv_heads;
    const int64_t first_row = call.group_indptr[group], last_row = call.group_indptr[group + 1];
    const int64_t first_query = call.query_indptr[first_row];
    const int64_t queries = (call.query_indptr[last_row] - first_query) * fold;
    if (queries == 0) return;
    state.resize(queries, call);
    load_queries(call, state, group, head);
    attend(call, state, state.trunk, 0, queries, call.trunk_slots + group * call.trunk_width, call.trunk_len[group],
           head);
    for (int64_t row = first_row; row < last_row; ++row) {
        attend(call, state, state.branch, (call.query_indptr[row] - first_query) * fold,
               (call.query_indptr[row + 1] - first_query) * fold, call.branch_slots + row * call.branch_width,
               call.branch_len[row], head);
    }
    store(call, state, group, head);
}

}  // namespace

void tree_attention(const TreeAttention& call, int threads) {
    const int64_t used = call.query_indptr[call.group_indptr[call.groups]];
    std::fill_n(call.out + used * call.heads * call.value_size, (call.tokens - used) * call.heads * call.value_size,
                0.0f);
    int64_t keys = 0;
    for (int64_t g = 0; g < call.groups; ++g) keys = std::max<int64_t>(keys, call.trunk_len[g]);
    const int64_t work = used * call.heads * (keys + call.branch_width) * call.head_size / 16;
    parallel_for(call.groups * call.kv_heads, work, threads, [&](int64_t item) {
        static thread_local Queries state;  // its buffers outlive the call: a decode step allocates nothing
        attend_group(call, state, item / call.kv_heads, item % call.kv_heads);
    });
}

void kv_append(const Append& call) {
    for (int64_t t = 0; t < call.tokens; ++t) {
        char* slot = call.pool + static_cast<int64_t>(call.slots[t]) * call.heads * call.bytes;
        const char* source = call.source + t * call.token_stride;
        for (int64_t h = 0; h < call.heads; ++h) {
            std::memcpy(slot + h * call.bytes, source + h * call.head_stride, call.bytes);
        }
    }
}

}  // namespace stars_fast
