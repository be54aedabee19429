// Vectorized loads and stores of 16 bytes, with element-wise ones where the alignment or the end of a row
// does not allow that.
#pragma once

#include "selfsup.cuh"

/// Elements in 16 bytes.
template <typename T>
constexpr int PER_VECTOR = 16 / static_cast<int>(sizeof(T));

/// The elements of 16 bytes, as f32 in registers.
template <typename T>
struct Vector {
    float v[PER_VECTOR<T>];
};

__device__ __forceinline__ bool is_aligned_16(const void* at) {
    return reinterpret_cast<uintptr_t>(at) % 16 == 0;
}

/// The two floats of a pair of bf16; the lower half comes first in memory.
__device__ __forceinline__ void unpack(float& low, float& high, unsigned pair) {
    low = __uint_as_float(pair << 16);
    high = __uint_as_float(pair & 0xffff0000u);
}

__device__ __forceinline__ unsigned bits_of(bf16 x) { return *reinterpret_cast<const uint16_t*>(&x); }

/// Both rounded to nearest even, by one instruction.
__device__ __forceinline__ unsigned pack(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&pair);
}

__device__ __forceinline__ Vector<bf16> unpack_vector(uint4 q) {
    Vector<bf16> r;
    unpack(r.v[0], r.v[1], q.x);
    unpack(r.v[2], r.v[3], q.y);
    unpack(r.v[4], r.v[5], q.z);
    unpack(r.v[6], r.v[7], q.w);
    return r;
}

/// Loads four f32 or eight bf16 from an address that is a multiple of 16.
__device__ __forceinline__ Vector<float> load_vector(const float* at) {
    float4 q = *reinterpret_cast<const float4*>(at);
    return {{q.x, q.y, q.z, q.w}};
}
__device__ __forceinline__ Vector<bf16> load_vector(const bf16* at) {
    return unpack_vector(*reinterpret_cast<const uint4*>(at));
}

__device__ __forceinline__ void store_vector(float* at, const Vector<float>& r) {
    *reinterpret_cast<float4*>(at) = make_float4(r.v[0], r.v[1], r.v[2], r.v[3]);
}
__device__ __forceinline__ void store_vector(bf16* at, const Vector<bf16>& r) {
    *reinterpret_cast<uint4*>(at) =
        make_uint4(pack(r.v[0], r.v[1]), pack(r.v[2], r.v[3]), pack(r.v[4], r.v[5]), pack(r.v[6], r.v[7]));
}

/// Loads the first `count` elements and fills up with zeros; `count` may exceed the vector. One load of 16
/// bytes if the vector is full and aligned.
template <typename T>
__device__ __forceinline__ Vector<T> load_partial(const T* at, int count) {
    if (count >= PER_VECTOR<T> && is_aligned_16(at)) return load_vector(at);
    Vector<T> r;
#pragma unroll
    for (int i = 0; i < PER_VECTOR<T>; i++) r.v[i] = i < count ? to_float(at[i]) : 0.0f;
    return r;
}

/// Stores the first `count` elements.
template <typename T>
__device__ __forceinline__ void store_partial(T* at, const Vector<T>& r, int count) {
    if (count >= PER_VECTOR<T> && is_aligned_16(at)) return store_vector(at, r);
#pragma unroll
    for (int i = 0; i < PER_VECTOR<T>; i++)
        if (i < count) at[i] = from_float<T>(r.v[i]);
}
