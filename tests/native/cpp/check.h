// What the test programs share: failing loudly, numbers that look random, and equality of bits.
#pragma once

#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

// Ends the program, naming the place.
#define CHECK(condition)                                                              \
    do {                                                                              \
        if (!(condition)) {                                                           \
            std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
            std::abort();                                                             \
        }                                                                             \
    } while (false)

// Sebastiano Vigna's splitmix64: the same numbers on every machine.
class Random {
public:
    explicit Random(std::uint64_t seed) : state_(seed) {}

    std::uint64_t bits() {
        std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }

    // From 0 to count - 1.
    int below(int count) { return static_cast<int>(bits() % static_cast<std::uint64_t>(count)); }

    // From -1 to 1.
    float real() { return static_cast<float>(static_cast<double>(bits() >> 11) * 0x1p-52 - 1.0); }

private:
    std::uint64_t state_;
};

inline bool same_bits(float a, float b) {
    return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b) || (a != a && b != b);
}

void test_blocks();
void test_branches();
void test_branches_of_threads();
void test_decoder();
void test_decoders_side_by_side();
void test_lanes();
void test_matmul();
void test_sampler();
void test_ternary();
void test_thread_pool();
void test_updates();
