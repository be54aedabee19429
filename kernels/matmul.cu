// GEMM: C [m, n] = A B, any sizes below 2^31. The letters of a name say how A and B lie in memory, as in
// BLAS: `nt` A [m, k], B [n, k] (y = x W^T), with a bias [n] unless null; `nn` A [m, k], B [k, n] (dx = dy W)
// and `tn` A [k, m], B [k, n] (dW = dy^T x), which add to what C holds if `accumulate`. Convolutions of 1x1
// are these, too.
//
// In bf16 the result goes to `out_bf16`, or to `out_f32` if out_bf16 is null. `moments` of `nt`, unless null,
// gets mean and sum of squared deviations of each column for every M rows of C in bf16, [ceil(m / M), 2, n].
// The tile M x N is in the name: 128x128, 128x64 and 64x128 require operands whose start and pitch are
// multiples of 16 bytes; 64x64 and f32 (64 x 64) require nothing.
//
// Grid (ceil(m / M) ceil(n / N), 1, splits), blocks of 128 threads for bf16 and of 256 for f32. Split-K:
// blockIdx.z takes `k_per_split` of k, a multiple of 32. With more than one split, the output is f32 [splits,
// m, n] without bias, and split_k_reduce adds the splits in an order that the launch alone determines: enough
// blocks for a weight gradient, whose k is all the rows.
#include "gather.cuh"
#include "gemm_operands.cuh"

/// Where this block's split of C goes.
__device__ __forceinline__ Output output_of(bf16* out_bf16, float* out_f32, int m, int n) {
    return {.out_bf16 = out_bf16, .out_f32 = out_bf16 ? nullptr : out_f32 + int64_t{blockIdx.z} * m * n};
}

/// Operands that are aligned to 16 bytes.
template <typename Tile, bool A_K_MAJOR, bool B_K_MAJOR>
__device__ __forceinline__ void matmul_aligned(const Output& to, const bf16* a, const bf16* b, int m, int n,
                                               int k, int k_per_split) {
    constexpr int THREADS = Tile::THREADS;
    using A =
        std::conditional_t<A_K_MAJOR, KMajorOperand<Tile::M, THREADS>, MnMajorOperand<Tile::M, THREADS>>;
    using B =
        std::conditional_t<B_K_MAJOR, KMajorOperand<Tile::N, THREADS>, MnMajorOperand<Tile::N, THREADS>>;
    KSplit split(k, k_per_split);
    typename Tile::TileCoord coord(n);
    Tile::template gemm<A_K_MAJOR && B_K_MAJOR>(
        A(a, A_K_MAJOR ? k : m, coord.row, m, split.begin, split.end),
        B(b, B_K_MAJOR ? k : n, coord.column, n, split.begin, split.end), k_tiles_of(split.end - split.begin),
        coord, m, n, to, DenseRows{n});
}

/// Any size and alignment; gathers only if it must.
template <bool A_K_MAJOR, bool B_K_MAJOR>
__device__ __forceinline__ void matmul_any(const Output& to, const bf16* a, const bf16* b, int m, int n,
                                           int k, int k_per_split) {
    using Tile = Tile64x64;
    if (alignment_of(a, A_K_MAJOR ? k : m) == 8 && alignment_of(b, B_K_MAJOR ? k : n) == 8)
        return matmul_aligned<Tile, A_K_MAJOR, B_K_MAJOR>(to, a, b, m, n, k, k_per_split);
    using Source = MatrixSource<bf16>;
    Source source_a(a, A_K_MAJOR ? m : k, A_K_MAJOR ? k : m),
        source_b(b, B_K_MAJOR ? n : k, B_K_MAJOR ? k : n);
    KSplit split(k, k_per_split);
    Tile::TileCoord coord(n);
    Tile::gemm<A_K_MAJOR && B_K_MAJOR>(
        GatheredOperand<Source, Tile::M, Tile::THREADS, A_K_MAJOR>(source_a, coord.row, split.begin),
        GatheredOperand<Source, Tile::N, Tile::THREADS, B_K_MAJOR>(source_b, coord.column, split.begin),
        k_tiles_of(split.end - split.begin), coord, m, n, to, DenseRows{n});
}

