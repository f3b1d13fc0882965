// Attention of many rows over the paged cache, on tensor cores: blocks of 64 queries of a head go
// through the keys in tiles, with a running softmax (https://arxiv.org/abs/2205.14135).
//
// With TERMS 1 operands are halves, as they are in a cache of halves. With TERMS 3 each operand
// is split in two halves, and all but the smallest of the four products are added: the result is
// nearly as good as float32.
//
// While a tile of keys and values in halves is worked on, the next one is copied to shared memory.

#define QUERIES 64

struct PromptAttention {
    const float* q;
    float* out;     // may be absent
    Packed packed;  // may be absent
    const void* keys;
    const void* values;
    const int* tiles;  // per block: first row, rows, sequence
    const int* positions;
    const int* tables;
    int stride, heads, kv_heads, key_size, value_size, key_room, value_room, block_size;
    float scale;
};

__device__ __forceinline__ void load_matrices(u32 (&r)[4], const u16* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(p)));
}

__device__ __forceinline__ void load_transposed(u32 (&r)[4], const u16* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(p)));
}

template <int TERMS>
__device__ __forceinline__ void store_split(u16* high, u16* low, const float (&x)[4]) {
    u32 first = pack_halves(x[0], x[1]), second = pack_halves(x[2], x[3]);
    *(uint2*)high = make_uint2(first, second);
    if constexpr (TERMS == 3) {
        *(uint2*)low = make_uint2(
            pack_halves(x[0] - half_to_float(first & 0xffff), x[1] - half_to_float(first >> 16)),
            pack_halves(x[2] - half_to_float(second & 0xffff), x[3] - half_to_float(second >> 16)));
    }
}

template <class T, int TERMS>
__device__ __forceinline__ void copy_split(u16* high, u16* low, const T* from, int d, int room) {
    float x[4] = {0, 0, 0, 0};
    if (from && d < room) {
        if constexpr (sizeof(T) == 2) {
            if constexpr (TERMS == 1) {
                *(uint2*)high = *(const uint2*)(from + d);
                return;
            }
            uint2 w = *(const uint2*)(from + d);
            x[0] = half_to_float(w.x & 0xffff), x[1] = half_to_float(w.x >> 16);
            x[2] = half_to_float(w.y & 0xffff), x[3] = half_to_float(w.y >> 16);
        } else {
            float4 w = *(const float4*)(from + d);
            x[0] = w.x, x[1] = w.y, x[2] = w.z, x[3] = w.w;
        }
    }
    store_split<TERMS>(high, low, x);
}

// 16 bytes to shared memory; zeros, if nothing is to be read.
__device__ __forceinline__ void copy_or_clear(void* to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0) : "memory");
}

__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Where a token's keys and values lie, in heads of a page.
__device__ __forceinline__ i64 place_of(
    const PromptAttention& p, const int* table, int kv_head, int token
) {
    return ((i64)table[token / p.block_size] * p.kv_heads + kv_head) * p.block_size
           + token % p.block_size;
}

// A tile of halves whose heads are multiples of 16 bytes: copies that are waited for later.
template <int SIZE, int KEYS>
__device__ __forceinline__ void fetch_tile(
    const PromptAttention& p, const int* table, int kv_head, int base, int length, u16* ks, u16* vs
) {
    constexpr int PIECES = SIZE / 8;
    for (int i = threadIdx.x; i < KEYS * PIECES; i += blockDim.x) {
        const int n = i / PIECES, d = i % PIECES * 8, token = base + n;
        const bool here = token < length;
        const i64 place = here ? place_of(p, table, kv_head, token) : 0;
        const u16* key = (const u16*)p.keys + place * p.key_room + d;
        const u16* value = (const u16*)p.values + place * p.value_room + d;
        const bool has_key = here && d < p.key_room, has_value = here && d < p.value_room;
        copy_or_clear(ks + n * (SIZE + 8) + d, has_key ? key : p.keys, has_key);
        copy_or_clear(vs + n * (SIZE + 8) + d, has_value ? value : p.values, has_value);
    }
    commit_copies();
}

