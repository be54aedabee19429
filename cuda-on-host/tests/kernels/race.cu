// Wrong: if thread 21 is the first to arrive, thread 0 reads what it writes without a barrier; other orders are sound.
__global__ void ticket(float* y, const float* x) {
    __shared__ unsigned first;
    __shared__ float s[64];
    if (threadIdx.x == 0) first = 0;
    s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    bool is_first = atomicAdd(&first, 1u) == 0;
    if (is_first && threadIdx.x % 8 == 5) s[0] = x[0];
    y[threadIdx.x] = s[threadIdx.x];
}
