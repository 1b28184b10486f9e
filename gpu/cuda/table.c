/* The launchers as one table, and a whole call. */
#include "gpu/cuda/launch.h"

static int preload(void)
{
    int (*const all[])(void) = {cuda_query_preload,  cuda_scan_preload, cuda_pick_preload,   cuda_attend_preload,
                                cuda_append_preload, cuda_team_preload, cuda_integer_preload};
    int r = 0;
    for (size_t i = 0; i < PKV_ARRAY_LEN(all) && !r; i++)
        r = all[i]();
    return r;
}

static int call(const struct cuda_attend *a, cuda_stream stream)
{
    int r = 0;
    if (a->team)
        return cuda_team_launch(a, stream);
    if (!cuda_dense_only(a)) {
        if (a->geom.sig_bits) {
            r = cuda_query_launch(a, stream);
            r = r ? r : cuda_scan_launch(a, stream);
        }
        r = r ? r : cuda_pick_launch(a, stream);
    }
    return r ? r : cuda_attend_launch(a, stream);
}

const struct cuda_table *gpu_cuda_table(void)
{
    static const struct cuda_table table = {
        .version = CUDA_TABLE_VERSION,
        .preload = preload,
        .query = cuda_query_launch,
        .scan = cuda_scan_launch,
        .pick = cuda_pick_launch,
        .attend = cuda_attend_launch,
        .call = call,
        .gather = cuda_gather_launch,
        .append = cuda_append_launch,
    };
    return &table;
}
