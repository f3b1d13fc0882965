// Few rows times quantised matrices: every weight is read once, in the file's own quantisation.
//
// A block computes TILES tiles of 16 outputs. Its warps share out the columns; each streams its
// chunks through a ring in shared memory, several ahead, and multiplies them by tensor cores.
// Copies of weights begin before the previous kernel has ended: they depend on nothing.
// `sources.py` says how many warps suit how many blocks.

// One matrix. `format` is 0 or 1: which of the two that the kernel was compiled for.
struct Segment {
    const u8* weights;
    float* out;
    const float* bias;
    const float* residual;
    float scale;
    int rows;
    int tiles;
    int format;
};

// A norm that products take in (https://arxiv.org/abs/1910.07467): one leaves its sums times the
// norm's weights, and their squares; the next divides by their root mean square.
struct Norm {
    const float* weight;
    float* sums;      // [rows][count] of squares, one of each block
    float* previous;  // [rows] what the norm before multiplied the residual by
    float* factor;    // [rows] what this one multiplies by
    int count;
    int width;
    float epsilon;
};

struct Product {
    Segment segments[3];
    Packed x;
    Packed y;    // what a gated product writes, or one that leaves its sums to a norm
    Norm before; // where x comes from sums, of which the norm is not complete
    Norm after;
    int count;   // of segments
    int chunks;  // of 64 columns
    int columns; // of x that are in use
    int rows;    // of x
};

// One stage: a chunk of each tile.
template <class F, int TILES>
__device__ __forceinline__ void fetch(
    u8* stage, const u8* const (&tiles)[TILES], int chunk, int row_bytes, int lane
) {
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        if constexpr (F::IN_ROWS) {
#pragma unroll
            for (int i = 0; i < F::BYTES / 512; i++) {
                const int row = i * 4 + (lane >> 3), piece = lane & 7;
                copy_async(stage + n * F::BYTES + F::place(row, piece),
                           tiles[n] + (i64)row * row_bytes + chunk * 128 + piece * 16);
            }
        } else {
            const u8* from = tiles[n] + (i64)chunk * F::BYTES;
            u8* to = stage + n * F::BYTES;
#pragma unroll
            for (int i = 0; i < (F::BYTES / 16 + 31) / 32; i++) {
                int piece = i * 32 + lane;
                if (piece < F::BYTES / 16) copy_async(to + 16 * piece, from + 16 * piece);
            }
        }
    }
}

// 64 columns of a tile, times N tiles of 8 columns of x, each in SETS parts that add up.
template <class F, int N, int SETS>
__device__ __forceinline__ void multiply_part(
    const u8* chunk, int sub, int lane, const uint4 (&b)[N * SETS][2],
    const float (&sums)[N][2][4],
    float (&total)[N][4]
) {
    typename F::Part part = F::load(chunk, lane, sub);
    float c[N][4];
#pragma unroll
    for (int s = 0; s < 4; s++) {
        u32 a[4];
        F::fragment(part, s, a);
#pragma unroll
        for (int n = 0; n < N; n++) {
            if (F::SPAN == 1 || s % 2 == 0) {
#pragma unroll
                for (int i = 0; i < 4; i++) c[n][i] = 0.0f;
            }
#pragma unroll
            for (int set = 0; set < SETS; set++) {
                const uint4& x = b[n * SETS + set][s >> 1];
                u32 b0 = s & 1 ? x.z : x.x, b1 = s & 1 ? x.w : x.y;
                if constexpr (F::SPAN == 0) multiply_add(total[n], a, b0, b1);
                else multiply_add(c[n], a, b0, b1);
            }
        }
        if constexpr (F::SPAN != 0) {
            if (F::SPAN == 1 || s % 2 == 1) {
                Pair d = F::scales(part, lane, s);
#pragma unroll
                for (int n = 0; n < N; n++) {
                    total[n][0] += d.low * c[n][0];
                    total[n][1] += d.low * c[n][1];
                    total[n][2] += d.high * c[n][2];
                    total[n][3] += d.high * c[n][3];
                }
                if constexpr (F::MINIMUM) {
                    Pair m = F::minima(part, lane, s);
#pragma unroll
                    for (int n = 0; n < N; n++) {
                        const float(&sum)[4] = sums[n][s >> 1];
                        total[n][0] += m.low * sum[0];
                        total[n][1] += m.low * sum[1];
                        total[n][2] += m.high * sum[0];
                        total[n][3] += m.high * sum[1];
                    }
                }
            }
        }
    }
}

