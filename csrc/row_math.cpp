#include "row_math.h"

#include <algorithm>

namespace stars_fast {

namespace {

template <class Combine>
STARS_FAST_INLINE float reduce(const float* lanes, Combine combine) {
    float total = lanes[0];
    for (int lane = 1; lane < kLanes; ++lane) total = combine(total, lanes[lane]);
    return total;
}

}  // namespace

STARS_FAST_CLONES float tile_max(const float* x, bool* bad) {
    float top[kLanes];
    int32_t wrong[kLanes] = {};
    std::fill_n(top, kLanes, -HUGE_VALF);
    for (int64_t i = 0; i < kTile; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
            const float value = x[i + lane];
            top[lane] = value > top[lane] ? value : top[lane];
            wrong[lane] |= value <= FLT_MAX ? 0 : 1;
        }
    }
    int32_t any = 0;
    for (int lane = 0; lane < kLanes; ++lane) any |= wrong[lane];
    *bad = any != 0;
    return reduce(top, [](float a, float b) { return a > b ? a : b; });
}

STARS_FAST_CLONES TileSums tile_sums(const float* x) {
    TileSums sums{-HUGE_VALF, 0, 0, false};
    sums.max = tile_max(x, &sums.bad);
    if (sums.bad || sums.max == -HUGE_VALF) return sums;
    float sum[kLanes] = {}, weighted[kLanes] = {};
    for (int64_t i = 0; i < kTile; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
            const float difference = x[i + lane] - sums.max;
            const float finite = difference > -FLT_MAX ? difference : -FLT_MAX;  // 0 * -inf would be NaN
            const float weight = exp_nonpositive(finite);
            sum[lane] += weight;
            weighted[lane] += weight * finite;
        }
    }
    const auto add = [](float a, float b) { return a + b; };
    sums.sum = reduce(sum, add);
    sums.weighted = reduce(weighted, add);
    return sums;
}

STARS_FAST_CLONES void load_tile(const void* logits, Float type, int64_t first, int64_t count, float* out) {
    if (type == Float::k32) {
        std::memcpy(out, static_cast<const float*>(logits) + first, count * sizeof(float));
    } else {
        const uint16_t* bits = static_cast<const uint16_t*>(logits) + first;
        if (type == Float::k16) {
            for (int64_t i = 0; i < count; ++i) out[i] = from_half(bits[i]);
        } else {
            for (int64_t i = 0; i < count; ++i) out[i] = from_bf16(bits[i]);
        }
    }
    std::fill(out + count, out + kTile, -HUGE_VALF);
}

}  // namespace stars_fast
