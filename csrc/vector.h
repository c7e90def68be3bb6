// Vectors of as many floats as an instruction set's registers hold, through the compilers' vector extensions.
//
// Everything here is inlined into functions that are compiled for one instruction set each (see tree_attention.cpp), so
// no vector is ever passed in a call.
#pragma once

#include "row_math.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // how vectors would be passed
#endif

namespace stars_fast {

struct Half {
    uint16_t bits;
};
struct Bf16 {
    uint16_t bits;
};

STARS_FAST_INLINE void round_to(float x, float& to) { to = x; }
STARS_FAST_INLINE void round_to(float x, Bf16& to) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    to.bits = static_cast<uint16_t>(x == x ? (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16 : 0x7FC0u);
}
STARS_FAST_INLINE void round_to(float x, Half& to) {
    const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7FFFFFFFu;
    // Below 2^-14 halves have one spacing, which is that of floats about 0.5.
    const uint32_t small = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
    const uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1)) >> 13;
    const uint32_t large = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
    const uint32_t rounded = magnitude < 0x38800000u ? small : magnitude < 0x47800000u ? normal : large;
    to.bits = static_cast<uint16_t>(rounded | (bits >> 16 & 0x8000u));
}

constexpr int64_t kWidest = 16;

// How many floats this processor's registers hold, as far as there are functions compiled for them.
inline int floats_of_registers() {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 4;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx512 ? 16 : 8;
#else
    return 4;
#endif
}

template <int kWidth>
struct VectorTypes;

#define STARS_FAST_VECTOR_TYPES(width)                                       \
    template <>                                                              \
    struct VectorTypes<width> {                                              \
        typedef float Floats __attribute__((vector_size(width * 4)));        \
        typedef int32_t Integers __attribute__((vector_size(width * 4)));    \
        typedef uint32_t Words __attribute__((vector_size(width * 4)));      \
        typedef uint16_t HalfWords __attribute__((vector_size(width * 2)));  \
    };
STARS_FAST_VECTOR_TYPES(4)
STARS_FAST_VECTOR_TYPES(8)
STARS_FAST_VECTOR_TYPES(16)
#undef STARS_FAST_VECTOR_TYPES

template <int kWidth>
struct Vector {
    using Floats = typename VectorTypes<kWidth>::Floats;
    using Integers = typename VectorTypes<kWidth>::Integers;
    using Words = typename VectorTypes<kWidth>::Words;
    using HalfWords = typename VectorTypes<kWidth>::HalfWords;

    STARS_FAST_INLINE static void load(const float* from, Floats& to) { std::memcpy(&to, from, sizeof(to)); }
    STARS_FAST_INLINE static void load(const Bf16* from, Floats& to) {
        const Words words = load_bits(from) << 16;
        std::memcpy(&to, &words, sizeof(to));
    }
    STARS_FAST_INLINE static void load(const Half* from, Floats& to) {  // as from_half in row_math.h
        const Words bits = load_bits(from);
        Words magnitude = (bits & 0x7FFFu) << 13;
        const Words special = magnitude >= 0x0F800000u ? Words{} + 0x7F800000u : Words{};
        Floats scaled;
        std::memcpy(&scaled, &magnitude, sizeof(scaled));
        scaled *= 0x1p112f;
        std::memcpy(&magnitude, &scaled, sizeof(scaled));
        magnitude |= special | (bits & 0x8000u) << 16;
        std::memcpy(&to, &magnitude, sizeof(to));
    }
    // The first `count` elements, and zeros.
    template <class Element>
    STARS_FAST_INLINE static void load_some(const Element* from, int64_t count, Floats& to) {
        Element padded[kWidth] = {};
        for (int64_t i = 0; i < count; ++i) padded[i] = from[i];
        load(padded, to);
    }
    STARS_FAST_INLINE static void store(const Floats& from, float* to) { std::memcpy(to, &from, sizeof(from)); }

    STARS_FAST_INLINE static float sum(const Floats& x) {
        float total = x[0];
        for (int lane = 1; lane < kWidth; ++lane) total += x[lane];
        return total;
    }
    STARS_FAST_INLINE static float max(const Floats& x) {
        float top = x[0];
        for (int lane = 1; lane < kWidth; ++lane) top = x[lane] > top ? x[lane] : top;
        return top;
    }
    STARS_FAST_INLINE static bool any(const Integers& x) {
        int32_t all = 0;
        for (int lane = 0; lane < kWidth; ++lane) all |= x[lane];
        return all != 0;
    }

