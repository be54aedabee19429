// Colour operations: on 8-bit pixels bit-identical to src/data/augment/colour.rs, and on floats in [0, 1]
// like src/data/augment/float.rs.
#pragma once

#include "augment.cuh"

/// A pixel of levels 0 to 255; packed into a word, one byte each, red lowest.
struct Levels {
    int r, g, b;

    __device__ __forceinline__ static Levels of(unsigned word) {
        return {static_cast<int>(word & 255), static_cast<int>(word >> 8 & 255),
                static_cast<int>(word >> 16 & 255)};
    }
    __device__ __forceinline__ unsigned word() const {
        return static_cast<unsigned>(r) | static_cast<unsigned>(g) << 8 | static_cast<unsigned>(b) << 16;
    }
    /// Grey, with ITU-R 601-2 weights in 16 bits.
    __device__ __forceinline__ int luma() const { return (19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16; }
};

/// Truncated and clipped to 8 bits.
__device__ __forceinline__ int clipped(float x) {
    return static_cast<int>(x > 0.0f ? (x < 255.0f ? x : 255.0f) : 0.0f);
}

__device__ __forceinline__ int blend(int from, int to, float factor) {
    float start = static_cast<float>(from);
    return clipped(start + multiply(factor, static_cast<float>(to) - start));
}

__device__ __forceinline__ Levels blend(Levels from, Levels to, float factor) {
    return {blend(from.r, to.r, factor), blend(from.g, to.g, factor), blend(from.b, to.b, factor)};
}

/// Rotates the hue by `by` 255ths of the circle, through Pillow's 8-bit HSV. Mixes f32 and f64 as Pillow
/// does.
__device__ __forceinline__ Levels turned(Levels x, int by) {
    int largest = max(x.r, max(x.g, x.b)), smallest = min(x.r, min(x.g, x.b));
    float range = static_cast<float>(max(largest - smallest, 1));
    float saturation = static_cast<float>(largest - smallest) / static_cast<float>(max(largest, 1));
    double r = static_cast<float>(largest - x.r) / range, g = static_cast<float>(largest - x.g) / range,
           b = static_cast<float>(largest - x.b) / range;
    float sixth = static_cast<float>(x.r == largest ? b - g : x.g == largest ? 2.0 + r - b : 4.0 + g - r);
    double turn = static_cast<double>(sixth) / 6.0 + 1.0;
    float hue = static_cast<float>(turn >= 1.0 ? turn - 1.0 : turn);
    int h = (static_cast<int>(multiply(static_cast<double>(hue), 255.0)) + by) & 255;
    int s = static_cast<int>(multiply(static_cast<double>(saturation), 255.0));

    double place = multiply(static_cast<double>(h), 6.0) / 255.0;
    int sector = static_cast<int>(place);  // 6 at the end of the circle, which is 0 again
    double f = static_cast<float>(place - sector), share = static_cast<float>(s / 255.0), v = largest;
    int p = static_cast<int>(multiply(v, 1.0 - share) + 0.5);
    int q = static_cast<int>(multiply(v, 1.0 - multiply(share, f)) + 0.5);
    int t = static_cast<int>(multiply(v, 1.0 - multiply(share, 1.0 - f)) + 0.5);
    switch (sector) {
        case 1:
            return {q, largest, p};
        case 2:
            return {p, largest, t};
        case 3:
            return {p, q, largest};
        case 4:
            return {t, p, largest};
        case 5:
            return {largest, p, q};
        default:
            return {largest, t, p};
    }
}

/// Runs a program; `mean` is the grey that is the pivot of contrast.
__device__ __forceinline__ Levels run(Levels x, const View& view, unsigned program, int mean) {
    for (; program; program >>= 4) {
        int grey = x.luma();
        switch (program & 15) {
            case BRIGHTNESS:
                x = blend({0, 0, 0}, x, view.brightness);
                break;
            case CONTRAST:
                x = blend({mean, mean, mean}, x, view.contrast);
                break;
            case SATURATION:
                x = blend({grey, grey, grey}, x, view.saturation);
                break;
            case HUE:
                x = turned(x, view.turn);
                break;
            case GREY:
                x = {grey, grey, grey};
                break;
        }
    }
    return x;
}

/// A pixel of floats in [0, 1].
struct Colour {
    float r, g, b;
};

__device__ __forceinline__ float clip(float x) { return __saturatef(x); }
__device__ __forceinline__ Colour clip(Colour x) { return {clip(x.r), clip(x.g), clip(x.b)}; }

/// `at + (x - at) factor`, clipped.
__device__ __forceinline__ Colour scaled(Colour x, Colour at, float factor) {
    return clip(
        Colour{at.r + (x.r - at.r) * factor, at.g + (x.g - at.g) * factor, at.b + (x.b - at.b) * factor});
}

/// One channel of a colour whose hue is `sixth` sixths of the circle: below `value` by a part of the range
/// that its distance on the circle determines.
__device__ __forceinline__ float channel(float offset, float sixth, float value, float range) {
    float k = offset + sixth;
    if (k >= 6.0f) k -= 6.0f;
    return value - range * clip(k < 4.0f - k ? k : 4.0f - k);
}

/// Rotates the hue by `turn` in [-1/2, 1/2] of the circle.
__device__ __forceinline__ Colour turned(Colour x, float turn) {
    float value = fmaxf(x.r, fmaxf(x.g, x.b)), range = value - fminf(x.r, fminf(x.g, x.b));
    float some = range > 0.0f ? range : 1.0f;
    float sixth = x.r == value   ? (x.g - x.b) / some
                  : x.g == value ? 2.0f + (x.b - x.r) / some
                                 : 4.0f + (x.r - x.g) / some;
    sixth += 6.0f * turn;
    if (sixth < 0.0f) sixth += 6.0f;
    else if (sixth >= 6.0f) sixth -= 6.0f;
    return {channel(5.0f, sixth, value, range), channel(3.0f, sixth, value, range),
            channel(1.0f, sixth, value, range)};
}

/// Multiplies the saturation in HSV, and clips it to 1.
__device__ __forceinline__ Colour saturated(Colour x, float factor) {
    float value = fmaxf(x.r, fmaxf(x.g, x.b)), range = value - fminf(x.r, fminf(x.g, x.b));
    float largest = value / (range > 0.0f ? range : 1.0f);
    return scaled(x, {value, value, value}, factor < largest ? factor : largest);
}

/// Runs a program; `mean` holds the channels' means, which are the pivot of contrast.
__device__ __forceinline__ Colour run(Colour x, const View& view, unsigned program, Colour mean) {
    for (; program; program >>= 4) {
        switch (program & 15) {
            case BRIGHTNESS:
                x = scaled(x, {0.0f, 0.0f, 0.0f}, view.brightness);
                break;
            case ADD:
                x = clip(Colour{x.r + view.brightness, x.g + view.brightness, x.b + view.brightness});
                break;
            case CONTRAST:
                x = scaled(x, mean, view.contrast);
                break;
            case SATURATION:
                x = saturated(x, view.saturation);
                break;
            case HUE:
                x = turned(x, view.hue);
                break;
            case GREY:
                x.r = x.g = x.b = clip(0.2989f * x.r + 0.5870f * x.g + 0.1140f * x.b);
                break;
        }
    }
    return x;
}
