#include "bandwidth.h"

#include "decoder_ops.h"
#include "thread_pool.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace quantlab::engine {

double read_bandwidth(std::int64_t bytes, int threads, int passes) {
    constexpr std::int64_t huge_page = 2 << 20;
    const std::int64_t rounded = std::max<std::int64_t>(1, bytes / huge_page) * huge_page;
    const std::unique_ptr<float, decltype(&std::free)> memory(
        static_cast<float*>(std::aligned_alloc(huge_page, static_cast<std::size_t>(rounded))), &std::free);
    if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    madvise(memory.get(), static_cast<std::size_t>(rounded), MADV_HUGEPAGE);
#endif
    const std::int64_t count = rounded / static_cast<std::int64_t>(sizeof(float));
    ThreadPool pool(threads);
    std::vector<float> sums(static_cast<std::size_t>(threads));
    const auto part = [&](int thread) { return count / 128 * thread / pool.size() * 128; };
    pool.run([&](int thread) { std::fill(memory.get() + part(thread), memory.get() + part(thread + 1), 1.0f); });
    const DecoderOps& ops = chosen_decoder_ops();
    double best = 0;
    for (int pass = 0; pass < passes; ++pass) {
        const auto started = std::chrono::steady_clock::now();
        pool.run([&](int thread) {
            sums[static_cast<std::size_t>(thread)] = ops.sum(memory.get() + part(thread), part(thread + 1) - part(thread));
        });
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - started;
        // The sums are needed: nothing of the reading may be left out.
        const float sum = std::max(1.0f, *std::max_element(sums.begin(), sums.end()));
        best = std::max(best, static_cast<double>(rounded) / seconds.count() * (sum > 0 ? 1.0 : 0.0));
    }
    return best;
}

}  // namespace quantlab::engine
