// Encodes, decodes, damages and rotates random units in memory of exactly their size, for a build with
// sanitizers: codec_fuzz ROUNDS SEED. Prints a digest of all results, which every instruction set must agree
// on; exits with 1 where a decoding is wrong or touches what is neither K nor V.
#include <stdio.h>
#include <stdlib.h>

#include "../core/codec.hpp"

namespace {

struct Random {
    uint64_t state;
    uint64_t next() {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return (state ^ state >> 29) * 0x9E3779B97F4A7C15u >> 11;
    }
    int32_t below(int32_t limit) { return int32_t(next() % uint64_t(limit)); }
    bool one_in(int32_t n) { return below(n) == 0; }
};

struct Digest {
    uint64_t value = 0xCBF29CE484222325u;
    void add(const uint8_t *bytes, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            value = (value ^ bytes[i]) * 0x100000001B3u;
        }
    }
};

// Bytes that begin `shift` after an allocation and end with it, so that a sanitizer sees every byte outside.
struct Buffer {
    Buffer(int64_t count, int64_t shift)
        : size(count), memory(static_cast<uint8_t *>(malloc(size_t(count + shift)))) {
        bytes = memory + shift;
    }
    ~Buffer() { free(memory); }
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    int64_t size;
    uint8_t *memory, *bytes;
};

struct Case {
    wr::UnitShape shape;
    int64_t token_stride;
    int32_t encoding;
    int64_t content_bytes() const { return (shape.tokens - 1) * token_stride + shape.content_bytes; }
};

int32_t random_width(Random &random) {
    const int32_t usual[] = {0, 1, 7, 16, 31, 64, 80, 96, 112, 128, 192, 256, 576};
    return random.one_in(3) ? random.below(100) : usual[random.below(13)];
}

Case random_case(Random &random) {
    const int32_t dtypes[] = {WR_F32, WR_F16, WR_BF16, WR_BF16};
    Case made;
    wr::UnitShape &shape = made.shape;
    shape.dtype = dtypes[random.below(4)];
    shape.tokens = random.one_in(40) ? 300 + random.below(800) : 1 + random.below(20);
    const int32_t size = wr::element_bytes(shape.dtype);
    const int32_t before = random.below(4) * size, between = random.below(3) * size,
                  after = random.below(4) * size;
    shape.k_bytes = (random.one_in(60) ? 8192 : random_width(random)) * size;
    shape.v_bytes = random_width(random) * size;
    const bool swapped = random.one_in(3);
    shape.k_offset = before + (swapped ? shape.v_bytes + between : 0);
    shape.v_offset = before + (swapped ? 0 : shape.k_bytes + between);
    shape.content_bytes = before + shape.k_bytes + between + shape.v_bytes + after;
    made.token_stride = shape.content_bytes + random.below(5) * size;
    made.encoding = 1 + random.below(4);
    return made;
}

// Numbers about one size, sometimes with outliers, zeros or any bits at all.
void fill(Random &random, const Case &given, Buffer &content) {
    const int32_t size = wr::element_bytes(given.shape.dtype), style = random.below(6);
    const float scale = style == 1 ? 0x1p-120f : style == 2 ? 0x1p+100f : 1.0f;
    for (int64_t at = 0; at + size <= content.size; at += size) {
        float value = float(random.below(2001) - 1000) * scale;
        value *= random.one_in(200) ? 1000.0f : 1.0f;
        wr::store_element(given.shape.dtype, content.bytes + at, random.one_in(50) ? 0.0f : value);
        if (style == 3 || (style == 4 && random.one_in(300))) {
            for (int32_t i = 0; i < size; ++i) {
                content.bytes[at + i] = uint8_t(random.next());
            }
        }
    }
}

void noise(Random &random, Buffer &buffer) {
    for (int64_t i = 0; i < buffer.size; ++i) {
        buffer.bytes[i] = uint8_t(random.next());
    }
}

void fail(const char *what, const Case &given) {
    const wr::UnitShape &s = given.shape;
    printf("%s: encoding %d, dtype %d, %d tokens, K %d bytes at %d, V %d bytes at %d, stride %lld\n", what,
           given.encoding, s.dtype, s.tokens, s.k_bytes, s.k_offset, s.v_bytes, s.v_offset,
           static_cast<long long>(given.token_stride));
    exit(1);
}

bool in_half(const wr::UnitShape &shape, int64_t at) {
    const bool in_k = at >= shape.k_offset && at < shape.k_offset + shape.k_bytes;
    return in_k || (at >= shape.v_offset && at < shape.v_offset + shape.v_bytes);
}

