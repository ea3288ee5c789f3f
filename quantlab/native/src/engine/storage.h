// Memory for weights and caches: zero bytes, aligned to 64; on huge pages where it is large and the system grants them,
// so that reading it spends less time looking up addresses. Large memory counts as used only where it was written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace quantlab::engine {

struct FreeStorage {
    std::size_t bytes;
    void operator()(std::uint8_t* storage) const;
};

using Storage = std::unique_ptr<std::uint8_t[], FreeStorage>;

// Throws std::bad_alloc.
Storage new_storage(std::size_t bytes);

}  // namespace quantlab::engine
