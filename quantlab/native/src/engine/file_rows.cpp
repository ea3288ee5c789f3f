// Tiles of rows: interleaved into a buffer that stays in a core's own cache, multiplied from there by all tokens.
#include "file_rows.h"

#include "matmul_kernel.h"
#include "packed_layout.h"

#include <algorithm>
#include <memory>
#include <new>

namespace quantlab::engine {

namespace {

constexpr std::int64_t most_tile_bytes = 128 << 10;
constexpr std::int64_t most_tile_groups = 4;  // as many as kernels take at once for one token

// Zeros, aligned for the kernels.
template <typename Element>
class Buffer {
public:
    explicit Buffer(std::int64_t count)
        : elements_(new(alignment) Element[static_cast<std::size_t>(count)]()) {}
    Element* data() const { return elements_.get(); }

private:
    static constexpr std::align_val_t alignment{64};
    struct Free {
        void operator()(Element* elements) const { ::operator delete[](elements, alignment); }
    };
    std::unique_ptr<Element[], Free> elements_;
};

// One multiplication, in parts that threads share: first the tokens' quantization, then the tiles.
class Product {
public:
    Product(const FileRows& weights, const float* values, int count, float* out, int threads)
        : weights_(weights),
          values_(values),
          count_(count),
          out_(out),
          kernel_(matmul_kernel()),
          scheme_(activation_scheme(weights.type)),
          token_scales_(scales_per_token(scheme_, weights.columns)),
          token_sums_(sums_per_token(scheme_, weights.columns)),
          codes_(static_cast<std::int64_t>(count) * weights.columns),
          scales_(count * token_scales_),
          sums_(count * token_sums_),
          token_parts_(std::min(count, parts_a_thread * threads)) {
        const std::int64_t groups = (weights.rows + group_rows - 1) / group_rows;
        const std::int64_t fitting = most_tile_bytes / group_bytes(weights.type, weights.columns);
        const std::int64_t fair = groups / (parts_a_thread * threads);  // enough tiles for all threads
        tile_rows_ = group_rows * std::clamp<std::int64_t>(std::min(fitting, fair), 1, most_tile_groups);
    }

    std::int64_t token_parts() const { return token_parts_; }
    std::int64_t tiles() const { return (weights_.rows + tile_rows_ - 1) / tile_rows_; }
    std::int64_t tile_bytes() const { return tile_rows_ / group_rows * group_bytes(weights_.type, weights_.columns); }

    void quantize(std::int64_t part) const {
        const std::int64_t first = static_cast<std::int64_t>(count_) * part / token_parts_;
        const std::int64_t last = static_cast<std::int64_t>(count_) * (part + 1) / token_parts_;
        for (std::int64_t t = first; t < last; ++t) {
            kernel_.quantizer(scheme_)(values_ + t * weights_.columns, weights_.columns,
                                       codes_.data() + t * weights_.columns, scales_.data() + t * token_scales_,
                                       sums_.data() + t * token_sums_);
        }
    }

    // Rows beyond the matrix's last keep what `buffer` held; the kernel stores nothing of theirs.
    void multiply(std::int64_t tile, std::uint8_t* buffer) const {
        const std::int64_t first = tile * tile_rows_;
        const std::int64_t rows = std::min(tile_rows_, weights_.rows - first);
        const std::int64_t row_bytes = file_row_bytes(weights_.type, weights_.columns);
        interleave(weights_.type, weights_.columns, 0, rows, weights_.bytes + first * row_bytes, buffer);
        const CodedTokens coded{codes_.data(), scales_.data(), sums_.data()};
        const bool by_token = scheme_ == ActivationScheme::token;
        const Tokens tokens{count_, weights_.columns, nullptr, by_token ? CodedTokens{} : coded, by_token ? coded : CodedTokens{}};
        const auto groups = static_cast<int>((rows + group_rows - 1) / group_rows);
        kernel_.by_codes[static_cast<int>(weights_.type)]({buffer, rows, tokens, out_ + first, weights_.rows, 0, groups});
    }

private:
    // Cores that others use too are evened out by taking the next part when one is done.
    static constexpr int parts_a_thread = 4;

    FileRows weights_;
    const float* values_;
    int count_;
    float* out_;
    const MatmulKernel& kernel_;
    ActivationScheme scheme_;
    std::int64_t token_scales_, token_sums_;  // of each token
    Buffer<std::int8_t> codes_;
    Buffer<float> scales_;
    Buffer<float> sums_;
    int token_parts_;
    std::int64_t tile_rows_;
};

}  // namespace

void multiply_file_rows(const FileRows& weights, const float* values, int count, float* out, ThreadPool& pool) {
    if (count == 0 || weights.rows == 0) {
        return;
    }
    const Product product(weights, values, count, out, pool.size());
    pool.run([&](int thread) {
        const Buffer<std::uint8_t> tile(product.tile_bytes());
        pool.divide(thread, product.token_parts(), [&](std::int64_t part) { product.quantize(part); });
        pool.barrier();
        pool.divide(thread, product.tiles(), [&](std::int64_t index) { product.multiply(index, tile.data()); });
    });
}

}  // namespace quantlab::engine
