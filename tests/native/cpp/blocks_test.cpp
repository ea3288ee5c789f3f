// Weights to blocks and back: exact buffers at odd addresses, every format, element, number of levels and kernel.
#include "check.h"
#include "weight_rows.h"

#include "../../../quantlab/native/src/kernels.h"
#include "../../../quantlab/native/src/matrices.h"

#include <cmath>
#include <memory>

using namespace quantlab;

namespace {

constexpr Element elements[] = {Element::f32, Element::f16, Element::bf16};
constexpr float not_a_number = NAN;
constexpr float special[] = {0.0f,    -0.0f,    INFINITY, -INFINITY, not_a_number, 0x1p-149f, -0x1p-130f,
                             0x1p-126f, 3.4e38f, 65504.0f, 65520.0f,  0x1p-24f,     -3.0f};

// Exactly as long as asked for, `offset` bytes behind an aligned address: a sanitizer sees a byte too many.
class Buffer {
public:
    Buffer(std::size_t bytes, std::size_t offset) : all_(new std::uint8_t[bytes + offset]()), offset_(offset), bytes_(bytes) {}
    std::uint8_t* data() { return all_.get() + offset_; }
    const std::uint8_t* data() const { return all_.get() + offset_; }
    std::size_t size() const { return bytes_; }
    bool operator==(const Buffer& other) const {
        return bytes_ == other.bytes_ && std::memcmp(data(), other.data(), bytes_) == 0;
    }

private:
    std::unique_ptr<std::uint8_t[]> all_;
    std::size_t offset_, bytes_;
};

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

enum class Numbers { ordinary, any };

Buffer random_weights(Element element, std::int64_t count, Numbers kind, std::size_t offset, Random& random) {
    const auto size = static_cast<std::size_t>(element_bytes(element));
    Buffer weights(static_cast<std::size_t>(count) * size, offset);
    for (std::int64_t i = 0; i < count; ++i) {
        std::uint8_t* target = weights.data() + static_cast<std::size_t>(i) * size;
        store(element, random.real() * std::ldexp(1.0f, random.below(6) - 3), target);
        if (kind == Numbers::any && random.below(20) == 0) {
            store(element, special[random.below(std::size(special))], target);
        } else if (kind == Numbers::any && random.below(20) == 0) {
            const std::uint64_t bits = random.bits();
            std::memcpy(target, &bits, size);
        }
    }
    return weights;
}

struct Encoded {
    Buffer bytes;
    std::vector<RowSums> sums;
    Faults faults;
};

Encoded encoded(const Kernel& kernel, const BlockFormat& format, Element element, const Buffer& weights, MatrixShape shape,
                int levels, int threads, std::size_t offset) {
    const auto size = static_cast<std::size_t>(shape.rows * shape.columns / weights_per_block * format.block_bytes);
    Encoded result{Buffer(size, offset), std::vector<RowSums>(static_cast<std::size_t>(shape.rows)), {}};
    result.faults = quantize_matrix(kernel, format, element, weights.data(), shape, levels, threads, result.bytes.data(),
                                    result.sums.data());
    Buffer unmeasured(size, offset);
    quantize_matrix(kernel, format, element, weights.data(), shape, levels, threads, unmeasured.data(), nullptr);
    CHECK(unmeasured == result.bytes);
    return result;
}

bool same(double a, double b) { return std::bit_cast<std::uint64_t>(a) == std::bit_cast<std::uint64_t>(b) || (a != a && b != b); }

bool same_place(const std::optional<Position>& a, const std::optional<Position>& b) {
    return a.has_value() == b.has_value() && (!a || (a->row == b->row && a->index == b->index));
}

void check_same(const Encoded& found, const Encoded& expected) {
    CHECK(found.bytes == expected.bytes);
    CHECK(same_place(found.faults.not_finite, expected.faults.not_finite));
    CHECK(same_place(found.faults.overflow, expected.faults.overflow));
    for (std::size_t row = 0; row < expected.sums.size(); ++row) {
        CHECK(same(found.sums[row].squared_errors, expected.sums[row].squared_errors));
        CHECK(same(found.sums[row].squared_weights, expected.sums[row].squared_weights));
    }
}

// Decoded by the formats' definition, each weight rounded to the element.
void check_decoded(const Kernel& kernel, const BlockFormat& format, Element element, const Buffer& bytes, MatrixShape shape,
                   std::size_t offset) {
    const auto size = static_cast<std::size_t>(element_bytes(element));
    Buffer weights(static_cast<std::size_t>(shape.rows * shape.columns) * size, offset);
    dequantize_matrix(kernel, format, element, bytes.data(), shape, 2, weights.data());
    const auto type = static_cast<engine::WeightType>(static_cast<int>(engine::WeightType::q4_0) + format.index);
    const Row row = read_row(type, bytes.data(), shape.rows * shape.columns);
    for (std::size_t i = 0; i < row.weights.size(); ++i) {
        std::uint8_t rounded[4];
        store(element, row.weights[i], rounded);
        CHECK(same_bits(loaded(element, weights.data() + i * size), loaded(element, rounded)));
    }
}

// A weight is no further from its code than one step: the codes span the block's range.
void check_close(const Kernel& kernel, const BlockFormat& format, const Buffer& weights, const Buffer& bytes, MatrixShape shape,
                 int levels) {
    Buffer decoded(weights.size(), 0);
    dequantize_matrix(kernel, format, Element::f32, bytes.data(), shape, 1, decoded.data());
    for (std::int64_t i = 0; i < shape.rows * shape.columns; i += weights_per_block) {
        float largest = 0;
        for (std::int64_t j = i; j < i + weights_per_block; ++j) largest = std::fmax(largest, std::fabs(loaded(Element::f32, weights.data() + 4 * j)));
        const float step = 2 * largest / static_cast<float>(levels - 1);
        for (std::int64_t j = i; j < i + weights_per_block; ++j) {
            CHECK(std::fabs(loaded(Element::f32, weights.data() + 4 * j) - loaded(Element::f32, decoded.data() + 4 * j)) <= 1.01f * step);
        }
    }
}

void test_format(const BlockFormat& format, Element element, const std::vector<const Kernel*>& kernels, Random& random) {
    for (const Numbers kind : {Numbers::ordinary, Numbers::any}) {
        std::vector<MatrixShape> shapes{{1, 32}, {3, 96}, {0, 64}, {5, 0}};
        if (kind == Numbers::any && element == Element::f16) shapes.push_back({33, 4096});  // two threads have work
        for (const MatrixShape shape : shapes) {
            const std::size_t offset = static_cast<std::size_t>(random.below(4));
            const int levels = format.most_levels - (random.below(2) == 0 ? 0 : random.below(format.most_levels - format.fewest_levels));
            const Buffer weights = random_weights(element, shape.rows * shape.columns, kind, offset, random);
            const Encoded expected = encoded(portable_kernel(), format, element, weights, shape, levels, 1, offset);
            for (const Kernel* kernel : kernels) {
                check_same(encoded(*kernel, format, element, weights, shape, levels, 3, offset ^ 1), expected);
                check_decoded(*kernel, format, element, expected.bytes, shape, offset);
            }
            if (kind == Numbers::ordinary && element == Element::f32 && levels == format.most_levels) {
                check_close(portable_kernel(), format, weights, expected.bytes, shape, levels);
            }
        }
    }
}

// Bytes that no encoder writes: any scale, any code.
void test_any_bytes(const BlockFormat& format, Element element, const std::vector<const Kernel*>& kernels, Random& random) {
    const MatrixShape shape{7, 64};
    Buffer bytes(static_cast<std::size_t>(7 * 2 * format.block_bytes), 1);
    for (std::size_t i = 0; i < bytes.size(); ++i) bytes.data()[i] = static_cast<std::uint8_t>(random.bits());
    for (const Kernel* kernel : kernels) check_decoded(*kernel, format, element, bytes, shape, 3);
}

}  // namespace

void test_blocks() {
    std::vector<const Kernel*> kernels{&portable_kernel()};
    if (avx2_kernel() != nullptr) kernels.push_back(avx2_kernel());
    std::printf("blocks: %zu kernels\n", kernels.size());
    Random random(11);
    for (const BlockFormat& format : block_formats()) {
        if (!format.has_own_scales()) continue;  // ternary_test.cpp
        for (const Element element : elements) {
            test_format(format, element, kernels, random);
            test_any_bytes(format, element, kernels, random);
        }
    }
}
