// Drawing tokens from rows of logits: bias and penalties, top-k, top-p, min-p, temperature. What it
// computes is what `reference/sampling.py` defines.
//
// One block a row. A token has a key that is the larger the better the token is: how near its logit
// is to the best one, then how low its id is. What top-k and top-p keep ends at a border among the
// keys, which is found digit by digit, as a radix sort would. Weights are whole numbers, so that
// sums do not depend on the order in which they are made.

typedef unsigned long long u64;

#define THREADS 1024
#define WARPS (THREADS / 32)
#define BINS 256
#define ONE 1099511627776.0f  // the weight of the best token: 2^40
#define ID_BITS 24
#define KEY_BITS (32 + ID_BITS)
#define LEVELS 3

struct Row {
    u64 seed, stream;
    float temperature, top_p, min_p, repeat_penalty, presence_penalty, frequency_penalty;
    int top_k, position;
    int biased, biases;   // how many ids have a bias; where among `lists` they stand, then values
    int seen, histories;  // the same of ids that were seen, and how often each was
};

__device__ const float NEAR[LEVELS] = {3.0f, 10.0f, 30.0f};  // distances to the best logit
#define FAR 128.0f

// The first number that NumPy's Philox 4x64 yields for such keys and counter, in [0, 1).
__device__ double uniform_number(u64 key, u64 other, u64 counter) {
    const u64 first = 0xD2E7470EE14C6C93ull, second = 0xCA5A826395121157ull;
    u64 a = counter + 1, b = 0, c = 0, d = 0;
    for (int round = 0; round < 10; round++) {
        u64 high = __umul64hi(a, first), low = a * first;
        a = __umul64hi(c, second) ^ b ^ key;
        b = c * second;
        c = high ^ d ^ other;
        d = low;
        key += 0x9E3779B97F4A7C15ull;
        other += 0xBB67AE8584CAA73Bull;
    }
    return (double)(a >> 11) * (1.0 / 9007199254740992.0);
}

__device__ __forceinline__ u64 order_of(float x, int id) {
    u32 bits = __float_as_uint(x == 0.0f ? 0.0f : x);  // -0 is 0
    u32 order = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (u64)order << 32 | (u32)~id;
}

// Where tokens end up among those within a reach of the best logit.
struct Keys {
    float best, scale;

    __device__ Keys(float best, float reach) : best(best), scale(4294967040.0f / reach) {}

    __device__ __forceinline__ u64 of(float x, int id) const {
        u32 far = (u32)fminf((best - x) * scale, 4294967040.0f);
        return (u64)~far << ID_BITS | (u32)((1 << ID_BITS) - 1 - id);
    }
};

__device__ __forceinline__ u64 weight_of(float exponent) {
    return (u64)(expf(exponent) * ONE);
}

__device__ __forceinline__ u64 warp_sum(u64 x) {
    for (int offset = 16; offset; offset >>= 1) x += __shfl_xor_sync(FULL, x, offset);
    return x;
}

__device__ __forceinline__ u64 warp_best(u64 x) {
    for (int offset = 16; offset; offset >>= 1) x = max(x, __shfl_xor_sync(FULL, x, offset));
    return x;
}

// Sums over the block; every thread gets them.
__device__ u64 block_sum(u64 x, u64* parts) {
    x = warp_sum(x);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = x;
    __syncthreads();
    return warp_sum(parts[threadIdx.x & 31]);
}

// The best of the block: the largest logit, and of equal ones the lowest id. NaN is never best.
__device__ u64 block_best(const float* x, int vocabulary, u64* parts) {
    u64 best = 0;
    for (int i = threadIdx.x; i < vocabulary; i += THREADS)
        if (x[i] == x[i]) best = max(best, order_of(x[i], i));
    best = warp_best(best);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = best;
    __syncthreads();
    return warp_best(parts[threadIdx.x & 31]);
}

// Native additions of 32 bits: those of 64 bits would be loops.
__device__ __forceinline__ void add_to(u32* low, u32* high, u32 bin, u64 weight) {
    u32 part = (u32)weight, before = atomicAdd(low + bin, part);
    u32 rest = (u32)(weight >> 32) + (before + part < before);
    if (rest) atomicAdd(high + bin, rest);
}

