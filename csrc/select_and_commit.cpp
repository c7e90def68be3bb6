#include "select_and_commit.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "philox.h"

namespace stars_fast {

namespace {

// What becomes of a group; decided for all groups before anything is written.
struct Decision {
    int32_t winner = kNone;
    bool accepted = false;
    int32_t looked = 0;
    int32_t best_row = -1;  // row that replaces the best so far
};

double threshold_of(const SelectAndCommit& call, int64_t g, int64_t b) {
    const double base = call.base[g], target = call.target[g];
    if (std::isinf(target) || (call.finished_at_target && call.ended[b])) return target;
    const double n = static_cast<double>(call.committed[g] + call.length[b]);
    return std::min(base + (target - base) * n / call.max_new_tokens[g], target);
}

bool accepts(const SelectAndCommit& call, int64_t g, int32_t attempt, double reward, double threshold) {
    if (reward >= threshold) return true;
    if (std::isinf(reward)) return false;
    const double uniform =
        acceptance_uniform(static_cast<uint64_t>(call.keys[g]), static_cast<uint32_t>(call.segment[g]),
                           static_cast<uint32_t>(attempt));
    return uniform < std::exp(std::min(0.0, (reward - threshold) / call.beta[g]));
}

Decision decide(const SelectAndCommit& call, int64_t g) {
    Decision decision;
    const int32_t first = call.group_indptr[g];
    const int32_t left = std::max(0, call.max_attempts[g] - call.attempts[g]);
    const int32_t count = std::min(call.group_indptr[g + 1] - first, left);
    float best = call.best_reward[g];
    bool any = call.best_attempt[g] >= 0;
    for (int32_t i = 0; i < count; ++i) {
        const int32_t row = first + i;
        const float reward = call.reward[row];
        ++decision.looked;
        if (std::isnan(reward) || reward == HUGE_VALF) {
            decision.winner = kInvalid;
            return decision;
        }
        if (!any || reward > best) {
            best = reward;
            any = true;
            decision.best_row = row;
        }
        if (accepts(call, g, call.attempts[g] + i, reward, threshold_of(call, g, row))) {
            decision.winner = row;
            decision.accepted = true;
            return decision;
        }
    }
    if (count > 0 && count == left) decision.winner = decision.best_row >= 0 ? decision.best_row : kEarlier;
    return decision;
}

int32_t committed_slots(const SelectAndCommit& call, int64_t g, const Decision& decision) {
    if (decision.winner == kEarlier) return call.best_len[g];
    return decision.winner >= 0 ? call.keep[decision.winner] : 0;
}

void write(const SelectAndCommit& call, int64_t g, const Decision& decision) {
    int32_t* best_slots = call.best_slots + g * call.branch_capacity;
    if (decision.best_row >= 0) {
        const int32_t row = decision.best_row;
        call.best_reward[g] = call.reward[row];
        call.best_attempt[g] = call.attempts[g] + row - call.group_indptr[g];
        call.best_len[g] = call.keep[row];
        std::copy_n(call.branch_slots + row * call.branch_capacity, call.keep[row], best_slots);
    }
    const int32_t* source = decision.winner >= 0 ? call.branch_slots + decision.winner * call.branch_capacity : best_slots;
    const int32_t count = committed_slots(call, g, decision);
    std::copy_n(source, count, call.trunk_slots + g * call.trunk_capacity + call.trunk_len[g]);
    call.trunk_len[g] += count;
    call.attempts[g] += decision.looked;
    call.winner[g] = decision.winner;
    call.accepted[g] = decision.accepted;
    for (int32_t row = call.group_indptr[g]; row < call.group_indptr[g + 1]; ++row) {
        call.threshold[row] = static_cast<float>(threshold_of(call, g, row));
        call.branch_len[row] = 0;
    }
}

}  // namespace

void select_and_commit(const SelectAndCommit& call) {
    std::vector<Decision> decisions(call.groups);
    for (int64_t g = 0; g < call.groups; ++g) {
        decisions[g] = decide(call, g);
        const int64_t needed = int64_t{call.trunk_len[g]} + committed_slots(call, g, decisions[g]);
        if (needed > call.trunk_capacity) {
            throw std::invalid_argument("trunk_slots holds " + std::to_string(call.trunk_capacity) +
                                        " slots, but group " + std::to_string(g) + " would need " +
                                        std::to_string(needed) + " after the commit");
        }
    }
    for (int64_t g = 0; g < call.groups; ++g) write(call, g, decisions[g]);
}

}  // namespace stars_fast
