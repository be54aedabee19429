// Views of images: crop and resample, flip, change colours, blur, solarise, normalise, in one launch; see
// src/data/augment/cuda.rs. 8-bit pixels are bit-identical to the host's, after normalisation too; float
// pixels agree up to rounding.
//
// Launch: blocks of a multiple of 32 threads, at most 512; one block per 4 size^2 words of `scratch`, each of
// which makes every gridDim.x-th view. No dynamic shared memory.
//
// out [n, size, size, 4], the fourth channel zero; views [n], as in augment.cuh; gaussian [n, 2 (size / 20) +
// 1], the weights of the views with a Gaussian blur; pixels, the bytes of all images. A crop is at most 1,000
// times as wide and high as its output.
#include "canvas.cuh"
#include "reduce.cuh"
#include "vector.cuh"

/// Half a level in fixed point with 22 fractional bits.
constexpr int HALF = 1 << 21;

__device__ __forceinline__ int to_8_bits(int sum) { return min(max(sum >> 22, 0), 255); }

/// Resamples one pixel: horizontally, rounded to 8 bits, then vertically. `line` starts at the crop's first
/// pixel.
__device__ __forceinline__ void resample(Levels& x, const int* column, const int* row, const uint8_t* line,
                                         int64_t pitch) {
    int r = HALF, g = HALF, b = HALF;
    line += row[0] * pitch + 3 * column[0];
    for (int i = 0; i < row[1]; i++, line += pitch) {
        int row_r = HALF, row_g = HALF, row_b = HALF, row_weight = row[2 + i];
        for (int j = 0; j < column[1]; j++) {
            int weight = column[2 + j];
            row_r += line[3 * j] * weight;
            row_g += line[3 * j + 1] * weight;
            row_b += line[3 * j + 2] * weight;
        }
        r += to_8_bits(row_r) * row_weight;
        g += to_8_bits(row_g) * row_weight;
        b += to_8_bits(row_b) * row_weight;
    }
    x = {to_8_bits(r), to_8_bits(g), to_8_bits(b)};
}
__device__ __forceinline__ void resample(Colour& x, const int* column, const int* row, const uint8_t* line,
                                         int64_t pitch) {
    Colour sum{};
    line += row[0] * pitch + 3 * column[0];
    for (int i = 0; i < row[1]; i++, line += pitch) {
        Colour row_sum{};
        for (int j = 0; j < column[1]; j++) {
            float weight = __int_as_float(column[2 + j]);
            row_sum.r += static_cast<float>(line[3 * j]) * weight;
            row_sum.g += static_cast<float>(line[3 * j + 1]) * weight;
            row_sum.b += static_cast<float>(line[3 * j + 2]) * weight;
        }
        float row_weight = __int_as_float(row[2 + i]);
        sum.r += row_sum.r * row_weight;
        sum.g += row_sum.g * row_weight;
        sum.b += row_sum.b * row_weight;
    }
    x = clip(Colour{sum.r / 255.0f, sum.g / 255.0f, sum.b / 255.0f});
}

/// Crops, resamples and flips, tile by tile: the weights of a tile's columns and rows fit into the
/// WEIGHT_WORDS of shared memory.
template <typename Pixel>
__device__ __forceinline__ void crop(Canvas canvas, int* weights, const View& view, const uint8_t* pixels) {
    int size = canvas.size,
        slot = (2 + max(Axis(view, 0).taps(), Axis(view, 1).taps())) | 1;  // odd: no bank conflicts
    int tile = min(size, WEIGHT_WORDS / (2 * slot));
    int64_t pitch = int64_t{3} * view.width;
    const uint8_t* begin = pixels + view.pixels + view.top * pitch + 3 * view.left;
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
                Pixel pixel;
                resample(pixel, weights + x * slot, weights + (width + y) * slot, begin, pitch);
                canvas.set((top + y) * size + left + x, pixel);
            }
            __syncthreads();  // before the next tile overwrites the weights, and before other threads read
                              // the pixels
        }
    }
}

/// The pivot of contrast: the mean grey, or each channel's mean, of the pixels after the operations that
/// precede it.
__device__ __forceinline__ int mean_of(Canvas canvas, const View& view, Levels x) {
    unsigned program = before_contrast(view.program), sum = 0;  // of at most 2^20 levels
    for (int i = threadIdx.x; i < canvas.count; i += blockDim.x) {
        canvas.get(x, i);
        sum += run(x, view, program, 0).luma();
    }
    return static_cast<int>(static_cast<double>(block_sum(sum)) / canvas.count + 0.5);
}
__device__ __forceinline__ Colour mean_of(Canvas canvas, const View& view, Colour x) {
    unsigned program = before_contrast(view.program);
    double r = 0.0, g = 0.0, b = 0.0;
    for (int i = threadIdx.x; i < canvas.count; i += blockDim.x) {
        canvas.get(x, i);
        x = run(x, view, program, Colour{});
        r += x.r, g += x.g, b += x.b;
    }
    r = block_sum(r), g = block_sum(g), b = block_sum(b);
    return {static_cast<float>(r / canvas.count), static_cast<float>(g / canvas.count),
            static_cast<float>(b / canvas.count)};
}

