// Batch norm over the rows of x [groups rows, c], channels last; see src/ops/batch_norm.
//
// Every kernel but the `finish` ones has the same layout: threadIdx.x is a vector of channels, threadIdx.y a
// row; the block (x, y, g) takes the channel vectors from x blockDim.x on and the rows [y rows_per_chunk,
// ...) of group g. Sums over rows have two levels, both in an order fixed by the shape: within a chunk, then
// over chunks in `finish`, in f64. blockDim.y is a power of two, and the block has at most 256 threads.
#include "vector.cuh"

constexpr int THREADS = 256;

/// Where a thread stands.
template <typename T>
struct Rows {
    int channel, count;  // first channel, and how many of the vector exist; may be <= 0
    int64_t begin, end;  // rows of the chunk, in the whole tensor
    int64_t partial;     // of this chunk, in [groups, chunks, 2, c]

    __device__ Rows(int64_t rows, int rows_per_chunk, int c) {
        channel = (blockIdx.x * blockDim.x + threadIdx.x) * PER_VECTOR<T>;
        count = c - channel < PER_VECTOR<T> ? c - channel : PER_VECTOR<T>;
        int64_t from = int64_t{blockIdx.y} * rows_per_chunk;
        int64_t to = from + rows_per_chunk < rows ? from + rows_per_chunk : rows;
        begin = blockIdx.z * rows + from;
        end = blockIdx.z * rows + to;
        partial = (int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * 2 * c + channel;
    }
};

/// Per-channel numbers of this thread's vector; `otherwise` where there are none.
template <typename T>
__device__ __forceinline__ void load_channels(float (&v)[PER_VECTOR<T>], const float* at, int count,
                                              float otherwise) {
#pragma unroll
    for (int k = 0; k < PER_VECTOR<T>; k++) v[k] = at && k < count ? at[k] : otherwise;
}

/// Mean and sum of squared deviations of so many numbers.
struct Moments {
    float mean, m2;
};

/// Chan, Golub and LeVeque (1979).
__device__ __forceinline__ Moments merge(Moments a, float na, Moments b, float nb) {
    float n = na + nb;
    if (n == 0.0f) return a;
    float delta = b.mean - a.mean;
    return {a.mean + delta * (nb / n), a.m2 + b.m2 + delta * delta * (na * nb / n)};
}

/// Rows of a chunk of `total` that the thread rows [from, from + span) of a block take, each every
/// blockDim.y-th.
__device__ __forceinline__ float rows_of(int64_t total, int from, int span) {
    int64_t whole = total / blockDim.y * span, rest = total % blockDim.y - from;
    return static_cast<float>(whole + (rest < 0 ? 0 : rest > span ? span : rest));
}

/// partial [groups, chunks, 2, c]: mean and sum of squared deviations of each chunk.
template <typename T>
__device__ __forceinline__ void moments(float* partial, const T* x, int64_t rows, int rows_per_chunk, int c) {
    constexpr int W = PER_VECTOR<T>;
    __shared__ float means[THREADS * W], squares[THREADS * W];
    Rows<T> at(rows, rows_per_chunk, c);
    Moments m[W] = {};
    float seen = 0.0f;
    if (at.count > 0) {
        // Welford: one pass, and no digits lost where the mean is far from zero.
        for (int64_t row = at.begin + threadIdx.y; row < at.end; row += blockDim.y) {
            Vector<T> v = load_some(x + row * c + at.channel, at.count);
            seen += 1.0f;
            float weight = 1.0f / seen;
#pragma unroll
            for (int k = 0; k < W; k++) {
                float delta = v.v[k] - m[k].mean;
                m[k].mean += delta * weight;
                m[k].m2 += delta * (v.v[k] - m[k].mean);
            }
        }
    }
    int slot = (threadIdx.y * blockDim.x + threadIdx.x) * W;
#pragma unroll
    for (int k = 0; k < W; k++) means[slot + k] = m[k].mean, squares[slot + k] = m[k].m2;
    for (int span = 1; span < static_cast<int>(blockDim.y); span *= 2) {
        __syncthreads();
        if (threadIdx.y % (2 * span) == 0) {
            int other = slot + span * blockDim.x * W, y = threadIdx.y;
            float na = rows_of(at.end - at.begin, y, span), nb = rows_of(at.end - at.begin, y + span, span);
#pragma unroll
            for (int k = 0; k < W; k++) {
                m[k] = merge(m[k], na, {means[other + k], squares[other + k]}, nb);
                means[slot + k] = m[k].mean, squares[slot + k] = m[k].m2;
            }
        }
    }
    if (threadIdx.y > 0) return;
#pragma unroll
    for (int k = 0; k < W; k++)
        if (k < at.count) partial[at.partial + k] = m[k].mean, partial[at.partial + c + k] = m[k].m2;
}

KERNEL BOUNDS(THREADS) void batch_norm_moments_f32(float* partial, const float* x, int64_t rows,
                                                   int rows_per_chunk, int c) {
    moments(partial, x, rows, rows_per_chunk, c);
}
KERNEL BOUNDS(THREADS) void batch_norm_moments_bf16(float* partial, const bf16* x, int64_t rows,
                                                    int rows_per_chunk, int c) {
    moments(partial, x, rows, rows_per_chunk, c);
}

/// mean, inv_std [groups, c] from the chunks' moments, a thread per channel. Where running statistics are
/// given, they move by `weight` towards the groups' mean of means and of unbiased variances.
KERNEL void batch_norm_finish(float* mean, float* inv_std, float* running_mean, float* running_variance,
                              const float* partial, int groups, int chunks, int64_t rows, int rows_per_chunk,
                              int c, float weight, float eps) {
    int j = blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= c) return;
    double sum_means = 0.0, sum_variances = 0.0;
    for (int g = 0; g < groups; g++) {
        double seen = 0.0, mu = 0.0, m2 = 0.0;
        for (int i = 0; i < chunks; i++) {
            const float* chunk = partial + (int64_t{g} * chunks + i) * 2 * c + j;
            int64_t left = rows - int64_t{i} * rows_per_chunk;
            double n = static_cast<double>(left < rows_per_chunk ? left : rows_per_chunk),
                   delta = chunk[0] - mu;
            m2 += chunk[c] + delta * delta * seen * n / (seen + n);
            mu += delta * n / (seen + n);
            seen += n;
        }
        double variance = seen > 0.0 ? m2 / seen : 0.0;
        mean[int64_t{g} * c + j] = static_cast<float>(mu);
        inv_std[int64_t{g} * c + j] = static_cast<float>(1.0 / sqrt(variance + eps));
        sum_means += mu;
        sum_variances += seen > 1.0 ? m2 / (seen - 1.0) : variance;
    }
    if (running_mean) {
        running_mean[j] = static_cast<float>((1.0 - weight) * running_mean[j] + weight * sum_means / groups);
        running_variance[j] =
            static_cast<float>((1.0 - weight) * running_variance[j] + weight * sum_variances / groups);
    }
}

