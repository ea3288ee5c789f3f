// The pool: every thread runs once, barriers hold, exceptions arrive, forks and signals break nothing.
#include "check.h"

#include "../../../quantlab/native/src/engine/bell.h"
#include "../../../quantlab/native/src/engine/paying_threads.h"
#include "../../../quantlab/native/src/engine/thread_pool.h"

#include <atomic>
#include <cfenv>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <sys/time.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <vector>

using quantlab::engine::Bell;
using quantlab::engine::PayingThreads;
using quantlab::engine::ThreadPool;

namespace {

// Asleep or spinning, every ring is heard, and what was written before it is seen.
void test_bells_are_heard() {
    for (const auto patience : {Bell::Duration(0), Bell::Duration(std::chrono::microseconds(50))}) {
        Bell question, answer;
        int asked = 0, answered = 0;
        std::thread other([&] {
            for (std::uint32_t round = 0; round < 300; ++round) {
                question.wait(round, patience);
                answered = asked;
                answer.ring();
            }
        });
        for (std::uint32_t round = 0; round < 300; ++round) {
            if (round % 50 == 0) usleep(300);  // the other one sleeps
            asked = static_cast<int>(round) + 7;
            question.ring();
            answer.wait(round, patience);
            CHECK(answered == asked);
        }
        other.join();
        CHECK(question.rings() == 300);
    }
}

// A bell that has rung already is not waited for; one that rings late is slept for, however long it takes.
void test_waits_tell_what_they_were() {
    Bell bell;
    bell.ring();
    const Bell::Wait none = bell.wait(0, std::chrono::microseconds(50));
    CHECK(!none.slept);
    CHECK(none.took == Bell::Duration(0));
    std::atomic<bool> waits = false;
    std::thread other([&] {
        while (!waits) std::this_thread::yield();
        usleep(20000);
        bell.ring();
    });
    waits = true;
    const Bell::Wait late = bell.wait(1, std::chrono::microseconds(50));
    CHECK(late.slept);
    CHECK(late.took > std::chrono::milliseconds(1));
    other.join();
}

using Milliseconds = std::chrono::milliseconds;

// Runs of `threads` whose caller waits for so many of 10 ms, from `from` to `to`; how many of them were of all threads.
int runs_together(PayingThreads& paying, int threads, Milliseconds from, Milliseconds to, int waited) {
    int together = 0;
    for (Milliseconds now = from; now < to; now += Milliseconds(10)) {
        if (paying.choice(now) == 1) continue;
        CHECK(paying.choice(now) == threads);
        paying.take(now + Milliseconds(10), Milliseconds(10), Milliseconds(waited));
        ++together;
    }
    return together;
}

// The caller computes alone where n times the rest of a run is less than the run, and for longer each time.
void test_threads_that_do_not_pay() {
    const Milliseconds second{1000};
    PayingThreads pair(2);
    CHECK(runs_together(pair, 2, {}, second, 4) == 100);
    PayingThreads late(2);
    CHECK(runs_together(late, 2, {}, second, 6) == 5);  // at 0, 60, 170, 380 and 790 ms
    PayingThreads four(4);
    CHECK(runs_together(four, 4, {}, second, 7) == 100);
    CHECK(runs_together(four, 4, second, 2 * second, 8) < 20);
}

// Once they pay again, the next rest is a short one.
void test_threads_that_pay_again() {
    PayingThreads pair(2);
    runs_together(pair, 2, {}, Milliseconds(10000), 9);
    CHECK(runs_together(pair, 2, Milliseconds(20000), Milliseconds(22000), 0) == 200);
    CHECK(runs_together(pair, 2, Milliseconds(22000), Milliseconds(23000), 10) >= 5);
}

// A short run proves nothing, nor does a pause among many.
void test_a_hiccup_is_forgiven() {
    PayingThreads pair(2);
    pair.take(Milliseconds(1), Milliseconds(1), Milliseconds(1));
    CHECK(pair.choice(Milliseconds(1)) == 2);
    CHECK(runs_together(pair, 2, {}, Milliseconds(100), 1) == 10);
    pair.take(Milliseconds(110), Milliseconds(10), Milliseconds(10));
    CHECK(pair.choice(Milliseconds(110)) == 2);
}

void test_every_thread_runs_once(ThreadPool& pool) {
    std::vector<std::atomic<int>> calls(static_cast<std::size_t>(pool.size()));
    for (int round = 0; round < 200; ++round) {
        pool.run([&](int thread) { ++calls[static_cast<std::size_t>(thread)]; });
    }
    for (const std::atomic<int>& count : calls) {
        CHECK(count == 200);
    }
}

// What others wrote before a barrier is seen after it: plain memory, so that a sanitizer would see a race.
void test_barriers_hold(ThreadPool& pool, int rounds) {
    std::vector<int> values(static_cast<std::size_t>(pool.size()), 0);
    pool.run([&](int thread) {
        for (int round = 1; round <= rounds; ++round) {
            values[static_cast<std::size_t>(thread)] = round;
            pool.barrier();
            for (const int value : values) {
                CHECK(value == round);
            }
            pool.barrier();
        }
    });
}

void check_counts(const std::vector<std::atomic<int>>& done, std::size_t parts, int count) {
    for (std::size_t part = 0; part < done.size(); ++part) {
        CHECK(done[part] == (part < parts ? count : 0));
    }
}

// Every part once, whoever takes it: with fewer parts than threads, none, more than a share has places for, and with
// divisions that follow each other without a meeting.
void test_parts_are_divided(ThreadPool& pool) {
    for (const std::size_t parts : {std::size_t{0}, std::size_t{1}, std::size_t{3}, std::size_t{1000}, std::size_t{200001}}) {
        std::vector<std::atomic<int>> done(parts + 1);
        const int rounds = parts > 1000 ? 2 : 50;
        pool.run([&](int thread) {
            for (int round = 0; round < rounds; ++round) {
                pool.divide(thread, static_cast<std::int64_t>(parts), [&](std::int64_t part) { ++done[static_cast<std::size_t>(part)]; });
            }
        });
        check_counts(done, parts, rounds);
    }
}

// A thread that has begun late, or not at all, finds its parts done.
void test_divided_parts_are_taken_over(ThreadPool& pool) {
    std::vector<std::atomic<int>> done(100);
    std::atomic<int> all = 0;
    pool.run([&](int thread) {
        if (thread != 0) {
            while (all != 100) std::this_thread::yield();
        }
        pool.divide(thread, 100, [&](std::int64_t part) {
            CHECK(thread == 0);
            ++done[static_cast<std::size_t>(part)];
            ++all;
        });
    });
    check_counts(done, 100, 1);
}

// Plain memory, so that a sanitizer would see two threads with one part, or a barrier that does not hold.
void test_divided_results_are_seen(ThreadPool& pool) {
    std::vector<int> done(1000, 0);
    pool.run([&](int thread) {
        for (int round = 1; round <= 20; ++round) {
            pool.divide(thread, 1000, [&](std::int64_t part) { ++done[static_cast<std::size_t>(part)]; });
            pool.barrier();
            CHECK(done[0] == round);
            CHECK(done[999] == round);
            pool.barrier();
        }
    });
}

void test_divisions_after_a_failure(ThreadPool& pool) {
    for (int failing = 0; failing < pool.size(); ++failing) {
        std::string message;
        try {
            pool.run([&](int thread) {
                for (int round = 0; round < 5; ++round) {
                    if (thread == failing && round == 2) throw std::runtime_error("in between");
                    pool.divide(thread, 10, [](std::int64_t) {});
                    if (round > 2) pool.barrier();
                }
            });
        } catch (const std::runtime_error& error) {
            message = error.what();
        }
        CHECK(message == "in between");
        test_parts_are_divided(pool);
    }
}

template <typename Task>
std::string message_of_failure(ThreadPool& pool, const Task& task) {
    try {
        pool.run(task);
    } catch (const std::runtime_error& error) {
        return error.what();
    }
    return "";
}

// One thread fails, at once or between barriers; the others wait for it at a barrier, or know of none.
void test_exceptions_arrive(ThreadPool& pool) {
    for (int failing = 0; failing < pool.size(); ++failing) {
        for (const int meetings : {0, 1, 5}) {
            const std::string message = message_of_failure(pool, [&](int thread) {
                for (int i = 0; i < 10; ++i) {
                    if (thread == failing && i == meetings) {
                        throw std::runtime_error("thread " + std::to_string(thread));
                    }
                    pool.barrier();
                }
            });
            CHECK(message == "thread " + std::to_string(failing));
        }
        const std::string message = message_of_failure(pool, [&](int thread) {
            if (thread == failing) {
                throw std::runtime_error("alone");
            }
        });
        CHECK(message == "alone");
        test_barriers_hold(pool, 10);
    }
}

void test_floating_point_is_the_default_inside(ThreadPool& pool) {
    std::fesetround(FE_UPWARD);
    std::vector<int> modes(static_cast<std::size_t>(pool.size()), -1);
    pool.run([&](int thread) { modes[static_cast<std::size_t>(thread)] = std::fegetround(); });
    CHECK(std::fegetround() == FE_UPWARD);
    std::fesetround(FE_TONEAREST);
    for (const int mode : modes) {
        CHECK(mode == FE_TONEAREST);
    }
}

// With a helper that is always late, the caller soon runs alone; the same results come of it, and failures arrive.
void test_runs_as_pays() {
    ThreadPool pool(3);
    int alone = 0;
    for (int round = 0; round < 400 && alone < 20; ++round) {
        std::vector<std::atomic<int>> done(100);
        std::atomic<int> calls = 0;
        pool.run_as_pays([&](int thread) {
            ++calls;
            if (thread == 0) alone += pool.size() == 1;
            if (thread != 0) usleep(3000);
            pool.divide(thread, 100, [&](std::int64_t part) { ++done[static_cast<std::size_t>(part)]; });
            pool.barrier();
            CHECK(done[99] == 1);
        });
        CHECK(calls == 1 || calls == 3);
        CHECK(pool.size() == 3);
        check_counts(done, 100, 1);
        if (round % 10 == 0) test_parts_are_divided(pool);  // of all threads, whatever pays
    }
    CHECK(alone == 20);
    std::string message;
    try {
        pool.run_as_pays([&](int) { throw std::runtime_error("alone"); });
    } catch (const std::runtime_error& error) {
        message = error.what();
    }
    CHECK(message == "alone");
    test_barriers_hold(pool, 10);
}

// The child has the pool's memory but not its threads. It ends without unwinding: the parent's objects are the parent's.
void test_forks(ThreadPool& pool) {
    for (int round = 0; round < 3; ++round) {
        const pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            std::atomic<int> calls = 0;
            pool.run([&](int) { ++calls; });
            test_barriers_hold(pool, 20);
            {
                ThreadPool another(2);
                test_barriers_hold(another, 20);
            }
            _exit(calls == pool.size() ? 0 : 1);
        }
        int status = -1;
        CHECK(waitpid(child, &status, 0) == child);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
        test_every_thread_runs_once(pool);
    }
}

