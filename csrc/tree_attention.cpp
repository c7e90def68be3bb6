// Attention over a tree: per request and key-value head one list of keys, the trunk's and then each branch's own.
//
// The queries of all rows of a request that share a head are one matrix, so a trunk's key is loaded once for a block of
// them. Keys come in tiles, with a running maximum and sum per query, as in flash attention; keys and values are read
// where they lie. What a query gets does not depend on the queries beside it, not even in its rounding.
#if defined(__clang__)
#pragma clang fp contract(fast)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=fast")  // elsewhere it is off: the draw must round alike everywhere, this need not
#endif
#include "tree_attention.h"

#include <algorithm>
#include <vector>

#include "checks.h"
#include "parallel.h"
#include "vector.h"

namespace stars_fast {

namespace {

constexpr int64_t kKeys = 64;   // keys of a tile
constexpr int kMostQueries = 4;  // of a block, which share what is loaded
constexpr int kChunk = 4;       // vectors of a value that are added up at once

// Keys that a query may see: [first, last) of the list it is attending to.
struct Span {
    int64_t first, last;
};

// The queries of one request and key-value head, and what has been summed up for each so far.
struct Queries {
    int64_t query_stride, value_stride;            // floats; whole vectors
    std::vector<float> q, weighted, maximum, sum;  // [M, D padded], [M, Dv padded], [M], [M]
    std::vector<Span> trunk, branch;               // [M]

    void resize(int64_t count, const TreeAttention& call) {
        query_stride = (call.head_size + kWidest - 1) / kWidest * kWidest;
        value_stride = (call.value_size + kWidest - 1) / kWidest * kWidest;
        count += kMostQueries - 1;  // a block reads, and never uses, what lies behind the last query
        q.assign(count * query_stride, 0.0f);
        weighted.assign(count * value_stride, 0.0f);
        maximum.assign(count, -HUGE_VALF);
        sum.assign(count, 0.0f);
        trunk.assign(count, {0, 0});
        branch.assign(count, {0, 0});
    }
};

// One list of keys and values, a tile at a time.
template <class Element>
struct Tile {
    const Element* keys[kKeys];
    const Element* values[kKeys];
    int64_t count;

    STARS_FAST_INLINE void point_at(const TreeAttention& call, const int32_t* slots, int64_t size, int64_t head) {
        count = size;
        for (int64_t n = 0; n < kKeys; ++n) {  // past the last key the first one is read, and not used
            const int64_t row = static_cast<int64_t>(slots[n < size ? n : 0]) * call.kv_heads + head;
            keys[n] = static_cast<const Element*>(call.k_pool) + row * call.head_size;
            values[n] = static_cast<const Element*>(call.v_pool) + row * call.value_size;
        }
    }
};

template <class Element, int kWidth>
struct Attention {
    using Lanes = Vector<kWidth>;
    using Floats = typename Lanes::Floats;
    static constexpr int kPairs = std::max(kWidth, 8);  // of a query and a key: products that are summed up at once

    const TreeAttention& call;
    Queries& state;
    int64_t head;

    // Scores of kQueries queries and the tile's keys.
    template <int kQueries>
    STARS_FAST_INLINE void score(const Tile<Element>& tile, int64_t first, float (*scores)[kKeys]) const {
        constexpr int kSide = kPairs / kQueries;  // keys
        const float* q = state.q.data() + first * state.query_stride;
        for (int64_t n = 0; n < tile.count; n += kSide) {
            Floats products[kPairs] = {};
            int64_t d = 0;
            for (; d + kWidth <= call.head_size; d += kWidth) {
                Floats queries[kQueries], key;
                for (int m = 0; m < kQueries; ++m) Lanes::load(q + m * state.query_stride + d, queries[m]);
                for (int i = 0; i < kSide; ++i) {
                    Lanes::load(tile.keys[n + i] + d, key);
                    for (int m = 0; m < kQueries; ++m) products[m * kSide + i] += queries[m] * key;
                }
            }
            if (d < call.head_size) {
                Floats query, key;
                for (int i = 0; i < kSide; ++i) {
                    Lanes::load_some(tile.keys[n + i] + d, call.head_size - d, key);
                    for (int m = 0; m < kQueries; ++m) {
                        Lanes::load(q + m * state.query_stride + d, query);
                        products[m * kSide + i] += query * key;
                    }
                }
            }
            float sums[kPairs];
            for (int i = 0; i < kPairs; i += kWidth) {
                Floats some;
                sums_of(products + i, some);
                Lanes::store(some, sums + i);
            }
            for (int m = 0; m < kQueries; ++m) std::memcpy(scores[m] + n, sums + m * kSide, kSide * sizeof(float));
        }
    }