/// inv_std [c] from running variance, for evaluation.
KERNEL void batch_norm_inv_std(float* inv_std, const float* variance, int c, float eps) {
    int j = blockIdx.x * blockDim.x + threadIdx.x;
    if (j < c) inv_std[j] = static_cast<float>(1.0 / sqrt(static_cast<double>(variance[j]) + eps));
}

/// y = relu((x - mean) inv_std gain + shift + residual); gain, shift and residual may be null. Evaluation is
/// one group with running statistics.
template <typename T>
__device__ __forceinline__ void apply(T* y, const T* x, const T* residual, const float* mean,
                                      const float* inv_std, const float* gain, const float* shift,
                                      int64_t rows, int rows_per_chunk, int c, bool relu) {
    constexpr int W = PER_VECTOR<T>;
    Rows<T> at(rows, rows_per_chunk, c);
    if (at.count <= 0) return;
    int64_t statistics = int64_t{blockIdx.z} * c + at.channel;
    float mu[W], a[W], b[W], g[W];
    load_channels<T>(mu, mean + statistics, at.count, 0.0f);
    load_channels<T>(a, inv_std + statistics, at.count, 0.0f);
    load_channels<T>(g, gain ? gain + at.channel : nullptr, at.count, 1.0f);
    load_channels<T>(b, shift ? shift + at.channel : nullptr, at.count, 0.0f);
#pragma unroll
    for (int k = 0; k < W; k++) a[k] *= g[k];
    for (int64_t row = at.begin + threadIdx.y; row < at.end; row += blockDim.y) {
        int64_t i = row * c + at.channel;
        Vector<T> v = load_some(x + i, at.count), r{};
        if (residual) r = load_some(residual + i, at.count);
#pragma unroll
        for (int k = 0; k < W; k++) {
            // The mean comes off first: a x + (b - a mean) would lose digits where it is far from zero.
            float z = (v.v[k] - mu[k]) * a[k] + b[k] + r.v[k];
            v.v[k] = relu && z < 0.0f ? 0.0f : z;
        }
        store_some(y + i, v, at.count);
    }
}

