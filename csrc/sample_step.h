// One sampling step on the CPU; the contract is that of stars_fast/ops/sample_step.py.
#pragma once

#include <cstdint>

#include "row_math.h"

namespace stars_fast {

// Pointers to B entries each, unless noted.
struct SampleStep {
    const void* logits;  // [B, V]
    Float type;
    int64_t rows, vocab;
    const int64_t* keys;
    const int32_t *segment, *attempt;
    int32_t* position;
    bool* alive;
    const int32_t* limit;
    const float* temperature;
    const int32_t* top_k;
    const float *top_p, *min_p, *repetition_penalty;
    bool* seen;  // [B, V] or null
    const int64_t* eos;  // [B, E]
    int64_t eos_count;   // E
    int64_t* token;
    float *logprob, *sampling_logprob, *entropy;
};

void sample_step(const SampleStep& step, int threads);

// log-softmax of logits [rows, vocab] at one token per row; NaN for a row that has no softmax.
struct GatherLogprobs {
    const void* logits;
    Float type;
    int64_t rows, vocab;
    const int64_t* tokens;
    float* out;
};

void gather_logprobs(const GatherLogprobs& gather, int threads);

// Throw std::invalid_argument. They read `tokens` only.
void check(const SampleStep& step);
void check(const GatherLogprobs& gather);

}  // namespace stars_fast
