// Wrong: the last element is never written where the grid is one thread short of it.
__global__ void copy(float* y, const float* x, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = x[i];
}
