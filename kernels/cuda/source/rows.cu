// What happens to rows between matrix products: norms, gates, sums, copies, rotary positions.
// Every kernel waits for the one before, so that the order of the stream holds for all that follow.

__device__ __forceinline__ float4 load4(const float* p, int k, int columns) {
    if (k + 3 < columns && columns % 4 == 0) return *(const float4*)(p + k);
    return make_float4(k < columns ? p[k] : 0.0f, k + 1 < columns ? p[k + 1] : 0.0f,
                       k + 2 < columns ? p[k + 2] : 0.0f, k + 3 < columns ? p[k + 3] : 0.0f);
}

// Rows of halves are scaled by a power of two where they would not fit; `scales` takes it away.
__device__ __forceinline__ float row_scale(float largest) {
    return largest > 32768.0f ? exp2f(ceilf(log2f(largest)) - 15.0f) : 1.0f;
}

// A block for each row, small enough to find room beside those of the product before it. `out`,
// `packed` and `factors`, which takes what each row is multiplied by, may be absent.
extern "C" __global__ void __launch_bounds__(256) rms_norm(
    const float* x, const float* weight, float* out, const __grid_constant__ Packed packed,
    float* factors, int columns, float epsilon
) {
    constexpr int KEPT = 4;  // quadruples that a thread keeps: all of a row of 4096
    __shared__ float room[33];
    const int first = threadIdx.x * 4, step = blockDim.x * 4;
    const float* from = x + (i64)blockIdx.x * columns;
    float4 w[KEPT], v[KEPT];
#pragma unroll
    for (int n = 0; n < KEPT; n++) w[n] = load4(weight, first + n * step, columns);
    let_next_start();  // weights depend on nothing before
    wait_for_previous();
#pragma unroll
    for (int n = 0; n < KEPT; n++) v[n] = load4(from, first + n * step, columns);
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < KEPT; n++)
        sum += v[n].x * v[n].x + v[n].y * v[n].y + v[n].z * v[n].z + v[n].w * v[n].w;
    for (int k = first + KEPT * step; k < columns; k += step) {
        const float4 u = load4(from, k, columns);
        sum += u.x * u.x + u.y * u.y + u.z * u.z + u.w * u.w;
    }
    const float factor = rsqrtf(block_sum(sum, room) / columns + epsilon);
    if (factors && threadIdx.x == 0) factors[blockIdx.x] = factor;
    auto store = [&](int k, const float4& a, const float4& b) {
        const float y[4] = {a.x * factor * b.x, a.y * factor * b.y, a.z * factor * b.z,
                            a.w * factor * b.w};
        if (packed.form) store_packed4(packed, blockIdx.x, k, columns, y);
        for (int i = 0; out && i < 4 && k + i < columns; i++)
            out[(i64)blockIdx.x * columns + k + i] = y[i];
    };
#pragma unroll
    for (int n = 0; n < KEPT; n++)
        if (first + n * step < columns) store(first + n * step, v[n], w[n]);
    for (int k = first + KEPT * step; k < columns; k += step)
        store(k, load4(from, k, columns), load4(weight, k, columns));
}

// silu(gate) * up, or x alone where `up` is absent. A block for each row.
extern "C" __global__ void gate_rows(
    const float* gate, const float* up, int stride, float* out,
    const __grid_constant__ Packed packed, float* scales, int columns
) {
    __shared__ float room[33];
    wait_for_previous();
    let_next_start();
    const float* a = gate + (i64)blockIdx.x * stride;
    const float* b = up ? up + (i64)blockIdx.x * stride : nullptr;
    float scale = 1.0f;
    if (scales) {
        float largest = 0.0f;
        for (int k = threadIdx.x; k < columns; k += blockDim.x)
            largest = fmaxf(largest, fabsf(b ? silu(a[k]) * b[k] : a[k]));
        scale = row_scale(block_max(largest, room));
        if (threadIdx.x == 0) scales[blockIdx.x] = scale;
    }
    for (int k = threadIdx.x; k < columns; k += blockDim.x) {
        float y = b ? silu(a[k]) * b[k] : a[k];
        if (out) out[(i64)blockIdx.x * columns + k] = y;
        if (packed.form) store_packed(packed, blockIdx.x, k, y / scale);
    }
}

// a + b * scale + bias, each but b optional. `stride` is that of b.
extern "C" __global__ void add_rows(
    const float* a, const float* b, int stride, const float* scales, const float* bias, float* out,
    int columns
) {
    wait_for_previous();
    let_next_start();
    const i64 row = blockIdx.y;
    const float scale = scales ? scales[row] : 1.0f;
    for (int k = blockIdx.x * blockDim.x + threadIdx.x; k < columns; k += gridDim.x * blockDim.x) {
        float y = b[row * stride + k] * scale;
        if (bias) y += bias[k];
        if (a) y += a[row * columns + k];
        out[row * columns + k] = y;
    }
}