// What the lane multiplies with in a step of 64 columns.
template <int N, int SETS>
__device__ __forceinline__ void load_x(
    const Packed& x, int step, int columns, int lane, uint4 (&b)[N * SETS][2]
) {
    const uint4* from = (const uint4*)x.data + (i64)step * N * SETS * 64 + lane;
#pragma unroll
    for (int n = 0; n < N * SETS; n++) {
        bool used = n / SETS * 8 + (lane >> 2) < columns;
        b[n][0] = used ? from[n * 64] : make_uint4(0, 0, 0, 0);
        b[n][1] = used ? from[n * 64 + 32] : make_uint4(0, 0, 0, 0);
    }
}

// The warp's share of the columns of some tiles: chunks `first` to `last`. `start` is called when
// what the previous kernel wrote is there.
template <class F, int N, int SETS, int TILES, int DEPTH, class Start>
__device__ __forceinline__ void multiply_tiles(
    const u8* const (&tiles)[TILES], int first, int last, int row_bytes, const Packed& x,
    int columns, u8* ring, int lane, float (&total)[TILES][N][4], Start start
) {
    constexpr int SUBS = F::COLUMNS / 64, STAGE = TILES * F::BYTES;
#pragma unroll
    for (int i = 0; i < DEPTH; i++) {
        if (first + i < last) fetch<F, TILES>(ring + i * STAGE, tiles, first + i, row_bytes, lane);
        commit_copies();
    }
    let_next_start();
    wait_for_previous();
    start();
    // With few registers of x, those of the next step are on their way during this one.
    constexpr bool AHEAD = N * SETS == 1;
    uint4 next[N * SETS][2];
    if (AHEAD && first < last) load_x<N, SETS>(x, first * SUBS, columns, lane, next);
    int place = 0;
    for (int chunk = first; chunk < last; chunk++) {
        wait_copies<DEPTH - 1>();
        __syncwarp();
        u8* stage = ring + place * STAGE;
#pragma unroll 1
        for (int sub = 0; sub < SUBS; sub++) {
            uint4 b[N * SETS][2];
            float sums[N][2][4];
            const int step = chunk * SUBS + sub;
            if constexpr (AHEAD) {
                b[0][0] = next[0][0], b[0][1] = next[0][1];
                if (step + 1 < last * SUBS) load_x<N, SETS>(x, step + 1, columns, lane, next);
            } else {
                load_x<N, SETS>(x, step, columns, lane, b);
            }
            if constexpr (F::MINIMUM) {
                const u32 ones[4] = {0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u};
#pragma unroll
                for (int i = 0; i < 2 * N * SETS; i++) {
                    float(&sum)[4] = sums[i / 2 / SETS][i & 1];
                    const uint4& own = b[i / 2][i & 1];
                    if (i / 2 % SETS == 0) {
#pragma unroll
                        for (int k = 0; k < 4; k++) sum[k] = 0.0f;
                    }
                    multiply_add(sum, ones, own.x, own.y);
                    multiply_add(sum, ones, own.z, own.w);
                }
            }
#pragma unroll
            for (int r = 0; r < TILES; r++)
                multiply_part<F, N, SETS>(stage + r * F::BYTES, sub, lane, b, sums, total[r]);
        }
        __syncwarp();
        if (chunk + DEPTH < last) fetch<F, TILES>(stage, tiles, chunk + DEPTH, row_bytes, lane);
        commit_copies();
        place = place + 1 == DEPTH ? 0 : place + 1;
    }
    wait_all_copies();
}

