// Moves random blocks of random layouts in memory of exactly their size, from several threads at once, and compares every
// byte with a plain loop: stress ROUNDS SEED. For builds with sanitizers. Exits with 1 where a byte is wrong.
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "../warmroute.h"

namespace {

using Bytes = std::vector<uint8_t>;

struct Random {
    std::mt19937_64 source;
    int32_t from(int32_t low, int32_t high) {
        return low + (int32_t)(source() % (uint64_t)(high - low + 1));
    }
    Bytes bytes(size_t count) {
        Bytes made(count);
        for (uint8_t &each : made) each = (uint8_t)(source() >> 32);
        return made;
    }
};

[[noreturn]] void fail(const char *what, const wr_context *context) {
    fprintf(stderr, "%s: %s\n", what, context != nullptr ? wr_explain(context) : "");
    _exit(1);
}

struct Case {
    int32_t layers, blocks, heads, tokens, content;
    int64_t layer_stride, block_stride, head_stride, token_stride, size;
};

// Dimensions in a random order from the inside out, each with a little padding now and then.
Case random_case(Random &random) {
    bool large = random.from(0, 3) == 0;
    Case made{random.from(1, 3), random.from(1, 12), random.from(1, 4), random.from(1, 8),
              large ? random.from(1, 512) * 64 : random.from(1, 300), 0, 0, 0, 0, 0};
    int64_t counts[4] = {made.tokens, made.heads, made.blocks, made.layers}, strides[4];
    int order[4] = {0, 1, 2, 3};
    std::shuffle(order, order + 4, random.source);
    int64_t extent = made.content;
    for (int each : order) {
        strides[each] = extent + (random.from(0, 3) == 0 ? random.from(0, 70) : 0);
        extent += (counts[each] - 1) * strides[each];
    }
    made.token_stride = strides[0];
    made.head_stride = strides[1];
    made.block_stride = strides[2];
    made.layer_stride = strides[3];
    made.size = extent;
    return made;
}

struct Plan {
    wr_range range;
    std::vector<int32_t> ids;
    int32_t packed_first_block, packed_blocks;
};

Plan random_plan(Random &random, const Case &shape) {
    Plan plan{};
    plan.range.heads = random.from(1, shape.heads);
    plan.range.first_head = random.from(0, shape.heads - plan.range.heads);
    plan.range.packed_heads = plan.range.heads + random.from(0, 2);
    plan.range.packed_first_head = random.from(0, plan.range.packed_heads - plan.range.heads);
    plan.ids.resize((size_t)shape.blocks);
    std::iota(plan.ids.begin(), plan.ids.end(), 0);
    if (random.from(0, 1)) std::shuffle(plan.ids.begin(), plan.ids.end(), random.source);
    plan.ids.resize((size_t)random.from(1, shape.blocks));
    plan.packed_blocks = (int32_t)plan.ids.size() + random.from(0, 2);
    plan.packed_first_block = random.from(0, plan.packed_blocks - (int32_t)plan.ids.size());
    plan.range.first_token = random.from(0, 3) ? 0 : random.from(0, shape.tokens);
    plan.range.token_count = random.from(0, 3) ? INT32_MAX : random.from(0, 3 * shape.tokens);
    return plan;
}

// The plain loop: what a move makes of `cache` and `packed`.
void move_plainly(const Case &shape, const Plan &plan, Bytes &cache, Bytes &packed, bool load) {
    for (int32_t layer = 0; layer < shape.layers; ++layer)
        for (size_t at = 0; at < plan.ids.size(); ++at)
            for (int32_t head = 0; head < plan.range.heads; ++head)
                for (int32_t token = 0; token < shape.tokens; ++token) {
                    int64_t number = (int64_t)at * shape.tokens + token - plan.range.first_token;
                    if (number < 0 || number >= plan.range.token_count) continue;
                    int64_t page = (int64_t)layer * plan.packed_blocks + plan.packed_first_block + (int64_t)at;
                    int64_t unit = page * plan.range.packed_heads + plan.range.packed_first_head + head;
                    uint8_t *in_packed = &packed[(size_t)((unit * shape.tokens + token) * shape.content)];
                    uint8_t *in_cache = &cache[(size_t)(layer * shape.layer_stride +
                                                        plan.ids[at] * shape.block_stride +
                                                        (plan.range.first_head + head) * shape.head_stride +
                                                        token * shape.token_stride)];
                    for (int32_t i = 0; i < shape.content; ++i)
                        (load ? in_cache : in_packed)[i] = (load ? in_packed : in_cache)[i];
                }
}

void one_round(Random &random, wr_context *context) {
    Case shape = random_case(random);
    Plan plan = random_plan(random, shape);
    size_t packed_size = (size_t)shape.layers * (size_t)plan.packed_blocks * (size_t)plan.range.packed_heads *
                         (size_t)shape.tokens * (size_t)shape.content;
    Bytes cache = random.bytes((size_t)shape.size), packed = random.bytes(packed_size);
    Bytes wanted_cache = cache, wanted_packed = packed;
    std::vector<uint64_t> layers;
    for (int32_t layer = 0; layer < shape.layers; ++layer)
        layers.push_back((uint64_t)(cache.data() + layer * shape.layer_stride));
    wr_view view{layers.data(),      (uint64_t)cache.data(), (uint64_t)(cache.data() + cache.size()),
                 shape.block_stride, shape.head_stride,      shape.token_stride,
                 shape.layers,       shape.blocks,           shape.heads,
                 shape.tokens,       shape.content,          WR_BYTES,
                 0,                  0,                      0,
                 0};
    wr_span span{(uint64_t)packed.data(), packed_size, (int32_t)plan.ids.size(), plan.packed_first_block,
                 plan.packed_blocks,      0};
    bool load = random.from(0, 1), all = plan.range.first_token == 0 && plan.range.token_count == INT32_MAX;
    std::vector<uint64_t> sums((size_t)shape.layers * plan.ids.size());
    uint64_t *wanted_sums = all && random.from(0, 1) ? sums.data() : nullptr;
    int32_t status =
        load ? wr_scatter(context, &view, &plan.range, plan.ids.data(), &span, 1, WR_RAW, nullptr, wanted_sums, nullptr)
             : wr_gather(context, &view, &plan.range, plan.ids.data(), &span, 1, WR_RAW, wanted_sums, nullptr);
    if (status != WR_OK) fail("a move was refused", context);
    move_plainly(shape, plan, wanted_cache, wanted_packed, load);
    if (cache != wanted_cache || packed != wanted_packed) fail("a byte is wrong", nullptr);
    for (size_t page = 0; wanted_sums != nullptr && page < sums.size(); ++page) {
        size_t unit = (size_t)shape.tokens * (size_t)shape.content;
        size_t layer = page / plan.ids.size(), at = page % plan.ids.size();
        size_t index = layer * (size_t)plan.packed_blocks + (size_t)plan.packed_first_block + at;
        size_t first = index * (size_t)plan.range.packed_heads + (size_t)plan.range.packed_first_head;
        uint64_t sum = 0;
        wr_checksum(context, packed.data() + first * unit, (size_t)plan.range.heads * unit, &sum, nullptr);
        if (sum != sums[page]) fail("a checksum is wrong", nullptr);
    }
}

void copy_round(Random &random, wr_context *context) {
    std::vector<uint64_t> targets, sources, sizes;
    Bytes from = random.bytes((size_t)random.from(1, 3 << 20)), to(from.size());
    for (size_t at = 0; at < from.size();) {
        size_t size = std::min(from.size() - at, (size_t)random.from(0, 200000));
        targets.push_back((uint64_t)(to.data() + at));
        sources.push_back((uint64_t)(from.data() + at));
        sizes.push_back(size);
        at += size;
    }
    if (wr_copy_batch(context, targets.data(), sources.data(), sizes.data(), (int64_t)sizes.size(), 1, nullptr) != WR_OK)
        fail("a batch was refused", context);
    if (from != to) fail("a copied byte is wrong", nullptr);
    wr_options plain{0, 1, 0, WR_ISA_PORTABLE, {}};
    wr_context *portable = nullptr;
    uint64_t sum = 0, wanted = 0;
    if (wr_open(&plain, &portable) != WR_OK) fail("no context", nullptr);
    wr_checksum(context, from.data(), from.size(), &sum, nullptr);
    wr_checksum(portable, to.data(), to.size(), &wanted, nullptr);
    wr_close(portable);
    if (sum != wanted) fail("instruction sets disagree about a checksum", nullptr);
    if (wr_crc32c(wr_crc32c(0, from.data(), from.size() / 3), from.data() + from.size() / 3,
                  from.size() - from.size() / 3) != wr_crc32c(0, to.data(), to.size()))
        fail("a CRC is wrong", nullptr);
}

void slab_round(wr_context *context) {
    void *memory = nullptr;
    uint32_t granted = 0;
    if (wr_slab_alloc(context, 3 << 20, -1, 0, 0, &memory, &granted) != WR_OK) fail("no slab", context);
    uint8_t *bytes = (uint8_t *)memory;
    if (bytes[0] != 0 || bytes[(3 << 20) - 1] != 0) fail("a slab is not zeroed", nullptr);
    bytes[(3 << 20) - 1] = 1;
    if (wr_slab_free(nullptr, memory, 3 << 20) != WR_OK) fail("a slab is not freed", nullptr);
    if (wr_slab_free(nullptr, memory, 3 << 20) != WR_INVALID) fail("a slab is freed twice", nullptr);
}

void work(int rounds, uint64_t seed, int32_t isa) {
    Random random{std::mt19937_64(seed)};
    wr_options options{0, random.from(1, 3), 0, isa, {}};
    wr_context *context = nullptr;
    if (wr_open(&options, &context) == WR_UNSUPPORTED) return;
    if (context == nullptr) fail("no context", nullptr);
    for (int round = 0; round < rounds; ++round) {
        one_round(random, context);
        if (round % 8 == 0) copy_round(random, context);
        if (round % 32 == 0) slab_round(context);
    }
    wr_close(context);
}

// A child of fork() goes on with its parent's context, whose threads it does not have.
void fork_round(uint64_t seed) {
    Random random{std::mt19937_64(seed)};
    wr_options options{0, 3, 0, 0, {}};
    wr_context *context = nullptr;
    if (wr_open(&options, &context) != WR_OK) fail("no context", nullptr);
    for (int round = 0; round < 8; ++round) copy_round(random, context);
    // A sanitizer's own locks do not survive a fork() in the middle of a thread's start: let the threads come to rest.
    std::this_thread::sleep_for(std::chrono::milliseconds(500));
    pid_t child = fork();
    if (child == 0) {
        alarm(60);
        for (int round = 0; round < 4; ++round) copy_round(random, context);
        wr_close(context);
        _exit(0);
    }
    int status = 0;
    copy_round(random, context);
    if (waitpid(child, &status, 0) != child || status != 0) {
        fprintf(stderr, "status %d, signal %d: ", WIFEXITED(status) ? WEXITSTATUS(status) : 0,
                WIFSIGNALED(status) ? WTERMSIG(status) : 0);
        fail("the child of a fork failed", nullptr);
    }
    wr_close(context);
}

}  // namespace

int main(int count, char **arguments) {
    int rounds = count > 1 ? atoi(arguments[1]) : 200;
    uint64_t seed = count > 2 ? (uint64_t)atoll(arguments[2]) : 1;
    bool forks = count <= 3;
    if (forks) fork_round(seed);
    std::vector<std::thread> threads;
    for (int32_t isa : {WR_ISA_PORTABLE, WR_ISA_AVX2, WR_ISA_AVX512, WR_ISA_NEON})
        threads.emplace_back(work, rounds, seed + (uint64_t)isa, isa);
    for (std::thread &thread : threads) thread.join();
    puts("every byte is right");
    return 0;
}
