// Storage, packing and reading of interleaved weights, and the choice of a kernel for them.
#include "packed_matrix.h"

#include "../instruction_set.h"
#include "../numbers.h"
#include "matmul_kernel.h"
#include "packed_layout.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>


namespace quantlab::engine {

namespace {

template <typename Piece>
Piece loaded(const std::uint8_t* source) {
    Piece piece;
    std::memcpy(&piece, source, sizeof piece);
    return piece;
}

// Side by side at `target`: a piece of each of `count` rows, which lie `stride` bytes apart, after `change`.
template <typename Piece, int count, typename Change>
void store_pieces(std::uint8_t* target, const std::uint8_t* source, std::int64_t stride, const Change& change) {
    Piece pieces[count];
    for (int i = 0; i < count; ++i) {
        pieces[i] = change(loaded<Piece>(source + i * stride));
    }
    std::memcpy(target, pieces, sizeof pieces);
}

template <typename Piece, int count>
void store_pieces(std::uint8_t* target, const std::uint8_t* source, std::int64_t stride) {
    store_pieces<Piece, count>(target, source, stride, [](Piece piece) { return piece; });
}

// Exchanges the bits of `mask` for those `distance` places higher.
constexpr std::uint32_t with_bits_exchanged(std::uint32_t word, int distance, std::uint32_t mask) {
    const std::uint32_t difference = (word ^ word >> distance) & mask;
    return word ^ difference ^ difference << distance;
}

// Moves bit 4 c + i to 8 i + c. Each step exchanges two binary digits of the bits' places, and so many bits at once.
constexpr std::uint32_t with_every_fourth_bit_together(std::uint32_t word) {
    word = with_bits_exchanged(word, 14, 0x0000ccccu);  // digits 4 and 1
    word = with_bits_exchanged(word, 7, 0x00aa00aau);   // 3 and 0
    word = with_bits_exchanged(word, 2, 0x0c0c0c0cu);   // 2 and 1
    return with_bits_exchanged(word, 1, 0x22222222u);   // 1 and 0
}

static_assert(with_every_fourth_bit_together(0x11111111u) == 0x000000ffu);
static_assert(with_every_fourth_bit_together(0x80000006u) == 0x80010100u);

std::uint32_t spread_to_every_fourth_bit(std::uint8_t bits) {
    std::uint32_t word = bits;
    word = (word | word << 12) & 0x000f000fu;
    word = (word | word << 6) & 0x03030303u;
    return (word | word << 3) & 0x11111111u;
}

// Blocks of quantized weights, between the file's order and ours. `row` counts within a group.
template <typename Layout>
struct Blocks {
    using File = typename Layout::File;

    static constexpr std::int64_t block_count(std::int64_t columns) { return columns / Layout::columns; }

    static std::int64_t file_row_bytes(std::int64_t columns) {
        return block_count(columns) * static_cast<std::int64_t>(sizeof(File));
    }
    static std::int64_t group_bytes(std::int64_t columns) { return block_count(columns) * Layout::bytes; }

    // Rows `row` to `row + count - 1` of a group, from rows that lie `stride` bytes apart.
    template <int count>
    static void pack_rows(const std::uint8_t* source, std::int64_t stride, std::int64_t columns, int row,
                          std::uint8_t* group) {
        for (std::int64_t b = 0; b < block_count(columns); ++b) {
            pack<count>(source + b * static_cast<std::int64_t>(sizeof(File)), stride, row, group + b * Layout::bytes);
        }
    }

    static void read_row(const std::uint8_t* group, std::int64_t columns, int row, float* out) {
        for (std::int64_t b = 0; b < block_count(columns); ++b) {
            decode(group + b * Layout::bytes, row, out + b * Layout::columns);
        }
    }

private:
    template <int count>
    static void pack(const std::uint8_t* source, std::int64_t stride, int row, std::uint8_t* block) {
        store_pieces<std::uint16_t, count>(block + 2 * row, source + offsetof(File, scale), stride);
        if constexpr (Layout::has_minimum) {
            const std::uint8_t* minimum = source + offsetof(File, minimum);
            store_pieces<std::uint16_t, count>(block + Layout::minima + 2 * row, minimum, stride);
        }
        std::uint8_t* codes = block + Layout::codes + 4 * row;
        if constexpr (Layout::bits == 2) {
            for (int vector = 0; vector < 16; ++vector) {
                store_pieces<std::uint32_t, count>(codes + 64 * vector, source + offsetof(File, codes) + 4 * vector, stride);
            }
        } else if constexpr (Layout::bits == 8) {
            for (int chunk = 0; chunk < 8; ++chunk) {  // plus 128: the sign bit turned
                store_pieces<std::uint32_t, count>(codes + 64 * chunk, source + offsetof(File, codes) + 4 * chunk, stride,
                                                   [](std::uint32_t four) { return four ^ 0x80808080u; });
            }
        } else {
            for (int vector = 0; vector < 4; ++vector) {
                const std::uint8_t* nibbles = source + offsetof(File, nibbles) + 4 * vector;
                store_pieces<std::uint32_t, count>(codes + 64 * vector, nibbles, stride);
            }
        }
        if constexpr (Layout::bits == 5) {
            store_pieces<std::uint32_t, count>(block + Layout::fifth_bits + 4 * row, source + offsetof(File, high_bits),
                                               stride, with_every_fourth_bit_together);
        }
    }

