// SGD, LARS and Adam over an entire arena; see src/optim/optimizer.rs and src/optim/adam.rs. One launch for
// SGD and Adam, two for LARS (lars_norms, lars_step).
//
// w, m, g are the arena's values, momentum and gradients, f32, with the same layout; `copy` is the bf16
// working copy of w, which is updated with it, or null. Arithmetic is f64, which gives the same numbers as on
// the CPU; on a data-centre GPU the kernels stay bound by memory.
//
// Slots are divided into chunks of OPTIMIZER_CHUNK = 8192 elements, a block per chunk; a chunk never spans
// two slots. The tables are in device memory and read in every step, so that a captured step sees changes:
//   slots [n, 3]      first element (a multiple of 16), number of elements, first chunk
//   chunks [n]        the slot of each chunk, slot after slot
//   policies [slots]  0: default; 1: no weight decay and no trust ratio; 2: frozen
//   rates [slots]     the slot's own learning rate, or -f for f times `*lr`
// Workspace of LARS: partial [chunks, 3]. Grid: one block of 256 per chunk, or fewer. No dynamic shared
// memory.
#include "rows.cuh"

constexpr int OPTIMIZER_CHUNK = 8192, THREADS = 256;
constexpr int DEFAULT = 0, NO_DECAY = 1, FROZEN = 2;

/// The elements of a chunk, and the policy of its slot.
struct Chunk {
    int slot, policy;
    int64_t begin, end;

    __device__ __forceinline__ Chunk(int chunk, const uint64_t* slots, const int* chunks,
                                     const int* policies) {
        slot = chunks[chunk];
        policy = policies[slot];
        int64_t offset = static_cast<int64_t>(slots[slot * 3]),
                length = static_cast<int64_t>(slots[slot * 3 + 1]);
        int64_t within = (chunk - static_cast<int64_t>(slots[slot * 3 + 2])) * OPTIMIZER_CHUNK;
        begin = offset + within;
        end = offset + (within + OPTIMIZER_CHUNK < length ? within + OPTIMIZER_CHUNK : length);
    }

    /// Calls f(first element, count).
    template <typename F>
    __device__ __forceinline__ void for_vectors(F f) const {
        for (int64_t i = begin + threadIdx.x * 8; i < end; i += THREADS * 8)
            f(i, end - i < 8 ? static_cast<int>(end - i) : 8);
    }
};

/// d = in_lr scale (g + decay w); m = momentum m + d; w -= out_lr m, or with Nesterov w -= out_lr (d +
/// momentum m).
struct Step {
    double scale, decay, momentum, in_lr, out_lr;
    bool nesterov;
};

__device__ __forceinline__ void update(float* w, float* m, bf16* copy, const float* g, const Chunk& at,
                                       const Step& step) {
    double factor = step.in_lr * step.scale;
    at.for_vectors([&](int64_t i, int count) {
        Vector8 weight = load_vector8(w + i, count), old = load_vector8(m + i, count),
                gradient = load_vector8(g + i, count);
#pragma unroll
        for (int k = 0; k < 8; k++) {
            double value = weight.v[k], direction = factor * (gradient.v[k] + step.decay * value);
            double momentum = step.momentum * old.v[k] + direction;
            double change = step.nesterov ? direction + step.momentum * momentum : momentum;
            old.v[k] = static_cast<float>(momentum);
            weight.v[k] = static_cast<float>(value - step.out_lr * change);
        }
        store_vector8(m + i, old, count);
        store_vector8(w + i, weight, count);
        if (copy) store_vector8(copy + i, weight, count);
    });
}

KERNEL BOUNDS(THREADS) void sgd_step(float* w, float* m, bf16* copy, const float* g, const uint64_t* slots,
                                     const int* chunks, const int* policies, const double* rates,
                                     const double* lr, int n_chunks, double momentum, double weight_decay,
                                     int nesterov) {
    for (int chunk = blockIdx.x; chunk < n_chunks; chunk += gridDim.x) {
        Chunk at(chunk, slots, chunks, policies);
        if (at.policy == FROZEN) continue;
        double rate = rates[at.slot] < 0.0 ? -rates[at.slot] * *lr : rates[at.slot];
        double decay = at.policy == NO_DECAY ? 0.0 : weight_decay;
        update(w, m, copy, g, at, {1.0, decay, momentum, 1.0, rate, nesterov != 0});
    }
}

/// partial [chunks, 3]: sums of w², g² and (g + weight_decay w)² over each chunk; not written for chunks
/// whose slot has no trust ratio.
KERNEL BOUNDS(THREADS) void lars_norms(double* partial, const float* w, const float* g, const uint64_t* slots,
                                       const int* chunks, const int* policies, int n_chunks,
                                       double weight_decay) {
    for (int chunk = blockIdx.x; chunk < n_chunks; chunk += gridDim.x) {
        Chunk at(chunk, slots, chunks, policies);
        if (at.policy != DEFAULT) continue;
        double ww = 0.0, gg = 0.0, dd = 0.0;
        at.for_vectors([&](int64_t i, int count) {
            Vector8 weight = load_vector8(w + i, count), gradient = load_vector8(g + i, count);
#pragma unroll
            for (int k = 0; k < 8; k++) {
                double a = weight.v[k], b = gradient.v[k], decayed = b + weight_decay * a;
                ww += a * a, gg += b * b, dd += decayed * decayed;
            }
        });
        ww = block_sum(ww), gg = block_sum(gg), dd = block_sum(dd);
        if (threadIdx.x == 0) {
            double* to = partial + int64_t{chunk} * 3;
            to[0] = ww, to[1] = gg, to[2] = dd;
        }
    }
}

