// How each quantisation lies in memory, and how its numbers become operands of tensor cores.
//
// A matrix is cut into tiles of 16 rows. A tile is a run of chunks of 64 columns (256 for those
// with super-blocks), each with its quants first and its scales behind, as `formats.py` packs them.
// Lane 4 g + t of a warp owns, of rows g and g + 8 and of every 16 columns, columns 4 t to 4 t + 3.
// Halves lie in whole rows, as matrix products of prompts want them; a chunk of a tile is then a
// piece of each of its rows.
//
// A format says: COLUMNS and BYTES of a chunk; IN_ROWS; SPAN, over how many steps of 16 columns a
// scale holds (0: there is none); MINIMUM, whether something is added to each number; `load` for
// the lane's part of 64 columns; `fragment` for the numbers of a step; `scales` and `minima` of
// rows g and g + 8.

struct Pair { float low, high; };  // for rows g and g + 8

// Numbers 0 to 1023 in the mantissa of a half: 1024 + n.
#define MAGIC 0x64006400u

struct Nibbles { uint4 words; };  // row g: words x and y; row g + 8: z and w

__device__ __forceinline__ u32 nibble_word(const uint4& w, int row, int s) {
    u32 x = row ? (s < 2 ? w.z : w.w) : (s < 2 ? w.x : w.y);
    return s & 1 ? x >> 8 : x;
}

__device__ __forceinline__ float half_at(const u8* p) { return half_to_float(*(const u16*)p); }

__device__ __forceinline__ Pair halves_for(const u8* scales, int lane, int s) {
    // [g][row half][block of 32 columns]
    const u8* p = scales + (lane >> 2) * 8 + (s >> 1) * 2;
    return {half_at(p), half_at(p + 4)};
}

struct Q8_0 {
    static constexpr int COLUMNS = 64, BYTES = 1088, SPAN = 2;
    static constexpr bool MINIMUM = false, IN_ROWS = false;
    struct Part { uint4 rows[2]; const u8* scales; };
    static __device__ __forceinline__ Part load(const u8* chunk, int lane, int) {
        const uint4* p = (const uint4*)chunk;
        return {{p[lane], p[32 + lane]}, chunk + 1024};
    }
    static __device__ __forceinline__ void fragment(const Part& part, int s, u32 (&a)[4]) {
#pragma unroll
        for (int row = 0; row < 2; row++) {
            const uint4& w = part.rows[row];
            u32 x = (s == 0 ? w.x : s == 1 ? w.y : s == 2 ? w.z : w.w) ^ 0x80808080u;
            a[row] = subtract_halves(__byte_perm(x, 0x64, 0x4140), 0x64806480u);
            a[row + 2] = subtract_halves(__byte_perm(x, 0x64, 0x4342), 0x64806480u);
        }
    }
    static __device__ __forceinline__ Pair scales(const Part& part, int lane, int s) {
        return halves_for(part.scales, lane, s);
    }
};

// Blocks of 32 with 4 bits each, or 5 with BIT: scale * (number - ZERO) [+ minimum].
template <bool BIT, int ZERO, bool MIN>
struct Blocks {
    static constexpr int COLUMNS = 64, SPAN = 2;
    static constexpr int BYTES = 512 + (BIT ? 128 : 0) + 64 + (MIN ? 64 : 0);
    static constexpr bool MINIMUM = MIN, IN_ROWS = false;
    struct Part { uint4 words; u32 bits; const u8* scales; };
    static __device__ __forceinline__ Part load(const u8* chunk, int lane, int) {
        u32 bits = BIT ? ((const u32*)(chunk + 512))[lane] : 0;
        return {((const uint4*)chunk)[lane], bits, chunk + 512 + (BIT ? 128 : 0)};
    }
    static __device__ __forceinline__ void fragment(const Part& part, int s, u32 (&a)[4]) {
        const u32 zero = MAGIC + ZERO * 0x00010001u;
#pragma unroll
        for (int row = 0; row < 2; row++) {
            u32 w = nibble_word(part.words, row, s);
            u32 first = (w & 0x000f000fu) | MAGIC;
            u32 second = ((w >> 4) & 0x000f000fu) | MAGIC;
            if (BIT) {
                int at = row * 8 + s * 2;
                first |= ((part.bits >> at) & 0x00010001u) << 4;
                second |= ((part.bits >> (at + 1)) & 0x00010001u) << 4;
            }
            a[row] = subtract_halves(first, zero);
            a[row + 2] = subtract_halves(second, zero);
        }
    }
    static __device__ __forceinline__ Pair scales(const Part& part, int lane, int s) {
        return halves_for(part.scales, lane, s);
    }
    static __device__ __forceinline__ Pair minima(const Part& part, int lane, int s) {
        return halves_for(part.scales + 64, lane, s);
    }
};
using Q4_0 = Blocks<false, 8, false>;
using Q4_1 = Blocks<false, 0, true>;
using Q5_0 = Blocks<true, 16, false>;
using Q5_1 = Blocks<true, 0, true>;