// What a block's warps have for one output row and one row of x, added up in a fixed order.
template <int N, int TILES>
__device__ __forceinline__ float collect(
    const float* parts, int first, int last, int row, int token, bool split
) {
    int column = split ? 2 * token : token;
    int lane = (row & 7) * 4 + ((column & 7) >> 1);
    int at = (((row >> 4) * N + (column >> 3)) * 32 + lane) * 4 + ((row >> 3) & 1) * 2;
    float sum = 0.0f;
    for (int warp = first; warp < last; warp++) {
        const float* p = parts + warp * TILES * N * 128 + at;
        sum += split ? p[0] + p[1] : p[column & 1];
    }
    return sum;
}

// A power of two that brings a row to about 1/64, so that it fits into halves even where one of its
// elements is a million times larger.
__device__ __forceinline__ float power_for(float factor) {
    return __int_as_float(__float_as_int(factor) & 0x7f800000) * 0.015625f;
}

// Starts to copy what `find_factors` needs: the squares of x, and the factors before.
__device__ __forceinline__ void fetch_squares(const Product& p, float* squares) {
    const int count = p.rows * p.before.count;
    for (int i = threadIdx.x; i < count; i += blockDim.x)
        copy_float(squares + i, p.before.sums + i);
    if (count && threadIdx.x < p.rows)
        copy_float(squares + count + threadIdx.x, p.before.previous + threadIdx.x);
}

// What each row's products are multiplied by, where x is not normed yet: a warp a row.
__device__ __forceinline__ void find_factors(
    const Product& p, const float* squares, float (&factors)[16]
) {
    const int lane = threadIdx.x & 31, count = p.before.count;
    if (!count) return;
    for (int row = threadIdx.x >> 5; row < p.rows; row += blockDim.x >> 5) {
        float sum = 0.0f;
        for (int i = lane; i < count; i += 32) sum += squares[row * count + i];
        const float factor = rsqrtf(warp_sum(sum) / p.before.width + p.before.epsilon);
        if (lane > 0) continue;
        factors[row] = factor / power_for(squares[p.rows * count + row]);
        if (blockIdx.x == 0) p.before.factor[row] = factor;
    }
}

// Leaves a sum to a norm: packed, and its square, added up over the GROUP lanes of a token.
template <int GROUP>
__device__ __forceinline__ void leave_sum(
    const Product& p, int token, int out, bool used, float y, float weight, float previous
) {
    if (used) store_packed(p.y, token, out, y * weight * power_for(previous));
    float square = y * y;
    const u32 lanes = GROUP == 32 ? FULL : 0xffffu << (threadIdx.x & 16);
#pragma unroll
    for (int offset = GROUP / 2; offset; offset >>= 1)
        square += __shfl_xor_sync(lanes, square, offset);
    if (out % GROUP == 0) p.after.sums[token * p.after.count + out / GROUP] = square;
}

