// Views of images of any number of channels, of 8 or 16 bits, in floats: what augment.cu does, three channels at
// a time; see src/data/augment/channels.rs. They agree with the host's up to rounding.
//
// Launch: as in augment.cu; a block makes three channels of a view.
//
// out [n, size, size, padded], the channels beyond the image's zero; views [n groups], ChannelView, the groups of
// a view one after another; gaussian [n, 2 (size / 20) + 1]; pixels, the bytes of all images.
#include "canvas.cuh"
#include "reduce.cuh"

/// A sample between 0 and 255, or between 0 and 65535.
__device__ __forceinline__ float sample(const uint8_t* at, bool wide) {
    return static_cast<float>(wide ? at[0] | at[1] << 8 : at[0]);
}

/// Resamples one pixel; `line` starts at the crop's first pixel, which is `pixel` bytes long.
__device__ __forceinline__ Colour resample(const int* column, const int* row, const uint8_t* line,
                                           int64_t pitch, int pixel, int count, bool wide) {
    Colour sum{};
    int bytes = wide ? 2 : 1;
    line += row[0] * pitch + int64_t{column[0]} * pixel;
    for (int i = 0; i < row[1]; i++, line += pitch) {
        Colour row_sum{};
        const uint8_t* at = line;
        for (int j = 0; j < column[1]; j++, at += pixel) {
            float weight = __int_as_float(column[2 + j]);
            row_sum.r += sample(at, wide) * weight;
            if (count > 1) row_sum.g += sample(at + bytes, wide) * weight;
            if (count > 2) row_sum.b += sample(at + 2 * bytes, wide) * weight;
        }
        float row_weight = __int_as_float(row[2 + i]);
        sum.r += row_sum.r * row_weight;
        sum.g += row_sum.g * row_weight;
        sum.b += row_sum.b * row_weight;
    }
    float most = wide ? 65535.0f : 255.0f;
    return clip(Colour{sum.r / most, sum.g / most, sum.b / most});
}

/// Crops, resamples and flips, tile by tile.
__device__ __forceinline__ void crop(Canvas canvas, int* weights, const ChannelView& channels, int count,
                                     const uint8_t* pixels) {
    const View& view = channels.view;
    bool wide = channels.bits == 16;
    int bytes = wide ? 2 : 1, pixel = channels.channels * bytes;
    int size = canvas.size,
        slot = (2 + max(Axis(view, 0).taps(), Axis(view, 1).taps())) | 1;  // odd: no bank conflicts
    int tile = min(size, WEIGHT_WORDS / (2 * slot));
    int64_t pitch = int64_t{pixel} * view.width;
    const uint8_t* begin =
        pixels + view.pixels + view.top * pitch + int64_t{view.left} * pixel + channels.first * bytes;
    for (int top = 0; top < size; top += tile) {
        for (int left = 0; left < size; left += tile) {
            int width = min(tile, size - left), height = min(tile, size - top);
            for (int i = threadIdx.x; i < width + height; i += blockDim.x) {
                int x = view.flags & FLIP ? size - 1 - left - i : left + i;
                if (i < width) Axis(view, 0).fill(weights + i * slot, x);
                else Axis(view, 1).fill(weights + i * slot, top + i - width);
            }
            __syncthreads();
            for (int i = threadIdx.x; i < width * height; i += blockDim.x) {
                int x = i % width, y = i / width;
                canvas.set((top + y) * size + left + x,
                           resample(weights + x * slot, weights + (width + y) * slot, begin, pitch, pixel,
                                    count, wide));
            }
            __syncthreads();  // before the next tile overwrites the weights, and before other threads read
                              // the pixels
        }
    }
}

/// `at + (x - at) factor` for each channel, clipped.
__device__ __forceinline__ Colour scaled(Colour x, Colour at, const float* factor) {
    return clip(Colour{at.r + (x.r - at.r) * factor[0], at.g + (x.g - at.g) * factor[1],
                       at.b + (x.b - at.b) * factor[2]});
}

/// Runs a program, brightness and contrast for each channel; saturation, hue and grey come only with three.
__device__ __forceinline__ Colour run(Colour x, const ChannelView& channels, unsigned program, Colour mean) {
    for (; program; program >>= 4) {
        const float* b = channels.brightness;
        switch (program & 15) {
            case BRIGHTNESS:
                x = scaled(x, {0.0f, 0.0f, 0.0f}, b);
                break;
            case ADD:
                x = clip(Colour{x.r + b[0], x.g + b[1], x.b + b[2]});
                break;
            case CONTRAST:
                x = scaled(x, mean, channels.contrast);
                break;
            default:
                x = run(x, channels.view, program & 15, mean);
                break;
        }
    }
    return x;
}