// Where the fewest best end whose weights reach a goal: the key of the last one. `part` tells the
// key and the weight of each of `count` tokens. A goal out of reach is reached by all.
template <class Part>
__device__ u64 border(int count, u64 goal, Part part) {
    __shared__ u32 low[BINS], high[BINS];
    __shared__ u64 left;
    __shared__ int digit;
    u64 prefix = 0;
    goal = max(goal, 1ull);
    for (int shift = KEY_BITS - 8; shift >= 0; shift -= 8) {
        __syncthreads();
        if (threadIdx.x < BINS) low[threadIdx.x] = high[threadIdx.x] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < count; i += THREADS) {
            u64 key, weight;
            part(i, key, weight);
            bool known = key >> shift >> 8 == prefix;
            if (known && weight) add_to(low, high, key >> shift & (BINS - 1), weight);
        }
        __syncthreads();
        if (threadIdx.x < 32) {  // eight bins a lane, the best first
            const int lane = threadIdx.x, first = BINS - 1 - 8 * lane;
            u64 bins[8], own = 0;
            for (int n = 0; n < 8; n++) {
                bins[n] = (u64)high[first - n] << 32 | low[first - n];
                own += bins[n];
            }
            u64 all = own;
            for (int offset = 1; offset < 32; offset <<= 1) {
                u64 other = __shfl_up_sync(FULL, all, offset);
                if (lane >= offset) all += other;
            }
            const u64 least = min(goal, __shfl_sync(FULL, all, 31));
            const u32 reached = __ballot_sync(FULL, all >= least && own);
            if (lane == (reached ? __ffs(reached) - 1 : 0)) {
                u64 rest = least - (all - own);
                int n = 0;
                while (n < 7 && bins[n] < rest) rest -= bins[n++];
                digit = first - n, left = rest;
            }
        }
        __syncthreads();
        prefix = prefix << 8 | (u64)digit;
        goal = max(left, 1ull);
    }
    return prefix;
}

// The token at which weights, summed by id, exceed a share of all. Each warp sums a run of ids.
template <class Weight>
__device__ int draw_by_id(int vocabulary, double uniform, Weight weight) {
    __shared__ u64 sums[WARPS];
    __shared__ int token;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int per = (vocabulary + THREADS - 1) / THREADS * 32;
    const int start = min(vocabulary, warp * per), stop = min(vocabulary, start + per);
    u64 own = 0;
    for (int i = start + lane; i < stop; i += 32) own += weight(i);
    own = warp_sum(own);
    __syncthreads();
    if (lane == 0) sums[warp] = own;
    if (threadIdx.x == 0) token = 0;
    __syncthreads();
    u64 before = 0, all = 0;
    for (int n = 0; n < WARPS; n++) {
        if (n < warp) before += sums[n];
        all += sums[n];
    }
    const u64 target = (u64)(uniform * (double)all);
    if (before <= target && target < before + own) {
        for (int first = start; first < stop; first += 32) {
            const u64 one = first + lane < stop ? weight(first + lane) : 0;
            u64 sum = one;
            for (int offset = 1; offset < 32; offset <<= 1) {
                u64 other = __shfl_up_sync(FULL, sum, offset);
                if (lane >= offset) sum += other;
            }
            u32 beyond = __ballot_sync(FULL, before + sum > target);
            if (beyond) {
                if (lane == __ffs(beyond) - 1) token = first + lane;
                break;
            }
            before += __shfl_sync(FULL, sum, 31);
        }
    }
    __syncthreads();
    return token;
}

// The key of the last token that top-k and top-p keep.
__device__ u64 last_kept(
    const float* x, int vocabulary, const Row& own, float best, int* candidates, Keys& keys,
    u64* parts
) {
    __shared__ int listed;
    const bool few = own.top_k > 0 && own.top_k < vocabulary;
    // A distance within which there is enough, by number or by weight.
    u64 weights[LEVELS + 1] = {}, numbers[LEVELS] = {};
    for (int i = threadIdx.x; i < vocabulary; i += THREADS) {
        const u64 weight = weight_of(x[i] - best);
        for (int n = 0; n < LEVELS; n++)
            if (x[i] >= best - NEAR[n]) weights[n] += weight, numbers[n]++;
        weights[LEVELS] += weight;
    }
    for (int n = 0; n < LEVELS; n++) {
        weights[n] = block_sum(weights[n], parts);
        numbers[n] = block_sum(numbers[n], parts);
    }
    weights[LEVELS] = block_sum(weights[LEVELS], parts);
    u64 share = (u64)ceil((double)own.top_p * (double)weights[LEVELS]);
    float reach = FAR, least = -INFINITY_F;
    for (int n = LEVELS - 1; n >= 0; n--) {
        if (few ? numbers[n] >= own.top_k : weights[n] >= share)
            reach = NEAR[n], least = best - NEAR[n];
    }
    keys = Keys(best, reach);
    if (threadIdx.x == 0) listed = 0;
    __syncthreads();
    const int lane = threadIdx.x & 31;
    for (int first = threadIdx.x - lane; first < vocabulary; first += THREADS) {
        const int i = first + lane;
        const bool near = i < vocabulary && x[i] >= least;
        const u32 all = __ballot_sync(FULL, near);
        int place = 0;
        if (lane == 0 && all) place = atomicAdd(&listed, __popc(all));
        place = __shfl_sync(FULL, place, 0) + __popc(all & ((1u << lane) - 1));
        if (near) candidates[place] = i;
    }
    __syncthreads();
    const int count = listed;
    u64 last = 0;
    if (few) {
        last = border(count, own.top_k, [&](int i, u64& key, u64& weight) {
            key = keys.of(x[candidates[i]], candidates[i]), weight = 1;
        });
    }
    if (own.top_p < 1.0f) {
        auto power = [&](int i, u64& key, u64& weight) {
            const float logit = x[candidates[i]];
            key = keys.of(logit, candidates[i]);
            weight = key >= last ? weight_of(logit - best) : 0;
        };
        if (few) {
            u64 sum = 0, key, weight;
            for (int i = threadIdx.x; i < count; i += THREADS) {
                power(i, key, weight);
                sum += weight;
            }
            share = (u64)ceil((double)own.top_p * (double)block_sum(sum, parts));
        }
        last = border(count, share, power);
    }
    return last;
}