// SIZE: elements of a head, rounded up. KEYS: of a tile.
template <class T, int SIZE, int KEYS, int TERMS>
__device__ __forceinline__ void attend_prompt(const PromptAttention& p) {
    extern __shared__ __align__(16) u16 halves[];
    constexpr int PITCH = SIZE + 8, SPLITS = TERMS == 3 ? 2 : 1;
    u16* qs = halves;                               // [SPLITS][QUERIES][PITCH]
    u16* first_ks = qs + SPLITS * QUERIES * PITCH;  // [SPLITS][KEYS][PITCH], then values
    constexpr int STAGE = 2 * SPLITS * KEYS * PITCH;
    const bool ahead = TERMS == 1 && p.key_room % 8 == 0 && p.value_room % 8 == 0;
    wait_for_previous();
    let_next_start();
    const int row0 = p.tiles[blockIdx.x * 3], rows = p.tiles[blockIdx.x * 3 + 1];
    const int* table = p.tables + (i64)p.tiles[blockIdx.x * 3 + 2] * p.stride;
    const int head = blockIdx.y, kv_head = head / (p.heads / p.kv_heads);
    const int position0 = p.positions[row0], length = position0 + rows;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    if (ahead)
        fetch_tile<SIZE, KEYS>(p, table, kv_head, 0, length, first_ks, first_ks + STAGE / 2);
    for (int i = threadIdx.x; i < QUERIES * (SIZE / 4); i += blockDim.x) {
        int r = i / (SIZE / 4), d = i % (SIZE / 4) * 4;
        const float* from = p.q + ((i64)(row0 + r) * p.heads + head) * p.key_size;
        float x[4];
        for (int e = 0; e < 4; e++)
            x[e] = r < rows && d + e < p.key_size ? from[d + e] * p.scale * 1.44269504f : 0.0f;
        u16* to = qs + r * PITCH + d;
        store_split<TERMS>(to, to + QUERIES * PITCH, x);
    }
    float total[SIZE / 8][4];
#pragma unroll
    for (int n = 0; n < SIZE / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) total[n][i] = 0.0f;
    float highest[2] = {LOWEST, LOWEST}, sum[2] = {0.0f, 0.0f};
    const int own = position0 + warp * 16 + g;  // of row g; row g + 8 comes 8 later
    for (int base = 0, number = 0; base < length; base += KEYS, number++) {
        u16* ks = first_ks + (ahead ? number % 2 * STAGE : 0);
        u16* vs = ks + STAGE / 2;
        if (ahead) wait_copies<0>();
        __syncthreads();
        if (ahead && base + KEYS < length) {
            u16* other = first_ks + (number + 1) % 2 * STAGE;
            fetch_tile<SIZE, KEYS>(
                p, table, kv_head, base + KEYS, length, other, other + STAGE / 2);
        }
        for (int i = threadIdx.x; !ahead && i < KEYS * (SIZE / 4); i += blockDim.x) {
            int n = i / (SIZE / 4), d = i % (SIZE / 4) * 4, token = base + n;
            bool here = token < length;
            const i64 place = here ? place_of(p, table, kv_head, token) : 0;
            const T* key = here ? (const T*)p.keys + place * p.key_room : nullptr;
            const T* value = here ? (const T*)p.values + place * p.value_room : nullptr;
            u16 *k = ks + n * PITCH + d, *v = vs + n * PITCH + d;
            copy_split<T, TERMS>(k, k + KEYS * PITCH, key, d, p.key_room);
            copy_split<T, TERMS>(v, v + KEYS * PITCH, value, d, p.value_room);
        }
        if (!ahead) __syncthreads();
        if (base > position0 + warp * 16 + 15) continue;  // all in the future
        float score[KEYS / 8][4];
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) score[n][i] = 0.0f;
#pragma unroll
        for (int d = 0; d < SIZE; d += 16) {
            u32 a[SPLITS][4];
#pragma unroll
            for (int i = 0; i < SPLITS; i++)
                load_matrices(a[i], qs + (i * QUERIES + warp * 16 + (lane & 15)) * PITCH + d
                                    + (lane >> 4) * 8);
#pragma unroll
            for (int n = 0; n < KEYS / 8; n += 2) {
                // Matrices: keys n at d, at d + 8, keys n + 1 at d, at d + 8.
                const u16* from = ks + (n * 8 + (lane >> 4) * 8 + (lane & 7)) * PITCH + d
                                  + ((lane >> 3) & 1) * 8;
                u32 b[4];
                load_matrices(b, from);
                multiply_add(score[n], a[0], b[0], b[1]);
                multiply_add(score[n + 1], a[0], b[2], b[3]);
                if constexpr (TERMS == 3) {
                    multiply_add(score[n], a[1], b[0], b[1]);
                    multiply_add(score[n + 1], a[1], b[2], b[3]);
                    load_matrices(b, from + KEYS * PITCH);
                    multiply_add(score[n], a[0], b[0], b[1]);
                    multiply_add(score[n + 1], a[0], b[2], b[3]);
                }
            }
        }
        float top[2] = {highest[0], highest[1]};
        const bool to_the_end = base + KEYS > position0 + warp * 16;  // some are in the future
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int token = base + n * 8 + 2 * t + (i & 1);
                if (to_the_end && token > own + (i >> 1) * 8) score[n][i] = LOWEST;
                top[i >> 1] = fmaxf(top[i >> 1], score[n][i]);
            }
        }
        float keep[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            top[i] = fmaxf(top[i], __shfl_xor_sync(FULL, top[i], 1));
            top[i] = fmaxf(top[i], __shfl_xor_sync(FULL, top[i], 2));
            keep[i] = power_of_two(highest[i] - top[i]);
            highest[i] = top[i];
            sum[i] *= keep[i];
        }
