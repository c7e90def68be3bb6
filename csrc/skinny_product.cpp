// Products of few rows with a weight that is read once.
//
// A block of rows and outputs has one vector of partial sums per product, and all products are added up in one order:
// lane by lane along the inputs, then across the lanes. So a row's numbers depend neither on the rows beside it, nor on
// how many there are, nor on threads.
#if defined(__clang__)
#pragma clang fp contract(fast)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=fast")  // as in tree_attention.cpp
#endif
#include "skinny_product.h"

#include <algorithm>

#include "checks.h"
#include "parallel.h"
#include "vector.h"

namespace stars_fast {

namespace {

constexpr int kMostRows = 4;                // of a block
constexpr int64_t kLeast = 16, kMost = 64;  // outputs that a thread takes at once: whole blocks

template <int kWidth>
struct Product {
    using Lanes = Vector<kWidth>;
    using Floats = typename Lanes::Floats;
    static constexpr int kPairs = std::max(kWidth, 8);  // of a row and an output: products that are summed up at once

    const SkinnyProduct& call;

    // The first `rows` of kRows rows and `outputs` of kPairs / kRows outputs. Meanwhile `fetched` rows of the
    // weight, one an output, are fetched from the output `ahead` on.
    template <int kRows>
    STARS_FAST_INLINE void block(int64_t row, int64_t rows, int64_t output, int64_t outputs, int64_t ahead,
                                 int64_t fetched) const {
        constexpr int kOutputs = kPairs / kRows;
        const float* next = call.weight + ahead * call.inputs;
        const float *x[kRows], *weight[kOutputs];
        // What lies past the last one is that one again: computed, and not stored.
        for (int m = 0; m < kRows; ++m) x[m] = call.x + (row + std::min<int64_t>(m, rows - 1)) * call.inputs;
        for (int n = 0; n < kOutputs; ++n) {
            weight[n] = call.weight + (output + std::min<int64_t>(n, outputs - 1)) * call.inputs;
        }
        Floats products[kPairs] = {};
        for (int64_t i = 0; i < call.inputs; i += kWidth) {
            Floats values[kRows], weights;
#pragma GCC unroll 16
            for (int m = 0; m < kRows; ++m) Lanes::load(x[m] + i, values[m]);
#pragma GCC unroll 16
            for (int n = 0; n < kOutputs; ++n) {
                Lanes::load(weight[n] + i, weights);
                if (n < fetched) __builtin_prefetch(next + n * call.inputs + i, 0, 2);  // nearer, it costs x its place
#pragma GCC unroll 16
                for (int m = 0; m < kRows; ++m) products[m * kOutputs + n] += values[m] * weights;
            }
        }
        float sums[kPairs];
        for (int p = 0; p < kPairs; p += kWidth) {
            Floats some;
            sums_of(products + p, some);
            Lanes::store(some, sums + p);
        }
        if (rows == kRows && outputs == kOutputs) {
            put<kOutputs>(sums, row, kRows, output, kOutputs);  // numbers that the compiler knows
        } else {
            put<kOutputs>(sums, row, rows, output, outputs);
        }
    }

    template <int kOutputs>
    STARS_FAST_INLINE void put(const float* sums, int64_t row, int64_t rows, int64_t output, int64_t outputs) const {
        for (int64_t m = 0; m < rows; ++m) {
            float* out = call.out + (row + m) * call.outputs + output;
            for (int64_t n = 0; n < outputs; ++n) {
                out[n] = call.bias == nullptr ? sums[m * kOutputs + n] : sums[m * kOutputs + n] + call.bias[output + n];
            }
        }
    }

    // All rows, kRows at a time, and outputs [first, last). Each pass fetches its part of the next outputs.
    template <int kRows>
    STARS_FAST_INLINE void run(int64_t first, int64_t last) const {
        constexpr int64_t kOutputs = kPairs / kRows;
        const int64_t passes = (call.rows + kRows - 1) / kRows, share = (kOutputs + passes - 1) / passes;
        for (int64_t output = first; output < last; output += kOutputs) {
            for (int64_t pass = 0; pass < passes; ++pass) {
                const int64_t row = pass * kRows, ahead = output + kOutputs + pass * share;
                const int64_t end = std::min(output + 2 * kOutputs, call.outputs);
                block<kRows>(row, std::min<int64_t>(call.rows - row, kRows), output, std::min(last - output, kOutputs),
                             ahead, std::min(share, end - ahead));
            }
        }
    }

    STARS_FAST_INLINE void run(int64_t first, int64_t last) const {
        if (call.rows == 1) return run<1>(first, last);
        if (call.rows == 2) return run<2>(first, last);
        run<kMostRows>(first, last);
    }
};

using Run = void (*)(const SkinnyProduct&, int64_t, int64_t);

void run_any(const SkinnyProduct& call, int64_t first, int64_t last) { Product<4>{call}.run(first, last); }

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx2,fma"))) void run_avx2(const SkinnyProduct& call, int64_t first, int64_t last) {
    Product<8>{call}.run(first, last);
}

__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) void run_avx512(const SkinnyProduct& call,
                                                                                      int64_t first, int64_t last) {
    Product<16>{call}.run(first, last);
}

Run widest() {
    const int floats = floats_of_registers();
    return floats == 16 ? run_avx512 : floats == 8 ? run_avx2 : run_any;
}
#else
Run widest() { return run_any; }
#endif

}  // namespace

void check(const SkinnyProduct& call) {
    check_sizes({call.rows, call.inputs, call.outputs});
    if (call.inputs % kWidest != 0) {  // in a remainder compilers fuse some products and not others
        throw std::invalid_argument("x has rows of " + std::to_string(call.inputs) + ", which must be a multiple of " +
                                    std::to_string(kWidest));
    }
    check_memory({{"out", call.out, bytes_of({call.rows, call.outputs, 4})},
                  {"x", call.x, bytes_of({call.rows, call.inputs, 4})},
                  {"weight", call.weight, bytes_of({call.outputs, call.inputs, 4})},
                  {"bias", call.bias, call.bias == nullptr ? 0 : bytes_of({call.outputs, 4})}},
                 1);
}

void skinny_product(const SkinnyProduct& call, int threads) {
    check(call);
    if (call.rows == 0) return;
    static const Run run = widest();
    const int64_t share = call.outputs / (4 * std::max(threads, 1)) / kLeast * kLeast;
    const int64_t size = std::min(std::max(share, kLeast), kMost), chunks = (call.outputs + size - 1) / size;
    const double work = static_cast<double>(call.outputs) * call.inputs * ((call.rows + kMostRows - 1) / kMostRows);
    parallel_for(chunks, work, threads, [&](int64_t chunk) {
        run(call, chunk * size, std::min(call.outputs, (chunk + 1) * size));
    });
}

}  // namespace stars_fast