/// One of Pillow's box blurs along a line of pixels that are `step` apart; pixel `i` is the `rank`-th of its
/// line; borders repeat.
__device__ __forceinline__ void box_blur(unsigned* to, const unsigned* from, int i, int rank, int step,
                                         int size, const View& view) {
    const unsigned* line = from + i - rank * step;
    auto at = [=](int k) { return Levels::of(line[min(max(k, 0), size - 1) * step]); };
    Levels left = at(rank - view.box - 1), right = at(rank + view.box + 1), sum{};
    for (int k = rank - view.box; k <= rank + view.box; k++) {
        Levels x = at(k);
        sum = {sum.r + x.r, sum.g + x.g, sum.b + x.b};
    }
    auto mean = [&view](unsigned inside, unsigned outside) {
        return static_cast<int>((inside * view.box_weight + outside * view.box_fraction + (1u << 23)) >> 24);
    };
    to[i] =
        Levels{mean(sum.r, left.r + right.r), mean(sum.g, left.g + right.g), mean(sum.b, left.b + right.b)}
            .word();
}

/// Pillow's Gaussian blur: three box blurs horizontally, three vertically.
__device__ __forceinline__ void box_blur(Canvas canvas, const View& view) {
    for (int pass = 0; pass < 6; pass++) {
        unsigned *from = pass % 2 ? canvas.blurred : canvas.pixels,
                 *to = pass % 2 ? canvas.pixels : canvas.blurred;
        for (int i = threadIdx.x; i < canvas.count; i += blockDim.x) {
            if (pass < 3) box_blur(to, from, i, i % canvas.size, 1, canvas.size, view);
            else box_blur(to, from, i, i / canvas.size, canvas.size, canvas.size, view);
        }
        __syncthreads();
    }
}

__device__ __forceinline__ void store(float* at, Colour x) {
    *reinterpret_cast<float4*>(at) = make_float4(x.r, x.g, x.b, 0.0f);
}
__device__ __forceinline__ void store(bf16* at, Colour x) {
    *reinterpret_cast<uint2*>(at) = make_uint2(pack(x.r, x.g), pack(x.b, 0.0f));
}

__device__ __forceinline__ Colour normalised(Colour x, const View& view) {
    return {(x.r - view.mean[0]) / view.deviation[0], (x.g - view.mean[1]) / view.deviation[1],
            (x.b - view.mean[2]) / view.deviation[2]};
}

/// Solarises and normalises a pixel, the last step.
__device__ __forceinline__ Colour finished(Levels x, const View& view) {
    auto value = [&view](int v) {
        bool inverted = view.flags & SOLARISE && static_cast<float>(v) >= view.solarise;
        return static_cast<float>(inverted ? 255 - v : v) / 255.0f;
    };
    return normalised({value(x.r), value(x.g), value(x.b)}, view);
}
__device__ __forceinline__ Colour finished(Colour x, const View& view) {
    auto value = [&view](float v) { return view.flags & SOLARISE && !(v < view.solarise) ? 1.0f - v : v; };
    return normalised({value(x.r), value(x.g), value(x.b)}, view);
}

/// Makes one view, with all threads of the block.
template <typename Pixel, typename T>
__device__ __forceinline__ void make(T* out, Canvas canvas, int* weights, const View& view,
                                     const uint8_t* pixels, const float* gaussian) {
    crop<Pixel>(canvas, weights, view, pixels);
    Pixel x{};
    decltype(mean_of(canvas, view, x)) mean{};
    if (has_contrast(view.program)) mean = mean_of(canvas, view, x);
    if (view.flags & (GAUSSIAN | BOX)) {
        for (int i = threadIdx.x; i < canvas.count; i += blockDim.x) {
            canvas.get(x, i);
            canvas.set(i, run(x, view, view.program, mean));
        }
        __syncthreads();
        if (view.flags & GAUSSIAN) blur<Pixel>(canvas, gaussian);
        else box_blur(canvas, view);
        for (int i = threadIdx.x; i < canvas.count; i += blockDim.x) {
            canvas.get(x, i);
            store(out + 4 * i, finished(x, view));
        }
    } else {
        for (int i = threadIdx.x; i < canvas.count; i += blockDim.x) {
            canvas.get(x, i);
            store(out + 4 * i, finished(run(x, view, view.program, mean), view));
        }
    }
    __syncthreads();  // before the next view overwrites the canvas
}

template <typename T>
__device__ __forceinline__ void augment(T* out, unsigned* scratch, const uint8_t* pixels,
                                        const uint8_t* views, const float* gaussian, int n, int size) {
    __shared__ int weights[WEIGHT_WORDS];
    Canvas canvas(scratch, size);
    int taps = 2 * (size / 20) + 1;
    for (int i = blockIdx.x; i < n; i += gridDim.x) {
        const View& view = reinterpret_cast<const View*>(views)[i];
        T* to = out + int64_t{i} * 4 * canvas.count;
        if (view.flags & FLOAT) make<Colour>(to, canvas, weights, view, pixels, gaussian + int64_t{i} * taps);
        else make<Levels>(to, canvas, weights, view, pixels, gaussian + int64_t{i} * taps);
    }
}

KERNEL BOUNDS(512) void augment_f32(float* out, unsigned* scratch, const uint8_t* pixels,
                                    const uint8_t* views, const float* gaussian, int n, int size) {
    augment(out, scratch, pixels, views, gaussian, n, size);
}
KERNEL BOUNDS(512) void augment_bf16(bf16* out, unsigned* scratch, const uint8_t* pixels,
                                     const uint8_t* views, const float* gaussian, int n, int size) {
    augment(out, scratch, pixels, views, gaussian, n, size);
}
