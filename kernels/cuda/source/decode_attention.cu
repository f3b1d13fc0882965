// Attention of few rows over the paged cache: split over the context, joined by the last block.
//
// A block takes HEADS query heads that share a key-value head, and a share of the context. Eight
// lanes read a key or value together, so that a warp has four tokens at once; each lane keeps
// 4 * VECTORS elements of a head, and fetches its part of later tokens ahead. Softmax is kept as
// running maximum and sum (https://arxiv.org/abs/1805.02867).
//
// Where the kernel writes the cache itself, all but the newest token has been there since the step
// before, and so has what describes the step: both are read before the previous kernel has ended.

#define LEAST_SHARE 32
#define MOST_SPLITS 32
#define AT_ONCE 16  // shares that are read together when they are joined

struct Attention {
    const float* q;
    const float* k;    // of this step, where this kernel writes the cache; else absent
    const float* v;
    float* out;        // may be absent
    Packed packed;     // may be absent
    void* keys;
    void* values;
    float* partial;    // [rows][heads][splits][value_room], then their maxima and sums
    u32* arrived;      // [rows][blocks of heads], zero between launches
    const int* positions;
    const int* sequence;
    const int* tables;
    Rotation q_turn, k_turn;
    int stride, heads, kv_heads, key_size, value_size, key_room, value_room, block_size;
    float scale;
};

__device__ __forceinline__ float load_fresh(const float* p) {  // what another block wrote
    float x;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(x) : "l"(p));
    return x;
}

__device__ __forceinline__ float4 load_fresh4(const float* p) {
    float4 x;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(p));
    return x;
}

// Four elements of a cache, as they are.
template <class T>
struct Piece {
    T x[4];
    __device__ __forceinline__ float4 floats() const {
        if constexpr (sizeof(T) == 2)
            return make_float4(half_to_float(x[0]), half_to_float(x[1]), half_to_float(x[2]),
                               half_to_float(x[3]));
        else return make_float4(x[0], x[1], x[2], x[3]);
    }
};

template <class T>
__device__ __forceinline__ void copy_piece(Piece<T>* to, const T* from) {
    if constexpr (sizeof(T) == 2)
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8;"
                     :: "r"(shared_address(to)), "l"(from) : "memory");
    else copy_async(to, from);
}

template <class T>
__device__ __forceinline__ T to_cache(float x) {
    if constexpr (sizeof(T) == 2) return float_to_half(x);
    else return x;
}

template <class T, int VECTORS, int HEADS>
__device__ __forceinline__ void attend(const Attention& p) {
    constexpr int E = 4 * VECTORS, SIZE = 8 * E, OWN = (HEADS * SIZE + 127) / 128;
    extern __shared__ __align__(16) u8 memory[];  // [warp][DEPTH][key or value][VECTORS][lane]
    __shared__ float queries[HEADS][SIZE];
    __shared__ float shared_state[4][HEADS][2];
    __shared__ float factors[HEADS][MOST_SPLITS];
    __shared__ u32 order;
    const int row = blockIdx.z, warp = threadIdx.x >> 5, lane = threadIdx.x & 31, l8 = lane & 7;
    const int group = p.heads / p.kv_heads, groups = (group + HEADS - 1) / HEADS;
    const int kv_head = blockIdx.y / groups, first = blockIdx.y % groups * HEADS;
    const int count = min(HEADS, group - first), head0 = kv_head * group + first;
    Piece<T>* ring = (Piece<T>*)memory + warp * (DEPTH * 2 * VECTORS * 32) + lane;
    const bool writes = p.k;
    let_next_start();
    if (!writes) wait_for_previous();
    const int position = p.positions[row], length = position + 1;
    const int* table = p.tables + (i64)p.sequence[row] * p.stride;
    const int even = ((length + gridDim.x - 1) / gridDim.x + 15) & ~15;
    const int share = max(even, LEAST_SHARE), used = (length + share - 1) / share;
    const int start = blockIdx.x * share, stop = min(length, start + share);
    if (start >= length) return;
    const T *keys = (const T*)p.keys, *values = (const T*)p.values;
    auto place_of = [&](int token) {
        return ((i64)table[token / p.block_size] * p.kv_heads + kv_head) * p.block_size
               + token % p.block_size;
    };
    auto fetch = [&](i64 place, int stage) {
        Piece<T>* to = ring + stage * (2 * VECTORS * 32);
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            int d = i * 32 + l8 * 4;
            if (d < p.key_room) copy_piece<T>(to + i * 32, keys + place * p.key_room + d);
            if (d < p.value_room)
                copy_piece<T>(to + (VECTORS + i) * 32, values + place * p.value_room + d);
        }
    };
    const int own = start + warp * 4 + (lane >> 3);  // the first of this lane's tokens
    const int known = writes ? min(stop, position) : stop;  // tokens before it are in the cache
    i64 ahead[DEPTH];
#pragma unroll
    for (int i = 0; i < DEPTH; i++) ahead[i] = own + 16 * i < known ? place_of(own + 16 * i) : 0;
