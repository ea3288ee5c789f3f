// A table of all kernels for one class of lanes. Included by one file per instruction set: see matmul_tiles.h.
#pragma once

#include "matmul_codes.h"
#include "matmul_ternary.h"
#include "matmul_values.h"
#include "quantize_token.h"

namespace quantlab::engine {

template <typename L>
struct MatmulKernelOf {
    template <Element element>
    static constexpr void set(MatmulKernel& kernel, WeightType type) {
        kernel.by_values[static_cast<int>(type)] = ByFloats<L, element>::multiply;
    }

    template <typename File>
    static constexpr void set(MatmulKernel& kernel, WeightType type) {
        using Layout = BlockLayout<File>;
        kernel.by_values[static_cast<int>(type)] = ByDecoding<L, Layout>::multiply;
        if constexpr (Layout::bits == 2) {
            kernel.by_codes[static_cast<int>(type)] = ByTernaryCodes<L, Layout>::multiply;
        } else {
            kernel.by_codes[static_cast<int>(type)] = ByCodes<L, Layout>::multiply;
        }
    }

    static constexpr MatmulKernel table() {
        MatmulKernel kernel{};
        set<Element::f32>(kernel, WeightType::f32);
        set<Element::f16>(kernel, WeightType::f16);
        set<Element::bf16>(kernel, WeightType::bf16);
        set<BlockQ4_0>(kernel, WeightType::q4_0);
        set<BlockQ4_1>(kernel, WeightType::q4_1);
        set<BlockQ5_0>(kernel, WeightType::q5_0);
        set<BlockQ5_1>(kernel, WeightType::q5_1);
        set<BlockQ8_0>(kernel, WeightType::q8_0);
        set<BlockTQ2_0>(kernel, WeightType::tq2_0);
        kernel.quantize_token = QuantizeToken<L>::run;
        kernel.quantize_row = QuantizeRow<L>::run;
        return kernel;
    }
};

}  // namespace quantlab::engine