#pragma unroll
        for (int n = 0; n < SIZE / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) total[n][i] *= keep[i >> 1];
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                score[n][i] = power_of_two(score[n][i] - top[i >> 1]);
                sum[i >> 1] += score[n][i];
            }
#pragma unroll
        for (int k = 0; k < KEYS; k += 16) {
            const float(&x)[4] = score[k / 8];
            const float(&y)[4] = score[k / 8 + 1];
            u32 a[SPLITS][4] = {{pack_halves(x[0], x[1]), pack_halves(x[2], x[3]),
                                 pack_halves(y[0], y[1]), pack_halves(y[2], y[3])}};
            if constexpr (TERMS == 3) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float(&z)[4] = i < 2 ? x : y;
                    a[SPLITS - 1][i] =
                        pack_halves(z[(i & 1) * 2] - half_to_float(a[0][i] & 0xffff),
                                    z[(i & 1) * 2 + 1] - half_to_float(a[0][i] >> 16));
                }
            }
#pragma unroll
            for (int n = 0; n < SIZE / 8; n += 2) {
                // Matrices: values k at n, k + 8 at n, k at n + 1, k + 8 at n + 1.
                const u16* from = vs + (k + (lane & 15)) * PITCH + n * 8 + (lane >> 4) * 8;
                u32 b[4];
                load_transposed(b, from);
                multiply_add(total[n], a[0], b[0], b[1]);
                multiply_add(total[n + 1], a[0], b[2], b[3]);
                if constexpr (TERMS == 3) {
                    multiply_add(total[n], a[1], b[0], b[1]);
                    multiply_add(total[n + 1], a[1], b[2], b[3]);
                    load_transposed(b, from + KEYS * PITCH);
                    multiply_add(total[n], a[0], b[0], b[1]);
                    multiply_add(total[n + 1], a[0], b[2], b[3]);
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        sum[i] += __shfl_xor_sync(FULL, sum[i], 1);
        sum[i] += __shfl_xor_sync(FULL, sum[i], 2);
        int r = warp * 16 + g + 8 * i;
        if (r >= rows) continue;
#pragma unroll
        for (int n = 0; n < SIZE / 8; n++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                int d = n * 8 + 2 * t + e;
                if (d >= p.value_size) continue;
                float y = total[n][2 * i + e] / sum[i];
                i64 at = (i64)(row0 + r) * p.heads + head;
                if (p.out) p.out[at * p.value_size + d] = y;
                if (p.packed.form) store_packed(p.packed, row0 + r, head * p.value_size + d, y);
            }
        }
    }
}

#define ATTEND_PROMPT(NAME, T, SIZE, KEYS, TERMS)                       \
    extern "C" __global__ void __launch_bounds__(128) NAME(             \
        const __grid_constant__ PromptAttention p) {                    \
        attend_prompt<T, SIZE, KEYS, TERMS>(p);                         \
    }
ATTEND_PROMPT(attend_prompt_f16_64, u16, 64, 64, 1)
ATTEND_PROMPT(attend_prompt_f16_128, u16, 128, 64, 1)
ATTEND_PROMPT(attend_prompt_f16_256, u16, 256, 32, 1)
ATTEND_PROMPT(attend_prompt_f32_64, float, 64, 32, 3)
ATTEND_PROMPT(attend_prompt_f32_128, float, 128, 32, 3)
ATTEND_PROMPT(attend_prompt_f32_256, float, 256, 16, 3)
