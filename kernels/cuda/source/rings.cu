// A ring of records in the memory of the GPU that takes them; another GPU of the machine puts them
// there over NVLink or PCIe. Nobody waits for the host: a taker spins on a word of its own memory.
//
// The memory begins with two words, each on lines of its own: records put so far, written by the
// other GPU, and records taken so far. Then come the slots, and slots for small records. Each end
// has words of its own as well: its count, the taken records it has seen, and how many blocks of a
// launch have arrived.
//
// A large record is copied, then announced, which takes a way to the other GPU and back in between.
// A small one is sent in pieces of 8 bytes, each with the record's number beside it, as the "LL"
// protocol of NCCL does (https://github.com/NVIDIA/nccl): each piece says for itself that it is
// there, so that one way is all it takes.

typedef unsigned long long u64;

#define TAKEN 256
#define SLOTS 512

struct Ring {
    u8* memory;
    u64* own;
    const int* stop;  // the host's: whether to give up
    i64 stride;       // from slot to slot, in bytes
    i64 small;        // the same of those for small records
    int slots;
    int early;        // whether the next kernel may begin while this one waits
};

__device__ __forceinline__ u64 load_acquire(const void* p) {
    u64 x;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(x) : "l"(p) : "memory");
    return x;
}

__device__ __forceinline__ void store_release(void* p, u64 x) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" :: "l"(p), "l"(x) : "memory");
}

__device__ __forceinline__ bool stopped(const Ring& ring) {
    return *(const volatile int*)ring.stop != 0;
}

// Waits until a word is at least so large; false when told to give up.
__device__ bool wait_for(const Ring& ring, const void* word, u64 least) {
    for (u32 turn = 1; load_acquire(word) < least; turn++) {
        if ((turn & 1023) == 0 && stopped(ring)) return false;
    }
    return true;
}

__device__ __forceinline__ u8* slot_of(const Ring& ring, u64 number) {
    return ring.memory + SLOTS + (i64)(number % (u64)ring.slots) * ring.stride;
}

__device__ __forceinline__ uint4* small_slot_of(const Ring& ring, u64 number) {
    u8* first = ring.memory + SLOTS + ring.slots * ring.stride;
    return (uint4*)(first + (i64)(number % (u64)ring.slots) * ring.small);
}

// How many records must have been taken so that there is room for this one.
__device__ __forceinline__ u64 least_taken(const Ring& ring, u64 number) {
    return number < (u64)ring.slots ? 0 : number + 1 - ring.slots;
}

__device__ __forceinline__ bool has_room(const Ring& ring, u64 number) {
    u64 least = least_taken(ring, number);
    return *(volatile u64*)(ring.own + 1) >= least || wait_for(ring, ring.memory + TAKEN, least);
}

// Far memory is looked at only when the slots may be full, and then for all that was taken.
__device__ __forceinline__ void count_put(const Ring& ring, u64 number) {
    ring.own[0] = number + 1;
    if (ring.own[1] < least_taken(ring, number + 1)) {
        ring.own[1] = load_acquire(ring.memory + TAKEN);
    }
}

__device__ __forceinline__ void count_taken(const Ring& ring, u64 number) {
    ring.own[0] = number + 1;
    store_release(ring.memory + TAKEN, number + 1);
}

// Of memory that another GPU writes to, or of the host: nothing of it may be in a cache.
__device__ __forceinline__ uint4 load_volatile(const uint4* p) {
    uint4 x;
    asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p) : "memory");
    return x;
}

__device__ __forceinline__ void copy(uint4* to, const uint4* from, i64 count) {
    i64 step = (i64)gridDim.x * blockDim.x;
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    for (; i + 3 * step < count; i += 4 * step) {  // four on the way at once
        uint4 a = load_volatile(from + i), b = load_volatile(from + i + step);
        uint4 c = load_volatile(from + i + 2 * step), d = load_volatile(from + i + 3 * step);
        to[i] = a, to[i + step] = b, to[i + 2 * step] = c, to[i + 3 * step] = d;
    }
    for (; i < count; i += step) to[i] = load_volatile(from + i);
}

// Whether this is the thread that ends the launch: all blocks have done their part, and what they
// wrote is seen by whoever sees what this thread writes next.
__device__ __forceinline__ bool ends(const Ring& ring) {
    __syncthreads();
    if (threadIdx.x) return false;
    if (gridDim.x == 1) return true;
    __threadfence_system();
    if (atomicAdd(ring.own + 2, 1ull) + 1 < gridDim.x) return false;
    ring.own[2] = 0;
    __threadfence_system();
    return true;
}

// One value of a record: `count` times 16 bytes at `offset` of the next slot. `last` sends it off.
extern "C" __global__ void put(Ring ring, const uint4* from, i64 count, i64 offset, int last) {
    __shared__ int go;
    if (ring.early) let_next_start();
    wait_for_previous();
    u64 number = *(volatile u64*)ring.own;
    if (threadIdx.x == 0) go = has_room(ring, number);
    __syncthreads();
    if (go) copy((uint4*)(slot_of(ring, number) + offset), from, count);
    if (!ends(ring) || !last || !go) return;
    store_release(ring.memory, number + 1);
    count_put(ring, number);
}

// One value of the record that comes next, to `to`.
extern "C" __global__ void take(Ring ring, uint4* to, i64 count, i64 offset, int last) {
    __shared__ int go;
    if (ring.early) let_next_start();
    wait_for_previous();
    u64 number = *(volatile u64*)ring.own;
    if (threadIdx.x == 0) go = wait_for(ring, ring.memory, number + 1);
    __syncthreads();
    if (go) copy(to, (const uint4*)(slot_of(ring, number) + offset), count);
    if (!ends(ring) || !last || !go) return;
    count_taken(ring, number);
}

// As `put`, of a small record; `count` and `offset` are in pieces of 8 bytes.
extern "C" __global__ void put_small(
    Ring ring, const uint2* from, i64 count, i64 offset, int last
) {
    if (ring.early) let_next_start();
    wait_for_previous();
    u64 number = *(volatile u64*)ring.own;
    uint4* to = small_slot_of(ring, number) + offset;
    u32 mark = (u32)(number + 1);
    bool go = has_room(ring, number);
    i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; go && i < count; i += step) {
        uint2 piece = __ldcg(from + i);
        asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %2};"
                     :: "l"(to + i), "r"(piece.x), "r"(mark), "r"(piece.y) : "memory");
    }
    go = __syncthreads_and(go);
    if (ends(ring) && last && go) count_put(ring, number);
}

// As `take`, of a small record.
extern "C" __global__ void take_small(Ring ring, uint2* to, i64 count, i64 offset, int last) {
    if (ring.early) let_next_start();
    wait_for_previous();
    u64 number = *(volatile u64*)ring.own;
    const uint4* from = small_slot_of(ring, number) + offset;
    u32 mark = (u32)(number + 1);
    bool go = true;
    i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; go && i < count; i += step) {
        uint4 piece;
        for (u32 turn = 1;; turn++) {
            piece = load_volatile(from + i);
            if (piece.y == mark && piece.w == mark) break;
            if ((turn & 1023) == 0 && stopped(ring)) {
                go = false;
                break;
            }
        }
        if (go) to[i] = make_uint2(piece.x, piece.z);
    }
    go = __syncthreads_and(go);
    if (ends(ring) && last && go) count_taken(ring, number);
}
