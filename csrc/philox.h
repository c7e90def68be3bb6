// Philox4x32-10 (Salmon et al., SC 2011); the same integers as stars_fast/ops/philox.py.
#pragma once

#include <array>
#include <cstdint>

namespace stars_fast {

enum class Stream : uint32_t { kTile = 0, kToken = 1, kAccept = 2 };  // of those in stars_fast/ops/philox.py

using Counter = std::array<uint32_t, 4>;

// Inlined into every clone of a kernel, so that blocks of numbers are drawn side by side in vector registers.
__attribute__((always_inline)) inline Counter philox4x32(uint64_t key, Counter c) {
    uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = uint64_t{0xD2511F53} * c[0], product1 = uint64_t{0xCD9E8D57} * c[2];
        c = {static_cast<uint32_t>(product1 >> 32) ^ c[1] ^ key0, static_cast<uint32_t>(product1),
             static_cast<uint32_t>(product0 >> 32) ^ c[3] ^ key1, static_cast<uint32_t>(product0)};
        key0 += 0x9E3779B9;
        key1 += 0xBB67AE85;
    }
    return c;
}

// Who draws, and for what: key and first three counter words.
struct Draw {
    uint64_t key;
    uint32_t segment, attempt, position;

    // Word i % 4 of block i / 4 belongs to index i.
    __attribute__((always_inline)) Counter block(Stream stream, uint32_t index) const {
        return philox4x32(key, {segment, attempt, position, (static_cast<uint32_t>(stream) << 28) | index});
    }
};

inline double acceptance_uniform(uint64_t key, uint32_t segment, uint32_t attempt) {
    return (Draw{key, segment, attempt, 0}.block(Stream::kAccept, 0)[0] + 0.5) * 0x1p-32;
}

}  // namespace stars_fast