struct MXFP4 {
    static constexpr int COLUMNS = 64, BYTES = 544, SPAN = 2;
    static constexpr bool MINIMUM = false, IN_ROWS = false;
    struct Part { uint4 words; const u8* scales; };
    static __device__ __forceinline__ Part load(const u8* chunk, int lane, int) {
        return {((const uint4*)chunk)[lane], chunk + 512};
    }
    static __device__ __forceinline__ u32 widen(u32 w) {  // sign, two bits exponent, one mantissa
        return ((w << 12) & 0x80008000u) | ((w << 9) & 0x0e000e00u);
    }
    static __device__ __forceinline__ void fragment(const Part& part, int s, u32 (&a)[4]) {
#pragma unroll
        for (int row = 0; row < 2; row++) {
            u32 w = nibble_word(part.words, row, s);
            a[row] = widen(w & 0x000f000fu);
            a[row + 2] = widen((w >> 4) & 0x000f000fu);
        }
    }
    // 2^(exponent - 127), times 2^14 for the bias that `widen` leaves.
    static __device__ __forceinline__ float power(u8 exponent) {
        return __int_as_float(min((int)exponent + 14, 254) << 23);
    }
    static __device__ __forceinline__ Pair scales(const Part& part, int lane, int s) {
        const u8* p = part.scales + (lane >> 2) * 4 + (s >> 1);
        return {power(p[0]), power(p[2])};
    }
};

// Super-blocks of 256: two halves, then for every 64 columns 24 bits with two scales and minima.
template <bool BIT>
struct SuperBlocks {
    static constexpr int COLUMNS = 256, SPAN = 2;
    static constexpr int BYTES = 2304 + (BIT ? 512 : 0);
    static constexpr bool MINIMUM = true, IN_ROWS = false;
    struct Part { uint4 words; u32 bits; u32 low, high; float d[2], m[2]; };
    static __device__ __forceinline__ u32 field(const uint4& w, int sub) {
        switch (sub) {
            case 0: return w.y;
            case 1: return __funnelshift_r(w.y, w.z, 24);
            case 2: return __funnelshift_r(w.z, w.w, 16);
            default: return w.w >> 8;
        }
    }
    static __device__ __forceinline__ Part load(const u8* chunk, int lane, int sub) {
        Part part;
        part.words = ((const uint4*)chunk)[sub * 32 + lane];
        part.bits = BIT ? ((const u32*)(chunk + 2048))[sub * 32 + lane] : 0;
        const uint4* rows = (const uint4*)(chunk + 2048 + (BIT ? 512 : 0));
        uint4 low = rows[lane >> 2], high = rows[8 + (lane >> 2)];
        part.low = field(low, sub);
        part.high = field(high, sub);
        part.d[0] = half_to_float(low.x & 0xffff);
        part.m[0] = -half_to_float(low.x >> 16);
        part.d[1] = half_to_float(high.x & 0xffff);
        part.m[1] = -half_to_float(high.x >> 16);
        return part;
    }
    static __device__ __forceinline__ void fragment(const Part& part, int s, u32 (&a)[4]) {
        Blocks<BIT, 0, true>::fragment({part.words, part.bits, nullptr}, s, a);
    }
    static __device__ __forceinline__ Pair scales(const Part& part, int, int s) {
        int at = (s >> 1) * 12;
        return {part.d[0] * ((part.low >> at) & 63), part.d[1] * ((part.high >> at) & 63)};
    }
    static __device__ __forceinline__ Pair minima(const Part& part, int, int s) {
        int at = (s >> 1) * 12 + 6;
        return {part.m[0] * ((part.low >> at) & 63), part.m[1] * ((part.high >> at) & 63)};
    }
};
using Q4_K = SuperBlocks<false>;
using Q5_K = SuperBlocks<true>;

