// Changes of colours: of 8-bit pixels as src/data/augment/colour.rs makes them, to the bit, and of floats in
// [0, 1] as src/data/augment/float.rs does.
#pragma once

#include "augment.cuh"

/// A pixel of levels in 0..=255, one byte each in a word, red lowest.
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
    return clipped(start + times(factor, static_cast<float>(to) - start));
}

__device__ __forceinline__ Levels blend(Levels from, Levels to, float factor) {
    return {blend(from.r, to.r, factor), blend(from.g, to.g, factor), blend(from.b, to.b, factor)};
}

/// Turns the colour circle by 255ths, through Pillow's 8-bit HSV. f32 and f64 are mixed as there.
__device__ __forceinline__ Levels turned(Levels x, int by) {
    int most = max(x.r, max(x.g, x.b)), least = min(x.r, min(x.g, x.b));
    float range = static_cast<float>(max(most - least, 1));
    float saturation = static_cast<float>(most - least) / static_cast<float>(max(most, 1));
    double r = static_cast<float>(most - x.r) / range, g = static_cast<float>(most - x.g) / range,
           b = static_cast<float>(most - x.b) / range;
    float sixth = static_cast<float>(x.r == most ? b - g : x.g == most ? 2.0 + r - b : 4.0 + g - r);
    double turn = static_cast<double>(sixth) / 6.0 + 1.0;
    float hue = static_cast<float>(turn >= 1.0 ? turn - 1.0 : turn);
    int h = (static_cast<int>(times(static_cast<double>(hue), 255.0)) + by) & 255;
    int s = static_cast<int>(times(static_cast<double>(saturation), 255.0));

    double place = times(static_cast<double>(h), 6.0) / 255.0;
    int sector = static_cast<int>(place);  // 6 at the very end, which is 0 again
    double f = static_cast<float>(place - sector), share = static_cast<float>(s / 255.0), v = most;
    int p = static_cast<int>(times(v, 1.0 - share) + 0.5);
    int q = static_cast<int>(times(v, 1.0 - times(share, f)) + 0.5);
    int t = static_cast<int>(times(v, 1.0 - times(share, 1.0 - f)) + 0.5);
    switch (sector) {
        case 1:
            return {q, most, p};
        case 2:
            return {p, most, t};
        case 3:
            return {p, q, most};
        case 4:
            return {t, p, most};
        case 5:
            return {most, p, q};
        default:
            return {most, t, p};
    }
}

/// Runs a program; `mean` is the grey that contrast scales around.
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

/// A pixel of floats.
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

/// The channel of a colour whose hue is `sixth` of the circle: below its value by the part of the range that
/// its distance on the circle says.
__device__ __forceinline__ float channel(float offset, float sixth, float value, float range) {
    float k = offset + sixth;
    if (k >= 6.0f) k -= 6.0f;
    return value - range * clip(k < 4.0f - k ? k : 4.0f - k);
}

/// Turns the colour circle by `turn` in [-1/2, 1/2].
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

/// Multiplies the saturation, in HSV, which is 1 at most.
__device__ __forceinline__ Colour saturated(Colour x, float factor) {
    float value = fmaxf(x.r, fmaxf(x.g, x.b)), range = value - fminf(x.r, fminf(x.g, x.b));
    float most = value / (range > 0.0f ? range : 1.0f);
    return scaled(x, {value, value, value}, factor < most ? factor : most);
}

/// Runs a program; `mean` holds the channels' means that contrast scales around.
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
