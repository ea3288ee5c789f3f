// Codes of 4 and 5 bits, a byte each, to and from the bits of a block (blocks.h), in loops that compilers vectorize.
#pragma once

#include <cstdint>
#include <cstring>

namespace quantlab {

inline void pack_nibbles(const std::uint8_t* codes, std::uint8_t* nibbles) {
    for (std::int32_t j = 0; j < 16; ++j) {
        nibbles[j] = static_cast<std::uint8_t>((codes[j] & 0x0f) | (codes[j + 16] << 4));
    }
}

inline void unpack_nibbles(const std::uint8_t* nibbles, std::uint8_t* codes) {
    for (std::int32_t j = 0; j < 16; ++j) {
        codes[j] = nibbles[j] & 0x0f;
        codes[j + 16] = nibbles[j] >> 4;
    }
}

// Eight codes at a time as the bytes of one number: the product moves the lowest bit of byte j to bit 56 + j.
inline void pack_high_bits(const std::uint8_t* codes, std::uint8_t* high_bits) {
    for (std::int32_t byte = 0; byte < 4; ++byte) {
        std::uint64_t eight;
        std::memcpy(&eight, codes + 8 * byte, 8);
        const std::uint64_t lowest = (eight >> 4) & 0x0101010101010101u;
        high_bits[byte] = static_cast<std::uint8_t>((lowest * 0x0102040810204080u) >> 56);
    }
}

// The product copies the byte eight times, the mask keeps bit j of copy j, and the sum carries it to the copy's top.
inline void add_high_bits(const std::uint8_t* high_bits, std::uint8_t* codes) {
    for (std::int32_t byte = 0; byte < 4; ++byte) {
        const std::uint64_t kept = (high_bits[byte] * 0x0101010101010101u) & 0x8040201008040201u;
        const std::uint64_t lowest = ((kept + 0x7f7f7f7f7f7f7f7fu) >> 7) & 0x0101010101010101u;
        std::uint64_t eight;
        std::memcpy(&eight, codes + 8 * byte, 8);
        eight |= lowest << 4;
        std::memcpy(codes + 8 * byte, &eight, 8);
    }
}

}  // namespace quantlab
