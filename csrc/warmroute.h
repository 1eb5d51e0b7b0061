/* The C ABI of warmroute's native core: moving, encoding, rotating and checking KV-cache bytes.
 *
 * Two libraries implement it: libwarmroute_cpu.so (host memory, threads) and libwarmroute_cuda.so (one NVIDIA GPU and
 * page-locked host memory). Neither links torch or libcudart; both take plain addresses, so that they work with any
 * version of either. Nothing here throws, allocates for its caller, or keeps an address after its work is done.
 *
 * Every function that can fail returns WR_OK (0) or a negative wr_status; wr_explain() says what went wrong in a
 * context's last failed call. Sizes are in bytes and byte order is little-endian throughout.
 *
 * The packed form of blocks, which slots and chunk objects hold, is [layer][block][head][token][content], without gaps,
 * each (layer, block) of it a page. With an encoding, each (layer, block, head) is an encoded unit of a fixed size
 * (wr_unit_bytes), in the same order. docs/kv-codecs.md specifies the encodings to the bit.
 */
#ifndef WARMROUTE_H
#define WARMROUTE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define WR_ABI_VERSION 1

#if defined(__GNUC__)
#define WR_API __attribute__((visibility("default")))
#else
#define WR_API
#endif

typedef enum wr_status {
    WR_OK = 0,
    WR_INVALID = -1,       /* an argument is out of its range */
    WR_OUT_OF_BOUNDS = -2, /* a block or head lies outside what was described; nothing was written */
    WR_UNSUPPORTED = -3,   /* this backend, device or element type cannot do it */
    WR_INCOMPRESSIBLE = -4,/* WR_EXP12: a unit has too many escapes; the output is undefined, use WR_RAW */
    WR_NO_MEMORY = -5,
    WR_DEVICE = -6,        /* the CUDA driver or runtime failed */
    WR_CORRUPT = -7        /* encoded bytes that no encoder writes */
} wr_status;

typedef enum wr_dtype { WR_BYTES = 0, WR_F32 = 1, WR_F16 = 2, WR_BF16 = 3, WR_F64 = 4 } wr_dtype;

typedef enum wr_encoding {
    WR_RAW = 0,
    WR_FP8 = 1,   /* e4m3 with one float32 scale per token, head and half (K, V); WR_F32, WR_F16, WR_BF16 */
    WR_K16_V8 = 2,/* K as it is, V as WR_FP8 */
    WR_EXP12 = 3, /* lossless: 12 bits per WR_BF16 element and escapes */
    WR_INT8 = 4   /* K per channel and block, V per token, symmetric, float32 scales; WR_F32, WR_F16, WR_BF16 */
} wr_encoding;

/* Where KV bytes are: any layout of vLLM as strides. The content of a token and head is k_bytes of K at k_offset and
 * v_bytes of V at v_offset; for MLA it is all K (v_bytes 0) and heads is 1. A cache of plain bytes is one head and one
 * token of dtype WR_BYTES whose content is the page. */
typedef struct wr_view {
    const uint64_t *layers;   /* [layer_count] address of block 0, head 0, token 0; host memory that holds device addresses */
    uint64_t begin, end;      /* the allocation: every address that is touched lies within [begin, end) */
    int64_t block_stride, head_stride, token_stride;
    int32_t layer_count, block_count, heads, tokens; /* tokens per block */
    int32_t content_bytes, dtype;
    int32_t k_offset, k_bytes, v_offset, v_bytes;
} wr_view;

/* Which part of each block is moved. Heads [first_head, first_head + heads) of the view are heads
 * [packed_first_head, …) of a packed form that has packed_heads of them. Tokens are counted over all blocks of a span:
 * tokens outside [first_token, first_token + token_count) are neither read nor written. It may reach past the end of a
 * span, since spans may differ in length: INT32_MAX tokens from 0 are all of every span. */
typedef struct wr_range {
    int32_t first_head, heads, packed_first_head, packed_heads;
    int32_t first_token, token_count; /* an encoding other than WR_RAW takes whole spans only */
} wr_range;

/* Blocks that belong together: the next block_count entries of a call's block ids, and the packed form that holds them
 * as its blocks [packed_first_block, packed_first_block + block_count) of packed_blocks. */
typedef struct wr_span {
    uint64_t packed;          /* host memory; page-locked for the CUDA backend, or device memory */
    uint64_t packed_bytes;    /* its size, which the whole packed form must not exceed */
    int32_t block_count, packed_first_block, packed_blocks, reserved;
} wr_span;

/* A rotation of K by one distance: cosine and sine of (new position - old position) times each frequency. The element
 * pairs (i, i + count) of the neox form, or (2 i, 2 i + 1) of the interleaved one, counted from rotary_offset bytes into
 * K, are rotated in float32 (float64 for WR_F64) and rounded to nearest even. Always from the stored original. */
typedef struct wr_rotation {
    const double *cosines, *sines; /* [count], host memory, read before the call returns */
    int32_t count, rotary_offset, interleaved, reserved;
} wr_rotation;

/* Which way raw content takes on a GPU. What a way cannot do (the copy engines: rotations, checksums; staging: parts of
 * blocks; encodings always use it) takes another. docs/gpu.md. */
typedef enum wr_path {
    WR_AUTO = 0,        /* as calibrated */
    WR_COPY_ENGINE = 1, /* batched copies */
    WR_KERNEL = 2,      /* a kernel that reads and writes page-locked memory itself */
    WR_STAGED = 3       /* a kernel to or from memory of the GPU, and batched copies between there and the host */
} wr_path;