    // Turns a query's scores into weights relative to its new maximum, and rescales what it has summed up.
    STARS_FAST_INLINE void weigh(int64_t query, Span seen, int64_t count, float* scores) const {
        if (call.softcap != 0.0f) {
            for (int64_t n = 0; n < count; ++n) scores[n] = call.softcap * std::tanh(scores[n] / call.softcap);
        }
        typename Lanes::Integers place, bad = {};
        for (int lane = 0; lane < kWidth; ++lane) place[lane] = lane;
        const Floats nothing = Floats{} - HUGE_VALF;
        Floats x, top = Floats{} + state.maximum[query];
        for (int64_t n = 0; n < count; n += kWidth, place += kWidth) {
            Lanes::load(scores + n, x);
            const auto visible =
                (place >= static_cast<int32_t>(seen.first)) & (place < static_cast<int32_t>(seen.last));
            x = visible ? x : nothing;
            bad |= ~(x < HUGE_VALF);  // NaN or +inf, which the exponential below would take for a weight of 0
            top = x > top ? x : top;
            Lanes::store(x, scores + n);
        }
        const float maximum = Lanes::max(top);
        Floats sums = {};
        for (int64_t n = 0; n < count; n += kWidth) {
            Lanes::load(scores + n, x);
            x -= maximum;
            Lanes::exp_nonpositive(x);
            sums += x;
            Lanes::store(x, scores + n);
        }
        const float factor = stars_fast::exp_nonpositive(state.maximum[query] - maximum);
        state.sum[query] = Lanes::any(bad) ? NAN : state.sum[query] * factor + Lanes::sum(sums);
        state.maximum[query] = maximum;
        float* weighted = state.weighted.data() + query * state.value_stride;
        for (int64_t d = 0; d < state.value_stride; d += kWidth) {
            Lanes::load(weighted + d, x);
            x *= factor;
            Lanes::store(x, weighted + d);
        }
    }

    // Adds kVectors vectors of the tile's values, from element d on; with `rest` > 0 there are only so many elements.
    template <int kQueries, int kVectors>
    STARS_FAST_INLINE void add_chunk(const Tile<Element>& tile, int64_t first, int64_t count,
                                     const float (*weights)[kKeys], int64_t d, int64_t rest) const {
        float* weighted = state.weighted.data() + first * state.value_stride + d;
        Floats sums[kQueries][kVectors], value;
        for (int m = 0; m < kQueries; ++m) {
            for (int v = 0; v < kVectors; ++v) Lanes::load(weighted + m * state.value_stride + v * kWidth, sums[m][v]);
        }
        for (int64_t n = 0; n < tile.count; ++n) {
            for (int v = 0; v < kVectors; ++v) {
                if (rest > 0) {
                    Lanes::load_some(tile.values[n] + d, rest, value);
                } else {
                    Lanes::load(tile.values[n] + d + v * kWidth, value);
                }
                for (int m = 0; m < kQueries; ++m) sums[m][v] += weights[m][n] * value;
            }
        }
        for (int m = 0; m < kQueries; ++m) {
            for (int v = 0; v < kVectors && m < count; ++v) {
                Lanes::store(sums[m][v], weighted + m * state.value_stride + v * kWidth);
            }
        }
    }

