// From tiles back to rows: for the matrix products of prompts, and for embeddings.

template <class F>
__device__ __forceinline__ void expand_part(
    const u8* chunk, int sub, int lane, int s, float scale, float (&low)[4], float (&high)[4]
) {
    typename F::Part part = F::load(chunk, lane, sub);
    u32 a[4];
    F::fragment(part, s, a);
    Pair d = F::scales(part, lane, s), m = {0, 0};
    if constexpr (F::MINIMUM) m = F::minima(part, lane, s);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 x = a[(i >> 1) * 2], y = a[(i >> 1) * 2 + 1];
        low[i] = (d.low * half_to_float(i & 1 ? x >> 16 : x & 0xffff) + m.low) * scale;
        high[i] = (d.high * half_to_float(i & 1 ? y >> 16 : y & 0xffff) + m.high) * scale;
    }
}

__device__ __forceinline__ void store_halves(u16* to, int k, int columns, const float (&x)[4]) {
    if (k + 3 < columns) {
        *(uint2*)(to + k) = make_uint2(pack_halves(x[0], x[1]), pack_halves(x[2], x[3]));
    } else {
        for (int i = 0; i < 4 && k + i < columns; i++) to[k + i] = float_to_half(x[i]);
    }
}

// Tiles from `first_tile` on as rows of halves; a warp for each chunk of a tile.
template <class F>
__device__ __forceinline__ void expand(
    const u8* weights, u16* out, int first_tile, int rows, int columns, int stride, int chunks,
    float scale
) {
    wait_for_previous();
    let_next_start();
    const int lane = threadIdx.x & 31;
    const int chunk = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
    if (chunk >= chunks) return;
    const int tile = first_tile + blockIdx.y, g = lane >> 2, t = lane & 3;
    const u8* from = weights + ((i64)tile * chunks + chunk) * F::BYTES;
    u16* to = out + (i64)blockIdx.y * 16 * stride;
    for (int sub = 0; sub < F::COLUMNS / 64; sub++) {
#pragma unroll
        for (int s = 0; s < 4; s++) {
            float low[4], high[4];
            expand_part<F>(from, sub, lane, s, scale, low, high);
            int k = chunk * F::COLUMNS + sub * 64 + s * 16 + t * 4;
            if (tile * 16 + g < rows) store_halves(to + (i64)g * stride, k, columns, low);
            if (tile * 16 + g + 8 < rows)
                store_halves(to + (i64)(g + 8) * stride, k, columns, high);
        }
    }
}

// The rows of some tokens, in float32; a block for each.
template <class F>
__device__ __forceinline__ void look_up(
    const u8* weights, const int* tokens, const int* drawn, float* out, int columns, int chunks,
    float scale
) {
    wait_for_previous();
    let_next_start();
    const int lane = threadIdx.x & 31;
    const int token = token_of(tokens, drawn, blockIdx.x), row = token & 15;
    float* to = out + (i64)blockIdx.x * columns;
    if constexpr (F::IN_ROWS) {
        const u16* from = (const u16*)weights + (i64)token * chunks * F::COLUMNS;
        for (int k = threadIdx.x; k < columns; k += blockDim.x)
            to[k] = half_to_float(from[k]) * scale;
    } else {
        const u8* tile = weights + (i64)(token >> 4) * chunks * F::BYTES;
        constexpr int SUBS = F::COLUMNS / 64;
        for (int part = threadIdx.x >> 5; part < chunks * SUBS; part += blockDim.x >> 5) {
            const u8* chunk = tile + (i64)(part / SUBS) * F::BYTES;
#pragma unroll
            for (int s = 0; s < 4; s++) {
                float low[4], high[4];
                expand_part<F>(chunk, part % SUBS, lane, s, scale, low, high);
                int k = part * 64 + s * 16 + (lane & 3) * 4;
                if (lane >> 2 == (row & 7))
                    for (int i = 0; i < 4 && k + i < columns; i++)
                        to[k + i] = row & 8 ? high[i] : low[i];
            }
        }
    }
}

#define EXPAND(F)                                                                              \
    extern "C" __global__ void __launch_bounds__(256) expand(                                  \
        const u8* weights, u16* out, int first_tile, int rows, int columns, int stride,        \
        int chunks, float scale                                                                \
    ) {                                                                                        \
        expand<F>(weights, out, first_tile, rows, columns, stride, chunks, scale);             \
    }

#define LOOK_UP(F)                                                                             \
    extern "C" __global__ void __launch_bounds__(256) look_up(                                 \
        const u8* weights, const int* tokens, const int* drawn, float* out, int columns,       \
        int chunks, float scale                                                                \
    ) {                                                                                        \
        look_up<F>(weights, tokens, drawn, out, columns, chunks, scale);                       \
    }