// Draws the tokens of rows that are not greedy, in the place of the best ones; `totals` are the
// logarithms of the sums of exp(logit). Each block has a `copy` of a row and `candidates`.
extern "C" __global__ void __launch_bounds__(THREADS) draw(
    const float* logits, const double* totals, const Row* rows, const int* lists, float* copies,
    int* all_candidates, int* ids, float* logprobs, int vocabulary, int count
) {
    __shared__ u64 parts[WARPS];
    wait_for_previous();
    let_next_start();
    float* copy = copies + (i64)blockIdx.x * vocabulary;
    int* candidates = all_candidates + (i64)blockIdx.x * vocabulary;
    for (int row = blockIdx.x; row < count; row += gridDim.x) {
        const Row own = rows[row];
        const bool adjusted = own.biased || own.seen;
        if (own.temperature <= 0.0f && !adjusted) continue;
        const float* raw = logits + (i64)row * vocabulary;
        const float* x = raw;
        int drawn = ids[row];
        if (adjusted) {
            for (int i = threadIdx.x; i < vocabulary; i += THREADS) copy[i] = raw[i];
            __syncthreads();
            for (int i = threadIdx.x; i < own.biased; i += THREADS)
                copy[lists[own.biases + i]] += __int_as_float(lists[own.biases + own.biased + i]);
            __syncthreads();
            for (int i = threadIdx.x; i < own.seen; i += THREADS) {
                float* logit = copy + lists[own.histories + i];
                float value = *logit, times = (float)lists[own.histories + own.seen + i];
                value = value > 0.0f ? value / own.repeat_penalty : value * own.repeat_penalty;
                *logit = value - (times * own.frequency_penalty + own.presence_penalty);
            }
            __syncthreads();
            x = copy;
            drawn = min((int)~(u32)block_best(x, vocabulary, parts), vocabulary - 1);
            drawn = max(drawn, 0);
        }
        if (own.temperature > 0.0f) {
            const float best = x[drawn], scale = 1.0f / fmaxf(own.temperature, 1e-30f);
            float limit = -INFINITY_F;
            if (own.min_p > 0.0f) {
                double least = (double)best + log((double)own.min_p);
                limit = (float)least;
                if ((double)limit < least) limit = nextafterf(limit, INFINITY_F);
            }
            const double uniform = uniform_number(own.seed, own.stream, own.position);
            Keys keys(best, FAR);
            u64 last = 0;
            if ((own.top_k > 0 && own.top_k < vocabulary) || own.top_p < 1.0f)
                last = last_kept(x, vocabulary, own, best, candidates, keys, parts);
            drawn = draw_by_id(vocabulary, uniform, [&](int i) -> u64 {
                const bool kept = x[i] >= limit && (!last || keys.of(x[i], i) >= last);
                return kept ? weight_of((x[i] - best) * scale) : 0;
            });
        }
        drawn = drawn < 0 || drawn >= vocabulary ? 0 : drawn;  // of logits that are no numbers
        __syncthreads();
        if (threadIdx.x == 0) {
            ids[row] = drawn;
            logprobs[row] = (float)((double)raw[drawn] - totals[row]);
        }
        __syncthreads();
    }
}
