// The last step of every loss that is a mean over rows: one block of 256 threads, with an order of summation
// that n alone determines. No dynamic shared memory.
#include "reduce.cuh"

constexpr int THREADS = 256;

/// loss = the mean of row_losses [n], n > 0.
KERNEL BOUNDS(THREADS) void row_losses_mean(float* loss, const float* row_losses, int n) {
    double sum = 0.0;
    for (int i = threadIdx.x; i < n; i += THREADS) sum += row_losses[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *loss = static_cast<float>(sum / n);
}
