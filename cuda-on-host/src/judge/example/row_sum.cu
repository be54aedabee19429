// Right: the sum of each row, one block per row, by shuffles.
__device__ float warp_sum(float x) {
    for (int by = 16; by > 0; by /= 2) x += __shfl_down_sync(0xffffffffu, x, by);
    return x;
}

__global__ void __launch_bounds__(128) row_sum(float* __restrict__ y, const float* __restrict__ x, int columns) {
    __shared__ float partial[4];
    float sum = 0.0f;
    for (int i = threadIdx.x; i < columns; i += blockDim.x) sum += x[blockIdx.x * columns + i];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) y[blockIdx.x] = partial[0] + partial[1] + partial[2] + partial[3];
}
