// Elementary functions on lanes: our own polynomials in explicit fused multiply-adds, so that every instruction set gives
// the same bits.
#pragma once

#include <cmath>
#include <cstdint>

namespace quantlab::engine {

// e^x for finite x, to about 1 ulp; 0 below -87 and the value at 88 above it.
//
// x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 in two parts so that n ln 2 is exact to fp32; e^r by its Taylor polynomial.
template <typename L>
inline L lane_exp(L x) {
    const L clamped = L::max(L::min(x, L::broadcast(88.0f)), L::broadcast(-87.0f));
    const L n = L::round(clamped * L::broadcast(1.44269504088896341f));
    L r = L::fma(n, L::broadcast(-0.693145751953125f), clamped);
    r = L::fma(n, L::broadcast(-1.42860682030941723e-6f), r);
    L p = L::broadcast(1.0f / 5040.0f);
    p = L::fma(p, r, L::broadcast(1.0f / 720.0f));
    p = L::fma(p, r, L::broadcast(1.0f / 120.0f));
    p = L::fma(p, r, L::broadcast(1.0f / 24.0f));
    p = L::fma(p, r, L::broadcast(1.0f / 6.0f));
    p = L::fma(p, r, L::broadcast(0.5f));
    p = L::fma(p, r, L::broadcast(1.0f));
    p = L::fma(p, r, L::broadcast(1.0f));
    return L::scale_by_power_of_two(p, n);
}

// tanh(x) = 1 - 2 / (e^2x + 1), absolute error below 2e-7.
template <typename L>
inline L lane_tanh(L x) {
    const L one = L::broadcast(1.0f), two = L::broadcast(2.0f);
    return one - two / (lane_exp(x * two) + one);
}

// cap * tanh(x / cap)
template <typename L>
inline L lane_soft_cap(L x, float cap) {
    return L::broadcast(cap) * lane_tanh(x / L::broadcast(cap));
}

// x / (1 + e^-x)
template <typename L>
inline L lane_silu(L x) {
    return x / (L::broadcast(1.0f) + lane_exp(L::zero() - x));
}

// 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
template <typename L>
inline L lane_gelu_tanh(L x) {
    const L cube = x * x * x;
    const L inner = L::broadcast(0.797884560802865356f) * L::fma(L::broadcast(0.044715f), cube, x);
    return L::broadcast(0.5f) * x * (L::broadcast(1.0f) + lane_tanh(inner));
}

// 0.5 x (1 + erf(x / sqrt 2)); erf by Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7 and rounding.
template <typename L>
inline L lane_gelu_erf(L x) {
    const L one = L::broadcast(1.0f);
    const L z = x * L::broadcast(0.707106781186547524f);
    const L magnitude = L::abs(z);
    const L t = one / L::fma(L::broadcast(0.3275911f), magnitude, one);
    L p = L::broadcast(1.061405429f);
    p = L::fma(p, t, L::broadcast(-1.453152027f));
    p = L::fma(p, t, L::broadcast(1.421413741f));
    p = L::fma(p, t, L::broadcast(-0.284496736f));
    p = L::fma(p, t, L::broadcast(0.254829592f));
    const L tail = p * t * lane_exp(L::zero() - z * z);  // 1 - erf|z|
    // 0.5 x (1 + erf z): x - 0.5 x tail for x >= 0, 0.5 x tail below; |x| takes both in one form.
    const L half = L::broadcast(0.5f);
    const L positive = L::max(x, L::zero());
    return positive - half * L::abs(x) * tail;
}

}  // namespace quantlab::engine
