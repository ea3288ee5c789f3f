// Ternary blocks: one scale a tensor, the same for every kernel and number of threads; exact buffers at odd addresses.
#include "check.h"

#include "../../../quantlab/native/src/kernels.h"
#include "../../../quantlab/native/src/matrices.h"

#include <cmath>
#include <cstring>
#include <vector>

using namespace quantlab;

namespace {

constexpr std::int64_t block_weights = weights_in<BlockTQ2_0>;
constexpr Element elements[] = {Element::f32, Element::f16, Element::bf16};
constexpr float special[] = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, 0x1p-149f, -0x1p-130f, 3.4e38f, 65520.0f, -3.0f};

using Bytes = std::vector<std::uint8_t>;

void store(Element element, float value, std::uint8_t* target) {
    if (element == Element::f32) {
        std::memcpy(target, &value, 4);
    } else {
        const std::uint16_t half = element == Element::f16 ? half_from_float(value) : brain_from_float(value);
        std::memcpy(target, &half, 2);
    }
}

float loaded(Element element, const std::uint8_t* source) {
    switch (element) {
        case Element::f32: return load_element<Element::f32>(source);
        case Element::f16: return load_element<Element::f16>(source);
        default: return load_element<Element::bf16>(source);
    }
}

std::size_t size_of(Element element) { return static_cast<std::size_t>(element_bytes(element)); }

// One byte and then the weights: an odd address, and nothing behind them.
Bytes random_weights(Element element, std::int64_t count, bool any, Random& random) {
    Bytes bytes(1 + static_cast<std::size_t>(count) * size_of(element));
    for (std::size_t i = 0; i < static_cast<std::size_t>(count); ++i) {
        const bool is_special = any && random.below(500) == 0;
        const float value = is_special ? special[random.below(std::size(special))] : random.real() * 0.1f;
        store(element, value, bytes.data() + 1 + i * size_of(element));
    }
    return bytes;
}

struct Encoded {
    Bytes bytes;
    std::vector<RowSums> sums;
    std::vector<double> magnitudes;
    TernaryTensor tensor;
};

Encoded encoded(const Kernel& kernel, Element element, const Bytes& weights, MatrixShape shape,
                std::optional<std::uint16_t> scale, int threads) {
    const auto blocks = static_cast<std::size_t>(shape.rows * shape.columns / block_weights);
    Encoded result{Bytes(1 + blocks * sizeof(BlockTQ2_0)), std::vector<RowSums>(static_cast<std::size_t>(shape.rows)),
                   std::vector<double>(blocks), {}};
    result.tensor = quantize_ternary(kernel, element, weights.data() + 1, shape, scale, threads, result.bytes.data() + 1,
                                     result.sums.data());
    sum_magnitudes(kernel, element, weights.data() + 1, shape, threads, result.magnitudes.data());
    Bytes unmeasured(result.bytes.size());
    quantize_ternary(kernel, element, weights.data() + 1, shape, scale, threads, unmeasured.data() + 1, nullptr);
    CHECK(unmeasured == result.bytes);
    return result;
}

bool same(double a, double b) {
    return std::bit_cast<std::uint64_t>(a) == std::bit_cast<std::uint64_t>(b) || (a != a && b != b);
}

bool same_place(const std::optional<Position>& a, const std::optional<Position>& b) {
    return a.has_value() == b.has_value() && (!a || (a->row == b->row && a->index == b->index));
}

void check_same(const Encoded& found, const Encoded& expected) {
    CHECK(found.bytes == expected.bytes);
    CHECK(found.tensor.scale == expected.tensor.scale);
    CHECK(same_place(found.tensor.not_finite, expected.tensor.not_finite));
    for (std::size_t row = 0; row < expected.sums.size(); ++row) {
        CHECK(same(found.sums[row].squared_errors, expected.sums[row].squared_errors));
        CHECK(same(found.sums[row].squared_weights, expected.sums[row].squared_weights));
    }
    for (std::size_t block = 0; block < expected.magnitudes.size(); ++block) {
        CHECK(same(found.magnitudes[block], expected.magnitudes[block]));
    }
}

// The format written down once more: two bits a weight, in the order of ggml's file.
int code_of(const BlockTQ2_0& block, std::int64_t i) {
    const std::int64_t within = i % 128;
    return block.codes[i / 128 * 32 + within % 32] >> (2 * (within / 32)) & 3;
}