typedef struct wr_options {
    int32_t device;           /* CUDA ordinal; ignored by the CPU backend */
    int32_t threads;          /* CPU: 0 for the number of usable cores, at most 8. CUDA: most thread blocks, 0 for 16 */
    int32_t path;             /* wr_path; CUDA only */
    int32_t isa;              /* CPU: 0 for the best there is, else a wr_isa; for tests */
    int32_t reserved[4];
} wr_options;

typedef enum wr_isa { WR_ISA_BEST = 0, WR_ISA_PORTABLE = 1, WR_ISA_AVX2 = 2, WR_ISA_AVX512 = 3, WR_ISA_NEON = 4 } wr_isa;

/* Threads, staging memory and, on a GPU, calibration. One thread uses a context at a time. */
typedef struct wr_context wr_context;

WR_API int32_t wr_abi(void);         /* WR_ABI_VERSION of the library */
WR_API const char *wr_build(void);   /* "cpu 0.1.0 1a2b3c4d x86_64" or "cuda 0.1.0 1a2b3c4d sm_80,sm_90,sm_100+ptx": backend, version, digest of the sources, targets */
WR_API int32_t wr_devices(void);     /* CPU: 1. CUDA: usable GPUs, 0 where there is no driver */

WR_API int32_t wr_open(const wr_options *options, wr_context **context);
WR_API void wr_close(wr_context *context); /* waits for what it began; null is allowed */
WR_API const char *wr_explain(const wr_context *context); /* of the last failed call; with null, of this thread's last failed wr_open */
WR_API int32_t wr_describe(const wr_context *context, char *text, size_t size); /* one line: instruction set or GPU, threads, calibrated cutoff */

/* Bytes of one encoded unit: (layer, block, head) of `view`. Negative: a wr_status. */
WR_API int64_t wr_unit_bytes(const wr_view *view, int32_t encoding);

/* Cache to packed form, and back. `blocks` (host memory) has the ids of all spans, one after the other. `stream` is a
 * cudaStream_t; null for the CPU backend, which returns when the bytes are there, and refused by the CUDA backend, whose
 * work is only enqueued. `checksums`, if not null, receives one value per packed page moved, spans after each other, each
 * [layer][block] (page-locked or device memory for CUDA, valid when the stream has come by): wr_checksum of the packed
 * bytes of the heads in range; whole spans only. With WR_EXP12, wr_gather of the CUDA backend reports
 * WR_INCOMPRESSIBLE through wr_finish. */
WR_API int32_t wr_gather(wr_context *context, const wr_view *view, const wr_range *range, const int32_t *blocks,
                         const wr_span *spans, int32_t span_count, int32_t encoding, uint64_t *checksums, void *stream);
WR_API int32_t wr_scatter(wr_context *context, const wr_view *view, const wr_range *range, const int32_t *blocks,
                          const wr_span *spans, int32_t span_count, int32_t encoding, const wr_rotation *rotation,
                          uint64_t *checksums, void *stream);

/* Rotate K in place, of all layers: for KV that is in the cache already and is an original. What is written must not be
 * named twice, here as in a scatter: a block that is would be rotated twice, or hold parts of both packed blocks. */
WR_API int32_t wr_rotate(wr_context *context, const wr_view *view, const wr_range *range, const int32_t *blocks,
                         int32_t block_count, const wr_rotation *rotation, void *stream);

/* Many copies in one call. On a GPU by its copy engines: cuMemcpyBatchAsync where the driver has it. `loads` says that
 * the sources are not written by anything that the stream still has to run, so that they may be read early. */
WR_API int32_t wr_copy_batch(wr_context *context, const uint64_t *targets, const uint64_t *sources,
                             const uint64_t *sizes, int64_t count, int32_t loads, void *stream);

/* CUDA: wait for the stream and what else the context has under way, for a minute at most, and say how the encoded gathers (WR_INCOMPRESSIBLE) and scatters
 * (WR_CORRUPT) since the last call ended. CPU: WR_OK. */
WR_API int32_t wr_finish(wr_context *context, void *stream);

/* CUDA: measure the page size from which the copy engines beat the kernel, in each direction, and use it from then on
 * (some tens of milliseconds, 64 MiB of device and page-locked memory). CPU: WR_OK. */
WR_API int32_t wr_calibrate(wr_context *context, uint64_t *load_cutoff, uint64_t *save_cutoff);

/* The sum over all 8-byte words w[i] of mix(w[i], i), modulo 2^64; a last partial word is filled with zeros, and the
 * length is mixed in. mix is a bijection of w for every i, so any change within one word is seen. Order-independent:
 * parts may be added up. It detects damage; it does not authenticate. */
WR_API int32_t wr_checksum(wr_context *context, const void *bytes, size_t size, uint64_t *sum, void *stream);

/* CRC-32C (Castagnoli; RFC 3720, appendix B.4) of host memory, continued from `crc`; 0 to begin. */
WR_API uint32_t wr_crc32c(uint32_t crc, const void *bytes, size_t size);

/* Zeroed host memory for a slab: populated, on NUMA node `node` (-1: wherever its first writer runs), in huge pages where
 * asked for and possible, page-locked where `lock` and the backend is CUDA. `granted` says what was given: bit 0
 * page-locked, bit 1 explicit huge pages, bit 2 transparent huge pages advised (always where there are no explicit ones
 * and the kernel has them), bit 3 it is all on the node. Children of fork() do not have it. Freeing takes no context, which
 * may be null or closed by then; a child of fork() may do so too, to no effect. */
WR_API int32_t wr_slab_alloc(wr_context *context, size_t size, int32_t node, int32_t huge, int32_t lock, void **memory,
                             uint32_t *granted);
WR_API int32_t wr_slab_free(wr_context *context, void *memory, size_t size);

#ifdef __cplusplus
}
#endif
#endif
