// What threads wait for: a number that another thread changes. They spin for a while, and then sleep.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace quantlab::engine {

// In a cache line of its own: threads that spin on one do not slow those that write another.
class alignas(64) Bell {
public:
    using Duration = std::chrono::nanoseconds;

    struct Wait {
        Duration took;  // 0 for less than a few microseconds
        bool slept;
    };

    std::uint32_t rings() const { return rings_.load(std::memory_order_acquire); }

    // What was written before is seen by all that hear it. A system call only if a thread sleeps.
    void ring();

    // Returns once rings() is not `heard`, having spun for `patience` at the most; with none it sleeps at once.
    //
    // It never yields. Linux lets a thread that yields pay with the rest of its time slice (6.18: with its share of the
    // slices to come): where something else computes on the core, that is milliseconds for each call. A sleeper gets its
    // core back as soon as the bell rings.
    Wait wait(std::uint32_t heard, Duration patience);

private:
    void sleep(std::uint32_t heard);

    // Both sequentially consistent where one ring could pass a thread on its way to sleep.
    std::atomic<std::uint32_t> rings_ = 0;
    std::atomic<std::uint32_t> sleepers_ = 0;
};

}  // namespace quantlab::engine