#pragma unroll
    for (int i = 0; i < DEPTH; i++) {
        if (own + 16 * i < known) fetch(ahead[i], i);
        commit_copies();
    }
    if (writes) wait_for_previous();
    const bool newest = writes && stop == length;
    const i64 new_head = (i64)row * p.kv_heads + kv_head;
    auto new_key = [&](int d) {
        const float* from = p.k + new_head * p.key_size;
        return to_cache<T>(d < p.key_size ? turned(p.k_turn, position, from, d) : 0.0f);
    };
    auto new_value = [&](int d) {
        return to_cache<T>(d < p.value_size ? p.v[new_head * p.value_size + d] : 0.0f);
    };
    // All loads first: they take as long together as one alone.
    T first_key = 0, first_value = 0;
    if (newest && threadIdx.x < p.key_room) first_key = new_key(threadIdx.x);
    if (newest && threadIdx.x < p.value_room) first_value = new_value(threadIdx.x);
    float turned_queries[OWN];
#pragma unroll
    for (int n = 0; n < OWN; n++) {
        int i = n * 128 + threadIdx.x, h = min(i / SIZE, count - 1), d = i % SIZE;
        const float* from = p.q + ((i64)row * p.heads + head0 + h) * p.key_size;
        turned_queries[n] = d < p.key_size ? turned(p.q_turn, position, from, d) * p.scale : 0.0f;
    }
#pragma unroll
    for (int n = 0; n < OWN; n++) {
        int i = n * 128 + threadIdx.x;
        if (i < HEADS * SIZE) queries[i / SIZE][i % SIZE] = turned_queries[n];
    }
    if (newest) {
        // To the cache, and to where a copy from the cache would have put it.
        const i64 place = place_of(position);
        const int at = position - start, stage = at / 16;
        Piece<T>* to = (Piece<T>*)memory + (at % 16 / 4) * (DEPTH * 2 * VECTORS * 32)
                       + stage * (2 * VECTORS * 32) + at % 4 * 8;
        for (int d = threadIdx.x; d < p.key_room; d += 128) {
            T x = d < 128 ? first_key : new_key(d);
            ((T*)p.keys)[place * p.key_room + d] = x;
            if (stage < DEPTH) to[d / 32 * 32 + d % 32 / 4].x[d % 4] = x;
        }
        for (int d = threadIdx.x; d < p.value_room; d += 128) {
            T x = d < 128 ? first_value : new_value(d);
            ((T*)p.values)[place * p.value_room + d] = x;
            if (stage < DEPTH) to[(VECTORS + d / 32) * 32 + d % 32 / 4].x[d % 4] = x;
        }
    }
    __syncthreads();
    float q[HEADS][E], total[HEADS][E], highest[HEADS], sum[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        highest[h] = LOWEST;
        sum[h] = 0.0f;
#pragma unroll
        for (int e = 0; e < E; e++) {
            q[h][e] = queries[h][(e >> 2) * 32 + l8 * 4 + (e & 3)];
            total[h][e] = 0.0f;
        }
    }
    int stage = 0;
    for (int base = start; base < stop; base += 16) {
        const int token = own + base - start, later = token + 16 * DEPTH;
        const bool here = token < stop;
        const i64 next = later < stop ? place_of(later) : 0;
        wait_copies<DEPTH - 1>();
        const Piece<T>* from = ring + stage * (2 * VECTORS * 32);
        float4 k[VECTORS], v[VECTORS];
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            int d = i * 32 + l8 * 4;
            k[i] = here && d < p.key_room ? from[i * 32].floats() : make_float4(0, 0, 0, 0);
            v[i] = here && d < p.value_room ? from[(VECTORS + i) * 32].floats()
                                            : make_float4(0, 0, 0, 0);
        }
        if (later < stop) fetch(next, stage);
        commit_copies();
        stage = stage + 1 == DEPTH ? 0 : stage + 1;
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float s = 0.0f;
#pragma unroll
            for (int i = 0; i < VECTORS; i++)
                s += q[h][4 * i] * k[i].x + q[h][4 * i + 1] * k[i].y + q[h][4 * i + 2] * k[i].z
                     + q[h][4 * i + 3] * k[i].w;
            s += __shfl_xor_sync(FULL, s, 1);
            s += __shfl_xor_sync(FULL, s, 2);
            s += __shfl_xor_sync(FULL, s, 4);
            if (!here) s = LOWEST;
            float top = fmaxf(highest[h], s);
            float keep = __expf(highest[h] - top), weight = here ? __expf(s - top) : 0.0f;
            highest[h] = top;
            sum[h] = sum[h] * keep + weight;