KERNEL BOUNDS(THREADS) void batch_norm_apply_f32(float* y, const float* x, const float* residual,
                                                 const float* mean, const float* inv_std, const float* gain,
                                                 const float* shift, int64_t rows, int rows_per_chunk, int c,
                                                 int relu) {
    apply(y, x, residual, mean, inv_std, gain, shift, rows, rows_per_chunk, c, relu);
}
KERNEL BOUNDS(THREADS) void batch_norm_apply_bf16(bf16* y, const bf16* x, const bf16* residual,
                                                  const float* mean, const float* inv_std, const float* gain,
                                                  const float* shift, int64_t rows, int rows_per_chunk, int c,
                                                  int relu) {
    apply(y, x, residual, mean, inv_std, gain, shift, rows, rows_per_chunk, c, relu);
}

/// dz = dy where y > 0, else 0; all of dy without y.
template <typename T>
__device__ __forceinline__ Vector<T> masked(const T* dy, const T* y, int64_t i, int count) {
    Vector<T> d = load_some(dy + i, count);
    if (y) {
        Vector<T> out = load_some(y + i, count);
#pragma unroll
        for (int k = 0; k < PER_VECTOR<T>; k++) d.v[k] = out.v[k] > 0.0f ? d.v[k] : 0.0f;
    }
    return d;
}

/// partial [groups, chunks, 2, c]: sums of dz and of dz x̂ over each chunk. y is the forward's output if it
/// had a ReLU, else null.
template <typename T>
__device__ __forceinline__ void backward_sums(float* partial, const T* dy, const T* y, const T* x,
                                              const float* mean, const float* inv_std, int64_t rows,
                                              int rows_per_chunk, int c) {
    constexpr int W = PER_VECTOR<T>;
    __shared__ float sums[THREADS * W], dots[THREADS * W];
    Rows<T> at(rows, rows_per_chunk, c);
    float sum[W] = {}, dot[W] = {}, mu[W], s[W];
    if (at.count > 0) {
        int64_t statistics = int64_t{blockIdx.z} * c + at.channel;
        load_channels<T>(mu, mean + statistics, at.count, 0.0f);
        load_channels<T>(s, inv_std + statistics, at.count, 0.0f);
        for (int64_t row = at.begin + threadIdx.y; row < at.end; row += blockDim.y) {
            int64_t i = row * c + at.channel;
            Vector<T> d = masked(dy, y, i, at.count), v = load_some(x + i, at.count);
#pragma unroll
            for (int k = 0; k < W; k++) {
                sum[k] += d.v[k];
                dot[k] += d.v[k] * ((v.v[k] - mu[k]) * s[k]);
            }
        }
    }
    int slot = (threadIdx.y * blockDim.x + threadIdx.x) * W;
#pragma unroll
    for (int k = 0; k < W; k++) sums[slot + k] = sum[k], dots[slot + k] = dot[k];
    for (int span = 1; span < static_cast<int>(blockDim.y); span *= 2) {
        __syncthreads();
        if (threadIdx.y % (2 * span) == 0) {
            int other = slot + span * blockDim.x * W;
#pragma unroll
            for (int k = 0; k < W; k++) {
                sums[slot + k] = sum[k] += sums[other + k];
                dots[slot + k] = dot[k] += dots[other + k];
            }
        }
    }
    if (threadIdx.y > 0) return;
#pragma unroll
    for (int k = 0; k < W; k++)
        if (k < at.count) partial[at.partial + k] = sum[k], partial[at.partial + c + k] = dot[k];
}

KERNEL BOUNDS(THREADS) void batch_norm_backward_sums_f32(float* partial, const float* dy, const float* y,
                                                         const float* x, const float* mean,
                                                         const float* inv_std, int64_t rows,
                                                         int rows_per_chunk, int c) {
    backward_sums(partial, dy, y, x, mean, inv_std, rows, rows_per_chunk, c);
}
KERNEL BOUNDS(THREADS) void batch_norm_backward_sums_bf16(float* partial, const bf16* dy, const bf16* y,
                                                          const bf16* x, const float* mean,
                                                          const float* inv_std, int64_t rows,
                                                          int rows_per_chunk, int c) {
    backward_sums(partial, dy, y, x, mean, inv_std, rows, rows_per_chunk, c);
}