    // The first `count` of kQueries queries attend to a tile that begins at place `start` of their list.
    template <int kQueries>
    STARS_FAST_INLINE void attend_block(const Tile<Element>& tile, const Span* spans, int64_t first, int64_t count,
                                        int64_t start) const {
        bool any = false;
        for (int64_t m = first; m < first + count; ++m) {
            any |= spans[m].first < start + tile.count && spans[m].last > start;
        }
        if (!any) return;
        alignas(64) float weights[kQueries][kKeys];
        score<kQueries>(tile, first, weights);
        for (int m = 0; m < kQueries; ++m) {
            const Span seen = m < count ? spans[first + m] : Span{0, 0};
            const Span here{std::max<int64_t>(seen.first - start, 0), std::min(seen.last - start, tile.count)};
            if (here.last > here.first) {
                weigh(first + m, here, tile.count, weights[m]);
            } else {
                std::fill_n(weights[m], kKeys, 0.0f);
            }
        }
        int64_t d = 0;
        for (; d + kChunk * kWidth <= call.value_size; d += kChunk * kWidth) {
            add_chunk<kQueries, kChunk>(tile, first, count, weights, d, 0);
        }
        for (; d + kWidth <= call.value_size; d += kWidth) add_chunk<kQueries, 1>(tile, first, count, weights, d, 0);
        if (d < call.value_size) add_chunk<kQueries, 1>(tile, first, count, weights, d, call.value_size - d);
    }

    // Queries [begin, end) attend to a list of keys, each to its own span of it.
    STARS_FAST_INLINE void attend(const std::vector<Span>& spans, int64_t begin, int64_t end, const int32_t* slots,
                                  int64_t length) const {
        Tile<Element> tile;
        for (int64_t start = 0; start < length; start += kKeys) {
            tile.point_at(call, slots + start, std::min(kKeys, length - start), head);
            int64_t first = begin;
            if constexpr (kWidth >= 16) {  // where registers are fewer, or narrower, there is no room for four
                for (; end - first > 2; first += 4) {
                    attend_block<4>(tile, spans.data(), first, std::min<int64_t>(end - first, 4), start);
                }
            }
            for (; end - first > 1; first += 2) attend_block<2>(tile, spans.data(), first, 2, start);
            if (first < end) attend_block<1>(tile, spans.data(), first, 1, start);
        }
    }

    STARS_FAST_INLINE void load_query(const Element* from, float* to) const {
        Floats x;
        int64_t d = 0;
        for (; d + kWidth <= call.head_size; d += kWidth) {
            Lanes::load(from + d, x);
            x *= call.scale;
            Lanes::store(x, to + d);
        }
        if (d == call.head_size) return;
        Lanes::load_some(from + d, call.head_size - d, x);
        x *= call.scale;
        Lanes::store(x, to + d);
    }

    STARS_FAST_INLINE void load_queries(int64_t group) const {
        const int64_t fold = call.heads / call.kv_heads, trunk = call.trunk_len[group];
        int64_t m = 0;
        for (int64_t row = call.group_indptr[group]; row < call.group_indptr[group + 1]; ++row) {
            const int64_t count = call.query_indptr[row + 1] - call.query_indptr[row];
            for (int64_t j = 0; j < count; ++j) {
                const int64_t index = call.branch_len[row] - count + j;
                const int64_t oldest = call.window ? trunk + index - call.window + 1 : 0;  // position
                const int64_t token = (call.query_indptr[row] + j) * call.q_token_stride;
                for (int64_t h = head * fold; h < (head + 1) * fold; ++h, ++m) {
                    load_query(static_cast<const Element*>(call.q) + token + h * call.q_head_stride,
                               state.q.data() + m * state.query_stride);
                    state.trunk[m] = {oldest, trunk};
                    state.branch[m] = {oldest - trunk, index + 1};
                    if (call.sinks != nullptr) {
                        state.maximum[m] = call.sinks[h];
                        state.sum[m] = 1.0f;
                    }
                }
            }
        }
    }

