// How a pass's work is divided among threads. Included by the files that implement Decoder.
#pragma once

#include "decoder.h"
#include "decoder_scratch.h"

#include <algorithm>
#include <cstdint>

namespace quantlab::engine {

// The part of [0, count) that thread `thread` of `threads` works on, in whole units.
inline Decoder::Range share(std::int64_t count, int thread, int threads, std::int64_t unit = 1) {
    const std::int64_t units = (count + unit - 1) / unit;
    const auto end = [&](int index) { return std::min(count, units * index / threads * unit); };
    return {end(thread), end(thread + 1)};
}

// Calls work(rows) for parts of `count` rows, by all threads.
template <typename Work>
void Decoder::divide(const Pass& pass, std::int64_t count, const Work& work) {
    pool_.divide(pass.thread, (count + divided_rows - 1) / divided_rows, [&](std::int64_t part) {
        work(Range{part * divided_rows, std::min(count, (part + 1) * divided_rows)});
    });
}

}  // namespace quantlab::engine
