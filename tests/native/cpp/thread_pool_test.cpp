// The pool: every thread runs once, barriers hold, exceptions arrive, forks and signals break nothing.
#include "check.h"

#include "../../../quantlab/native/src/engine/thread_pool.h"

#include <atomic>
#include <cfenv>
#include <csignal>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <sys/time.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <vector>

using quantlab::engine::ThreadPool;

namespace {

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
    test_several_pools();
    test_destruction_in_a_child();
    ThreadPool unused(4);
    ThreadPool pool(2);
    test_signals(pool);
}