    // exp(x) for x <= 0, as exp_nonpositive in row_math.h.
    STARS_FAST_INLINE static void exp_nonpositive(Floats& x) {
        const Floats clamped = x > -87.0f ? x : Floats{} - 87.0f;
        const Floats n = (clamped * 1.44269504f + 12582912.0f) - 12582912.0f;
        const Floats r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
        Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
        p = p * r + 8.3334519073e-3f;
        p = p * r + 4.1665795894e-2f;
        p = p * r + 1.6666665459e-1f;
        p = p * r + 5.0000001201e-1f;
        p = p * r * r + r + 1.0f;
        const Integers bits = (__builtin_convertvector(n, Integers) + 127) << 23;
        Floats scale;
        std::memcpy(&scale, &bits, sizeof(scale));
        x = x >= -87.0f ? p * scale : Floats{};
    }

private:
    template <class Element>
    STARS_FAST_INLINE static Words load_bits(const Element* from) {
        HalfWords bits;
        std::memcpy(&bits, from, sizeof(bits));
        return __builtin_convertvector(bits, Words);
    }
};

// Sums of kWidth vectors at once: lane i of `to` is the sum over x[i]. All are added up in the same order.
#define STARS_FAST_ADD_HALVES(a, b, low, high) \
    (__builtin_shufflevector(a, b, STARS_FAST_LANES low) + __builtin_shufflevector(a, b, STARS_FAST_LANES high))
#define STARS_FAST_LANES(...) __VA_ARGS__

STARS_FAST_INLINE void sums_of(const Vector<4>::Floats* x, Vector<4>::Floats& to) {
    const auto ab = STARS_FAST_ADD_HALVES(x[0], x[1], (0, 4, 1, 5), (2, 6, 3, 7));
    const auto cd = STARS_FAST_ADD_HALVES(x[2], x[3], (0, 4, 1, 5), (2, 6, 3, 7));
    to = STARS_FAST_ADD_HALVES(ab, cd, (0, 1, 4, 5), (2, 3, 6, 7));
}

STARS_FAST_INLINE void sums_of(const Vector<8>::Floats* x, Vector<8>::Floats& to) {
    Vector<8>::Floats quarters[2];  // four partial sums in each half
    for (int i = 0; i < 2; ++i, x += 4) {
        const auto ab = STARS_FAST_ADD_HALVES(x[0], x[1], (0, 8, 1, 9, 4, 12, 5, 13), (2, 10, 3, 11, 6, 14, 7, 15));
        const auto cd = STARS_FAST_ADD_HALVES(x[2], x[3], (0, 8, 1, 9, 4, 12, 5, 13), (2, 10, 3, 11, 6, 14, 7, 15));
        quarters[i] = STARS_FAST_ADD_HALVES(ab, cd, (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15));
    }
    to = STARS_FAST_ADD_HALVES(quarters[0], quarters[1], (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15));
}

STARS_FAST_INLINE void sums_of(const Vector<16>::Floats* x, Vector<16>::Floats& to) {
    Vector<16>::Floats quarters[4];  // four partial sums in each quarter
    for (int i = 0; i < 4; ++i, x += 4) {
        const auto ab =
            STARS_FAST_ADD_HALVES(x[0], x[1], (0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29),
                                  (2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31));
        const auto cd =
            STARS_FAST_ADD_HALVES(x[2], x[3], (0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29),
                                  (2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31));
        quarters[i] = STARS_FAST_ADD_HALVES(ab, cd, (0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
                                            (2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31));
    }
    Vector<16>::Floats halves[2];
    for (int i = 0; i < 2; ++i) {
        halves[i] = STARS_FAST_ADD_HALVES(quarters[2 * i], quarters[2 * i + 1],
                                          (0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
                                          (8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31));
    }
    to = STARS_FAST_ADD_HALVES(halves[0], halves[1], (0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27),
                               (4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31));
}
#undef STARS_FAST_ADD_HALVES
#undef STARS_FAST_LANES

}  // namespace stars_fast