    static void decode(const std::uint8_t* block, int row, float* out) {
        std::uint8_t codes[Layout::columns];
        read_codes(block, row, codes);
        const float scale = float_from_half(loaded<std::uint16_t>(block + 2 * row));
        for (int i = 0; i < Layout::columns; ++i) {
            out[i] = scale * static_cast<float>(codes[i] - Layout::zero_code);
        }
        if constexpr (Layout::has_minimum) {
            const float minimum = float_from_half(loaded<std::uint16_t>(block + Layout::minima + 2 * row));
            for (int i = 0; i < block_columns; ++i) {
                out[i] += minimum;
            }
        }
    }

    static void read_codes(const std::uint8_t* block, int row, std::uint8_t* codes) {
        const std::uint8_t* packed = block + Layout::codes + 4 * row;
        for (int i = 0; i < Layout::columns; ++i) {
            const auto place = [](int byte) { return 64 * (byte / 4) + byte % 4; };  // of a byte of the file's block
            if constexpr (Layout::bits == 2) {
                codes[i] = packed[place(i / 128 * 32 + i % 32)] >> (i % 128 / 32 * 2) & 3;
            } else if constexpr (Layout::bits == 8) {
                codes[i] = packed[place(i)];
            } else {
                codes[i] = i < 16 ? packed[place(i)] & 0x0f : packed[place(i - 16)] >> 4;
            }
        }
        if constexpr (Layout::bits == 5) {
            std::uint32_t bits = 0;
            for (int i = 0; i < 4; ++i) {
                bits |= spread_to_every_fourth_bit(block[Layout::fifth_bits + 4 * row + i]) << i;
            }
            for (int i = 0; i < block_columns; ++i) {
                codes[i] = static_cast<std::uint8_t>(codes[i] | (bits >> i & 1u) << 4);
            }
        }
    }
};

template <Element element>
struct Floats {
    static constexpr std::int64_t bytes = element_bytes(element);

    static std::int64_t file_row_bytes(std::int64_t columns) { return columns * bytes; }
    static std::int64_t group_bytes(std::int64_t columns) { return columns * bytes * group_rows; }

    template <int count>
    static void pack_rows(const std::uint8_t* source, std::int64_t stride, std::int64_t columns, int row,
                          std::uint8_t* group) {
        using Bits = std::conditional_t<bytes == 4, std::uint32_t, std::uint16_t>;
        for (std::int64_t c = 0; c < columns; ++c) {
            store_pieces<Bits, count>(group + (c * group_rows + row) * bytes, source + c * bytes, stride);
        }
    }

