// Mean and sum of squared deviations, and their merge.
#pragma once

#include "selfsup.cuh"

struct Moments {
    float mean, m2;
};

/// The moments of na and nb numbers together (Chan, Golub and LeVeque 1979).
__device__ __forceinline__ Moments merge(Moments a, float na, Moments b, float nb) {
    float n = na + nb;
    if (n == 0.0f) return a;
    float delta = b.mean - a.mean;
    return {a.mean + delta * (nb / n), a.m2 + b.m2 + delta * delta * (na * nb / n)};
}