extern "C" __global__ void select_rows(
    const float* x, const int* wanted, float* out, int columns
) {
    wait_for_previous();
    let_next_start();
    const float* from = x + (i64)wanted[blockIdx.x] * columns;
    for (int k = threadIdx.x; k < columns; k += blockDim.x)
        out[(i64)blockIdx.x * columns + k] = from[k];
}

extern "C" __global__ void look_up_floats(
    const float* weights, const int* tokens, const int* drawn, float* out, int columns
) {
    wait_for_previous();
    let_next_start();
    const float* from = weights + (i64)token_of(tokens, drawn, blockIdx.x) * columns;
    for (int k = threadIdx.x; k < columns; k += blockDim.x)
        out[(i64)blockIdx.x * columns + k] = from[k];
}

// x times weights of float32, in float32: a warp for each output, up to 16 rows of x.
extern "C" __global__ void __launch_bounds__(256) product_floats(
    const float* weights, const float* x, const float* bias, const float* residual, float* out,
    int outputs, int columns, int rows
) {
    wait_for_previous();
    let_next_start();
    const int lane = threadIdx.x & 31;
    const int n = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
    if (n >= outputs) return;
    float total[16];
#pragma unroll
    for (int r = 0; r < 16; r++) total[r] = 0.0f;
    for (int k = lane; k < columns; k += 32) {
        float w = weights[(i64)n * columns + k];
#pragma unroll
        for (int r = 0; r < 16; r++)
            if (r < rows) total[r] += w * x[(i64)r * columns + k];
    }
#pragma unroll
    for (int r = 0; r < 16; r++) {
        if (r >= rows) break;
        float y = warp_sum(total[r]);
        i64 at = (i64)r * outputs + n;
        if (lane == 0) out[at] = y + (bias ? bias[n] : 0.0f) + (residual ? residual[at] : 0.0f);
    }
}

extern "C" __global__ void rotate(
    const float* x, float* out, const int* positions, const __grid_constant__ Rotation by,
    int heads, int size
) {
    wait_for_previous();
    let_next_start();
    i64 at = ((i64)blockIdx.x * heads + blockIdx.y) * size;
    for (int d = threadIdx.x; d < size; d += blockDim.x)
        out[at + d] = turned(by, positions[blockIdx.x], x + at, d);
}

// Of a row, rotates queries and keys, and writes keys and values to their places in the cache.
// Blocks: rows x (query heads, then key heads, then value heads). `out` takes the queries.
template <class T>
__device__ __forceinline__ void store_heads(
    const float* q, const float* k, const float* v, float* out, T* keys, T* values,
    const int* positions, const int* sequence, const int* tables, int stride,
    const Rotation& q_turn, const Rotation& k_turn, int heads, int kv_heads, int key_size,
    int value_size, int key_room, int value_room, int block_size
) {
    wait_for_previous();
    let_next_start();
    const i64 row = blockIdx.x;
    const int position = positions[row];
    int head = blockIdx.y;
    if (head < heads) {
        i64 at = (row * heads + head) * key_size;
        for (int d = threadIdx.x; d < key_size; d += blockDim.x)
            out[at + d] = turned(q_turn, position, q + at, d);
        return;
    }
    head -= heads;
    const bool is_key = head < kv_heads;
    if (!is_key) head -= kv_heads;
    const int page = tables[(i64)sequence[row] * stride + position / block_size];
    const i64 place = ((i64)page * kv_heads + head) * block_size + position % block_size;
    const int size = is_key ? key_size : value_size, room = is_key ? key_room : value_room;
    const float* from = (is_key ? k : v) + (row * kv_heads + head) * size;
    T* to = (is_key ? keys : values) + place * room;
    for (int d = threadIdx.x; d < size; d += blockDim.x) {
        float x = is_key ? turned(k_turn, position, from, d) : from[d];
        if constexpr (sizeof(T) == 2) to[d] = float_to_half(x);
        else to[d] = x;
    }
}

#define STORE_HEADS(NAME, T)                                                                      \
    extern "C" __global__ void NAME(                                                              \
        const float* q, const float* k, const float* v, float* out, T* keys, T* values,           \
        const int* positions, const int* sequence, const int* tables, int stride,                 \
        const __grid_constant__ Rotation q_turn, const __grid_constant__ Rotation k_turn,         \
        int heads, int kv_heads, int key_size, int value_size, int key_room, int value_room,      \
        int block_size                                                                            \
    ) {                                                                                           \
        store_heads<T>(q, k, v, out, keys, values, positions, sequence, tables, stride, q_turn,   \
                       k_turn, heads, kv_heads, key_size, value_size, key_room, value_room,       \
                       block_size);                                                               \
    }
STORE_HEADS(store_heads_f32, float)
STORE_HEADS(store_heads_f16, u16)
