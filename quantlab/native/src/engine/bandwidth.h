// How fast this machine reads memory: the ruler for a decoder that reads all its weights for every token.
#pragma once

#include <cstdint>

namespace quantlab::engine {

// Bytes a second, the best of `passes` over `bytes` that `threads` threads share, in huge pages where the system gives
// them, with the widest loads of the instruction set in use. Throws std::bad_alloc.
double read_bandwidth(std::int64_t bytes, int threads, int passes);

}  // namespace quantlab::engine
