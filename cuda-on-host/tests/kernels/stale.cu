// Wrong: the scale is that of the first launch's input.
__device__ bool known;
__device__ float scale;

__global__ void scaled(float* y, const float* x, int n) {
    if (threadIdx.x == 0 && !known) scale = x[0], known = true;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = scale * x[i];
}

__global__ void naive(float* y, const float* x, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = x[0] * x[i];
}
