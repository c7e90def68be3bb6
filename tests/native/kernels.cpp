// The CPU kernels without Python: the published numbers of Philox, wrong arguments refused, and several callers at once
// who must get what one alone gets. Prints its results, one a line; given a file of such lines, says what differs.
// Usage: kernels [rounds] > results; kernels [rounds] results
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "expect.h"
#include "parallel.h"
#include "philox.h"
#include "sample_step.h"
#include "select_and_commit.h"
#include "skinny_product.h"
#include "tree_attention.h"

using namespace stars_fast;

namespace {

using Results = std::vector<double>;

template <class T>
void add(Results& results, const std::vector<T>& values) {
    results.insert(results.end(), values.begin(), values.end());
}

std::vector<float> noise(std::mt19937& random, int64_t count) {
    // Not std::normal_distribution: what it makes of the same bits is each library's own affair.
    std::vector<float> values(count);
    for (float& value : values) value = static_cast<float>(random() >> 8) * 0x1p-23f - 1.0f;
    return values;
}

// Three groups of two, one and three rows, several queries a row; tables wider than needed.
struct Tree {
    static constexpr int64_t kHeads = 4, kKvHeads = 2, kSize = 20, kValue = 12, kTrunk = 70, kBranch = 5, kRows = 6;
    static constexpr int64_t kSlots = 3 * kTrunk + kRows * kBranch + 1, kTokens = 13;
    std::mt19937 random{5};
    std::vector<float> q = noise(random, kTokens * kHeads * kSize), k = noise(random, kSlots * kKvHeads * kSize),
                       v = noise(random, kSlots * kKvHeads * kValue);
    std::vector<float> out = std::vector<float>(kTokens * kHeads * kValue);
    std::vector<int32_t> trunk_slots, trunk_len{70, 0, 64}, branch_slots, branch_len{5, 2, 1, 3, 4, 5};
    std::vector<int32_t> group_indptr{0, 2, 3, 6}, query_indptr{0, 1, 3, 4, 6, 8, 12};

    Tree() {
        for (int32_t i = 0; i < 3 * kTrunk; ++i) trunk_slots.push_back(1 + (i * 37) % (3 * kTrunk));
        for (int32_t i = 0; i < kRows * kBranch; ++i) branch_slots.push_back(1 + 3 * kTrunk + i);
    }

