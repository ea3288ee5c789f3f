// Work over rows on several threads, started for one call and gone after it: nothing is left for a fork to break.
#pragma once

#include <atomic>
#include <cfenv>
#include <cstddef>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace quantlab {

// Rounding to nearest and no flushing of subnormals, whatever the calling thread has set, until the end of a scope.
class DefaultFloatingPoint {
public:
    DefaultFloatingPoint() {
        std::fegetenv(&saved_);
        std::fesetenv(FE_DFL_ENV);
    }
    ~DefaultFloatingPoint() { std::fesetenv(&saved_); }
    DefaultFloatingPoint(const DefaultFloatingPoint&) = delete;
    DefaultFloatingPoint& operator=(const DefaultFloatingPoint&) = delete;

private:
    std::fenv_t saved_;
};

// Calls work(part, first, last) for `parts` consecutive ranges that make up [0, count), from `threads` threads, this
// one among them. Each takes the next part when it is done with one, so that a core which others use too holds nobody
// up. `work` must not throw. A thread that cannot be started costs speed, nothing else.
template <typename Work>
void for_each_part(std::int64_t count, int parts, int threads, const Work& work) {
    std::atomic<int> next = 0;
    const auto run = [&work, &next, count, parts] {
        const DefaultFloatingPoint guard;
        for (int part = next++; part < parts; part = next++) {
            work(part, count * part / parts, count * (part + 1) / parts);
        }
    };
    std::vector<std::thread> others;
    others.reserve(static_cast<std::size_t>(threads - 1));
    for (int i = 1; i < threads; ++i) {
        try {
            others.emplace_back(run);
        } catch (const std::system_error&) {
            break;
        }
    }
    run();
    for (std::thread& other : others) {
        other.join();
    }
}

}  // namespace quantlab
