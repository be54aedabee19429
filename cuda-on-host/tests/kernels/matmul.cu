// Right: c = a b through tiles in shared memory.
#include <cuda_runtime.h>
#define TILE 16

extern "C" __global__ void matmul(const float *a, const float *b, float *c, int m, int n, int k)
{
    __shared__ float as[TILE][TILE], bs[TILE][TILE];
    int row = blockIdx.y * TILE + threadIdx.y;
    int column = blockIdx.x * TILE + threadIdx.x;
    float sum = 0.0f;
    for (int from = 0; from < k; from += TILE) {
        as[threadIdx.y][threadIdx.x] = row < m && from + threadIdx.x < k ? a[row * k + from + threadIdx.x] : 0.0f;
        bs[threadIdx.y][threadIdx.x] = column < n && from + threadIdx.y < k ? b[(from + threadIdx.y) * n + column] : 0.0f;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < TILE; i++) sum += as[threadIdx.y][i] * bs[i][threadIdx.x];
        __syncthreads();
    }
    if (row < m && column < n) c[row * n + column] = sum;
}
