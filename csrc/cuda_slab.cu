// Slabs: host memory near the GPU, page-locked in pieces.
#include "slab.hpp"

#include "cuda_context.hpp"

namespace wr {
namespace cuda {

namespace {

struct Locked {
    uint64_t begin, size;
    CUcontext context;
    bool same; // the GPU sees it at the same address
};

struct Registry {
    std::mutex lock;
    std::vector<Locked> held;
    std::atomic<int> in_pieces{0}; // slabs of more than one registration
};

Registry &registry() {
    static Registry made;
    return made;
}

Mappings &mappings() {
    static Mappings made;
    return made;
}

size_t piece_at(size_t size, size_t at) { return std::min(kPinnedPiece, size - at); }

cudaError_t unlock(uint8_t *memory, size_t size) {
    cudaError_t worst = cudaSuccess;
    for (size_t at = 0; at < size; at += kPinnedPiece) {
        const cudaError_t error = cudaHostUnregister(memory + at);
        if (error != cudaSuccess) worst = error;
    }
    cudaGetLastError();
    return worst;
}

int32_t lock_pages(wr_context &context, uint8_t *memory, size_t size, bool &same) {
    same = true;
    for (size_t at = 0; at < size; at += kPinnedPiece) {
        const unsigned flags = cudaHostRegisterPortable | cudaHostRegisterMapped;
        const cudaError_t error = cudaHostRegister(memory + at, piece_at(size, at), flags);
        if (error != cudaSuccess) {
            unlock(memory, at);
            return refuse(context.reason, error == cudaErrorMemoryAllocation ? WR_NO_MEMORY : WR_DEVICE,
                          "%zu MiB cannot be page-locked: %s; ask for less, or raise the limit of locked memory", size >> 20,
                          cudaGetErrorString(error));
        }
        void *seen = nullptr;
        same = same && cudaHostGetDevicePointer(&seen, memory + at, 0) == cudaSuccess && seen == memory + at;
    }
    if (!same) cudaGetLastError(); // or the next launch would seem to have failed
    return WR_OK;
}

void remember(const Locked &locked) {
    std::lock_guard<std::mutex> hold(registry().lock);
    registry().held.push_back(locked);
    registry().in_pieces += locked.size > kPinnedPiece;
}

bool forget(uint64_t begin, Locked &locked) {
    Registry &known = registry();
    std::lock_guard<std::mutex> hold(known.lock);
    for (size_t i = 0; i < known.held.size(); ++i) {
        if (known.held[i].begin != begin) continue;
        locked = known.held[i];
        known.in_pieces -= locked.size > kPinnedPiece;
        known.held.erase(known.held.begin() + static_cast<ptrdiff_t>(i));
        return true;
    }
    return false;
}

// On the GPU's own node where the caller has no wish and the machine lets us.
int32_t map_near(wr_context &context, size_t size, int32_t node, bool huge, Mapping &mapping) {
    if (node < 0 && context.node >= 0 &&
        map_slab(size, context.node, huge, context.helpers, mapping, context.reason) == WR_OK)
        return WR_OK;
    return map_slab(size, node, huge, context.helpers, mapping, context.reason);
}

}  // namespace

uint64_t registered_until(uint64_t address) {
    Registry &known = registry();
    if (known.in_pieces.load(std::memory_order_relaxed) == 0) return UINT64_MAX;
    std::lock_guard<std::mutex> hold(known.lock);
    for (const Locked &each : known.held)
        if (address >= each.begin && address - each.begin < each.size)
            return each.begin + (address - each.begin) / kPinnedPiece * kPinnedPiece + kPinnedPiece;
    return UINT64_MAX;
}

bool in_slab(uint64_t address, uint64_t size, uint64_t &device_address) {
    Registry &known = registry();
    std::lock_guard<std::mutex> hold(known.lock);
    for (const Locked &each : known.held) {
        const bool inside = address >= each.begin && size <= each.size && address - each.begin <= each.size - size;
        if (!inside || !each.same) continue;
        device_address = address;
        return true;
    }
    return false;
}

int32_t slab_alloc(wr_context &context, size_t size, int32_t node, bool huge, bool lock, void **memory,
                   uint32_t *granted) {
    Mapping mapping;
    WR_PASSED(map_near(context, size, node, huge, mapping));
    if (lock) {
        bool same = false;
        if (const int32_t status = lock_pages(context, mapping.memory, mapping.size, same)) {
            unmap(mapping);
            return status;
        }
        mapping.granted |= SLAB_LOCKED;
        remember(Locked{reinterpret_cast<uint64_t>(mapping.memory), mapping.size, context.primary, same});
    }
    mappings().add(mapping);
    *memory = mapping.memory;
    if (granted != nullptr) *granted = mapping.granted;
    return WR_OK;
}

int32_t slab_free(void *memory) {
    if (memory == nullptr) return WR_OK;
    Mapping mapping;
    const int32_t status = mappings().take(memory, mapping);
    if (mapping.memory == nullptr) return status;
    Locked locked;
    if (forget(reinterpret_cast<uint64_t>(memory), locked)) {
        const Current current(locked.context);
        // What a copy under way may still touch stays mapped.
        if (unlock(mapping.memory, mapping.size) != cudaSuccess) return WR_DEVICE;
    }
    unmap(mapping);
    return status;
}

}  // namespace cuda
}  // namespace wr