template <class F0, class F1, int N, int SETS, int TILES, int WARPS, int DEPTH, bool GATED>
__device__ __forceinline__ void product(const Product& p) {
    extern __shared__ __align__(16) u8 memory[];
    constexpr int ROOM = DEPTH * TILES * (F0::BYTES > F1::BYTES ? F0::BYTES : F1::BYTES);
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    // Which tiles, and which share of the columns.
    int group = blockIdx.x, number = 0, share = warp, shares = WARPS;
    if (GATED) {
        number = warp / (WARPS / 2);
        share = warp % (WARPS / 2);
        shares = WARPS / 2;
    } else {
        while (number + 1 < p.count) {
            int groups = (p.segments[number].tiles + TILES - 1) / TILES;
            if (group < groups) break;
            group -= groups;
            number++;
        }
    }
    const Segment& segment = p.segments[number];
    float total[TILES][N][4];
#pragma unroll
    for (int r = 0; r < TILES; r++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) total[r][n][i] = 0.0f;
    // What the end needs is on its way during the products.
    constexpr int GROUP = 16 * TILES;
    float* squares = (float*)(memory + WARPS * ROOM);
    float residual = 0.0f, weight = 0.0f, previous = 0.0f;
    auto start = [&] {
        fetch_squares(p, squares);
        const int token = threadIdx.x / GROUP, out = group * GROUP + threadIdx.x % GROUP;
        if (GATED || token >= p.rows || out >= segment.rows) return;
        if (segment.residual) residual = segment.residual[(i64)token * segment.rows + out];
        if (p.after.weight) weight = p.after.weight[out], previous = p.after.previous[token];
    };
    auto run = [&](auto format) {
        using F = decltype(format);
        const int chunks = p.chunks * 64 / F::COLUMNS;
        const u8* tiles[TILES];
#pragma unroll
        for (int r = 0; r < TILES; r++) {
            int tile = min(group * TILES + r, segment.tiles - 1);
            tiles[r] = segment.weights + (i64)tile * chunks * F::BYTES;
        }
        multiply_tiles<F, N, SETS, TILES, DEPTH>(
            tiles, chunks * share / shares, chunks * (share + 1) / shares,
            chunks * (F::BYTES / 16), p.x, p.columns, memory + warp * ROOM, lane, total, start);
    };
    if (segment.format == 0) run(F0());
    else run(F1());
    __shared__ float factors[16];
    __syncthreads();  // the rings are read no more, and the squares are there
    float* parts = (float*)memory;
#pragma unroll
    for (int r = 0; r < TILES; r++)
#pragma unroll
        for (int n = 0; n < N; n++)
            ((float4*)parts)[((warp * TILES + r) * N + n) * 32 + lane] =
                make_float4(total[r][n][0], total[r][n][1], total[r][n][2], total[r][n][3]);
    find_factors(p, squares, factors);
    __syncthreads();
    const bool split = p.x.form == FRAGMENTS_SPLIT;
    for (int i = threadIdx.x; i < GROUP * p.rows; i += WARPS * 32) {
        const int token = i / GROUP, row = i % GROUP, out = group * GROUP + row;
        const bool used = out < segment.rows, first = i == threadIdx.x;
        const float factor = p.before.count ? factors[token] : 1.0f;
        const i64 at = (i64)token * segment.rows + out;
        float y = 0.0f;
        if (used && GATED) {
            float gate = factor * p.segments[0].scale *
                         collect<N, TILES>(parts, 0, WARPS / 2, row, token, split);
            float up = factor * p.segments[1].scale *
                       collect<N, TILES>(parts, WARPS / 2, WARPS, row, token, split);
            if (p.segments[0].bias) gate += p.segments[0].bias[out];
            if (p.segments[1].bias) up += p.segments[1].bias[out];
            y = silu(gate) * up;
            if (p.segments[0].out) p.segments[0].out[at] = y;
            if (p.y.form) store_packed(p.y, token, out, y);
        } else if (used) {
            y = factor * segment.scale * collect<N, TILES>(parts, 0, WARPS, row, token, split);
            if (segment.bias) y += segment.bias[out];
            if (segment.residual) y += first ? residual : segment.residual[at];
            segment.out[at] = y;
        }
        if (GATED || !p.after.weight) continue;
        if (used && !first) weight = p.after.weight[out], previous = p.after.previous[token];
        leave_sum<GROUP>(p, token, out, used, y, weight, previous);
    }
}

// Shared memory: WARPS * DEPTH * TILES chunks of the larger format; where x is not normed yet, its
// squares and the factors before.
#define PRODUCT(NAME, F0, F1, N, SETS, TILES, WARPS, DEPTH, GATED, BLOCKS) \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) NAME(  \
        const __grid_constant__ Product p                                   \
    ) {                                                                     \
        product<F0, F1, N, SETS, TILES, WARPS, DEPTH, GATED>(p);            \
    }
