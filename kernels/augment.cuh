// The parameters of one view of an image, which src/data/augment/view.rs writes, and the weights that
// resample it.
#pragma once

#include "selfsup.cuh"

/// The parameters of a view: `View` of src/data/augment/view.rs, field by field.
struct View {
    int64_t pixels;  // offset of the image's first pixel, in bytes
    int width;       // of the image: a row has 3 width bytes
    int left, top;   // the crop's first column and row
    int crop[2];     // its width and height
    int whole[2];    // width and height of the output for the entire crop
    int first[2];    // its first column and row that this view shows
    unsigned flags;
    unsigned program;  // colour operations, 4 bits each, the first lowest; ends with 0
    float brightness, contrast, saturation, hue;
    int turn;        // hue shift of 8-bit pixels, in 255ths of the circle
    float solarise;  // values from this threshold on are inverted; in levels if pixels are 8-bit
    float mean[3], deviation[3];
    int box;  // the radius of a box, in whole pixels
    unsigned box_weight,
        box_fraction;  // weights of a pixel inside the box, and of the one outside; 2^24 is 1
};
static_assert(sizeof(View) == 112, "as src/data/augment/view.rs has it");

/// Three channels of a view of an image of any channels: `ChannelView` of src/data/augment/view.rs, field by
/// field.
struct ChannelView {
    View view;     // its mean, deviation and colour operations are those of the three channels
    int channels;  // of the image
    int first;     // channel of these
    int bits;      // of a sample: 8, or 16, little-endian
    int padded;    // channels of the output
    float brightness[3], contrast[3];
    int dropped;  // which of the three becomes zero; negative for none
    float noise;  // standard deviation; 0 adds none
    unsigned key[2];
};
static_assert(sizeof(ChannelView) == 168, "as src/data/augment/view.rs has it");

// Flags.
constexpr unsigned FLIP = 1, BICUBIC = 2, ANTIALIAS = 4, FLOAT = 8, SOLARISE = 16, GAUSSIAN = 32, BOX = 64;
// Operations of a program.
constexpr unsigned BRIGHTNESS = 1, CONTRAST = 2, SATURATION = 3, HUE = 4, GREY = 5, ADD = 6;

/// The operations of a program that precede its contrast; none if it has no contrast.
__device__ __forceinline__ unsigned before_contrast(unsigned program) {
    for (int at = 0; program >> at; at += 4)
        if ((program >> at & 15) == CONTRAST) return program & ((1u << at) - 1);
    return 0;
}

__device__ __forceinline__ bool has_contrast(unsigned program) {
    for (; program; program >>= 4)
        if ((program & 15) == CONTRAST) return true;
    return false;
}

// Bit-identical to the host: the compiler must not contract these products into fused multiply-adds.
__device__ __forceinline__ double multiply(double x, double y) { return __dmul_rn(x, y); }
__device__ __forceinline__ float multiply(float x, float y) { return __fmul_rn(x, y); }

/// How one axis of a crop is resampled; `Weights` of src/data/augment/resize.rs.
struct Axis {
    int input, first;
    bool bicubic, floats;
    double scale, stretch, support;

    __device__ __forceinline__ Axis(const View& view, int axis) {
        input = view.crop[axis];
        first = view.first[axis];
        bicubic = view.flags & BICUBIC;
        floats = view.flags & FLOAT;
        scale = static_cast<double>(input) / static_cast<double>(view.whole[axis]);
        stretch = view.flags & ANTIALIAS && scale > 1.0 ? scale : 1.0;
        support = bicubic ? 2.0 * stretch : stretch;
    }

    /// The maximum number of weights of an output pixel.
    __device__ __forceinline__ int taps() const {
        int largest = static_cast<int>(2.0 * support) + 2;
        return largest < input ? largest : input;
    }

    __device__ __forceinline__ double weight(double x) const {
        x = x < 0.0 ? -x : x;
        if (!bicubic) return x < 1.0 ? 1.0 - x : 0.0;
        if (x < 1.0) return multiply(multiply(multiply(1.5, x) - 2.5, x), x) + 1.0;
        if (x < 2.0) return multiply(multiply(multiply(x - 5.0, x) + 8.0, x) - 4.0, -0.5);
        return 0.0;
    }

    /// Writes to `slot` the first input pixel of output pixel `x`, the number of its weights, and the
    /// weights: in fixed point with 22 fractional bits, or as floats.
    __device__ __forceinline__ void fill(int* slot, int x) const {
        double center = multiply(first + x + 0.5, scale), low = center - support + 0.5;
        int from = low > 0.0 ? static_cast<int>(low) : 0;
        int to = static_cast<int>(center + support + 0.5);
        if (to > input) to = input;
        double shrink = 1.0 / stretch, sum = 0.0;
        for (int i = from; i < to; i++) sum += weight(multiply(i - center + 0.5, shrink));
        if (sum == 0.0) sum = 1.0;
        slot[0] = from;
        slot[1] = to - from;
        for (int i = from; i < to; i++) {
            double w = weight(multiply(i - center + 0.5, shrink)) / sum;
            slot[2 + i - from] = floats ? __float_as_int(static_cast<float>(w))
                                        : static_cast<int>(multiply(w, 4194304.0) + (w < 0.0 ? -0.5 : 0.5));
        }
    }
};
