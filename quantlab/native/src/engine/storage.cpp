#include "storage.h"

#include <cstring>
#include <new>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace quantlab::engine {

namespace {

constexpr std::size_t huge_page = std::size_t{1} << 21;
constexpr std::align_val_t alignment{64};

// Large storage is mapped by itself, on huge pages where the system grants them: the multiplication then spends less
// time looking up addresses. What lies beyond the last whole huge page stays on small ones.
#if defined(__unix__) || defined(__APPLE__)

bool is_mapped(std::size_t bytes) { return bytes >= huge_page; }

std::uint8_t* map_storage(std::size_t bytes) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t used = (bytes + page - 1) / page * page;
    void* mapped = mmap(nullptr, used + huge_page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) {
        throw std::bad_alloc();
    }
    auto* start = static_cast<std::uint8_t*>(mapped);
    const std::size_t ahead = huge_page - reinterpret_cast<std::uintptr_t>(start) % huge_page;
    munmap(start, ahead);
    if (ahead < huge_page) {
        munmap(start + ahead + used, huge_page - ahead);
    }
#if defined(MADV_HUGEPAGE)
    madvise(start + ahead, used, MADV_HUGEPAGE);
#endif
    return start + ahead;
}

void unmap_storage(std::uint8_t* storage, std::size_t bytes) { munmap(storage, bytes); }

#else

bool is_mapped(std::size_t) { return false; }
std::uint8_t* map_storage(std::size_t) { throw std::bad_alloc(); }
void unmap_storage(std::uint8_t*, std::size_t) {}

#endif

std::uint8_t* allocated(std::size_t bytes) {
    if (is_mapped(bytes)) {
        return map_storage(bytes);
    }
    auto* storage = static_cast<std::uint8_t*>(::operator new(bytes, alignment));
    std::memset(storage, 0, bytes);
    return storage;
}

}  // namespace

void FreeStorage::operator()(std::uint8_t* storage) const {
    if (is_mapped(bytes)) {
        unmap_storage(storage, bytes);
    } else {
        ::operator delete(storage, alignment);
    }
}

Storage new_storage(std::size_t bytes) { return Storage(allocated(bytes), FreeStorage{bytes}); }

}  // namespace quantlab::engine
