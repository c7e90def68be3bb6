#include "select_and_commit.h"

#include <algorithm>
#include <cmath>

#include "checks.h"
#include "philox.h"

namespace stars_fast {

namespace {

double threshold_of(const SelectAndCommit& call, int64_t g, int64_t b) {
    const double base = call.base[g], target = call.target[g];
    if (std::isinf(target) || (call.ended[b] && !call.ramp[g])) return target;
    const double n = static_cast<double>(int64_t{call.committed[g]} + call.length[b]);
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

// The group's winner; keeps the books of attempts and of the best so far.
int32_t look(const SelectAndCommit& call, int64_t g) {
    const int32_t first = call.group_indptr[g];
    const int64_t left = std::max<int64_t>(0, int64_t{call.max_attempts[g]} - call.attempts[g]);
    const int64_t count = std::min<int64_t>(call.group_indptr[g + 1] - first, left);
    int32_t best_row = -1;
    for (int32_t row = first; row < first + count; ++row) {
        const int32_t attempt = call.attempts[g]++;
        const float reward = call.reward[row];
        if (std::isnan(reward) || reward == HUGE_VALF) return kInvalid;
        if (call.best_attempt[g] < 0 || reward > call.best_reward[g]) {
            best_row = row;
            call.best_reward[g] = reward;
            call.best_attempt[g] = attempt;
            call.best_length[g] = call.length[row];
            call.best_ended[g] = call.ended[row];
        }
        if (accepts(call, g, attempt, reward, threshold_of(call, g, row))) {
            call.accepted[g] = true;
            return row;
        }
    }
    if (count == 0 || count < left) return kNone;
    return best_row >= 0 ? best_row : kEarlier;
}

Finish finish_of(const SelectAndCommit& call, int64_t g, int32_t winner) {
    if (winner == kNone || winner == kInvalid) return kGoesOn;
    const bool earlier = winner == kEarlier;
    if (earlier ? call.best_ended[g] : call.ended[winner]) return kStop;
    const int32_t length = earlier ? call.best_length[g] : call.length[winner];
    return int64_t{call.committed[g]} + length >= call.max_new_tokens[g] ? kLength : kGoesOn;
}

}  // namespace

void check(const SelectAndCommit& call) {
    const int64_t rows = call.rows, groups = call.groups;
    check_sizes({rows, groups});
    check_memory({{"attempts", call.attempts, bytes_of({groups, 4})},
                  {"best_reward", call.best_reward, bytes_of({groups, 4})},
                  {"best_attempt", call.best_attempt, bytes_of({groups, 4})},
                  {"best_length", call.best_length, bytes_of({groups, 4})},
                  {"best_ended", call.best_ended, groups},
                  {"reward", call.reward, bytes_of({rows, 4})},
                  {"length", call.length, bytes_of({rows, 4})},
                  {"ended", call.ended, rows},
                  {"group_indptr", call.group_indptr, bytes_of({groups + 1, 4})},
                  {"keys", call.keys, bytes_of({groups, 8})},
                  {"segment", call.segment, bytes_of({groups, 4})},
                  {"committed", call.committed, bytes_of({groups, 4})},
                  {"max_new_tokens", call.max_new_tokens, bytes_of({groups, 4})},
                  {"max_attempts", call.max_attempts, bytes_of({groups, 4})},
                  {"base", call.base, bytes_of({groups, 8})},
                  {"target", call.target, bytes_of({groups, 8})},
                  {"beta", call.beta, bytes_of({groups, 8})},
                  {"ramp", call.ramp, groups}},
                 5);
    check_offsets("group_indptr", call.group_indptr, groups, rows);
}

void select_and_commit(const SelectAndCommit& call) {
    check(call);
    for (int64_t g = 0; g < call.groups; ++g) {
        call.accepted[g] = false;
        const int32_t winner = look(call, g);
        call.winner[g] = winner;
        call.finish[g] = finish_of(call, g, winner);
        for (int32_t row = call.group_indptr[g]; row < call.group_indptr[g + 1]; ++row) {
            call.threshold[row] = static_cast<float>(threshold_of(call, g, row));
        }
    }
    std::fill(call.threshold + call.group_indptr[call.groups], call.threshold + call.rows, 0.0f);
}

}  // namespace stars_fast
