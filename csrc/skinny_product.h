#pragma once

#include <cstdint>

namespace stars_fast {

// A product with one weight, as in stars_fast/ops/skinny_product.py, whose docstring is the specification. In float32.
struct SkinnyProduct {
    const float* x;       // [R, I]
    const float* weight;  // [O, I]
    const float* bias;    // [O] or null
    float* out;           // [R, O]
    int64_t rows, inputs, outputs;  // inputs: whole vectors, so a multiple of 16
};

void skinny_product(const SkinnyProduct& call, int threads);

// Throws std::invalid_argument for what would reach memory that is not the caller's.
void check(const SkinnyProduct& call);

}  // namespace stars_fast
