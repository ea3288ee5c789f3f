#include "updates.h"

#include "../threads.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <vector>

namespace quantlab::adapters {

namespace {

constexpr std::int64_t rows_per_part = 64;  // each lays all of A out anew, as much work as one or two rows
constexpr std::int64_t least_shared_work = 1 << 19;  // multiplications, in the time that a thread takes to start

std::int64_t part_count(const LowRank& update) { return (update.rows + rows_per_part - 1) / rows_per_part; }

int useful_threads(const LowRank& update, int threads) {
    const double work = static_cast<double>(update.rows) * static_cast<double>(update.columns) *
                        static_cast<double>(update.rank + weights_per_block);
    if (work < least_shared_work) {
        return 1;
    }
    return static_cast<int>(std::clamp<std::int64_t>(part_count(update), 1, threads));
}

// Columns from `column` on of A, [rank][panel_columns], zeros beyond the last.
void lay_out(const LowRank& update, std::int64_t column, std::int64_t width, float* panel) {
    for (std::int64_t k = 0; k < update.rank; ++k) {
        std::memcpy(panel + k * panel_columns, update.a + k * update.columns + column,
                    static_cast<std::size_t>(width) * sizeof(float));
    }
}

// work(row, column, width, values): up to panel_columns consecutive elements of one row of the update. Calls for the
// same row come from one thread, in ascending order of columns.
template <typename Work>
void for_each_run(const UpdateKernel& kernel, const LowRank& update, int threads, const Work& work) {
    const auto do_rows = [&](std::int64_t first, std::int64_t last) {
        std::vector<float> panel(static_cast<std::size_t>(update.rank * panel_columns));
        Tile tile;
        for (std::int64_t column = 0; column < update.columns; column += panel_columns) {
            const std::int64_t width = std::min<std::int64_t>(panel_columns, update.columns - column);
            lay_out(update, column, width, panel.data());
            for (std::int64_t row = first; row < last; row += tile_rows) {
                const float* rows[tile_rows];
                for (int i = 0; i < tile_rows; ++i) {  // the last one again where there are no more
                    rows[i] = update.b + std::min(row + i, last - 1) * update.rank;
                }
                kernel.products(panel.data(), rows, update.rank, update.scale, tile);
                for (int i = 0; i < tile_rows && row + i < last; ++i) {
                    work(row + i, column, width, tile + i * panel_columns);
                }
            }
        }
    };
    const std::int64_t parts = part_count(update);
    const auto part = [&](int, std::int64_t first, std::int64_t last) {
        for (std::int64_t i = first; i < last; ++i) {
            do_rows(i * rows_per_part, std::min((i + 1) * rows_per_part, update.rows));
        }
    };
    for_each_part(parts, static_cast<int>(parts), useful_threads(update, threads), part);
}

// The largest magnitude, NaN counting as infinite.
double largest_magnitude(const float* values, std::int64_t count) {
    std::uint32_t largest = 0;
    for (std::int64_t i = 0; i < count; ++i) {  // the bits order as the magnitudes do
        largest = std::max(largest, std::bit_cast<std::uint32_t>(values[i]) & 0x7fffffffu);
    }
    return std::bit_cast<float>(std::min(largest, infinity_bits));
}

// Whether sums cannot leave fp32 however their terms fall, roundings included: most updates are far from it.
bool is_surely_finite(const LowRank& update) {
    constexpr double safe = 1e38;  // a third of the largest float
    constexpr std::int64_t longest = 1 << 20;  // so many roundings add less than a tenth
    const double bound = largest_magnitude(update.a, update.rank * update.columns) *
                         largest_magnitude(update.b, update.rows * update.rank) * static_cast<double>(update.rank);
    return update.rank <= longest && bound * std::max(1.0, std::fabs(static_cast<double>(update.scale))) < safe;
}

bool is_finite_half(std::uint16_t half) { return (half & half_infinity_bits) != half_infinity_bits; }

bool is_zero_half(std::uint16_t half) { return (half & 0x7fffu) == 0; }

}  // namespace

std::optional<Position> first_not_finite(const UpdateKernel& kernel, const LowRank& update, int threads) {
    if (is_surely_finite(update)) {
        return std::nullopt;
    }
    constexpr std::int64_t none = std::numeric_limits<std::int64_t>::max();
    std::vector<std::int64_t> first(static_cast<std::size_t>(update.rows), none);  // of each row
    for_each_run(kernel, update, threads,
                 [&](std::int64_t row, std::int64_t column, std::int64_t width, const float* values) {
                     const float* found = std::find_if_not(values, values + width,
                                                           [](float value) { return std::isfinite(value); });
                     auto& known = first[static_cast<std::size_t>(row)];
                     if (found != values + width) {
                         known = std::min(known, column + (found - values));
                     }
                 });
    const auto found = std::find_if(first.begin(), first.end(), [](std::int64_t column) { return column != none; });
    return found == first.end() ? std::nullopt : std::optional(Position{found - first.begin(), *found});
}

void multiply(const UpdateKernel& kernel, const LowRank& update, int threads, float* out) {
    for_each_run(kernel, update, threads,
                 [&](std::int64_t row, std::int64_t column, std::int64_t width, const float* values) {
                     std::copy_n(values, width, out + row * update.columns + column);
                 });
}

void rechoose_codes(const UpdateKernel& kernel, const BlockFormat& format, std::int32_t levels, const LowRank& update,
                    int threads, const std::uint8_t* blocks, std::uint8_t* out) {
    const quantizers::BlockAccess& access = quantizers::block_access[format.index];
    const quantizers::CodeRange range = access.range(levels);
    const std::int64_t row_bytes = update.columns / weights_per_block * format.block_bytes;
    for_each_run(kernel, update, threads,
                 [&](std::int64_t row, std::int64_t column, std::int64_t, const float* values) {
                     const std::int64_t place = row * row_bytes + column / weights_per_block * format.block_bytes;
                     quantizers::OpenBlock block = access.open(blocks + place);
                     if (is_zero_half(block.step) || !is_finite_half(block.step) || !is_finite_half(block.offset)) {
                         std::memmove(out + place, blocks + place, static_cast<std::size_t>(format.block_bytes));
                         return;
                     }
                     kernel.move_codes(values, float_from_half(block.step), range, block.codes);
                     access.close(block, out + place);
                 });
}

}  // namespace quantlab::adapters
