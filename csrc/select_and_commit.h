// Acceptance and commit on the CPU; the contract is that of stars_fast/ops/select_and_commit.py.
#pragma once

#include <cstdint>

namespace stars_fast {

enum Winner : int32_t { kNone = -1, kEarlier = -2, kInvalid = -3 };

struct SelectAndCommit {
    int64_t rows, groups, branch_capacity, trunk_capacity;  // B, G, S, P
    const float* reward;                                    // [B]
    const int32_t* length;                                  // [B]
    const bool* ended;                                      // [B]
    const int32_t* group_indptr;                            // [G + 1]
    const int64_t* keys;                                    // [G]
    const int32_t* segment;                                 // [G]
    int32_t* attempts;                                      // [G]
    const int32_t *committed, *max_new_tokens, *max_attempts;  // [G]
    const double *base, *target, *beta;                        // [G]
    bool finished_at_target;
    float* best_reward;                // [G]
    int32_t *best_attempt;             // [G]
    int32_t* best_slots;               // [G, S]
    int32_t* best_len;                 // [G]
    int32_t* trunk_slots;              // [G, P]
    int32_t* trunk_len;                // [G]
    const int32_t* branch_slots;       // [B, S]
    int32_t* branch_len;               // [B]
    const int32_t* keep;               // [B]
    int32_t* winner;                   // [G]
    bool* accepted;                    // [G]
    float* threshold;                  // [B]
};

void select_and_commit(const SelectAndCommit& call);

}  // namespace stars_fast
