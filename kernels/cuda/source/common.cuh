// What all kernels share: half-precision arithmetic, tensor-core products, copies to shared memory,
// dependent launches. No headers are included, so that NVRTC needs none.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

#define FULL 0xffffffffu
#define HALF_MAX 65504.0f
#define NOT_A_NUMBER __int_as_float(0x7fffffff)
#define LOWEST -1e30f  // below every score
#define INFINITY_F __int_as_float(0x7f800000)

__device__ __forceinline__ float half_to_float(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

__device__ __forceinline__ u16 float_to_half(float f) {
    u16 h;
    f = fminf(fmaxf(f, -HALF_MAX), HALF_MAX);
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

// Two floats as halves in one word, the first in the low half.
__device__ __forceinline__ u32 pack_halves(float low, float high) {
    return (u32)float_to_half(low) | (u32)float_to_half(high) << 16;
}

__device__ __forceinline__ u32 subtract_halves(u32 a, u32 b) {
    u32 d;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

// c += a * b: a is 16 x 16 (row), b 16 x 8 (column), both halves; c 16 x 8 in float32.
__device__ __forceinline__ void multiply_add(
    float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1
) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 shared_address(const void* p) {
    return (u32)__cvta_generic_to_shared(p);
}

__device__ __forceinline__ void copy_async(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                 :: "r"(shared_address(to)), "l"(from) : "memory");
}

__device__ __forceinline__ void copy_float(float* to, const float* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;"
                 :: "r"(shared_address(to)), "l"(from) : "memory");
}

__device__ __forceinline__ void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int PENDING>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
}

__device__ __forceinline__ void wait_all_copies() {  // those of no group as well
    asm volatile("cp.async.wait_all;" ::: "memory");
}

// The next kernel of the stream may start; before it reads what this one writes, it waits.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The token of a row; one below 0 was drawn by the step before.
__device__ __forceinline__ int token_of(const int* tokens, const int* drawn, int row) {
    const int token = tokens[row];
    return token < 0 ? drawn[-1 - token] : token;
}

__device__ __forceinline__ float warp_sum(float x) {
    for (int offset = 16; offset; offset >>= 1) x += __shfl_xor_sync(FULL, x, offset);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
    for (int offset = 16; offset; offset >>= 1) x = fmaxf(x, __shfl_xor_sync(FULL, x, offset));
    return x;
}

// Sum over a block of whole warps; every thread gets it. `room` holds 33 floats.
__device__ __forceinline__ float block_sum(float x, float* room) {
    x = warp_sum(x);
    if ((threadIdx.x & 31) == 0) room[threadIdx.x >> 5] = x;
    __syncthreads();
    if (threadIdx.x < 32) {
        float y = threadIdx.x < blockDim.x >> 5 ? room[threadIdx.x] : 0.0f;
        y = warp_sum(y);
        if (threadIdx.x == 0) room[32] = y;
    }
    __syncthreads();
    return room[32];
}

__device__ __forceinline__ float block_max(float x, float* room) {
    x = warp_max(x);
    if ((threadIdx.x & 31) == 0) room[threadIdx.x >> 5] = x;
    __syncthreads();
    if (threadIdx.x < 32) {
        float y = threadIdx.x < blockDim.x >> 5 ? room[threadIdx.x] : -3.4e38f;
        y = warp_max(y);
        if (threadIdx.x == 0) room[32] = y;
    }
    __syncthreads();
    return room[32];
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

// How the input of a matrix product is stored.
enum Form { FRAGMENTS_SPLIT = 1, FRAGMENTS = 2, ROWS = 3 };

// Operands of `multiply_add` for up to 16 rows of x, ready to be loaded; columns of a matrix
// product are rows of x. Each number is kept as its half and as what that leaves, which together
// are as good as float32: with FRAGMENTS_SPLIT in two columns next to each other, with FRAGMENTS in two tiles.
// With ROWS, x is stored as a matrix of halves.
struct Packed {
    u16* data;
    int form;
    int tiles;  // of 8 columns, both parts counted
    int stride; // halves of a row, with ROWS
};

// Index of element k of a column: each lane finds the numbers of two steps of 16 side by side.
__device__ __forceinline__ i64 fragment_index(int column, int k, int tiles) {
    int chunk = k >> 6, s = (k >> 4) & 3, t = (k >> 2) & 3, j = k & 3;
    int tile = column >> 3, g = column & 7;
    return ((i64)((chunk * tiles + tile) * 2 + (s >> 1)) * 32 + (g * 4 + t)) * 8 + (s & 1) * 4 + j;
}

// Where the first part of a number lies, with fragments; the second lies `second_part` further.
__device__ __forceinline__ i64 first_part(const Packed& to, int row, int k) {
    int column = to.form == FRAGMENTS ? (row >> 3) * 16 + (row & 7) : 2 * row;
    return fragment_index(column, k, to.tiles);
}

__device__ __forceinline__ int second_part(const Packed& to) {
    return to.form == FRAGMENTS ? 512 : 32;  // the next tile, or the next column's lanes
}

__device__ __forceinline__ void store_packed(const Packed& to, int row, int k, float x) {
    const u16 high = float_to_half(x);
    if (to.form == ROWS) {
        to.data[(i64)row * to.stride + k] = high;
        return;
    }
    u16* at = to.data + first_part(to, row, k);
    *at = high;
    at[second_part(to)] = float_to_half(x - half_to_float(high));
}

// Four neighbours at once, k a multiple of four; those beyond `columns` are not stored.
__device__ __forceinline__ void store_packed4(
    const Packed& to, int row, int k, int columns, const float (&x)[4]
) {
    if (k + 3 >= columns) {
        for (int i = 0; k + i < columns; i++) store_packed(to, row, k + i, x[i]);
        return;
    }
    const uint2 high = make_uint2(pack_halves(x[0], x[1]), pack_halves(x[2], x[3]));
    if (to.form == ROWS) {
        *(uint2*)(to.data + (i64)row * to.stride + k) = high;
        return;
    }
    u16* at = to.data + first_part(to, row, k);
    *(uint2*)at = high;
    *(uint2*)(at + second_part(to)) = make_uint2(
        pack_halves(x[0] - half_to_float(high.x & 0xffff), x[1] - half_to_float(high.x >> 16)),
        pack_halves(x[2] - half_to_float(high.y & 0xffff), x[3] - half_to_float(high.y >> 16)));
}

// Rotary positions (https://arxiv.org/abs/2104.09864). `table` holds cosine and sine of each
// position's pairs; without one nothing turns.
struct Rotation {
    const float2* table;
    int size;  // elements of a head that turn
    int neox;  // first half with second half, not neighbours
};

__device__ __forceinline__ void turn(
    const Rotation& by, int position, int pair, float& a, float& b
) {
    float2 angle = by.table[(i64)position * (by.size / 2) + pair];
    float x = a * angle.x - b * angle.y;
    b = a * angle.y + b * angle.x;
    a = x;
}

// Element d of a rotated head.
__device__ __forceinline__ float turned(const Rotation& by, int position, const float* x, int d) {
    if (!by.table || d >= by.size) return x[d];
    int half = by.size / 2;
    int pair = by.neox ? d % half : d / 2;
    bool second = by.neox ? d >= half : d & 1;
    float a = by.neox ? x[pair] : x[2 * pair], b = by.neox ? x[pair + half] : x[2 * pair + 1];
    turn(by, position, pair, a, b);
    return second ? b : a;
}