    TreeAttention call() {
        return {q.data(), kHeads * kSize, kSize, k.data(), v.data(), out.data(), Float::k32, kTokens, kHeads, kKvHeads,
                kSize, kValue, kSlots, trunk_slots.data(), trunk_len.data(), 3, kTrunk, branch_slots.data(),
                branch_len.data(), kRows, kBranch, group_indptr.data(), query_indptr.data(), 0.3f, 0, 0.0f, nullptr};
    }
};

void attention(Results& results, int threads) {
    Tree tree;
    std::vector<int32_t> slots{3, 9, 200};
    std::vector<float> keys = noise(tree.random, 6 * Tree::kSize), values = noise(tree.random, 6 * Tree::kValue);
    const auto bytes = [](auto* p) { return reinterpret_cast<char*>(p); };
    kv_append({{bytes(keys.data()), 2 * Tree::kSize * 4, Tree::kSize * 4, bytes(tree.k.data()), Tree::kSize * 4},
               {bytes(values.data()), 2 * Tree::kValue * 4, Tree::kValue * 4, bytes(tree.v.data()), Tree::kValue * 4},
               slots.data(), 3, 2, Tree::kSlots});
    tree_attention(tree.call(), threads);
    add(results, tree.out);
}

void sampling(Results& results, int threads) {
    constexpr int64_t kRows = 24, kVocab = 5000;
    std::mt19937 random(7);
    std::vector<float> logits = noise(random, kRows * kVocab), temperature(kRows, 0.7f), top_p(kRows, 0.9f),
                       min_p(kRows, 0.02f), penalty(kRows, 1.3f), logprob(kRows), sampling_logprob(kRows),
                       entropy(kRows), gathered(kRows);
    for (float& x : logits) x *= 9.0f;
    std::vector<int64_t> keys(kRows), eos(kRows, 3), token(kRows);
    std::vector<int32_t> segment(kRows, 2), attempt(kRows, 1), position(kRows), limit(kRows, 9), top_k(kRows, 40);
    for (int64_t b = 0; b < kRows; ++b) keys[b] = (b << 32) + 977 * b + 1;
    std::vector<uint8_t> alive(kRows, 1), seen(kRows * kVocab);
    const auto flags = [](std::vector<uint8_t>& bytes) { return reinterpret_cast<bool*>(bytes.data()); };
    for (int step = 0; step < 3; ++step) {
        sample_step({logits.data(), Float::k32, kRows, kVocab, keys.data(), segment.data(), attempt.data(),
                     position.data(), flags(alive), limit.data(), temperature.data(), top_k.data(), top_p.data(),
                     min_p.data(), penalty.data(), flags(seen), eos.data(), 1, token.data(), logprob.data(),
                     sampling_logprob.data(), entropy.data()},
                    threads);
        gather_logprobs({logits.data(), Float::k32, kRows, kVocab, token.data(), gathered.data()}, threads);
        add(results, token);
        for (const auto* values : {&logprob, &sampling_logprob, &entropy, &gathered}) add(results, *values);
    }
}

void products(Results& results, int threads) {
    constexpr int64_t kRows = 7, kInputs = 160, kOutputs = 530;  // no whole blocks, and enough to wake threads
    std::mt19937 random(3);
    const std::vector<float> x = noise(random, kRows * kInputs), weight = noise(random, kOutputs * kInputs),
                             bias = noise(random, kOutputs);
    for (int64_t rows = 1; rows <= kRows; ++rows) {
        std::vector<float> out(rows * kOutputs);
        skinny_product({x.data(), weight.data(), bias.data(), out.data(), rows, kInputs, kOutputs}, threads);
        add(results, out);
    }
}

Results all(int threads) {
    Results results;
    attention(results, threads);
    sampling(results, threads);
    products(results, threads);
    return results;
}

void philox_is_the_published_one() {  // the known answers of Random123
    EXPECT((philox4x32(0, {0, 0, 0, 0}) == Counter{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
    EXPECT((philox4x32(~uint64_t{0}, {~0u, ~0u, ~0u, ~0u}) == Counter{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
    EXPECT((philox4x32(0x299f31d0a4093822, {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}) ==
            Counter{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

void wrong_integers_are_refused() {
    int refused = 0, tried = 0;
    for (const int32_t wrong : {-1, -9, INT32_MIN, INT32_MAX, 1 << 20}) {
        for (const auto table : {&Tree::trunk_slots, &Tree::trunk_len, &Tree::branch_slots, &Tree::branch_len,
                                 &Tree::group_indptr, &Tree::query_indptr}) {
            Tree tree;
            for (size_t i = 0; i < (tree.*table).size(); ++i) {
                const bool unread = (table == &Tree::trunk_slots && i >= 70 && (i < 140 || i >= 204)) ||
                                    (table == &Tree::branch_slots && static_cast<int>(i % 5) >= tree.branch_len[i / 5]);
                if (unread) continue;
                const int32_t right = std::exchange((tree.*table)[i], wrong);
                refused += refuses([&] { tree_attention(tree.call(), 1); });
                ++tried;
                (tree.*table)[i] = right;
            }
        }
    }
    EXPECT(refused == tried && tried > 500);
}

void products_that_do_not_fit_are_refused() {
    std::vector<float> x(64), weight(320), out(20);
    EXPECT(refuses([&] { skinny_product({x.data(), weight.data(), nullptr, x.data() + 5, 2, 32, 10}, 1); }));
    EXPECT(refuses([&] { skinny_product({x.data(), weight.data(), nullptr, nullptr, 2, 32, 10}, 1); }));
    EXPECT(refuses([&] { skinny_product({x.data(), weight.data(), nullptr, out.data(), 2, 20, 10}, 1); }));
    EXPECT(!refuses([&] { skinny_product({x.data(), weight.data(), nullptr, out.data(), 2, 32, 10}, 1); }));
}

void a_body_may_throw() {
    for (const int threads : {1, 3}) {
        EXPECT(refuses([&] {
            parallel_for(50, 1e9, threads, [](int64_t i) {
                if (i % 7 == 3) throw std::runtime_error("of the body");
            });
        }));
    }
}

void callers_do_not_disturb_one_another(const Results& expected, int rounds) {
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 4; ++caller) {
        callers.emplace_back([&] {
            for (int round = 0; round < rounds; ++round) EXPECT(all(3) == expected);
        });
    }
    for (std::thread& caller : callers) caller.join();
}

#ifndef __SANITIZE_THREAD__  // which does not follow a fork of several threads
void a_fork_has_threads_of_its_own(const Results& expected) {
    const pid_t child = fork();
    if (child == 0) _exit(all(3) == expected ? 0 : 1);
    int status = 0;
    EXPECT(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}
#endif

}  // namespace

int main(int count, char** arguments) {
    const int rounds = count > 1 ? std::atoi(arguments[1]) : 10;
    philox_is_the_published_one();
    wrong_integers_are_refused();
    products_that_do_not_fit_are_refused();
    a_body_may_throw();
    const Results results = all(1);
#ifndef __SANITIZE_THREAD__
    a_fork_has_threads_of_its_own(results);
#endif
    callers_do_not_disturb_one_another(results, rounds);
    if (count <= 2) {
        for (const double x : results) std::printf("%.9g\n", x);
        return 0;
    }
    std::ifstream file(arguments[2]);
    double other = 0, worst = 0;
    for (const double x : results) {
        EXPECT(file >> other);
        worst = std::max(worst, std::abs(x - other) / std::max(1.0, std::abs(x)));
    }
    std::printf("%zu results, at most %.2g from those of %s\n", results.size(), worst, arguments[2]);
    EXPECT(worst < 1e-5);
}