/// Follows lars_norms with the same tables. `sum_of_norms`: the trust ratio divides |w| by |g| + weight_decay
/// |w| + 1e-8, and if |w| or |g| is 0, the gradient is taken as it is, without decay; otherwise it divides by
/// |g + weight_decay w|, and is 1 if that or |w| is 0. `clip`: the ratio is min(ratio / lr, 1).
/// `lr_in_momentum`: m = momentum m + lr (...); w -= m.
KERNEL BOUNDS(THREADS) void lars_step(float* w, float* m, bf16* copy, const float* g, const double* partial,
                                      const uint64_t* slots, const int* chunks, const int* policies,
                                      const double* rates, const double* lr, int n_chunks, double momentum,
                                      double weight_decay, double trust, int sum_of_norms, int clip,
                                      int lr_in_momentum) {
    __shared__ double shared[2];
    for (int chunk = blockIdx.x; chunk < n_chunks; chunk += gridDim.x) {
        Chunk at(chunk, slots, chunks, policies);
        if (at.policy == FROZEN) continue;
        double rate = rates[at.slot] < 0.0 ? -rates[at.slot] * *lr : rates[at.slot], scale = 1.0, decay = 0.0;
        if (at.policy != NO_DECAY) {
            // Every block adds up the slot's chunks again, in the same order: cheaper than a launch in
            // between.
            int64_t first = static_cast<int64_t>(slots[at.slot * 3 + 2]);
            int64_t length = static_cast<int64_t>(slots[at.slot * 3 + 1]);
            int64_t last = first + (length + OPTIMIZER_CHUNK - 1) / OPTIMIZER_CHUNK;
            double ww = 0.0, gg = 0.0, dd = 0.0;
            for (int64_t i = first + threadIdx.x; i < last; i += THREADS)
                ww += partial[i * 3], gg += partial[i * 3 + 1], dd += partial[i * 3 + 2];
            ww = block_sum(ww), gg = block_sum(gg), dd = block_sum(dd);
            if (threadIdx.x == 0) {
                double weight = sqrt(ww), gradient = sqrt(gg), decayed = sqrt(dd), ratio = 1.0;
                bool has_ratio = weight > 0.0 && (sum_of_norms ? gradient : decayed) > 0.0;
                if (has_ratio)
                    ratio =
                        trust * weight / (sum_of_norms ? gradient + weight_decay * weight + 1e-8 : decayed);
                if (clip && has_ratio) ratio = ratio / rate < 1.0 ? ratio / rate : 1.0;
                shared[0] = ratio;
                shared[1] = has_ratio || !sum_of_norms ? weight_decay : 0.0;
            }
            __syncthreads();
            scale = shared[0], decay = shared[1];
            __syncthreads();  // before the next chunk overwrites `shared`
        }
        double in_lr = lr_in_momentum ? rate : 1.0, out_lr = lr_in_momentum ? 1.0 : rate;
        update(w, m, copy, g, at, {scale, decay, momentum, in_lr, out_lr, false});
    }
}

/// m and v are Adam's means of gradients and of squares; rate [3]: the learning rate, 1 - beta1^t and
/// 1 - beta2^t. `decoupled`: AdamW's decay, of the weights; otherwise it is part of the gradient.
KERNEL BOUNDS(THREADS) void adam_step(float* w, float* m, float* v, bf16* copy, const float* g,
                                      const uint64_t* slots, const int* chunks, const int* policies,
                                      const double* rates, const double* rate, int n_chunks, double beta1,
                                      double beta2, double eps, double weight_decay, int decoupled) {
    double inverse_root = 1.0 / sqrt(rate[2]);
    for (int chunk = blockIdx.x; chunk < n_chunks; chunk += gridDim.x) {
        Chunk at(chunk, slots, chunks, policies);
        if (at.policy == FROZEN) continue;
        double lr = rates[at.slot] < 0.0 ? -rates[at.slot] * rate[0] : rates[at.slot];
        double decay = at.policy == NO_DECAY ? 0.0 : weight_decay;
        double coupled = decoupled ? 0.0 : decay, kept = decoupled ? 1.0 - lr * decay : 1.0;
        double along = lr / rate[1];
        at.for_vectors([&](int64_t i, int count) {
            Vector8 weight = load_vector8(w + i, count), mean = load_vector8(m + i, count),
                    square = load_vector8(v + i, count), gradient = load_vector8(g + i, count);
#pragma unroll
            for (int k = 0; k < 8; k++) {
                double value = weight.v[k], d = gradient.v[k] + coupled * value;
                double first = beta1 * mean.v[k] + (1.0 - beta1) * d;
                double second = beta2 * square.v[k] + (1.0 - beta2) * d * d;
                mean.v[k] = static_cast<float>(first);
                square.v[k] = static_cast<float>(second);
                double change = along * first / (sqrt(second) * inverse_root + eps);
                weight.v[k] = static_cast<float>(kept * value - change);
            }
            store_vector8(m + i, mean, count);
            store_vector8(v + i, square, count);
            store_vector8(w + i, weight, count);
            if (copy) store_vector8(copy + i, weight, count);
        });
    }
}