#pragma unroll
            for (int i = 0; i < VECTORS; i++) {
                total[h][4 * i] = total[h][4 * i] * keep + weight * v[i].x;
                total[h][4 * i + 1] = total[h][4 * i + 1] * keep + weight * v[i].y;
                total[h][4 * i + 2] = total[h][4 * i + 2] * keep + weight * v[i].z;
                total[h][4 * i + 3] = total[h][4 * i + 3] * keep + weight * v[i].w;
            }
        }
    }
    wait_copies<0>();
    __syncthreads();  // the rings are read no more
    float* totals = (float*)memory;  // [warp][HEADS][SIZE]
    // The four tokens of a warp, then the four warps.
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
#pragma unroll
        for (int offset = 8; offset <= 16; offset <<= 1) {
            float other = __shfl_xor_sync(FULL, highest[h], offset);
            float top = fmaxf(highest[h], other);
            float mine = __expf(highest[h] - top), theirs = __expf(other - top);
            sum[h] = sum[h] * mine + __shfl_xor_sync(FULL, sum[h], offset) * theirs;
#pragma unroll
            for (int e = 0; e < E; e++)
                total[h][e] =
                    total[h][e] * mine + __shfl_xor_sync(FULL, total[h][e], offset) * theirs;
            highest[h] = top;
        }
        if (lane < 8) {
#pragma unroll
            for (int e = 0; e < E; e++)
                totals[(warp * HEADS + h) * SIZE + (e >> 2) * 32 + l8 * 4 + (e & 3)] = total[h][e];
            if (lane == 0) {
                shared_state[warp][h][0] = highest[h];
                shared_state[warp][h][1] = sum[h];
            }
        }
    }
    __syncthreads();
    const int splits = gridDim.x, room = p.value_room;
    const i64 line = ((i64)row * p.heads + head0) * splits;  // of this block's first head
    float* values_of = p.partial + line * room;
    float* states = p.partial + (i64)gridDim.z * p.heads * splits * room + line * 2;
    for (int i = threadIdx.x; i < count * p.value_size; i += blockDim.x) {
        int h = i / p.value_size, d = i % p.value_size;
        float top = LOWEST, x = 0.0f, s = 0.0f;
#pragma unroll
        for (int w = 0; w < 4; w++) top = fmaxf(top, shared_state[w][h][0]);
#pragma unroll
        for (int w = 0; w < 4; w++) {
            float factor = __expf(shared_state[w][h][0] - top);
            s += shared_state[w][h][1] * factor;
            x += totals[(w * HEADS + h) * SIZE + d] * factor;
        }
        if (used == 1) {
            const int head = head0 + h;
            if (p.out) p.out[((i64)row * p.heads + head) * p.value_size + d] = x / s;
            if (p.packed.form) store_packed(p.packed, row, head * p.value_size + d, x / s);
        } else {
            const int part = h * splits + blockIdx.x;
            values_of[(i64)part * room + d] = x;
            if (d == 0) {
                states[part * 2] = top;
                states[part * 2 + 1] = s;
            }
        }
    }
    if (used == 1) return;
    __syncthreads();
    if (threadIdx.x == 0) {
        u32* arrived = p.arrived + row * gridDim.y + blockIdx.y;
        __threadfence();
        order = atomicAdd(arrived, 1);
        __threadfence();
        if (order == used - 1) *arrived = 0;
    }
    __syncthreads();
    if (order != used - 1) return;
    // Four elements a thread; those of the first shares are on the way while weights are computed.
    const int pieces = room / 4, items = count * pieces;
    float4 piece[AT_ONCE];
    auto load_pieces = [&](int i, int n) {
        const float* from = values_of + (i64)(i / pieces) * splits * room + i % pieces * 4;
#pragma unroll
        for (int m = 0; m < AT_ONCE; m++)
            piece[m] = load_fresh4(from + (i64)min(n + m, used - 1) * room);
    };
    if (threadIdx.x < items) load_pieces(threadIdx.x, 0);
    // A warp a head: the weight of each share; none for those that are not used.
    for (int h = warp; h < count; h += 4) {
        const float* from = states + (h * splits + lane) * 2;
        float own_top = lane < used ? load_fresh(from) : LOWEST;
        float own_sum = lane < used ? load_fresh(from + 1) : 0.0f;
        float factor = __expf(own_top - warp_max(own_top));
        float all = warp_sum(own_sum * factor);
        factors[h][lane] = factor / all;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < items; i += blockDim.x) {
        const int h = i / pieces, d = i % pieces * 4, head = head0 + h;
        if (i >= 128) load_pieces(i, 0);
        float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        for (int n = 0; n < used; n += AT_ONCE) {
            if (n) load_pieces(i, n);
#pragma unroll
            for (int m = 0; m < AT_ONCE; m++) {
                const float factor = factors[h][n + m];  // 0 from `used` on
                x[0] += piece[m].x * factor;
                x[1] += piece[m].y * factor;
                x[2] += piece[m].z * factor;
                x[3] += piece[m].w * factor;
            }
        }
        const int k = head * p.value_size + d;
        if (p.value_size % 4 == 0 && p.packed.form)
            store_packed4(p.packed, row, k, p.heads * p.value_size, x);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            if (d + e >= p.value_size) break;
            if (p.out) p.out[(i64)row * p.heads * p.value_size + k + e] = x[e];
            if (p.value_size % 4 && p.packed.form) store_packed(p.packed, row, k + e, x[e]);
        }
    }
}

#define ATTEND(NAME, T, VECTORS, HEADS)                               \
    extern "C" __global__ void __launch_bounds__(128) NAME(           \
        const __grid_constant__ Attention p) {                        \
        attend<T, VECTORS, HEADS>(p);                                 \
    }