    STARS_FAST_INLINE void store(int64_t first, int64_t last) const {
        const int64_t fold = call.heads / call.kv_heads;
        int64_t m = 0;
        for (int64_t token = first; token < last; ++token) {
            for (int64_t h = head * fold; h < (head + 1) * fold; ++h, ++m) {
                Element* out = static_cast<Element*>(call.out) + (token * call.heads + h) * call.value_size;
                const float* weighted = state.weighted.data() + m * state.value_stride;
                const float inverse = state.sum[m] != 0.0f ? 1.0f / state.sum[m] : 0.0f;
                for (int64_t d = 0; d < call.value_size; ++d) round_to(weighted[d] * inverse, out[d]);
            }
        }
    }

    STARS_FAST_INLINE void run(int64_t group) const {
        const int64_t fold = call.heads / call.kv_heads;
        const int64_t first_row = call.group_indptr[group], last_row = call.group_indptr[group + 1];
        const int64_t first = call.query_indptr[first_row], last = call.query_indptr[last_row];
        if (first == last) return;
        state.resize((last - first) * fold, call);
        load_queries(group);
        attend(state.trunk, 0, (last - first) * fold, call.trunk_slots + group * call.trunk_width,
               call.trunk_len[group]);
        for (int64_t row = first_row; row < last_row; ++row) {
            attend(state.branch, (call.query_indptr[row] - first) * fold, (call.query_indptr[row + 1] - first) * fold,
                   call.branch_slots + row * call.branch_width, call.branch_len[row]);
        }
        store(first, last);
    }
};

template <int kWidth>
STARS_FAST_INLINE void attend_group(const TreeAttention& call, Queries& state, int64_t group, int64_t head) {
    if (call.type == Float::k32) return Attention<float, kWidth>{call, state, head}.run(group);
    if (call.type == Float::kBf16) return Attention<Bf16, kWidth>{call, state, head}.run(group);
    Attention<Half, kWidth>{call, state, head}.run(group);
}

using AttendGroup = void (*)(const TreeAttention&, Queries&, int64_t, int64_t);

void attend_group_any(const TreeAttention& call, Queries& state, int64_t group, int64_t head) {
    attend_group<4>(call, state, group, head);  // NEON's and SSE's registers hold four floats
}

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx2,fma"))) void attend_group_avx2(const TreeAttention& call, Queries& state, int64_t group,
                                                           int64_t head) {
    attend_group<8>(call, state, group, head);
}

__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) void attend_group_avx512(
    const TreeAttention& call, Queries& state, int64_t group, int64_t head) {
    attend_group<16>(call, state, group, head);
}

AttendGroup widest() {
    const int floats = floats_of_registers();
    return floats == 16 ? attend_group_avx512 : floats == 8 ? attend_group_avx2 : attend_group_any;
}
#else
AttendGroup widest() { return attend_group_any; }
#endif

}  // namespace

