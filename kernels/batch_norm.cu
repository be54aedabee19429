// Batch norm over the rows of x [groups rows, c], channels last; see src/ops/batch_norm.
//
// Every kernel but `merge` and the `finish` ones has the same layout: threadIdx.x is a vector of channels,
// threadIdx.y a row; the block (x, y, g) takes the channel vectors from x blockDim.x on and the rows [y
// rows_per_chunk, ...) of group g. A thread has four rows in flight, two in the backward pass: 16 bytes each
// of one, two or three tensors. Sums over rows have two levels, both in an order that the shape alone
// determines: within a chunk, then over chunks in `finish`, in f64. blockDim.y is a power of two, and the block has at most 256
// threads.
//
// All are bound by memory. Bytes per element in bf16: moments reads 2, apply reads 2 (4 with a residual) and
// writes 2; after a convolution whose epilogue has computed the moments, apply is all. The backward pass
// reads x and dy twice and writes dx, 10; a ReLU's mask is recomputed from x, or with a residual from y,
// which is 4 more, and dresidual another 2.
#include "moments.cuh"
#include "vector.cuh"

constexpr int THREADS = 256;
// Rows that a thread has in flight.
constexpr int FORWARD_ROWS = 4, BACKWARD_ROWS = 2;
// Flags of `accumulate`: which output the kernel adds to instead of overwriting it.
constexpr int ACCUMULATE_DSHIFT = 1, ACCUMULATE_DGAIN = 2;
constexpr int ACCUMULATE_DX = 1, ACCUMULATE_DRESIDUAL = 2;

/// A thread's channels and rows.
template <typename T>
struct ThreadRows {
    int channel, count;  // first channel, and how many of the vector exist; may be <= 0
    int64_t begin, end;  // rows of the chunk, in the whole tensor
    int64_t partial;     // of this chunk, in [groups, chunks, 2, c]
    bool vectorized;     // vectors are full and 16-byte aligned in every row, if their tensor is

