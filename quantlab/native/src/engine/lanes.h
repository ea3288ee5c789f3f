// Sixteen float lanes in one class per instruction set: every kernel of the engine is a template over such a class.
//
// A lane is a row, a position or a dimension, never a partial sum of an output, so that all classes compute the same
// bits; ScalarLanes is the specification. All of them have, with L the class itself:
//
//   L::load(const float*)  L::load_half(const uint16_t*)  L::load_brain(const uint16_t*)  L::load_int8(const int8_t*)
//   L::load_first(const float*, n)                  the first n floats, zeros after them; reads no more
//   L::broadcast(float)  L::zero()
//   store(float*)  store_half(uint16_t*)            halves rounded to nearest, ties to even
//   store_int8(int8_t*)                             lanes that are whole numbers from -128 to 127
//   store_first(float*, n)                          writes no more than n floats
//   + - * /  L::fma(a, b, c)                        a * b + c, rounded once
//   L::max(a, b)  L::min(a, b)                      a > b ? a : b; a < b ? a : b  (b where one is NaN)
//   L::abs(a)  L::sqrt(a)  L::round(a)              to a whole number, ties to even
//   L::scale_by_power_of_two(a, n)                  a * 2^n, rounded once, for whole n from -126 to 127
//   L::greater(a, b)  L::equal(a, b) -> L::Mask     false where one is NaN
//   L::select(mask, a, b)                           a where the mask is true, else b
//   fold_sum()  fold_max()                          lanes i and i + 8 first, then i + 4, i + 2, i + 1
//
// Addresses need no alignment. Subnormals count in full: FTZ and DAZ must be off and rounding to nearest, as
// ThreadPool::run sees to. Which NaN comes out of an operation is left open.
//
// For multiplications by quantized weights (packed_matrix.h) there are the codes of sixteen rows and four columns:
//
//   L::load_codes(const uint8_t*) -> L::Codes       64 bytes, four of each row
//   L::low_nibbles(c)  L::high_nibbles(c)           of each byte
//   L::fifth_bits(c, bit)                           that bit of each byte, moved to bit 4
//   L::two_bits(c, bit)                             that bit of each byte and the next, moved to bits 0 and 1
//   a | b
//   L::column(c, i)                                 byte i of each row's four, 0 to 255, as lanes
//   L::Dot<bits>                                    the sum over 32 columns of code * activation, exact; over 128 of
//                                                   codes of two bits
//       add(c, i, const int8_t* four)               for i = 0 to 7 in this order, codes below 2^bits, activations from
//                                                   -127 to 127; where L::planes<bits> is 2, all the low nibbles
//                                                   first, then the high ones for i = 8 to 15; 32 times with two bits
//       total() -> L
//
// and how much of a multiplication the registers hold:
//
//   L::code_tile  L::value_tile                     tokens taken at once, by int8 and by float activations
//   L::code_groups                                  groups of rows taken at once for one token by int8 activations
//   L::value_chains                                 groups times tokens that keep the multipliers busy
//
// A file compiled for an instruction set sees its class and ScalarLanes, and must use its own: its members are inlined,
// since a copy that the linker keeps for all files could hold instructions that the processor lacks.
#pragma once

#if defined(__GNUC__)
#define QUANTLAB_INLINE __attribute__((always_inline)) inline
// For loops that need all registers: inlined into a large function they would not get them.
#define QUANTLAB_OUTLINE __attribute__((noinline))
#else
#define QUANTLAB_INLINE inline
#define QUANTLAB_OUTLINE
#endif

namespace quantlab::engine {

inline constexpr int lane_count = 16;

}  // namespace quantlab::engine

#include "lanes_scalar.h"  // IWYU pragma: export

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#include "lanes_avx512.h"  // IWYU pragma: export
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "lanes_avx2.h"  // IWYU pragma: export
#endif
