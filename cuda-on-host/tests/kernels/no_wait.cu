// Wrong: the copies are never waited for.
__device__ void copy_4(float* to, const float* from) {
    unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;\n" ::"r"(address), "l"(from) : "memory");
}

__global__ void reverse(float* y, const float* x, int n) {
    extern __shared__ float s[];
    int from = blockIdx.x * 64, i = from + threadIdx.x;
    s[threadIdx.x] = 0.0f;
    __syncthreads();
    if (i < n) copy_4(s + threadIdx.x, x + i);
    asm volatile("cp.async.commit_group;\n" ::: "memory");
    __syncthreads();
    if (i < n) y[i] = s[63 - threadIdx.x];
}

__global__ void naive_reverse(float* y, const float* x, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    int other = i / 64 * 64 + 63 - i % 64;
    if (i < n) y[i] = other < n ? x[other] : 0.0f;
}