// A pool made before the fork and never used after it.
void test_destruction_in_a_child() {
    auto* pool = new ThreadPool(3);
    pool->run([](int) {});
    const pid_t child = fork();
    if (child == 0) {
        delete pool;
        _exit(0);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    delete pool;
}

std::atomic<int> signals_seen = 0;
std::thread::id signal_thread;

void on_signal(int) {
    ++signals_seen;
    signal_thread = std::this_thread::get_id();
}

void test_signals(ThreadPool& pool) {
    struct sigaction action = {};
    action.sa_handler = on_signal;
    CHECK(sigaction(SIGALRM, &action, nullptr) == 0);
    const itimerval often{{0, 200}, {0, 200}};  // microseconds
    CHECK(setitimer(ITIMER_REAL, &often, nullptr) == 0);
    for (int round = 0; round < 1000000 && signals_seen < 20; ++round) {
        test_barriers_hold(pool, 5);
    }
    const itimerval never{};
    setitimer(ITIMER_REAL, &never, nullptr);
    CHECK(signals_seen >= 20);
    CHECK(signal_thread == std::this_thread::get_id());
}

// Pools asleep, several of them, used in turns and from several threads.
void test_several_pools() {
    ThreadPool first(2);
    ThreadPool second(3);
    for (int round = 0; round < 20; ++round) {
        usleep(300);
        test_barriers_hold(first, 3);
        test_barriers_hold(second, 3);
    }
    std::vector<std::thread> users;
    std::atomic<int> calls = 0;
    for (int i = 0; i < 3; ++i) {
        users.emplace_back([&] {
            for (int round = 0; round < 50; ++round) {
                first.run([&](int) { ++calls; });
            }
        });
    }
    for (std::thread& user : users) {
        user.join();
    }
    CHECK(calls == 3 * 50 * first.size());
}

}  // namespace

void test_thread_pool() {
    test_bells_are_heard();
    test_waits_tell_what_they_were();
    test_threads_that_do_not_pay();
    test_threads_that_pay_again();
    test_a_hiccup_is_forgiven();
    for (const int threads : {1, 2, 5}) {
        std::printf("threads: %d\n", threads);
        std::fflush(stdout);
        ThreadPool pool(threads);
        CHECK(pool.size() == threads);
        test_every_thread_runs_once(pool);
        test_barriers_hold(pool, threads == 2 ? 2000 : 200);
        test_parts_are_divided(pool);
        test_divided_parts_are_taken_over(pool);
        test_divided_results_are_seen(pool);
        test_divisions_after_a_failure(pool);
        test_exceptions_arrive(pool);
        test_floating_point_is_the_default_inside(pool);
        test_forks(pool);
    }
    test_runs_as_pays();
    test_several_pools();
    test_destruction_in_a_child();
    ThreadPool unused(4);
    ThreadPool pool(2);
    test_signals(pool);
}
