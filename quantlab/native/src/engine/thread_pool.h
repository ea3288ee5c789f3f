// Threads that wait for work, and meet at barriers inside it. The caller is one of them: thread 0.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace quantlab::engine {

// Between runs the other threads spin for some 70 microseconds and then sleep, so that an idle engine costs nothing.
//
// run() may be called from any thread, one call at a time (a second waits), never from inside a task. After a fork the
// child's pool starts threads of its own when it first runs. No thread of a pool handles signals.
class ThreadPool {
public:
    // `threads` at least 1. Where the system refuses a thread the pool is smaller: see size().
    explicit ThreadPool(int threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    // How many threads a task runs on: inside one of run_as_pays() that may be 1. Else it changes only in a forked child
    // that the system refuses threads, when that first runs.
    int size() const;

    // Calls task(thread) for thread = 0 .. size() - 1, all at the same time, and returns when all are done. Floating
    // point is set to its default inside (rounding to nearest, subnormals kept), whatever the caller has set.
    //
    // The first exception of a task is thrown here, once all threads are done; those at a barrier then, or coming to
    // one later, are unwound by an exception of their own.
    template <typename Task>
    void run(Task&& task) {
        call_on_all(std::ref(task), false);
    }

    // As run(), but on the caller alone, size() being 1 then, at times when threads wait for each other more than they
    // compute, because their cores have other work. For tasks that do the same on any number of threads.
    template <typename Task>
    void run_as_pays(Task&& task) {
        call_on_all(std::ref(task), true);
    }

    // Inside a task: waits until all threads are here. What any of them wrote before is seen by all after it.
    void barrier();

    // Inside a task, called by all threads with the same `parts`: calls work(part) for parts 0 .. parts - 1. Each thread
    // goes through a run of neighbouring parts, in order; one that is done takes parts from the ends of the others' runs,
    // so that cores that others use too are evened out. Meets nobody: a barrier makes the results seen.
    template <typename Work>
    void divide(int thread, std::int64_t parts, const Work& work) {
        const std::int64_t unit = parts / most_units + 1, units = (parts + unit - 1) / unit;
        const std::uint32_t division = next_division(thread);
        for (std::int64_t taken; (taken = take_unit(thread, division, static_cast<int>(units))) >= 0;) {
            const std::int64_t end = (taken + 1) * unit < parts ? (taken + 1) * unit : parts;
            for (std::int64_t part = taken * unit; part < end; ++part) {
                work(part);
            }
        }
    }

private:
    class Crew;

    void call_on_all(const std::function<void(int)>& task, bool as_pays);
    // Of parts taken at a time: places in a share have 16 bits.
    static constexpr std::int64_t most_units = 65535;

    std::uint32_t next_division(int thread);
    int take_unit(int thread, std::uint32_t division, int units);

    std::atomic<Crew*> crew_;  // owned, unless it is another process's
};

}  // namespace quantlab::engine