template <typename Tile>
__device__ __forceinline__ void matmul_nt(bf16* out_bf16, float* out_f32, const bf16* a, const bf16* b,
                                          const float* bias, float* moments, int m, int n, int k,
                                          int k_per_split) {
    Output to = output_of(out_bf16, out_f32, m, n);
    to.bias = bias, to.moments = moments;
    if constexpr (std::is_same_v<Tile, Tile64x64>) matmul_any<true, true>(to, a, b, m, n, k, k_per_split);
    else matmul_aligned<Tile, true, true>(to, a, b, m, n, k, k_per_split);
}
template <typename Tile, bool A_K_MAJOR>
__device__ __forceinline__ void matmul_gradient(bf16* out_bf16, float* out_f32, const bf16* a, const bf16* b,
                                                int m, int n, int k, int k_per_split, bool accumulate) {
    Output to = output_of(out_bf16, out_f32, m, n);
    to.accumulate = accumulate;
    if constexpr (std::is_same_v<Tile, Tile64x64>)
        matmul_any<A_K_MAJOR, false>(to, a, b, m, n, k, k_per_split);
    else matmul_aligned<Tile, A_K_MAJOR, false>(to, a, b, m, n, k, k_per_split);
}

KERNEL BOUNDS(128, 2) void matmul_nt_bf16_128x128(bf16* out_bf16, float* out_f32, const bf16* a,
                                                  const bf16* b, const float* bias, float* moments, int m,
                                                  int n, int k, int k_per_split) {
    matmul_nt<Tile128x128>(out_bf16, out_f32, a, b, bias, moments, m, n, k, k_per_split);
}
KERNEL BOUNDS(128, 2) void matmul_nt_bf16_128x64(bf16* out_bf16, float* out_f32, const bf16* a, const bf16* b,
                                                 const float* bias, float* moments, int m, int n, int k,
                                                 int k_per_split) {
    matmul_nt<Tile128x64>(out_bf16, out_f32, a, b, bias, moments, m, n, k, k_per_split);
}
KERNEL BOUNDS(128) void matmul_nt_bf16_64x64(bf16* out_bf16, float* out_f32, const bf16* a, const bf16* b,
                                             const float* bias, float* moments, int m, int n, int k,
                                             int k_per_split) {
    matmul_nt<Tile64x64>(out_bf16, out_f32, a, b, bias, moments, m, n, k, k_per_split);
}
KERNEL BOUNDS(128, 2) void matmul_nn_bf16_128x128(bf16* out_bf16, float* out_f32, const bf16* a,
                                                  const bf16* b, int m, int n, int k, int k_per_split,
                                                  int accumulate) {
    matmul_gradient<Tile128x128, true>(out_bf16, out_f32, a, b, m, n, k, k_per_split, accumulate);
}
KERNEL BOUNDS(128, 2) void matmul_nn_bf16_128x64(bf16* out_bf16, float* out_f32, const bf16* a, const bf16* b,
                                                 int m, int n, int k, int k_per_split, int accumulate) {
    matmul_gradient<Tile128x64, true>(out_bf16, out_f32, a, b, m, n, k, k_per_split, accumulate);
}
KERNEL BOUNDS(128) void matmul_nn_bf16_64x64(bf16* out_bf16, float* out_f32, const bf16* a, const bf16* b,
                                             int m, int n, int k, int k_per_split, int accumulate) {
    matmul_gradient<Tile64x64, true>(out_bf16, out_f32, a, b, m, n, k, k_per_split, accumulate);
}
KERNEL BOUNDS(128, 2) void matmul_tn_bf16_128x128(bf16* out_bf16, float* out_f32, const bf16* a,
                                                  const bf16* b, int m, int n, int k, int k_per_split,
                                                  int accumulate) {
    matmul_gradient<Tile128x128, false>(out_bf16, out_f32, a, b, m, n, k, k_per_split, accumulate);
}
KERNEL BOUNDS(128, 2) void matmul_tn_bf16_64x128(bf16* out_bf16, float* out_f32, const bf16* a, const bf16* b,
                                                 int m, int n, int k, int k_per_split, int accumulate) {
    matmul_gradient<Tile64x128, false>(out_bf16, out_f32, a, b, m, n, k, k_per_split, accumulate);
}
KERNEL BOUNDS(128) void matmul_tn_bf16_64x64(bf16* out_bf16, float* out_f32, const bf16* a, const bf16* b,
                                             int m, int n, int k, int k_per_split, int accumulate) {
    matmul_gradient<Tile64x64, false>(out_bf16, out_f32, a, b, m, n, k, k_per_split, accumulate);
}