// Decodes into poisoned content; adds the status and the K and V of what was decoded to the digest.
int32_t decode(const Case &given, const Buffer &encoded, Buffer &content, const wr::Rotation *rotation,
               Digest &digest) {
    memset(content.bytes, 0xA5, size_t(content.size));
    const int32_t status = wr::decode_unit(given.shape, given.encoding, encoded.bytes, content.bytes,
                                           given.token_stride, rotation);
    if (status != WR_OK && status != WR_CORRUPT) {
        fail("a decoder's status", given);
    }
    for (int64_t at = 0; at < content.size; ++at) {
        if (!in_half(given.shape, at % given.token_stride) && content.bytes[at] != 0xA5) {
            fail("bytes that are neither K nor V were written", given);
        }
    }
    digest.add(reinterpret_cast<const uint8_t *>(&status), 4);
    if (status == WR_OK) {
        digest.add(content.bytes, content.size);
    }
    return status;
}

void check_lossless(const Case &given, const Buffer &content, const Buffer &decoded) {
    for (int64_t at = 0; at < content.size; ++at) {
        if (in_half(given.shape, at % given.token_stride) && content.bytes[at] != decoded.bytes[at]) {
            fail("lossless decoding differs", given);
        }
    }
}

void damage(Random &random, Buffer &encoded) {
    for (int32_t n = random.below(4); n >= 0; --n) {
        encoded.bytes[random.next() % uint64_t(encoded.size)] ^= uint8_t(1u << random.below(8));
    }
}

struct Factors {
    float cosines[4096], sines[4096];
};

wr::Rotation random_rotation(Random &random, const wr::UnitShape &shape, Factors &factors) {
    const int32_t size = wr::element_bytes(shape.dtype), width = shape.k_bytes / size;
    const int32_t skipped = width == 0 ? 0 : random.below(width), pairs = (width - skipped) / 2;
    for (int32_t i = 0; i < pairs; ++i) {
        factors.cosines[i] = float(random.below(2001) - 1000) * 0.001f;
        factors.sines[i] = float(random.below(2001) - 1000) * 0.001f;
    }
    return {factors.cosines,          factors.sines, nullptr, nullptr, pairs, skipped * size,
            int32_t(random.one_in(2))};
}

void run(Random &random, Digest &digest, int64_t *statuses) {
    const Case given = random_case(random);
    const int64_t bytes = wr::unit_bytes(given.shape, given.encoding);
    if (bytes < 0) {
        return;
    }
    const int32_t size = wr::element_bytes(given.shape.dtype);
    Buffer content(given.content_bytes(), random.below(16) * size),
        decoded(content.size, random.below(16) * size);
    Buffer encoded(bytes, random.below(20));
    Factors factors;
    const wr::Rotation rotation = random_rotation(random, given.shape, factors);
    fill(random, given, content);
    memset(encoded.bytes, 0x5A, size_t(bytes));
    const int32_t status =
        wr::encode_unit(given.shape, given.encoding, content.bytes, given.token_stride, encoded.bytes);
    ++statuses[status == WR_OK ? 0 : 1];
    if (status == WR_OK) {
        digest.add(encoded.bytes, bytes);
        if (decode(given, encoded, decoded, nullptr, digest) != WR_OK) {
            fail("what was encoded is refused", given);
        }
        if (given.encoding == WR_EXP12) {
            check_lossless(given, content, decoded);
        }
        decode(given, encoded, decoded, &rotation, digest);
        damage(random, encoded);
        statuses[2] += decode(given, encoded, decoded, nullptr, digest) == WR_CORRUPT;
    }
    noise(random, encoded);
    statuses[2] += decode(given, encoded, decoded, &rotation, digest) == WR_CORRUPT;
}

} // namespace

int main(int argc, char **argv) {
    const int64_t rounds = argc > 1 ? atoll(argv[1]) : 1000;
    Random random = {argc > 2 ? uint64_t(atoll(argv[2])) : 1};
    Digest digest;
    int64_t statuses[3] = {0, 0, 0}; // encoded, incompressible, corrupt
    for (int64_t i = 0; i < rounds; ++i) {
        run(random, digest, statuses);
    }
    printf("encoded %lld, incompressible %lld, corrupt %lld, digest %016llx\n",
           static_cast<long long>(statuses[0]), static_cast<long long>(statuses[1]),
           static_cast<long long>(statuses[2]), static_cast<unsigned long long>(digest.value));
    return 0;
}