struct Q6_K {
    static constexpr int COLUMNS = 256, BYTES = 3360, SPAN = 1;
    static constexpr bool MINIMUM = false, IN_ROWS = false;
    struct Part { uint4 words; uint2 bits; u32 low, high; float d[2]; };
    static __device__ __forceinline__ Part load(const u8* chunk, int lane, int sub) {
        Part part;
        part.words = ((const uint4*)chunk)[sub * 32 + lane];
        part.bits = ((const uint2*)(chunk + 2048))[sub * 32 + lane];
        const u32* scales = (const u32*)(chunk + 3072);
        int g = lane >> 2;
        part.low = scales[g * 4 + sub];
        part.high = scales[(g + 8) * 4 + sub];
        part.d[0] = half_at(chunk + 3328 + 2 * g);
        part.d[1] = half_at(chunk + 3328 + 2 * (g + 8));
        return part;
    }
    static __device__ __forceinline__ void fragment(const Part& part, int s, u32 (&a)[4]) {
#pragma unroll
        for (int row = 0; row < 2; row++) {
            u32 w = nibble_word(part.words, row, s);
            u32 bits = (row ? part.bits.y : part.bits.x) >> (4 * s);
            u32 first = (w & 0x000f000fu) | ((bits & 0x00030003u) << 4) | MAGIC;
            u32 second = ((w >> 4) & 0x000f000fu) | (((bits >> 2) & 0x00030003u) << 4) | MAGIC;
            a[row] = subtract_halves(first, 0x64206420u);
            a[row + 2] = subtract_halves(second, 0x64206420u);
        }
    }
    static __device__ __forceinline__ Pair scales(const Part& part, int, int s) {
        const int up = 24 - 8 * s;
        int low = (int)(part.low << up) >> 24, high = (int)(part.high << up) >> 24;
        return {part.d[0] * low, part.d[1] * high};
    }
};

// Halves; BF16 is kept so as well, times a power of two that the product takes away again. In
// shared memory the eight pieces of 16 bytes of a row stand in another order for every fourth row,
// so that the lanes of a warp read from different banks.
struct F16 {
    static constexpr int COLUMNS = 64, BYTES = 2048, SPAN = 0;
    static constexpr bool MINIMUM = false, IN_ROWS = true;
    struct Part { uint2 words[2][4]; };
    static __device__ __forceinline__ int place(int row, int piece) {
        return row * 128 + ((piece ^ (row & 3) << 1) << 4);
    }
    static __device__ __forceinline__ Part load(const u8* chunk, int lane, int) {
        Part part;
        const int g = lane >> 2, t = lane & 3;
#pragma unroll
        for (int row = 0; row < 2; row++)
#pragma unroll
            for (int s = 0; s < 4; s++)
                part.words[row][s] = *(const uint2*)(
                    chunk + place(g + 8 * row, 2 * s + (t >> 1)) + (t & 1) * 8);
        return part;
    }
    static __device__ __forceinline__ void fragment(const Part& part, int s, u32 (&a)[4]) {
#pragma unroll
        for (int row = 0; row < 2; row++) {
            a[row] = part.words[row][s].x;
            a[row + 2] = part.words[row][s].y;
        }
    }
    static __device__ __forceinline__ Pair scales(const Part&, int, int) { return {1, 1}; }
};