/// The channels' means after the operations that precede contrast.
__device__ __forceinline__ Colour mean_of(Canvas canvas, const ChannelView& channels) {
    unsigned program = before_contrast(channels.view.program);
    double r = 0.0, g = 0.0, b = 0.0;
    for (int i = threadIdx.x; i < canvas.count; i += blockDim.x) {
        Colour x;
        canvas.get(x, i);
        x = run(x, channels, program, Colour{});
        r += x.r, g += x.g, b += x.b;
    }
    r = block_sum(r), g = block_sum(g), b = block_sum(b);
    return {static_cast<float>(r / canvas.count), static_cast<float>(g / canvas.count),
            static_cast<float>(b / canvas.count)};
}

/// A number of nearly a normal distribution: the sum of the sixteen bytes of a block of Philox4x32-10
/// (src/device/philox.rs).
__device__ __forceinline__ float normal(const unsigned* key, unsigned pixel, unsigned channel) {
    unsigned k0 = key[0], k1 = key[1], a = pixel, b = channel, c = 0, d = 1;
    for (int round = 0; round < 10; round++) {
        if (round > 0) k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
        uint64_t x = uint64_t{0xD2511F53u} * a, y = uint64_t{0xCD9E8D57u} * c;
        a = static_cast<unsigned>(y >> 32) ^ b ^ k0;
        b = static_cast<unsigned>(y);
        c = static_cast<unsigned>(x >> 32) ^ d ^ k1;
        d = static_cast<unsigned>(x);
    }
    int sum = 0;
    for (int shift = 0; shift < 32; shift += 8)
        sum += static_cast<int>((a >> shift & 255) + (b >> shift & 255) + (c >> shift & 255) + (d >> shift & 255));
    return static_cast<float>(sum - 2040) / 295.60108f;
}

/// Noise, solarise and normalise, the last steps.
__device__ __forceinline__ float finished(float x, const ChannelView& channels, int pixel, int c) {
    const View& view = channels.view;
    if (channels.noise > 0.0f) {
        float drawn = normal(channels.key, static_cast<unsigned>(pixel),
                             static_cast<unsigned>(channels.first + c));
        x = clip(x + channels.noise * drawn);
    }
    if (view.flags & SOLARISE && !(x < view.solarise)) x = 1.0f - x;
    return (x - view.mean[c]) / view.deviation[c];
}

template <typename T>
__device__ __forceinline__ void make(T* out, Canvas canvas, int* weights, const ChannelView& channels,
                                     const uint8_t* pixels, const float* gaussian) {
    const View& view = channels.view;
    int count = min(channels.channels - channels.first, 3);
    crop(canvas, weights, channels, count, pixels);
    Colour mean{};
    if (has_contrast(view.program)) mean = mean_of(canvas, channels);
    for (int i = threadIdx.x; i < canvas.count; i += blockDim.x) {
        Colour x;
        canvas.get(x, i);
        x = run(x, channels, view.program, mean);
        if (channels.dropped == 0) x.r = 0.0f;
        if (channels.dropped == 1) x.g = 0.0f;
        if (channels.dropped == 2) x.b = 0.0f;
        canvas.set(i, x);
    }
    __syncthreads();
    if (view.flags & GAUSSIAN) blur<Colour>(canvas, gaussian);
    bool last = channels.first + 3 >= channels.channels;
    int end = last ? channels.padded - channels.first : 3;
    for (int i = threadIdx.x; i < canvas.count; i += blockDim.x) {
        Colour x;
        canvas.get(x, i);
        T* to = out + int64_t{i} * channels.padded + channels.first;
        to[0] = from_float<T>(finished(x.r, channels, i, 0));
        if (count > 1) to[1] = from_float<T>(finished(x.g, channels, i, 1));
        if (count > 2) to[2] = from_float<T>(finished(x.b, channels, i, 2));
        for (int c = count; c < end; c++) to[c] = from_float<T>(0.0f);
    }
    __syncthreads();  // before the next view overwrites the canvas
}

template <typename T>
__device__ __forceinline__ void augment(T* out, unsigned* scratch, const uint8_t* pixels,
                                        const uint8_t* views, const float* gaussian, int n, int groups,
                                        int size) {
    __shared__ int weights[WEIGHT_WORDS];
    Canvas canvas(scratch, size);
    int taps = 2 * (size / 20) + 1;
    for (int i = blockIdx.x; i < n * groups; i += gridDim.x) {
        const ChannelView& channels = reinterpret_cast<const ChannelView*>(views)[i];
        T* to = out + int64_t{i / groups} * canvas.count * channels.padded;
        make(to, canvas, weights, channels, pixels, gaussian + int64_t{i / groups} * taps);
    }
}

KERNEL BOUNDS(512) void augment_channels_f32(float* out, unsigned* scratch, const uint8_t* pixels,
                                             const uint8_t* views, const float* gaussian, int n, int groups,
                                             int size) {
    augment(out, scratch, pixels, views, gaussian, n, groups, size);
}
KERNEL BOUNDS(512) void augment_channels_bf16(bf16* out, unsigned* scratch, const uint8_t* pixels,
                                              const uint8_t* views, const float* gaussian, int n, int groups,
                                              int size) {
    augment(out, scratch, pixels, views, gaussian, n, groups, size);
}
