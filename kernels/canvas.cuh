// A view in a block's scratch memory, and what is done to it there whatever the images are.
#pragma once

#include "colour.cuh"

/// Words of shared memory for the weights of a tile's columns and rows. Bicubic shrinking by 1,000 takes
/// 4,005 for each.
constexpr int WEIGHT_WORDS = 8192;

/// A block's scratch memory: a view's pixels, as a word each or as one plane per channel, and a plane for the
/// blur.
struct Canvas {
    unsigned *pixels, *blurred;
    int size, count;

    __device__ __forceinline__ Canvas(unsigned* scratch, int size) : size(size), count(size * size) {
        pixels = scratch + int64_t{blockIdx.x} * 4 * count;
        blurred = pixels + 3 * count;
    }
    __device__ __forceinline__ void get(Levels& x, int at) const { x = Levels::of(pixels[at]); }
    __device__ __forceinline__ void get(Colour& x, int at) const {
        x = {channel(x, at, 0), channel(x, at, 1), channel(x, at, 2)};
    }
    __device__ __forceinline__ void set(int at, Levels x) { pixels[at] = x.word(); }
    __device__ __forceinline__ void set(int at, Colour x) {
        pixels[at] = __float_as_uint(x.r);
        pixels[at + count] = __float_as_uint(x.g);
        pixels[at + 2 * count] = __float_as_uint(x.b);
    }
    // One channel as a float; the first argument only selects the type of the pixels.
    __device__ __forceinline__ float channel(Levels, int at, int c) const {
        return static_cast<float>(pixels[at] >> 8 * c & 255);
    }
    __device__ __forceinline__ float channel(Colour, int at, int c) const {
        return __uint_as_float(pixels[at + c * count]);
    }
    __device__ __forceinline__ void set_channel(Levels, int at, int c, float x) {
        unsigned level = static_cast<unsigned>(clipped(x + 0.5f));
        pixels[at] = (pixels[at] & ~(255u << 8 * c)) | level << 8 * c;
    }
    __device__ __forceinline__ void set_channel(Colour, int at, int c, float x) {
        pixels[at + c * count] = __float_as_uint(x);
    }
};

/// The sampled Gaussian, horizontally and then vertically, zeros outside; one channel at a time. Sums are
/// bit-identical to the host's.
template <typename Pixel>
__device__ __forceinline__ void blur(Canvas canvas, const float* weights) {
    int size = canvas.size, radius = size / 20;
    Pixel kind{};
    for (int c = 0; c < 3; c++) {
        for (int i = threadIdx.x; i < canvas.count; i += blockDim.x) {
            int x = i % size, first = max(-radius, -x), last = min(radius, size - 1 - x);
            float sum = 0.0f;
            for (int t = first; t <= last; t++)
                sum += multiply(canvas.channel(kind, i + t, c), weights[radius + t]);
            canvas.blurred[i] = __float_as_uint(sum);
        }
        __syncthreads();
        for (int i = threadIdx.x; i < canvas.count; i += blockDim.x) {
            int y = i / size, first = max(-radius, -y), last = min(radius, size - 1 - y);
            float sum = 0.0f;
            for (int t = first; t <= last; t++)
                sum += multiply(__uint_as_float(canvas.blurred[i + t * size]), weights[radius + t]);
            canvas.set_channel(kind, i, c, sum);
        }
        __syncthreads();
    }
}
