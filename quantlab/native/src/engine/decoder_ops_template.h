// `DecoderOps` over a class of 16 lanes (lanes.h); the scalar one is the specification.
#pragma once

#include "attention_template.h"
#include "decoder_ops.h"
#include "kv_cache_template.h"
#include "lane_math.h"
#include "lanes.h"

#include <cmath>

namespace quantlab::engine {

template <typename L>
struct DecoderOpsOver {
    static float sum_of(const float* x, int n) {
        L sum = L::zero();
        for (int i = 0; i < n; i += 16) sum = sum + L::load(x + i);
        return sum.fold_sum();
    }

    static void rms_norm(const float* x, const float* weight, int n, float epsilon, float* out) {
        L squares = L::zero();
        for (int i = 0; i < n; i += 16) {
            const L v = L::load(x + i);
            squares = L::fma(v, v, squares);
        }
        const float mean = squares.fold_sum() / static_cast<float>(n);
        const L factor = L::broadcast(1.0f / std::sqrt(mean + epsilon));
        for (int i = 0; i < n; i += 16) ((L::load(x + i) * factor) * L::load(weight + i)).store(out + i);
    }

    static void layer_norm(const float* x, const float* weight, const float* bias, int n, float epsilon, float* out) {
        const L mean = L::broadcast(sum_of(x, n) / static_cast<float>(n));
        L squares = L::zero();
        for (int i = 0; i < n; i += 16) {
            const L v = L::load(x + i) - mean;
            squares = L::fma(v, v, squares);
        }
        const L factor = L::broadcast(1.0f / std::sqrt(squares.fold_sum() / static_cast<float>(n) + epsilon));
        for (int i = 0; i < n; i += 16) {
            const L v = (L::load(x + i) - mean) * factor;
            L::fma(v, L::load(weight + i), L::load(bias + i)).store(out + i);
        }
    }

    static void add(float* x, const float* y, int n) {
        for (int i = 0; i < n; i += 16) (L::load(x + i) + L::load(y + i)).store(x + i);
    }

    static void scale(float* x, float factor, int n) {
        const L f = L::broadcast(factor);
        for (int i = 0; i < n; i += 16) (L::load(x + i) * f).store(x + i);
    }

    static void cap(float* x, float limit, int n) {
        for (int i = 0; i < n; i += 16) lane_soft_cap(L::load(x + i), limit).store(x + i);
    }

    // Columns i and i + half are a pair.
    static void rotate(float* head, const float* cosines, const float* sines, int half) {
        int i = 0;
        for (; i + 16 <= half; i += 16) {
            const L a = L::load(head + i), b = L::load(head + half + i);
            const L c = L::load(cosines + i), s = L::load(sines + i);
            (a * c - b * s).store(head + i);
            (b * c + a * s).store(head + half + i);
        }
        for (; i < half; ++i) {
            const float a = head[i], b = head[half + i];
            const float ac = a * cosines[i], bs = b * sines[i], bc = b * cosines[i], as = a * sines[i];
            head[i] = ac - bs;
            head[half + i] = bc + as;
        }
    }

    static L activated(Activation activation, L x) {
        switch (activation) {
            case Activation::silu: return lane_silu(x);
            case Activation::gelu_tanh: return lane_gelu_tanh(x);
            case Activation::gelu_erf: return lane_gelu_erf(x);
        }
        return x;
    }

    static void activate(Activation activation, const float* gate, const float* up, int n, float* out) {
        for (int i = 0; i < n; i += 16) {
            L v = activated(activation, L::load(gate + i));
            if (up != nullptr) v = v * L::load(up + i);
            v.store(out + i);
        }
    }

    static void low_rank_products(const float* a, int rank, const float* x, int n, float* products) {
        int r = 0;
        for (; r + 4 <= rank; r += 4) products_of<4>(a + static_cast<std::int64_t>(r) * n, x, n, products + r);
        for (; r < rank; ++r) products_of<1>(a + static_cast<std::int64_t>(r) * n, x, n, products + r);
    }

    // `count` rows at a time: one's sum would wait for itself.
    template <int count>
    static void products_of(const float* a, const float* x, std::int64_t n, float* products) {
        L sums[count];
        for (int r = 0; r < count; ++r) sums[r] = L::zero();
        for (std::int64_t i = 0; i < n; i += 16) {
            const L v = L::load(x + i);
            for (int r = 0; r < count; ++r) sums[r] = L::fma(L::load(a + r * n + i), v, sums[r]);
        }
        for (int r = 0; r < count; ++r) products[r] = sums[r].fold_sum();
    }

    static void add_low_rank(const float* b, int rank, const float* products, float* y, int n) {
        int i = 0;
        for (; i + 64 <= n; i += 64) add_rows_of<4>(b + static_cast<std::int64_t>(i) * rank, rank, products, y + i);
        for (; i < n; i += 16) add_rows_of<1>(b + static_cast<std::int64_t>(i) * rank, rank, products, y + i);
    }

    template <int groups>
    static void add_rows_of(const float* b, std::int64_t rank, const float* products, float* y) {
        L sums[groups];
        for (int g = 0; g < groups; ++g) sums[g] = L::zero();
        for (std::int64_t r = 0; r < rank; ++r) {
            const L product = L::broadcast(products[r]);
            for (int g = 0; g < groups; ++g) sums[g] = L::fma(L::load(b + (g * rank + r) * 16), product, sums[g]);
        }
        for (int g = 0; g < groups; ++g) (L::load(y + 16 * g) + sums[g]).store(y + 16 * g);
    }

    static float sum(const float* x, std::int64_t n) {
        constexpr int streams = 4;
        L sums[streams];
        for (int s = 0; s < streams; ++s) sums[s] = L::zero();
        for (std::int64_t i = 0; i < n; i += 16 * streams) {
            for (int s = 0; s < streams; ++s) sums[s] = sums[s] + L::load(x + i + 16 * s);
        }
        return ((sums[0] + sums[1]) + (sums[2] + sums[3])).fold_sum();
    }

    static constexpr DecoderOps ops() {
        using Cache = CacheOver<L>;
        using Attention = AttentionOver<L>;
        return {rms_norm,           layer_norm,          add,
                scale,              cap,                 rotate,
                activate,           Cache::store_key,    Cache::store_value,
                Attention::attend_chunk, Attention::merge, Attention::finish, low_rank_products,
                add_low_rank,       sum};
    }
};

}  // namespace quantlab::engine
