// What the programs in this folder share: a check that stays when assertions are compiled out, and refusals.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#define EXPECT(condition)                                                                \
    do {                                                                                 \
        if (!(condition)) {                                                              \
            std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            std::abort();                                                                \
        }                                                                                \
    } while (false)

// Whether `call` throws what the Python module turns into an exception.
template <class Call>
bool refuses(const Call& call) {
    try {
        call();
    } catch (const std::exception&) {
        return true;
    }
    return false;
}