    static void read_row(const std::uint8_t* group, std::int64_t columns, int row, float* out) {
        for (std::int64_t c = 0; c < columns; ++c) {
            out[c] = load_element<element>(group + (c * group_rows + row) * bytes);
        }
    }
};

// Calls work with a value of the class that packs rows of that type.
template <typename Work>
auto with_packing(WeightType type, const Work& work) {
    switch (type) {
        case WeightType::f32:
            return work(Floats<Element::f32>());
        case WeightType::f16:
            return work(Floats<Element::f16>());
        case WeightType::bf16:
            return work(Floats<Element::bf16>());
        case WeightType::q4_0:
            return work(Blocks<BlockLayout<BlockQ4_0>>());
        case WeightType::q4_1:
            return work(Blocks<BlockLayout<BlockQ4_1>>());
        case WeightType::q5_0:
            return work(Blocks<BlockLayout<BlockQ5_0>>());
        case WeightType::q5_1:
            return work(Blocks<BlockLayout<BlockQ5_1>>());
        case WeightType::q8_0:
            return work(Blocks<BlockLayout<BlockQ8_0>>());
        case WeightType::tq2_0:
            return work(Blocks<BlockLayout<BlockTQ2_0>>());
    }
    throw std::invalid_argument("no such weight type");
}

}  // namespace

std::int64_t file_row_bytes(WeightType type, std::int64_t columns) {
    return with_packing(type, [columns](auto packing) { return packing.file_row_bytes(columns); });
}

std::int64_t group_bytes(WeightType type, std::int64_t columns) {
    return with_packing(type, [columns](auto packing) { return packing.group_bytes(columns); });
}

void interleave(WeightType type, std::int64_t columns, std::int64_t first_row, std::int64_t rows,
                const std::uint8_t* file_rows, std::uint8_t* storage) {
    // A group's rows write to the same cache lines, so they take turns while those are near.
    constexpr std::int64_t panel_columns = 2 * ternary_columns;
    with_packing(type, [=](auto packing) {
        const std::int64_t stride = packing.file_row_bytes(columns), end = first_row + rows;
        for (std::int64_t row = first_row, group_end; row < end; row = group_end) {
            group_end = std::min(end, (row / group_rows + 1) * group_rows);
            std::uint8_t* group = storage + row / group_rows * packing.group_bytes(columns);
            for (std::int64_t column = 0; column < columns; column += panel_columns) {
                const std::int64_t panel = std::min(panel_columns, columns - column);
                const std::uint8_t* source = file_rows + (row - first_row) * stride + packing.file_row_bytes(column);
                std::uint8_t* target = group + packing.group_bytes(column);
                auto r = static_cast<int>(row % group_rows);
                const int last = r + static_cast<int>(group_end - row);
                for (; r + 4 <= last; r += 4, source += 4 * stride) {
                    packing.template pack_rows<4>(source, stride, panel, r, target);
                }
                for (; r < last; ++r, source += stride) {
                    packing.template pack_rows<1>(source, stride, panel, r, target);
                }
            }
        }
    });
}

PackedMatrix::PackedMatrix(WeightType type, std::int64_t rows, std::int64_t columns)
    : PackedMatrix(type, rows, columns, matmul_kernel()) {}

PackedMatrix::PackedMatrix(WeightType type, std::int64_t rows, std::int64_t columns, const MatmulKernel& kernel)
    : type_(type), rows_(rows), columns_(columns), kernel_(&kernel) {
    const auto bytes = static_cast<std::size_t>(groups() * group_bytes());
    storage_ = new_storage(bytes);
}

std::int64_t PackedMatrix::group_bytes() const { return engine::group_bytes(type_, columns_); }

void PackedMatrix::fill(std::int64_t first_row, std::int64_t rows, const std::uint8_t* file_rows) {
    interleave(type_, columns_, first_row, rows, file_rows, storage_.get());
}

void PackedMatrix::multiply(const Tokens& x, float* out, std::int64_t out_stride, int first_group,
                            int last_group) const {
    const auto index = static_cast<std::size_t>(type_);
    const bool by_codes = is_quantized(type_) && x.coded(activation_scheme(type_)).codes != nullptr;
    const Multiplication job{storage_.get(), rows_, x, out, out_stride, first_group, last_group};
    (by_codes ? kernel_->by_codes[index] : kernel_->by_values[index])(job);
}

void PackedMatrix::read_row(std::int64_t row, float* out) const {
    with_packing(type_, [&](auto packing) {
        const std::uint8_t* group = storage_.get() + row / group_rows * packing.group_bytes(columns_);
        packing.read_row(group, columns_, static_cast<int>(row % group_rows), out);
    });
}

const MatmulKernel& matmul_kernel() {
    const std::optional<InstructionSet> chosen = chosen_instruction_set();
    if (!chosen) {
        throw std::runtime_error(std::string(kernel_variable) + " names no kernel that can run here");
    }
    const MatmulKernel* kernel = nullptr;
    if (*chosen >= InstructionSet::avx512) {
        kernel = avx512_matmul_kernel();
    }
    if (kernel == nullptr && *chosen >= InstructionSet::avx2 && has_avx_vnni()) {
        kernel = avx_vnni_matmul_kernel();
    }
    if (kernel == nullptr && *chosen >= InstructionSet::avx2) {
        kernel = avx2_matmul_kernel();
    }
    return kernel != nullptr ? *kernel : scalar_matmul_kernel();
}

void quantize_token(const float* values, int columns, std::int8_t* codes, float* scales, float* sums) {
    matmul_kernel().quantize_token(values, columns, codes, scales, sums);
}

void quantize_row(const float* values, int columns, std::int8_t* codes, float* scale, float* sums) {
    matmul_kernel().quantize_row(values, columns, codes, scale, sums);
}

}  // namespace quantlab::engine