void check_decoded(const Kernel& kernel, Element element, const Bytes& bytes, MatrixShape shape) {
    const BlockFormat& format = *find_block_format("tq2_0");
    Bytes weights(1 + static_cast<std::size_t>(shape.rows * shape.columns) * size_of(element));
    dequantize_matrix(kernel, format, element, bytes.data() + 1, shape, 2, weights.data() + 1);
    for (std::int64_t i = 0; i < shape.rows * shape.columns; ++i) {
        BlockTQ2_0 block;
        std::memcpy(&block, bytes.data() + 1 + i / block_weights * static_cast<std::int64_t>(sizeof block), sizeof block);
        const float weight = float_from_half(block.scale) * static_cast<float>(code_of(block, i % block_weights) - 1);
        std::uint8_t rounded[4];
        store(element, weight, rounded);
        const float found = loaded(element, weights.data() + 1 + static_cast<std::size_t>(i) * size_of(element));
        CHECK(same_bits(found, loaded(element, rounded)));
    }
}

// Each weight by the definition: 0 up to half of the scale and epsilon, beyond it the scale with the weight's sign.
void check_codes(Element element, const Bytes& weights, const Encoded& found, MatrixShape shape) {
    const float gamma = float_from_half(found.tensor.scale);
    for (std::int64_t i = 0; i < shape.rows * shape.columns; ++i) {
        BlockTQ2_0 block;
        std::memcpy(&block, found.bytes.data() + 1 + i / block_weights * static_cast<std::int64_t>(sizeof block), sizeof block);
        const float weight = loaded(element, weights.data() + 1 + static_cast<std::size_t>(i) * size_of(element));
        const bool is_zero = gamma == 0.0f || std::fabs(weight) <= 0.5f * (gamma + 1e-5f);
        const int expected = is_zero ? 0 : weight > 0 ? 1 : -1;
        CHECK(code_of(block, i % block_weights) - 1 == expected);
        CHECK(expected == 0 || block.scale == found.tensor.scale);
    }
}

void test_element(Element element, const std::vector<const Kernel*>& kernels, Random& random) {
    for (const bool any : {false, true}) {
        for (const MatrixShape shape : {MatrixShape{1, 256}, {3, 768}, {0, 256}, {5, 0}, {33, 4096}}) {
            const Bytes weights = random_weights(element, shape.rows * shape.columns, any, random);
            const Encoded expected = encoded(portable_kernel(), element, weights, shape, std::nullopt, 1);
            const bool is_finite = (expected.tensor.scale & half_infinity_bits) != half_infinity_bits;
            CHECK(any || is_finite);
            for (const Kernel* kernel : kernels) {
                check_same(encoded(*kernel, element, weights, shape, std::nullopt, 3), expected);
                check_decoded(*kernel, element, expected.bytes, shape);
                if (is_finite) {
                    const Encoded known = encoded(*kernel, element, weights, shape, expected.tensor.scale, 2);
                    CHECK(known.bytes == expected.bytes);
                }
            }
            if (is_finite) {
                check_codes(element, weights, expected, shape);
            }
        }
    }
    Bytes bytes(1 + 7 * 2 * sizeof(BlockTQ2_0));  // that no encoder writes: any scale, any code
    for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(random.bits());
    for (const Kernel* kernel : kernels) check_decoded(*kernel, element, bytes, {7, 512});
}

void test_scale() {
    CHECK(ternary_scale({}) == 0);
    const double one_of_three[] = {256.0, 0.0, 512.0};
    CHECK(float_from_half(ternary_scale(one_of_three)) == 1.0f);
    const double beyond[] = {256.0 * 65520.0};
    CHECK(ternary_scale(beyond) == half_infinity_bits);
    const double vanishing[] = {256.0 * 0x1p-26};
    CHECK(ternary_scale(vanishing) == 0);
}

}  // namespace

void test_ternary() {
    std::vector<const Kernel*> kernels{&portable_kernel()};
    if (avx2_kernel() != nullptr) kernels.push_back(avx2_kernel());
    std::printf("ternary: %zu kernels\n", kernels.size());
    Random random(12);
    for (const Element element : elements) test_element(element, kernels, random);
    test_scale();
}
