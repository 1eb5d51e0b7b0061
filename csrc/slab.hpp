// Host memory for slabs: private anonymous mappings, on a NUMA node, in huge pages, all of it taken at once.
//
// A slab does not go along into children of fork(): copying its page tables would stall the engine, and pages that are
// page-locked must not become copies. It does not go into core dumps either: it holds what users wrote.
#ifndef WARMROUTE_SLAB_HPP
#define WARMROUTE_SLAB_HPP

#include <errno.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <map>
#include <mutex>

#include "core/check.hpp"
#include "pool.hpp"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace wr {

enum SlabGrant : uint32_t { SLAB_LOCKED = 1, SLAB_HUGE = 2, SLAB_TRANSPARENT = 4, SLAB_BOUND = 8 };

constexpr size_t SLAB_ALIGNMENT = 2u << 20;

struct Mapping {
    uint8_t *memory;
    size_t size;
    uint32_t granted;
};

// What was handed out, so that only that is ever unmapped. Children of fork() do not have their parent's slabs: a child
// that makes one begins a table of its own, and leaves the other, whose lock is in an unknown state, alone.
class Mappings {
  public:
    void add(const Mapping &mapping) {
        Table *table = table_.load();
        if (table == nullptr || table->owner != getpid()) {
            Table *mine = new Table;
            mine->inherited = table != nullptr;
            if (!table_.compare_exchange_strong(table, mine)) delete mine;
            table = table_.load();
        }
        std::lock_guard<std::mutex> hold(table->lock);
        table->held[mapping.memory] = mapping;
    }

    // WR_OK, also for a parent's slab, which is not there: then `mapping` is empty.
    int32_t take(void *memory, Mapping &mapping) {
        mapping = Mapping{};
        Table *table = table_.load();
        if (table == nullptr) return WR_INVALID;
        if (table->owner != getpid()) return WR_OK;
        std::lock_guard<std::mutex> hold(table->lock);
        auto found = table->held.find((uint8_t *)memory);
        if (found == table->held.end()) return table->inherited ? WR_OK : WR_INVALID;
        mapping = found->second;
        table->held.erase(found);
        return WR_OK;
    }

  private:
    struct Table {
        pid_t owner = getpid();
        bool inherited = false;
        std::mutex lock;
        std::map<uint8_t *, Mapping> held;
    };

    std::atomic<Table *> table_{nullptr};
};

// An aligned mapping whose size is a multiple of SLAB_ALIGNMENT, or null.
inline uint8_t *map_aligned(size_t size) {
    uint8_t *wide = (uint8_t *)mmap(nullptr, size + SLAB_ALIGNMENT, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (wide == MAP_FAILED) return nullptr;
    size_t before = (SLAB_ALIGNMENT - (uintptr_t)wide % SLAB_ALIGNMENT) % SLAB_ALIGNMENT;
    if (before > 0) munmap(wide, before);
    munmap(wide + before + size, SLAB_ALIGNMENT - before);
    return wide + before;
}

inline uint8_t *map_huge(size_t size) {
#if defined(MAP_HUGETLB)
    const int huge_2mib = 21 << 26;  // MAP_HUGE_2MB, which not every libc defines
    void *memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | huge_2mib, -1, 0);
    return memory == MAP_FAILED ? nullptr : (uint8_t *)memory;
#else
    (void)size;
    return nullptr;
#endif
}

constexpr int SLAB_NODES = 1024;

// Ask for a node's memory first (MPOL_PREFERRED: a full node lends from its neighbours instead of ending the process).
// False where there is no such node; where the call is forbidden, memory is simply not bound.
inline bool prefer_node(uint8_t *memory, size_t size, int node) {
    unsigned long mask[SLAB_NODES / (8 * sizeof(unsigned long))] = {};
    if (node >= SLAB_NODES) return false;
    mask[(size_t)node / (8 * sizeof(long))] = 1ul << ((size_t)node % (8 * sizeof(long)));
    const int preferred = 1;
    return syscall(SYS_mbind, memory, size, preferred, mask, SLAB_NODES, 0) == 0 || errno == ENOSYS || errno == EPERM;
}

// Whether samples of populated memory lie on the node.
inline bool lies_on(uint8_t *memory, size_t size, int node) {
    constexpr int samples = 64;
    void *pages[samples];
    int nodes[samples];
    for (int i = 0; i < samples; ++i) pages[i] = memory + size / samples * (size_t)i / 4096 * 4096;
    if (syscall(SYS_move_pages, 0, samples, pages, nullptr, nodes, 0) != 0) return false;
    for (int i = 0; i < samples; ++i)
        if (nodes[i] != node) return false;
    return true;
}

struct Population {
    uint8_t *memory;
    std::atomic<int> error;
};

// Kernels before 5.14 cannot populate; there each page is written to.
inline void populate(void *state, int64_t begin, int64_t end) {
    Population &population = *(Population *)state;
    uint8_t *first = population.memory + begin;
    size_t size = (size_t)(end - begin);
    int result;
    do {
        result = madvise(first, size, MADV_POPULATE_WRITE);
    } while (result != 0 && errno == EINTR);
    if (result == 0) return;
    if (errno != EINVAL) {
        population.error.store(errno);
        return;
    }
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    for (size_t at = 0; at < size; at += page) ((volatile uint8_t *)first)[at] = 0;
}

inline void unmap(const Mapping &mapping) { munmap(mapping.memory, mapping.size); }

inline int32_t map_slab(size_t size, int32_t node, bool huge, Helpers &helpers, Mapping &mapping, Reason &reason) {
    if (size == 0 || size > SIZE_MAX / 2) return refuse(reason, WR_INVALID, "a slab of %zu bytes", size);
    if (node < -1) return refuse(reason, WR_INVALID, "NUMA node %d", node);
    size_t whole = (size + SLAB_ALIGNMENT - 1) / SLAB_ALIGNMENT * SLAB_ALIGNMENT;
    mapping = Mapping{huge ? map_huge(whole) : nullptr, whole, 0};
    if (mapping.memory != nullptr) mapping.granted |= SLAB_HUGE;
    if (mapping.memory == nullptr) mapping.memory = map_aligned(whole);
    if (mapping.memory == nullptr)
        return refuse(reason, WR_NO_MEMORY, "%zu MiB cannot be mapped: %s", whole >> 20, strerror(errno));
    if (!(mapping.granted & SLAB_HUGE) && madvise(mapping.memory, whole, MADV_HUGEPAGE) == 0)
        mapping.granted |= SLAB_TRANSPARENT;
    madvise(mapping.memory, whole, MADV_DONTFORK);
    madvise(mapping.memory, whole, MADV_DONTDUMP);
    if (node >= 0 && !prefer_node(mapping.memory, whole, node)) {
        unmap(mapping);
        return refuse(reason, WR_INVALID, "NUMA node %d does not exist or may not be used", node);
    }
    Population population{mapping.memory, {0}};
    helpers.run(Job{populate, &population, (int64_t)whole, (int64_t)64 << 20});
    if (int error = population.error.load()) {
        unmap(mapping);
        return refuse(reason, WR_NO_MEMORY, "%zu MiB cannot be had from the machine: %s", whole >> 20, strerror(error));
    }
    if (node >= 0 && lies_on(mapping.memory, whole, node)) mapping.granted |= SLAB_BOUND;
    return WR_OK;
}

}  // namespace wr

#endif