/// sums [groups, 2, c] over chunks, a thread per channel; dshift and dgain [c], where given, are their totals
/// over groups, added to what they hold if `accumulate` has bit 0 and bit 1.
KERNEL void batch_norm_backward_finish(float* sums, float* dshift, float* dgain, const float* partial,
                                       int groups, int chunks, int c, int accumulate) {
    int j = blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= c) return;
    double all_sums = 0.0, all_dots = 0.0;
    for (int g = 0; g < groups; g++) {
        double sum = 0.0, dot = 0.0;
        for (int i = 0; i < chunks; i++) {
            const float* chunk = partial + (int64_t{g} * chunks + i) * 2 * c + j;
            sum += chunk[0];
            dot += chunk[c];
        }
        sums[int64_t{g} * 2 * c + j] = static_cast<float>(sum);
        sums[(int64_t{g} * 2 + 1) * c + j] = static_cast<float>(dot);
        all_sums += sum;
        all_dots += dot;
    }
    if (dshift) dshift[j] = static_cast<float>(all_sums) + (accumulate & 1 ? dshift[j] : 0.0f);
    if (dgain) dgain[j] = static_cast<float>(all_dots) + (accumulate & 2 ? dgain[j] : 0.0f);
}

/// dx = gain inv_std (dz - sum / m - x̂ dot / m) and dresidual = dz, each where given; bit 0 of `accumulate`
/// adds to dx, bit 1 to dresidual.
template <typename T>
__device__ __forceinline__ void backward_apply(T* dx, T* dresidual, const T* dy, const T* y, const T* x,
                                               const float* mean, const float* inv_std, const float* gain,
                                               const float* sums, int64_t rows, int rows_per_chunk, int c,
                                               int accumulate) {
    constexpr int W = PER_VECTOR<T>;
    Rows<T> at(rows, rows_per_chunk, c);
    if (at.count <= 0) return;
    int64_t statistics = int64_t{blockIdx.z} * c + at.channel;
    const float* of_group = sums + int64_t{blockIdx.z} * 2 * c + at.channel;
    // dx = a dz + b (x - mean) + e, the means subtracted first for the same reason as in the forward.
    float mu[W], a[W], b[W], e[W], inv_m = 1.0f / static_cast<float>(rows);
#pragma unroll
    for (int k = 0; k < W; k++) {
        bool exists = k < at.count;
        float s = exists ? inv_std[statistics + k] : 0.0f;
        mu[k] = exists ? mean[statistics + k] : 0.0f;
        a[k] = exists && gain ? gain[at.channel + k] * s : s;
        b[k] = exists ? -a[k] * s * (of_group[c + k] * inv_m) : 0.0f;
        e[k] = exists ? -a[k] * (of_group[k] * inv_m) : 0.0f;
    }
    for (int64_t row = at.begin + threadIdx.y; row < at.end; row += blockDim.y) {
        int64_t i = row * c + at.channel;
        Vector<T> d = masked(dy, y, i, at.count);
        if (dresidual) {
            Vector<T> r = d, old{};
            if (accumulate & 2) old = load_some(dresidual + i, at.count);
#pragma unroll
            for (int k = 0; k < W; k++) r.v[k] += old.v[k];
            store_some(dresidual + i, r, at.count);
        }
        if (dx) {
            Vector<T> v = load_some(x + i, at.count), old{};
            if (accumulate & 1) old = load_some(dx + i, at.count);
#pragma unroll
            for (int k = 0; k < W; k++) v.v[k] = a[k] * d.v[k] + b[k] * (v.v[k] - mu[k]) + e[k] + old.v[k];
            store_some(dx + i, v, at.count);
        }
    }
}

KERNEL BOUNDS(THREADS) void batch_norm_backward_apply_f32(float* dx, float* dresidual, const float* dy,
                                                          const float* y, const float* x, const float* mean,
                                                          const float* inv_std, const float* gain,
                                                          const float* sums, int64_t rows, int rows_per_chunk,
                                                          int c, int accumulate) {
    backward_apply(dx, dresidual, dy, y, x, mean, inv_std, gain, sums, rows, rows_per_chunk, c, accumulate);
}
KERNEL BOUNDS(THREADS) void batch_norm_backward_apply_bf16(bf16* dx, bf16* dresidual, const bf16* dy,
                                                           const bf16* y, const bf16* x, const float* mean,
                                                           const float* inv_std, const float* gain,
                                                           const float* sums, int64_t rows,
                                                           int rows_per_chunk, int c, int accumulate) {
    backward_apply(dx, dresidual, dy, y, x, mean, inv_std, gain, sums, rows, rows_per_chunk, c, accumulate);
}
