// One random number for a key and a counter: Philox 4x64 with ten rounds.
//
// John K. Salmon, Mark A. Moraes, Ron O. Dror, David E. Shaw: Parallel random numbers: as easy as 1, 2, 3. SC 2011,
// doi:10.1145/2063384.2063405.
#pragma once

#include <cstdint>

namespace quantlab::engine {

// The upper half of a product.
constexpr std::uint64_t multiply_high(std::uint64_t a, std::uint64_t b) {
    constexpr std::uint64_t low = 0xffffffffu;
    const std::uint64_t cross = (a >> 32) * (b & low) + ((a & low) * (b & low) >> 32);
    const std::uint64_t carry = (a & low) * (b >> 32) + (cross & low);
    return (a >> 32) * (b >> 32) + (cross >> 32) + (carry >> 32);
}

// The first of the four words that numpy.random.Philox(key=key, counter=counter) gives: numpy steps the counter before
// it makes a block.
constexpr std::uint64_t random_word(std::uint64_t key, std::uint64_t counter) {
    std::uint64_t x0 = counter + 1, x1 = x0 == 0 ? 1 : 0, x2 = 0, x3 = 0;
    std::uint64_t k0 = key, k1 = 0;
    for (int round = 0; round < 10; ++round) {
        constexpr std::uint64_t m0 = 0xd2e7470ee14c6c93u, m1 = 0xca5a826395121157u;
        const std::uint64_t high0 = multiply_high(m0, x0), low0 = m0 * x0;
        const std::uint64_t high1 = multiply_high(m1, x2), low1 = m1 * x2;
        x0 = high1 ^ x1 ^ k0;
        x1 = low1;
        x2 = high0 ^ x3 ^ k1;
        x3 = low0;
        k0 += 0x9e3779b97f4a7c15u;
        k1 += 0xbb67ae8584caa73bu;
    }
    return x0;
}

}  // namespace quantlab::engine
