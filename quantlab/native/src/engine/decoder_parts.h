// How a decoder's work is kept apart: one user at a time, and a pass divided among threads. Included by the files that
// implement Decoder.
#pragma once

#include "decoder.h"
#include "decoder_scratch.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <stdexcept>

namespace quantlab::engine {

// A sequence has one user at a time: two would write beyond its cache. Not a lock: a second user is a mistake to report,
// and in a forked child nobody would ever unlock it.
class OnlyUser {
public:
    explicit OnlyUser(std::atomic<bool>& used) : used_(used) {
        if (used_.exchange(true, std::memory_order_acquire)) {
            throw std::runtime_error("the decoder is in use by another thread; give each thread a decoder of its own");
        }
    }
    ~OnlyUser() { used_.store(false, std::memory_order_release); }
    OnlyUser(const OnlyUser&) = delete;
    OnlyUser& operator=(const OnlyUser&) = delete;

private:
    std::atomic<bool>& used_;
};

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