    __device__ ThreadRows(int64_t rows, int rows_per_chunk, int c) {
        channel = (blockIdx.x * blockDim.x + threadIdx.x) * PER_VECTOR<T>;
        count = c - channel < PER_VECTOR<T> ? c - channel : PER_VECTOR<T>;
        int64_t from = int64_t{blockIdx.y} * rows_per_chunk;
        int64_t to = from + rows_per_chunk < rows ? from + rows_per_chunk : rows;
        begin = blockIdx.z * rows + from;
        end = blockIdx.z * rows + to;
        partial = (int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * 2 * c + channel;
        vectorized = c % PER_VECTOR<T> == 0;
    }

    /// Calls f(VECTORIZED, IN_FLIGHT or 1, element of the first row, elements from row to row) for all rows
    /// of the thread, in order. VECTORIZED, a bool as a type: loads and stores need no checks.
    template <int IN_FLIGHT, typename F>
    __device__ __forceinline__ void for_rows(bool aligned, int c, F f) const {
        if (aligned && vectorized) for_rows_as<true, IN_FLIGHT>(c, f);
        else for_rows_as<false, 1>(c, f);
    }

  private:
    template <bool VECTORIZED, int IN_FLIGHT, typename F>
    __device__ __forceinline__ void for_rows_as(int c, F& f) const {
        if (count <= 0) return;
        using Vectorized = std::bool_constant<VECTORIZED>;
        const int64_t step = blockDim.y;
        int64_t row = begin + threadIdx.y;
        for (; row + (IN_FLIGHT - 1) * step < end; row += IN_FLIGHT * step)
            f(Vectorized{}, std::integral_constant<int, IN_FLIGHT>{}, row * c + channel, step * c);
        for (; row < end; row += step)
            f(Vectorized{}, std::integral_constant<int, 1>{}, row * c + channel, step * c);
    }
};

/// N vectors `step` elements apart.
template <bool VECTORIZED, int N, typename T>
__device__ __forceinline__ void load_rows(Vector<T> (&v)[N], const T* at, int64_t step, int count) {
#pragma unroll
    for (int i = 0; i < N; i++)
        v[i] = VECTORIZED ? load_vector(at + i * step) : load_partial(at + i * step, count);
}

template <bool VECTORIZED, typename T>
__device__ __forceinline__ void store_row(T* at, const Vector<T>& v, int count) {
    if (VECTORIZED) store_vector(at, v);
    else store_partial(at, v, count);
}

/// Loads this thread's channels of a per-channel array; `fallback` if that is null, and for channels beyond
/// `count`.
template <typename T>
__device__ __forceinline__ void load_channels(float (&v)[PER_VECTOR<T>], const float* at, int count,
                                              float fallback) {
#pragma unroll
    for (int k = 0; k < PER_VECTOR<T>; k++) v[k] = at && k < count ? at[k] : fallback;
}

/// The rows of a chunk of `total` that the thread rows [from, from + span) of a block have; each has every
/// blockDim.y-th.
__device__ __forceinline__ float rows_of(int64_t total, int from, int span) {
    int64_t full = total / blockDim.y * span, rest = total % blockDim.y - from;
    return static_cast<float>(full + (rest < 0 ? 0 : rest > span ? span : rest));
}

/// Reduces two numbers per channel over the thread rows of the block, in the order of a tree; thread row 0
/// gets the result. merge_two(first, second, first and second of the other, thread rows that each of them
/// stands for).
template <int W, typename Merge>
__device__ __forceinline__ void reduce_thread_rows(float (&first)[W], float (&second)[W], Merge merge_two) {
    __shared__ float firsts[THREADS * W], seconds[THREADS * W];
    // Neighbouring threads have neighbouring words: no bank conflicts.
    const int threads = blockDim.x * blockDim.y, slot = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
    for (int k = 0; k < W; k++)
        firsts[k * threads + slot] = first[k], seconds[k * threads + slot] = second[k];
    for (int span = 1; span < static_cast<int>(blockDim.y); span *= 2) {
        __syncthreads();
        if (threadIdx.y % (2 * span) == 0) {
            int other = slot + span * blockDim.x;
#pragma unroll
            for (int k = 0; k < W; k++) {
                merge_two(first[k], second[k], firsts[k * threads + other], seconds[k * threads + other],
                          span);
                firsts[k * threads + slot] = first[k], seconds[k * threads + slot] = second[k];
            }
        }
    }
}

/// partial [groups, chunks, 2, c]: mean and sum of squared deviations of each chunk.
template <typename T>
__device__ __forceinline__ void moments(float* partial, const T* x, int64_t rows, int rows_per_chunk, int c) {
    constexpr int W = PER_VECTOR<T>;
    ThreadRows<T> at(rows, rows_per_chunk, c);
    // Sums are shifted by the thread's first row: one pass without a division, and no digits are lost where
    // the mean is far from zero.
    float shift[W] = {}, mean[W] = {}, m2[W] = {};
    const int64_t first = at.begin + threadIdx.y;
    if (at.count > 0 && first < at.end) {
        Vector<T> v = load_partial(x + first * c + at.channel, at.count);
#pragma unroll
        for (int k = 0; k < W; k++) shift[k] = v.v[k];
    }
    const bool aligned = is_aligned_16(x);
    at.template for_rows<FORWARD_ROWS>(aligned, c, [&](auto vectorized, auto n, int64_t i, int64_t step) {
        Vector<T> v[n.value];
        load_rows<vectorized.value>(v, x + i, step, at.count);
#pragma unroll
        for (int r = 0; r < n.value; r++)
#pragma unroll
            for (int k = 0; k < W; k++) {
                float d = v[r].v[k] - shift[k];
                mean[k] += d;
                m2[k] += d * d;
            }
    });
    const float own_rows = rows_of(at.end - at.begin, threadIdx.y, 1),
                inverse = own_rows > 0.0f ? 1.0f / own_rows : 0.0f;
#pragma unroll
    for (int k = 0; k < W; k++) {
        m2[k] = fmaxf(m2[k] - mean[k] * mean[k] * inverse, 0.0f);
        mean[k] = shift[k] + mean[k] * inverse;
    }
    reduce_thread_rows<W>(mean, m2, [&](float& mean, float& m2, float other_mean, float other_m2, int span) {
        const int y = threadIdx.y;
        Moments both = merge({mean, m2}, rows_of(at.end - at.begin, y, span), {other_mean, other_m2},
                             rows_of(at.end - at.begin, y + span, span));
        mean = both.mean, m2 = both.m2;
    });
    if (threadIdx.y > 0) return;
#pragma unroll
    for (int k = 0; k < W; k++)
        if (k < at.count) partial[at.partial + k] = mean[k], partial[at.partial + c + k] = m2[k];
}

KERNEL BOUNDS(THREADS) void batch_norm_moments_f32(float* partial, const float* x, int64_t rows,
                                                   int rows_per_chunk, int c) {
    moments(partial, x, rows, rows_per_chunk, c);
}
KERNEL BOUNDS(THREADS) void batch_norm_moments_bf16(float* partial, const bf16* x, int64_t rows,
                                                    int rows_per_chunk, int c) {
    moments(partial, x, rows, rows_per_chunk, c);
}

constexpr int FINISH_THREADS = 1024;

/// Reduces two f64 sums, which start at 0, over chunks, for the finish kernels: threadIdx.x is a channel,
/// threadIdx.y every blockDim.y-th chunk. f(i) adds chunk i; a channel's sums are added in the order of a
/// tree, and thread row 0 gets them. All threads must call it the same number of times.
template <typename F>
__device__ __forceinline__ void reduce_chunks(double& first, double& second, int chunks, F f) {
    __shared__ double firsts[FINISH_THREADS], seconds[FINISH_THREADS];
    const int slot = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll 4
    for (int i = threadIdx.y; i < chunks; i += blockDim.y) f(i);
    __syncthreads();  // before this call overwrites the sums of the last one
    firsts[slot] = first, seconds[slot] = second;
    for (int span = blockDim.y / 2; span > 0; span /= 2) {
        __syncthreads();
        if (static_cast<int>(threadIdx.y) < span) {
            firsts[slot] = first += firsts[slot + span * blockDim.x];
            seconds[slot] = second += seconds[slot + span * blockDim.x];
        }
    }
}

/// Mean and sum of squared deviations.
struct WideMoments {
    double mean, m2;
};

/// The moments of a channel over the chunks [first, first + count) of its group, in f64, for thread row 0;
/// `of_group` points to the channel in the group's partial [chunks, 2, c]. All threads must call it the same
/// number of times.
__device__ __forceinline__ WideMoments merge_chunks(const float* of_group, int first, int count, int64_t rows,
                                                    int rows_per_chunk, int c) {
    const float* own = of_group + int64_t{first} * 2 * c;
    // Shifted by the first chunk's mean, so that the subtraction at the end loses no digits.
    const double shift = count > 0 ? own[0] : 0.0;
    double sum = 0.0, square = 0.0;
    reduce_chunks(sum, square, count, [&](int i) {
        const float* chunk = own + int64_t{i} * 2 * c;
        int64_t rest = rows - (int64_t{first} + i) * rows_per_chunk;
        double n = static_cast<double>(rest < rows_per_chunk ? rest : rows_per_chunk),
               delta = chunk[0] - shift;
        sum += n * delta;
        square += chunk[c] + n * delta * delta;
    });
    int64_t begin = int64_t{first} * rows_per_chunk, end = begin + int64_t{count} * rows_per_chunk;
    int64_t n = (end < rows ? end : rows) - begin;
    const double shifted_mean = n > 0 ? sum / static_cast<double>(n) : 0.0;
    return {shift + shifted_mean, fmax(square - shifted_mean * sum, 0.0)};
}

/// merged [groups, ceil(chunks / run), 2, c]: the moments of each run of chunks, as those of a chunk of run
/// rows_per_chunk rows. Where a convolution's tiles leave tens of thousands of chunks, the few blocks of
/// batch_norm_finish would read them alone. Block (x, y, g): channels from x blockDim.x on, run y of group g.
KERNEL BOUNDS(THREADS) void batch_norm_merge(float* merged, const float* partial, int chunks, int run,
                                             int64_t rows, int rows_per_chunk, int c) {
    const int j = blockIdx.x * blockDim.x + threadIdx.x, first = blockIdx.y * run;
    const int count = j >= c ? 0 : chunks - first < run ? chunks - first : run;
    const float* of_group = partial + int64_t{blockIdx.z} * chunks * 2 * c + j;
    const WideMoments m = merge_chunks(of_group, first, count, rows, rows_per_chunk, c);
    if (count <= 0 || threadIdx.y > 0) return;
    float* to = merged + (int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * 2 * c + j;
    to[0] = static_cast<float>(m.mean), to[c] = static_cast<float>(m.m2);
}

/// mean, inv_std [groups, c] from the chunks' moments, partial [groups, chunks, 2, c]; blocks of 8 channels
/// and a power of two of thread rows. Running statistics, unless null, move by `weight` towards the groups'
/// mean of means and of unbiased variances.
KERNEL BOUNDS(FINISH_THREADS) void batch_norm_finish(float* mean, float* inv_std, float* running_mean,
                                                     float* running_variance, const float* partial,
                                                     int groups, int chunks, int64_t rows, int rows_per_chunk,
                                                     int c, float weight, float eps) {
    const int j = blockIdx.x * blockDim.x + threadIdx.x;
    const bool exists = j < c, writes = exists && threadIdx.y == 0;
    double sum_means = 0.0, sum_variances = 0.0;
    for (int g = 0; g < groups; g++) {
        const float* of_group = partial + int64_t{g} * chunks * 2 * c + j;
        const auto [mu, m2] = merge_chunks(of_group, 0, exists ? chunks : 0, rows, rows_per_chunk, c);
        if (!writes) continue;
        const double n = static_cast<double>(rows), variance = rows > 0 ? m2 / n : 0.0;
        mean[int64_t{g} * c + j] = static_cast<float>(mu);
        inv_std[int64_t{g} * c + j] = static_cast<float>(1.0 / sqrt(variance + eps));
        sum_means += mu;
        sum_variances += rows > 1 ? m2 / (n - 1.0) : variance;
    }
    if (writes && running_mean) {
        running_mean[j] = static_cast<float>((1.0 - weight) * running_mean[j] + weight * sum_means / groups);
        running_variance[j] =
            static_cast<float>((1.0 - weight) * running_variance[j] + weight * sum_variances / groups);
    }
}

/// inv_std [c] from the running variance, for evaluation.
KERNEL void batch_norm_inv_std(float* inv_std, const float* variance, int c, float eps) {
    int j = blockIdx.x * blockDim.x + threadIdx.x;
    if (j < c) inv_std[j] = static_cast<float>(1.0 / sqrt(static_cast<double>(variance[j]) + eps));
}

/// y before the residual and the ReLU, as a function of x: the backward pass recomputes the same bits.
template <int W>
struct Affine {
    float mu[W], a[W], b[W];

    template <typename T>
    __device__ __forceinline__ static Affine load(const ThreadRows<T>& at, const float* mean,
                                                  const float* inv_std, const float* gain, const float* shift,
                                                  int c) {
        Affine f;
        const int64_t statistics = int64_t{blockIdx.z} * c + at.channel;
        float g[W];
        load_channels<T>(f.mu, mean + statistics, at.count, 0.0f);
        load_channels<T>(f.a, inv_std + statistics, at.count, 0.0f);
        load_channels<T>(g, gain ? gain + at.channel : nullptr, at.count, 1.0f);
        load_channels<T>(f.b, shift ? shift + at.channel : nullptr, at.count, 0.0f);
#pragma unroll
        for (int k = 0; k < W; k++) f.a[k] *= g[k];
        return f;
    }
    /// Subtracts the mean first: a x + (b - a mean) would lose digits where the mean is far from zero.
    __device__ __forceinline__ float operator()(int k, float x) const {
        return __fmaf_rn(x - mu[k], a[k], b[k]);
    }
};

/// y = relu((x - mean) inv_std gain + shift + residual); gain, shift and residual may be null. Evaluation is
/// one group with the running statistics.
template <typename T>
__device__ __forceinline__ void apply(T* y, const T* x, const T* residual, const float* mean,
                                      const float* inv_std, const float* gain, const float* shift,
                                      int64_t rows, int rows_per_chunk, int c, bool relu) {
    constexpr int W = PER_VECTOR<T>;
    ThreadRows<T> at(rows, rows_per_chunk, c);
    if (at.count <= 0) return;
    const auto affine = Affine<W>::load(at, mean, inv_std, gain, shift, c);
    bool aligned = is_aligned_16(x) && is_aligned_16(y) && is_aligned_16(residual);
    at.template for_rows<FORWARD_ROWS>(aligned, c, [&](auto vectorized, auto n, int64_t i, int64_t step) {
        Vector<T> v[n.value], z[n.value] = {};
        load_rows<vectorized.value>(v, x + i, step, at.count);
        if (residual) load_rows<vectorized.value>(z, residual + i, step, at.count);
#pragma unroll
        for (int r = 0; r < n.value; r++) {
#pragma unroll
            for (int k = 0; k < W; k++) {
                float sum = affine(k, v[r].v[k]) + z[r].v[k];
                v[r].v[k] = relu && sum < 0.0f ? 0.0f : sum;
            }
            store_row<vectorized.value>(y + i + r * step, v[r], at.count);
        }
    });
}

KERNEL BOUNDS(THREADS, 2) void batch_norm_apply_f32(float* y, const float* x, const float* residual,
                                                    const float* mean, const float* inv_std,
                                                    const float* gain, const float* shift, int64_t rows,
                                                    int rows_per_chunk, int c, int relu) {
    apply(y, x, residual, mean, inv_std, gain, shift, rows, rows_per_chunk, c, relu);
}
KERNEL BOUNDS(THREADS, 2) void batch_norm_apply_bf16(bf16* y, const bf16* x, const bf16* residual,
                                                     const float* mean, const float* inv_std,
                                                     const float* gain, const float* shift, int64_t rows,
                                                     int rows_per_chunk, int c, int relu) {
    apply(y, x, residual, mean, inv_std, gain, shift, rows, rows_per_chunk, c, relu);
}

/// The inputs of the backward pass. dz = dy where the forward pass's output was above 0, else 0: by that
/// output, y, unless null; else with `relu` by its recomputation from x; without either everywhere.
template <typename T>
struct BackwardInputs {
    const T *dy, *y, *x;
    bool relu;

    __device__ __forceinline__ bool is_aligned() const {
        return is_aligned_16(dy) && is_aligned_16(y) && is_aligned_16(x);
    }

    template <bool VECTORIZED, int N>
    __device__ __forceinline__ void load(Vector<T> (&dz)[N], Vector<T> (&v)[N], int64_t i, int64_t step,
                                         int count, const Affine<PER_VECTOR<T>>& affine) const {
        Vector<T> out[N];
        load_rows<VECTORIZED>(dz, dy + i, step, count);
        load_rows<VECTORIZED>(v, x + i, step, count);
        if (y) load_rows<VECTORIZED>(out, y + i, step, count);
#pragma unroll
        for (int r = 0; r < N; r++)
#pragma unroll
            for (int k = 0; k < PER_VECTOR<T>; k++) {
                float z = y ? out[r].v[k] : relu ? affine(k, v[r].v[k]) : 1.0f;
                dz[r].v[k] = z > 0.0f ? dz[r].v[k] : 0.0f;
            }
    }
};

/// partial [groups, chunks, 2, c]: sums of dz and of dz x̂ over each chunk.
template <typename T>
__device__ __forceinline__ void backward_sums(float* partial, const BackwardInputs<T>& in, const float* mean,
                                              const float* inv_std, const float* gain, const float* shift,
                                              int64_t rows, int rows_per_chunk, int c) {
    constexpr int W = PER_VECTOR<T>;
    ThreadRows<T> at(rows, rows_per_chunk, c);
    float sum[W] = {}, dot[W] = {};
    if (at.count > 0) {
        const auto affine = Affine<W>::load(at, mean, inv_std, gain, shift, c);
        const bool aligned = in.is_aligned();
        at.template for_rows<BACKWARD_ROWS>(
            aligned, c, [&](auto vectorized, auto n, int64_t i, int64_t step) {
                Vector<T> dz[n.value], v[n.value];
                in.template load<vectorized.value>(dz, v, i, step, at.count, affine);
#pragma unroll
                for (int r = 0; r < n.value; r++)
#pragma unroll
                    for (int k = 0; k < W; k++) {
                        sum[k] += dz[r].v[k];
                        dot[k] += dz[r].v[k] * (v[r].v[k] - affine.mu[k]);
                    }
            });
        float s[W];
        load_channels<T>(s, inv_std + int64_t{blockIdx.z} * c + at.channel, at.count, 0.0f);
#pragma unroll
        for (int k = 0; k < W; k++) dot[k] *= s[k];
    }
    reduce_thread_rows<W>(sum, dot, [](float& sum, float& dot, float other_sum, float other_dot, int) {
        sum += other_sum;
        dot += other_dot;
    });
    if (threadIdx.y > 0) return;
#pragma unroll
    for (int k = 0; k < W; k++)
        if (k < at.count) partial[at.partial + k] = sum[k], partial[at.partial + c + k] = dot[k];
}

KERNEL BOUNDS(THREADS, 2) void batch_norm_backward_sums_f32(float* partial, const float* dy, const float* y,
                                                            const float* x, const float* mean,
                                                            const float* inv_std, const float* gain,
                                                            const float* shift, int64_t rows,
                                                            int rows_per_chunk, int c, int relu) {
    BackwardInputs<float> in{dy, y, x, relu != 0};
    backward_sums(partial, in, mean, inv_std, gain, shift, rows, rows_per_chunk, c);
}
KERNEL BOUNDS(THREADS, 2) void batch_norm_backward_sums_bf16(float* partial, const bf16* dy, const bf16* y,
                                                             const bf16* x, const float* mean,
                                                             const float* inv_std, const float* gain,
                                                             const float* shift, int64_t rows,
                                                             int rows_per_chunk, int c, int relu) {
    BackwardInputs<bf16> in{dy, y, x, relu != 0};
    backward_sums(partial, in, mean, inv_std, gain, shift, rows, rows_per_chunk, c);
}

/// sums [groups, 2, c] over chunks, in blocks like those of batch_norm_finish. dshift and dgain [c], unless
/// null, are their totals over groups; ACCUMULATE_DSHIFT and ACCUMULATE_DGAIN of `accumulate` add to what
/// they hold.
KERNEL BOUNDS(FINISH_THREADS) void batch_norm_backward_finish(float* sums, float* dshift, float* dgain,
                                                              const float* partial, int groups, int chunks,
                                                              int c, int accumulate) {
    const int j = blockIdx.x * blockDim.x + threadIdx.x;
    const bool exists = j < c, writes = exists && threadIdx.y == 0;
    double all_sums = 0.0, all_dots = 0.0;
    for (int g = 0; g < groups; g++) {
        double sum = 0.0, dot = 0.0;
        reduce_chunks(sum, dot, exists ? chunks : 0, [&](int i) {
            const float* chunk = partial + (int64_t{g} * chunks + i) * 2 * c + j;
            sum += chunk[0];
            dot += chunk[c];
        });
        if (!writes) continue;
        sums[int64_t{g} * 2 * c + j] = static_cast<float>(sum);
        sums[(int64_t{g} * 2 + 1) * c + j] = static_cast<float>(dot);
        all_sums += sum;
        all_dots += dot;
    }
    if (writes && dshift)
        dshift[j] = static_cast<float>(all_sums) + (accumulate & ACCUMULATE_DSHIFT ? dshift[j] : 0.0f);
    if (writes && dgain)
        dgain[j] = static_cast<float>(all_dots) + (accumulate & ACCUMULATE_DGAIN ? dgain[j] : 0.0f);
}

/// dx = gain inv_std (dz - sum / m - x̂ dot / m) and dresidual = dz, each unless null; ACCUMULATE_DX and
/// ACCUMULATE_DRESIDUAL of `accumulate` add to what they hold.
template <typename T>
__device__ __forceinline__ void backward_apply(T* dx, T* dresidual, const BackwardInputs<T>& in,
                                               const float* mean, const float* inv_std, const float* gain,
                                               const float* shift, const float* sums, int64_t rows,
                                               int rows_per_chunk, int c, int accumulate) {
    constexpr int W = PER_VECTOR<T>;
    ThreadRows<T> at(rows, rows_per_chunk, c);
    if (at.count <= 0) return;
    const auto affine = Affine<W>::load(at, mean, inv_std, gain, shift, c);
    const float* of_group = sums + int64_t{blockIdx.z} * 2 * c + at.channel;
    // dx = a dz + b (x - mean) + e, with the mean subtracted first for the same reason as in the forward
    // pass.
    float s[W], b[W], e[W], inv_m = 1.0f / static_cast<float>(rows);
    load_channels<T>(s, inv_std + int64_t{blockIdx.z} * c + at.channel, at.count, 0.0f);
#pragma unroll
    for (int k = 0; k < W; k++) {
        bool exists = k < at.count;
        b[k] = exists ? -affine.a[k] * s[k] * (of_group[c + k] * inv_m) : 0.0f;
        e[k] = exists ? -affine.a[k] * (of_group[k] * inv_m) : 0.0f;
    }
    const bool aligned = in.is_aligned() && is_aligned_16(dx) && is_aligned_16(dresidual);
    at.template for_rows<BACKWARD_ROWS>(aligned, c, [&](auto vectorized, auto n, int64_t i, int64_t step) {
        Vector<T> dz[n.value], v[n.value], old[n.value] = {};
        in.template load<vectorized.value>(dz, v, i, step, at.count, affine);
        // The residual comes first: it may be x itself, and dx then adds to it.
        if (dresidual) {
            if (accumulate & ACCUMULATE_DRESIDUAL)
                load_rows<vectorized.value>(old, dresidual + i, step, at.count);
#pragma unroll
            for (int r = 0; r < n.value; r++) {
#pragma unroll
                for (int k = 0; k < W; k++) old[r].v[k] += dz[r].v[k];
                store_row<vectorized.value>(dresidual + i + r * step, old[r], at.count);
            }
        }
        if (!dx) return;
#pragma unroll
        for (int r = 0; r < n.value; r++) old[r] = {};
        if (accumulate & ACCUMULATE_DX) load_rows<vectorized.value>(old, dx + i, step, at.count);
#pragma unroll
        for (int r = 0; r < n.value; r++) {
#pragma unroll
            for (int k = 0; k < W; k++)
                v[r].v[k] = affine.a[k] * dz[r].v[k] + b[k] * (v[r].v[k] - affine.mu[k]) + e[k] + old[r].v[k];
            store_row<vectorized.value>(dx + i + r * step, v[r], at.count);
        }
    });
}

KERNEL BOUNDS(THREADS, 2) void batch_norm_backward_apply_f32(
    float* dx, float* dresidual, const float* dy, const float* y, const float* x, const float* mean,
    const float* inv_std, const float* gain, const float* shift, const float* sums, int64_t rows,
    int rows_per_chunk, int c, int relu, int accumulate) {
    BackwardInputs<float> in{dy, y, x, relu != 0};
    backward_apply(dx, dresidual, in, mean, inv_std, gain, shift, sums, rows, rows_per_chunk, c, accumulate);
}
KERNEL BOUNDS(THREADS, 2) void batch_norm_backward_apply_bf16(bf16* dx, bf16* dresidual, const bf16* dy,
                                                              const bf16* y, const bf16* x, const float* mean,
                                                              const float* inv_std, const float* gain,
                                                              const float* shift, const float* sums,
                                                              int64_t rows, int rows_per_chunk, int c,
                                                              int relu, int accumulate) {
    BackwardInputs<bf16> in{dy, y, x, relu != 0};
    backward_apply(dx, dresidual, in, mean, inv_std, gain, shift, sums, rows, rows_per_chunk, c, accumulate);
}
