// Gather, scatter, rotation and batches of copies in host memory.
#ifndef WARMROUTE_CPU_MOVES_HPP
#define WARMROUTE_CPU_MOVES_HPP

#include "cpu_context.hpp"

namespace wr {

// The arguments of wr_gather and wr_scatter.
struct MoveCall {
    const wr_view *view;
    const wr_range *range;
    const int32_t *blocks;
    const wr_span *spans;
    int32_t span_count, encoding;
    const wr_rotation *rotation;
    uint64_t *checksums;
    bool load;
};

int32_t move_blocks(wr_context &context, const MoveCall &call);

int32_t rotate_blocks(wr_context &context, const wr_view *view, const wr_range *range, const int32_t *blocks,
                      int32_t block_count, const wr_rotation *rotation);

int32_t copy_batch(wr_context &context, const uint64_t *targets, const uint64_t *sources, const uint64_t *sizes,
                   int64_t count);

}  // namespace wr

#endif
