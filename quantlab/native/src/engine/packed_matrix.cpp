// Storage, packing and reading of interleaved weights, and the choice of a kernel for them.
#include "packed_matrix.h"

#include "../instruction_set.h"
#include "../numbers.h"
#include "matmul_kernel.h"
#include "packed_layout.h"

#include <cstring>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace quantlab::engine {

namespace {

constexpr std::int64_t block_count(std::int64_t columns) { return columns / block_columns; }

template <typename Piece>
void store(std::uint8_t* target, const Piece& piece) {
    std::memcpy(target, &piece, sizeof piece);
}

template <typename Piece>
Piece loaded(const std::uint8_t* source) {
    Piece piece;
    std::memcpy(&piece, source, sizeof piece);
    return piece;
}

// Bits 0, 4, 8 ... 28 of a word, next to each other.
std::uint8_t every_fourth_bit(std::uint32_t word) {
    word &= 0x11111111u;
    word = (word | word >> 3) & 0x03030303u;
    word = (word | word >> 6) & 0x000f000fu;
    return static_cast<std::uint8_t>(word | word >> 12);
}

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

    static std::int64_t file_row_bytes(std::int64_t columns) {
        return block_count(columns) * static_cast<std::int64_t>(sizeof(File));
    }
    static std::int64_t group_bytes(std::int64_t columns) { return block_count(columns) * Layout::bytes; }

    static void pack_row(const std::uint8_t* source, std::int64_t columns, int row, std::uint8_t* group) {
        for (std::int64_t b = 0; b < block_count(columns); ++b) {
            pack(loaded<File>(source + b * static_cast<std::int64_t>(sizeof(File))), row, group + b * Layout::bytes);
        }
    }

    static void read_row(const std::uint8_t* group, std::int64_t columns, int row, float* out) {
        for (std::int64_t b = 0; b < block_count(columns); ++b) {
            decode(group + b * Layout::bytes, row, out + b * block_columns);
        }
    }

private:
    static void pack(const File& file, int row, std::uint8_t* block) {
        store(block + 2 * row, file.scale);
        if constexpr (Layout::has_minimum) {
            store(block + Layout::minima + 2 * row, file.minimum);
        }
        std::uint8_t* codes = block + Layout::codes + 4 * row;
        if constexpr (Layout::bits == 8) {
            const auto* signed_codes = reinterpret_cast<const std::uint8_t*>(file.codes);
            for (int chunk = 0; chunk < 8; ++chunk) {  // plus 128: the sign bit turned
                store(codes + 64 * chunk, loaded<std::uint32_t>(signed_codes + 4 * chunk) ^ 0x80808080u);
            }
        } else {
            for (int vector = 0; vector < 4; ++vector) {
                store(codes + 64 * vector, loaded<std::uint32_t>(file.nibbles + 4 * vector));
            }
        }
        if constexpr (Layout::bits == 5) {
            const auto bits = loaded<std::uint32_t>(file.high_bits);
            for (int i = 0; i < 4; ++i) {
                block[Layout::fifth_bits + 4 * row + i] = every_fourth_bit(bits >> i);
            }
        }
    }