template <bool A_K_MAJOR, bool B_K_MAJOR>
__device__ __forceinline__ void matmul_f32(float* c, const float* a, const float* b, const float* bias, int m,
                                           int n, int k, int k_per_split, bool accumulate) {
    KSplit split(k, k_per_split);
    MatrixSource<float> source_a(a, A_K_MAJOR ? m : k, A_K_MAJOR ? k : m),
        source_b(b, B_K_MAJOR ? n : k, B_K_MAJOR ? k : n);
    c += int64_t{blockIdx.z} * m * n;
    TileF32::gemm<A_K_MAJOR, B_K_MAJOR>(source_a, source_b, m, n, split.begin, split.end, bias, accumulate,
                                        [&](int i) { return c + int64_t{i} * n; });
}

KERNEL BOUNDS(256) void matmul_nt_f32(float* c, const float* a, const float* b, const float* bias, int m,
                                      int n, int k, int k_per_split) {
    matmul_f32<true, true>(c, a, b, bias, m, n, k, k_per_split, /*accumulate=*/false);
}
KERNEL BOUNDS(256) void matmul_nn_f32(float* c, const float* a, const float* b, int m, int n, int k,
                                      int k_per_split, int accumulate) {
    matmul_f32<true, false>(c, a, b, /*bias=*/nullptr, m, n, k, k_per_split, accumulate);
}
KERNEL BOUNDS(256) void matmul_tn_f32(float* c, const float* a, const float* b, int m, int n, int k,
                                      int k_per_split, int accumulate) {
    matmul_f32<false, false>(c, a, b, /*bias=*/nullptr, m, n, k, k_per_split, accumulate);
}

constexpr int REDUCE_THREADS = 512;

/// y [n] = the sum of partial [splits, n], plus what y holds if `accumulate`. threadIdx.x is an element,
/// threadIdx.y a run of splits: a small matrix has few elements and up to 128 splits, which one thread would
/// wait for eight at a time. The splits of a run are added in order, then the runs.
template <typename T>
__device__ __forceinline__ void split_k_reduce(T* y, const float* partial, int splits, int64_t n,
                                               bool accumulate) {
    __shared__ float sums[REDUCE_THREADS];
    const int runs = blockDim.y, run = (splits + runs - 1) / runs, begin = threadIdx.y * run,
              end = begin + run < splits ? begin + run : splits;
    const int64_t step = int64_t{gridDim.x} * blockDim.x;
    // All threads of a block go round equally often, for the barriers.
    for (int64_t first = int64_t{blockIdx.x} * blockDim.x; first < n; first += step) {
        const int64_t i = first + threadIdx.x;
        float sum = 0.0f;
        if (i < n) {
            if (accumulate && threadIdx.y == 0) sum = to_float(y[i]);
#pragma unroll 8
            for (int s = begin; s < end; s++) sum += partial[s * n + i];
        }
        if (runs > 1) {
            __syncthreads();  // the sums of the last round have been read
            sums[threadIdx.y * blockDim.x + threadIdx.x] = sum;
            __syncthreads();
            for (int other = 1; threadIdx.y == 0 && other < runs; other++)
                sum += sums[other * blockDim.x + threadIdx.x];
        }
        if (i < n && threadIdx.y == 0) y[i] = from_float<T>(sum);
    }
}

KERNEL BOUNDS(REDUCE_THREADS) void split_k_reduce_f32(float* y, const float* partial, int splits, int64_t n,
                                                      int accumulate) {
    split_k_reduce(y, partial, splits, n, accumulate);
}
KERNEL BOUNDS(REDUCE_THREADS) void split_k_reduce_bf16(bf16* y, const float* partial, int splits, int64_t n,
                                                       int accumulate) {
    split_k_reduce(y, partial, splits, n, accumulate);
}
