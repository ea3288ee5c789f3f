// Whether all threads of a pool or its caller alone should run a task, from how long earlier runs waited.
#pragma once

#include <algorithm>
#include <chrono>

namespace quantlab::engine {

// Threads that meet wait for the one whose core does something else at the moment. Where the caller, in runs of all n
// threads, waited for so long that n times the rest would have been less, it had better compute alone. It does so for a
// while; then all threads are tried again, and if that does not pay, the next while is twice as long.
//
// One caller at a time. Times are given, so that a test need not wait.
class PayingThreads {
public:
    using Duration = std::chrono::nanoseconds;

    static constexpr Duration evidence = std::chrono::milliseconds(5);  // of runs, before they count
    static constexpr Duration memory = std::chrono::milliseconds(50);   // of runs, before older ones count half
    static constexpr Duration first_rest = std::chrono::milliseconds(50), longest_rest = std::chrono::milliseconds(800);

    // `threads`, at least 1, are all.
    explicit PayingThreads(int threads) : threads_(threads) {}

    // How many should run a task that begins at `now`: all, or 1.
    int choice(Duration now) const { return now < alone_until_ ? 1 : threads_; }

    // Notes a run of all threads that ended at `now`: the caller took so long, and waited for so much of that.
    void take(Duration now, Duration took, Duration waited) {
        took_ += took;
        waited_ += waited;
        paid_ += took;
        if (paid_ > longest_rest) rest_ = first_rest;
        if (took_ < evidence) return;
        if (waited_ * threads_ > took_ * (threads_ - 1)) {
            alone_until_ = now + rest_;
            rest_ = std::min(2 * rest_, longest_rest);
            took_ = waited_ = paid_ = Duration(0);
        } else if (took_ > memory) {
            took_ /= 2;
            waited_ /= 2;
        }
    }

private:
    int threads_;
    Duration took_{0}, waited_{0};  // of the last runs
    Duration paid_{0};              // what all threads ran for since they did not pay
    Duration alone_until_{Duration::min()}, rest_ = first_rest;
};

}  // namespace quantlab::engine