    static void decode(const std::uint8_t* block, int row, float* out) {
        std::uint8_t codes[block_columns];
        read_codes(block, row, codes);
        const float scale = float_from_half(loaded<std::uint16_t>(block + 2 * row));
        for (int i = 0; i < block_columns; ++i) {
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
        for (int i = 0; i < block_columns; ++i) {
            const int at = 64 * (i / 4) + i % 4;
            if constexpr (Layout::bits == 8) {
                codes[i] = packed[at];
            } else {
                codes[i] = i < 16 ? packed[at] & 0x0f : packed[at - 256] >> 4;
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

    static void pack_row(const std::uint8_t* source, std::int64_t columns, int row, std::uint8_t* group) {
        for (std::int64_t c = 0; c < columns; ++c) {
            std::memcpy(group + (c * group_rows + row) * bytes, source + c * bytes, static_cast<std::size_t>(bytes));
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
    }
    throw std::invalid_argument("no such weight type");
}

constexpr std::size_t huge_page = std::size_t{1} << 21;
constexpr std::align_val_t alignment{64};

// Large storage is mapped by itself, on huge pages where the system grants them: the multiplication then spends less
// time looking up addresses. What lies beyond the last whole huge page stays on small ones.
#if defined(__unix__) || defined(__APPLE__)

bool is_mapped(std::size_t bytes) { return bytes >= huge_page; }

std::uint8_t* map_storage(std::size_t bytes) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t used = (bytes + page - 1) / page * page;
    void* mapped = mmap(nullptr, used + huge_page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) {
        throw std::bad_alloc();
    }
    auto* start = static_cast<std::uint8_t*>(mapped);
    const std::size_t ahead = huge_page - reinterpret_cast<std::uintptr_t>(start) % huge_page;
    munmap(start, ahead);
    if (ahead < huge_page) {
        munmap(start + ahead + used, huge_page - ahead);
    }
#if defined(MADV_HUGEPAGE)
    madvise(start + ahead, used, MADV_HUGEPAGE);
#endif
    return start + ahead;
}

void unmap_storage(std::uint8_t* storage, std::size_t bytes) { munmap(storage, bytes); }

#else

bool is_mapped(std::size_t) { return false; }
std::uint8_t* map_storage(std::size_t) { throw std::bad_alloc(); }
void unmap_storage(std::uint8_t*, std::size_t) {}

#endif

std::uint8_t* new_storage(std::size_t bytes) {
    if (is_mapped(bytes)) {
        return map_storage(bytes);
    }
    auto* storage = static_cast<std::uint8_t*>(::operator new(bytes, alignment));
    std::memset(storage, 0, bytes);
    return storage;
}

}  // namespace

std::int64_t file_row_bytes(WeightType type, std::int64_t columns) {
    return with_packing(type, [columns](auto packing) { return packing.file_row_bytes(columns); });
}

std::int64_t group_bytes(WeightType type, std::int64_t columns) {
    return with_packing(type, [columns](auto packing) { return packing.group_bytes(columns); });
}

void PackedMatrix::Free::operator()(std::uint8_t* storage) const {
    if (is_mapped(bytes)) {
        unmap_storage(storage, bytes);
    } else {
        ::operator delete(storage, alignment);
    }
}

PackedMatrix::PackedMatrix(WeightType type, std::int64_t rows, std::int64_t columns)
    : PackedMatrix(type, rows, columns, matmul_kernel()) {}

PackedMatrix::PackedMatrix(WeightType type, std::int64_t rows, std::int64_t columns, const MatmulKernel& kernel)
    : type_(type), rows_(rows), columns_(columns), kernel_(&kernel) {
    const auto bytes = static_cast<std::size_t>(groups() * group_bytes());
    storage_ = std::unique_ptr<std::uint8_t[], Free>(new_storage(bytes), Free{bytes});
}

std::int64_t PackedMatrix::group_bytes() const { return engine::group_bytes(type_, columns_); }

void PackedMatrix::fill(std::int64_t first_row, std::int64_t rows, const std::uint8_t* file_rows) {
    with_packing(type_, [&](auto packing) {
        for (std::int64_t row = first_row; row < first_row + rows; ++row) {
            std::uint8_t* group = storage_.get() + row / group_rows * packing.group_bytes(columns_);
            packing.pack_row(file_rows, columns_, static_cast<int>(row % group_rows), group);
            file_rows += packing.file_row_bytes(columns_);
        }
    });
}

void PackedMatrix::multiply(const Tokens& x, float* out, std::int64_t out_stride, int first_group,
                            int last_group) const {
    const auto index = static_cast<std::size_t>(type_);
    const bool by_codes = x.codes != nullptr && is_quantized(type_);
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

}  // namespace quantlab::engine
