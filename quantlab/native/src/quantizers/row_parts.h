// Rows cut into parts that share a pass over the second moment, and parts spread over threads.
#pragma once

#include "../threads.h"
#include "row_group.h"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace quantlab::quantizers {

inline constexpr std::int64_t groups_per_part = 4;  // each reads the panels of the second moment once

// work(groups): up to four row groups.
template <typename Work>
void for_each_row_part(const WeightView& weight, int threads, const Work& work) {
    constexpr std::int64_t rows = groups_per_part * lanes;
    const std::int64_t parts = (weight.rows + rows - 1) / rows;
    if (parts == 0) {
        return;
    }
    const auto useful = static_cast<int>(std::min<std::int64_t>(parts, threads));
    for_each_part(parts, static_cast<int>(parts), useful, [&](int, std::int64_t from, std::int64_t to) {
        for (std::int64_t part = from; part < to; ++part) {
            std::vector<RowGroup> groups;
            for (std::int64_t row = part * rows; row < std::min((part + 1) * rows, weight.rows); row += lanes) {
                groups.emplace_back(weight, row);
            }
            work(groups);
        }
    });
}

}  // namespace quantlab::quantizers
