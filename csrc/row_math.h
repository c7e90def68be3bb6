// Exponentials, logarithms and sums over rows of logits, written so that compilers vectorise them.
//
// Functions marked STARS_FAST_CLONES are compiled for several instruction sets and chosen at run time. As nothing is
// contracted to fused multiply-adds (-ffp-contract=off) and sums have a fixed number of lanes, all of them round alike.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(STARS_FAST_CLONES)  // set to nothing for ThreadSanitizer, which the choice of a clone at loading breaks
#elif defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__)
#define STARS_FAST_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define STARS_FAST_CLONES
#endif
#define STARS_FAST_INLINE __attribute__((always_inline)) inline

namespace stars_fast {

constexpr int64_t kTile = 1024;  // token ids drawn together; part of the specification of the draw
constexpr int kLanes = 16;

enum class Float : int { k32 = 0, k16 = 1, kBf16 = 2 };  // as in stars_fast/ops/_library.py

template <class To, class From>
STARS_FAST_INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

STARS_FAST_INLINE float from_bf16(uint16_t bits) { return bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

STARS_FAST_INLINE float from_half(uint16_t bits) {
    const uint32_t magnitude = (bits & 0x7FFFu) << 13;
    // Scaling by 2^112 moves the exponent's bias, subnormals included; infinities and NaNs keep all exponent bits.
    const float scaled = bit_cast<float>(magnitude) * 0x1p112f;
    const uint32_t special = magnitude >= 0x0F800000u ? 0x7F800000u : 0u;
    return bit_cast<float>(bit_cast<uint32_t>(scaled) | special | (bits & 0x8000u) << 16);
}

// exp(x) for x <= 0, relative error 1e-7; 0 below -87. (Cephes' polynomial.)
STARS_FAST_INLINE float exp_nonpositive(float x) {
    const float clamped = x > -87.0f ? x : -87.0f;
    const float n = (clamped * 1.44269504f + 12582912.0f) - 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
    const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const float scale = bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
    return x >= -87.0f ? p * scale : 0.0f;
}

// log(x) for normal x > 0, error about 1 ulp. (Cephes' polynomial.)
STARS_FAST_INLINE float log_positive(float x) {
    const int32_t bits = bit_cast<int32_t>(x);
    // 1 for a mantissa at or above sqrt(2). A comparison would keep GCC from vectorising.
    const int32_t above = ((bits & 0x007FFFFF) + (0x00800000 - 0x003504F3)) >> 23;
    const float exponent = static_cast<float>(((bits >> 23) - 127) + above);
    const float m = bit_cast<float>((bits & 0x007FFFFF) | ((127 - above) << 23)) - 1.0f;
    const float z = m * m;
    float p = 7.0376836292e-2f;
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    p = p * m * z - exponent * 2.12194440e-4f - 0.5f * z;
    return (m + p) + exponent * 0.693359375f;
}

// Standard Gumbel noise from 32 random bits, with full resolution where it is large: -log(-log1p(-v)).
STARS_FAST_INLINE float gumbel(uint32_t bits) {
    // In halves, because few instruction sets convert unsigned integers; the sum rounds once, as the conversion would.
    const float high = static_cast<float>(static_cast<int32_t>(bits >> 16)) * 65536.0f;
    const float x = high + static_cast<float>(static_cast<int32_t>(bits & 0xFFFF));
    const float sum = x * 0x1p-32f + 0x1p-33f;
    const float v = sum - static_cast<float>(static_cast<int32_t>(sum)) * 0x1p-24f;  // 1 becomes the float below it
    const float u = 1.0f - v;
    const float log1p = log_positive(u) - ((u - 1.0f) + v) / u;  // the second term is what rounding took from u
    return -log_positive(-log1p);
}

// Sums over one tile of a row. `bad` is set if an element is NaN or +inf.
struct TileSums {
    float max;
    float sum;       // of exp(x - max)
    float weighted;  // of exp(x - max) * (x - max)
    bool bad;
};

// Every tile function takes whole tiles: the last one of a row is padded with -inf.
TileSums tile_sums(const float* x);
float tile_max(const float* x, bool* bad);
void load_tile(const void* logits, Float type, int64_t first, int64_t count, float* out);

// Log-probabilities, entropy and validity of a row from its tiles.
struct RowSums {
    double max = -HUGE_VAL, sum = 0, weighted = 0;
    bool bad = false;

    void add(const TileSums& tile) {
        bad |= tile.bad;
        if (tile.max == -HUGE_VALF) return;
        const double top = tile.max > max ? tile.max : max;
        rescale(top);
        const double factor = std::exp(tile.max - top), shift = tile.max - top;
        sum += factor * tile.sum;
        weighted += factor * (tile.weighted + shift * tile.sum);
    }
    bool valid() const { return !bad && max > -HUGE_VAL; }
    // In this order: with logits far from 0 the sum max + log(sum) would round log(sum) away.
    float logprob(float x) const { return static_cast<float>((x - max) - std::log(sum)); }
    double entropy() const { return std::log(sum) - weighted / sum; }

private:
    void rescale(double top) {
        if (sum > 0) {
            const double factor = std::exp(max - top), shift = max - top;
            weighted = factor * (weighted + shift * sum);
            sum *= factor;
        }
        max = top;
    }
};

}  // namespace stars_fast