void check(const TreeAttention& call) {
    check_sizes({call.tokens, call.heads, call.slots, call.groups, call.trunk_width, call.rows, call.branch_width});
    if (call.kv_heads < 1 || call.heads % call.kv_heads != 0) {
        throw std::invalid_argument("q has " + std::to_string(call.heads) + " heads, which cannot share the " +
                                    std::to_string(call.kv_heads) + " of k_pool and v_pool evenly");
    }
    constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
    check_value("the size of q's heads", call.head_size, 1, kMost);
    check_value("the size of v_pool's heads", call.value_size, 1, kMost);
    check_value("window", call.window, 0, kMost);
    const int64_t element = call.type == Float::k32 ? 4 : 2;
    const int64_t queries = call.tokens == 0 || call.heads == 0
                                ? 0
                                : (call.tokens - 1) * call.q_token_stride + (call.heads - 1) * call.q_head_stride +
                                      call.head_size;
    check_memory({{"out", call.out, bytes_of({call.tokens, call.heads, call.value_size, element})},
                  {"q", call.q, queries * element},
                  {"k_pool", call.k_pool, bytes_of({call.slots, call.kv_heads, call.head_size, element})},
                  {"v_pool", call.v_pool, bytes_of({call.slots, call.kv_heads, call.value_size, element})},
                  {"trunk_slots", call.trunk_slots, bytes_of({call.groups, call.trunk_width, 4})},
                  {"trunk_len", call.trunk_len, bytes_of({call.groups, 4})},
                  {"branch_slots", call.branch_slots, bytes_of({call.rows, call.branch_width, 4})},
                  {"branch_len", call.branch_len, bytes_of({call.rows, 4})},
                  {"group_indptr", call.group_indptr, bytes_of({call.groups + 1, 4})},
                  {"query_indptr", call.query_indptr, bytes_of({call.rows + 1, 4})}},
                 1);
    check_offsets("group_indptr", call.group_indptr, call.groups, call.rows);
    check_offsets("query_indptr", call.query_indptr, call.rows, call.tokens);
    check_range("trunk_len", call.trunk_len, call.groups, 0, call.trunk_width);
    check_range("branch_len", call.branch_len, call.rows, 0, call.branch_width);
    for (int64_t g = 0; g < call.groups; ++g) {
        const int64_t first = call.group_indptr[g], last = call.group_indptr[g + 1];
        if (call.query_indptr[first] == call.query_indptr[last]) continue;  // nobody reads its slots
        check_range("trunk_slots", call.trunk_slots + g * call.trunk_width, call.trunk_len[g], 0, call.slots - 1, g);
        for (int64_t row = first; row < last; ++row) {
            check_range("branch_slots", call.branch_slots + row * call.branch_width, call.branch_len[row], 0,
                        call.slots - 1, row);
        }
    }
}

void tree_attention(const TreeAttention& call, int threads) {
    check(call);
    static const AttendGroup attend = widest();
    const int64_t used = call.query_indptr[call.group_indptr[call.groups]];
    const int64_t token_bytes = call.heads * call.value_size * (call.type == Float::k32 ? 4 : 2);
    if (used < call.tokens) {
        std::memset(static_cast<char*>(call.out) + used * token_bytes, 0, (call.tokens - used) * token_bytes);
    }
    if (used == 0) return;
    int64_t keys = 0;
    for (int64_t g = 0; g < call.groups; ++g) keys = std::max<int64_t>(keys, call.trunk_len[g]);
    const double work = static_cast<double>(used * call.heads) * (keys + call.branch_width) * call.head_size / 4;
    parallel_for(call.groups * call.kv_heads, work, threads, [&](int64_t item) {
        static thread_local Queries state;  // its buffers outlive the call: a decode step allocates nothing
        attend(call, state, item / call.kv_heads, item % call.kv_heads);
    });
}

void check(const Append& call) {
    check_sizes({call.tokens, call.heads, call.pool_slots});
    constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
    check_value("the size of k's heads in bytes", call.k.bytes, 1, kMost);
    check_value("the size of v's heads in bytes", call.v.bytes, 1, kMost);
    const auto read = [&](const Append::Part& part) {
        if (call.tokens == 0 || call.heads == 0) return int64_t{0};
        return (call.tokens - 1) * part.token_stride + (call.heads - 1) * part.head_stride + part.bytes;
    };
    check_memory({{"k_pool", call.k.pool, bytes_of({call.pool_slots, call.heads, call.k.bytes})},
                  {"v_pool", call.v.pool, bytes_of({call.pool_slots, call.heads, call.v.bytes})},
                  {"k", call.k.source, read(call.k)},
                  {"v", call.v.source, read(call.v)},
                  {"slots", call.slots, bytes_of({call.tokens, 4})}},
                 2);
    check_range("slots", call.slots, call.tokens, 0, call.pool_slots - 1);
}

void kv_append(const Append& call) {
    check(call);
    for (const Append::Part& part : {call.k, call.v}) {
        for (int64_t t = 0; t < call.tokens; ++t) {
            char* slot = part.pool + static_cast<int64_t>(call.slots[t]) * call.heads * part.bytes;
            const char* source = part.source + t * part.token_stride;
            for (int64_t h = 0; h < call.heads; ++h) {
                std::memcpy(slot + h * part.bytes, source + h * part.head_stride, part.bytes);
            }
        }
    }
}

}  // namespace stars_fast
