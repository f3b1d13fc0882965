// The best tokens and their log probabilities, without the logits leaving the device.
//
// First each row's vocabulary is cut into parts, one a block: its largest logits, best first, and
// the sum of exponentials. Then one block a row joins the parts. Equal logits go by id.

#define THREADS 256

__device__ __forceinline__ bool better(float x, int i, float y, int j) {
    return x > y || (x == y && i < j);
}

// Best of a block; every thread gets it. NaN is never best.
__device__ __forceinline__ void block_best(float& x, int& i, float* xs, int* is) {
    for (int offset = 16; offset; offset >>= 1) {
        float y = __shfl_xor_sync(FULL, x, offset);
        int j = __shfl_xor_sync(FULL, i, offset);
        if (better(y, j, x, i)) x = y, i = j;
    }
    __syncthreads();
    if ((threadIdx.x & 31) == 0) xs[threadIdx.x >> 5] = x, is[threadIdx.x >> 5] = i;
    __syncthreads();
    x = xs[0], i = is[0];
    for (int n = 1; n < THREADS / 32; n++)
        if (better(xs[n], is[n], x, i)) x = xs[n], i = is[n];
}

// `best` and `ids`: [rows][parts][most]; `sums`: [rows][parts] of exp(logit - first best).
extern "C" __global__ void __launch_bounds__(THREADS) best_of_parts(
    const float* logits, float* best, int* ids, double* sums, int vocabulary, int most
) {
    __shared__ float xs[THREADS / 32];
    __shared__ int is[THREADS / 32];
    __shared__ double parts[THREADS / 32];
    extern __shared__ float own[];
    wait_for_previous();
    let_next_start();
    const int per = (vocabulary + gridDim.x - 1) / gridDim.x;
    const int start = blockIdx.x * per, count = min(per, vocabulary - start);
    const i64 part = (i64)blockIdx.y * gridDim.x + blockIdx.x;
    const float* row = logits + (i64)blockIdx.y * vocabulary + start;
    for (int i = threadIdx.x; i < count; i += THREADS) own[i] = row[i];
    float highest = -INFINITY_F;
    for (int n = 0; n < most; n++) {
        float x = -INFINITY_F;
        int id = 0x7fffffff;
        for (int i = threadIdx.x; i < count; i += THREADS)
            if (better(own[i], i, x, id)) x = own[i], id = i;
        block_best(x, id, xs, is);
        if (n == 0) {
            highest = x;
            double sum = 0.0;
            for (int i = threadIdx.x; i < count; i += THREADS)
                sum += (double)expf(own[i] - highest);
            for (int offset = 16; offset; offset >>= 1) sum += __shfl_xor_sync(FULL, sum, offset);
            if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = sum;
            __syncthreads();
            if (threadIdx.x == 0) {
                sum = 0.0;
                for (int i = 0; i < THREADS / 32; i++) sum += parts[i];
                sums[part] = count > 0 ? sum : 0.0;
            }
        }
        if (threadIdx.x == 0) {
            best[part * most + n] = x;
            ids[part * most + n] = id == 0x7fffffff ? id : start + id;
        }
        if (id != 0x7fffffff && id % THREADS == threadIdx.x) own[id] = NOT_A_NUMBER;
    }
}

// `id` and `logprob`: [rows]; `top_ids` and `top_logprobs`: [rows][most]; `totals`: [rows] of the
// logarithm of the sum of exp(logit).
extern "C" __global__ void __launch_bounds__(THREADS) join_parts(
    const float* best, const int* ids, const double* sums, int parts, int most, int* id,
    float* logprob, int* top_ids, float* top_logprobs, double* totals
) {
    __shared__ float xs[THREADS / 32];
    __shared__ int is[THREADS / 32];
    __shared__ double total;
    wait_for_previous();
    let_next_start();
    const i64 row = blockIdx.x;
    float last = INFINITY_F, highest = 0.0f;
    int last_id = -1;
    for (int n = 0; n < most; n++) {
        float x = -INFINITY_F;
        int i = 0x7fffffff;
        for (int c = threadIdx.x; c < parts * most; c += THREADS) {
            float y = best[row * parts * most + c];
            int j = ids[row * parts * most + c];
            if (better(last, last_id, y, j) && better(y, j, x, i)) x = y, i = j;
        }
        block_best(x, i, xs, is);
        if (n == 0) {
            highest = x;
            if (threadIdx.x == 0) {
                double sum = 0.0;
                for (int k = 0; k < parts; k++) {
                    float top = best[(row * parts + k) * most];
                    if (sums[row * parts + k] > 0.0)
                        sum += sums[row * parts + k] * exp((double)top - (double)highest);
                }
                total = (double)highest + log(sum);
                totals[row] = total;
            }
            __syncthreads();
        }
        if (threadIdx.x == 0) {
            float y = (float)((double)x - total);
            if (n == 0) id[row] = i == 0x7fffffff ? 0 : i, logprob[row] = y;
            top_ids[row * most + n] = i == 0x7fffffff ? -1 : i;
            top_logprobs[row * most + n] = y;
        }
        last = x, last_id = i;
    }
}
