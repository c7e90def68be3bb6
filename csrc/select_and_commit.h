// Acceptance on the CPU; the contract is that of stars_fast/ops/select_and_commit.py.
#pragma once

#include <cstdint>

namespace stars_fast {

enum Winner : int32_t { kNone = -1, kEarlier = -2, kInvalid = -3 };
enum Finish : int32_t { kGoesOn = 0, kStop = 1, kLength = 2 };

struct SelectAndCommit {
    int64_t rows, groups;         // B, G
    const float* reward;          // [B]
    const int32_t* length;        // [B]
    const bool* ended;            // [B]
    const int32_t* group_indptr;  // [G + 1]
    const int64_t* keys;          // [G], as all that follow but threshold
    const int32_t* segment;
    int32_t* attempts;
    const int32_t *committed, *max_new_tokens, *max_attempts;
    const double *base, *target, *beta;
    const bool* ramp;
    float* best_reward;
    int32_t *best_attempt, *best_length;
    bool* best_ended;
    int32_t* winner;
    bool* accepted;
    float* threshold;  // [B]
    int32_t* finish;
};

void select_and_commit(const SelectAndCommit& call);
void check(const SelectAndCommit& call);  // reads group_indptr only; throws std::invalid_argument

}  // namespace stars_fast
