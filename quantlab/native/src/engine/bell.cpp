#include "bell.h"

#include <climits>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace quantlab::engine {

namespace {

using Clock = std::chrono::steady_clock;

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// std::atomic's own wait yields before it sleeps, so Linux is asked itself.
#if defined(__linux__)

static_assert(sizeof(std::atomic<std::uint32_t>) == sizeof(std::uint32_t));

void sleep_while(const std::atomic<std::uint32_t>& word, std::uint32_t value) {
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void wake_all(std::atomic<std::uint32_t>& word) {
    syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

#else

void sleep_while(const std::atomic<std::uint32_t>& word, std::uint32_t value) { word.wait(value); }
void wake_all(std::atomic<std::uint32_t>& word) { word.notify_all(); }

#endif

}  // namespace

void Bell::ring() {
    rings_.fetch_add(1);
    if (sleepers_.load() != 0) wake_all(rings_);
}

Bell::Wait Bell::wait(std::uint32_t heard, Duration patience) {
    constexpr int spins_a_look = 64;  // at the clock, of 10 to 40 ns each
    const auto spin = [&] {
        for (int i = 0; i < spins_a_look; ++i) {
            if (rings() != heard) return true;
            relax();
        }
        return false;
    };
    if (patience > Duration(0) && spin()) return {Duration(0), false};
    const Clock::time_point start = Clock::now();
    Duration took{0};
    for (; took < patience; took = Clock::now() - start) {
        if (spin()) return {Clock::now() - start, false};
    }
    sleep(heard);
    return {Clock::now() - start, true};
}

void Bell::sleep(std::uint32_t heard) {
    sleepers_.fetch_add(1);
    while (rings_.load() == heard) sleep_while(rings_, heard);
    sleepers_.fetch_sub(1, std::memory_order_relaxed);
}

}  // namespace quantlab::engine
