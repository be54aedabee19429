// Views of images: crop and resample, flip, change colours, blur, invert, normalise, in one launch; see
// src/data/augment/cuda.rs. 8-bit pixels are the host's to the bit, normalised ones too; float pixels are to
// rounding.
//
// Launch: blocks of a multiple of 32 threads, 512 at most; as many as there is `scratch` for, each of which
// makes every gridDim.x-th view. No dynamic shared memory. `scratch` has 4 size^2 words for each block.
//
// out [n, size, size, 4], the fourth channel zero; views [n], as augment.cuh has them; gaussian [n, 2 (size /
// 20) + 1], the weights of those views that are blurred so; pixels, the bytes of all images. A crop is at
// most 1,000 times as wide and high as what it is brought to.
#include "colour.cuh"
#include "reduce.cuh"
#include "vector.cuh"

/// Words of shared memory for the weights of a tile's columns and rows. Bicubic shrinking by 1,000 takes
/// 4,005 for each.
constexpr int ROOM = 8192;
/// Half a level of a product with weights of 2^22.
constexpr int HALF = 1 << 21;

/// A block's own memory: a view's pixels, a word each or a plane for each channel, and one more word for
/// each.
struct Canvas {
    unsigned *pixels, *other;
    int size, count;

    __device__ __forceinline__ Canvas(unsigned* scratch, int size) : size(size), count(size * size) {
        pixels = scratch + int64_t{blockIdx.x} * 4 * count;
        other = pixels + 3 * count;
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
    // One channel, as a float, of the kind of pixels that the first argument has.
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

__device__ __forceinline__ int to_8_bits(int sum) { return min(max(sum >> 22, 0), 255); }

/// The sum over a pixel's window: across, rounded to 8 bits, and down. `line` is where the crop begins.
__device__ __forceinline__ void resample(Levels& x, const int* column, const int* row, const uint8_t* line,
                                         int64_t pitch) {
    int r = HALF, g = HALF, b = HALF;
    line += row[0] * pitch + 3 * column[0];
    for (int i = 0; i < row[1]; i++, line += pitch) {
        int across_r = HALF, across_g = HALF, across_b = HALF, down = row[2 + i];
        for (int j = 0; j < column[1]; j++) {
            int weight = column[2 + j];
            across_r += line[3 * j] * weight;
            across_g += line[3 * j + 1] * weight;
            across_b += line[3 * j + 2] * weight;
        }
        r += to_8_bits(across_r) * down;
        g += to_8_bits(across_g) * down;
        b += to_8_bits(across_b) * down;
    }
    x = {to_8_bits(r), to_8_bits(g), to_8_bits(b)};
}
__device__ __forceinline__ void resample(Colour& x, const int* column, const int* row, const uint8_t* line,
                                         int64_t pitch) {
    Colour sum{};
    line += row[0] * pitch + 3 * column[0];
    for (int i = 0; i < row[1]; i++, line += pitch) {
        Colour across{};
        for (int j = 0; j < column[1]; j++) {
            float weight = __int_as_float(column[2 + j]);
            across.r += static_cast<float>(line[3 * j]) * weight;
            across.g += static_cast<float>(line[3 * j + 1]) * weight;
            across.b += static_cast<float>(line[3 * j + 2]) * weight;
        }
        float down = __int_as_float(row[2 + i]);
        sum.r += across.r * down;
        sum.g += across.g * down;
        sum.b += across.b * down;
    }
    x = clip(Colour{sum.r / 255.0f, sum.g / 255.0f, sum.b / 255.0f});
}

/// Crop, resample, flip: tile by tile, the weights of whose columns and rows fit into the ROOM words of
/// shared memory.
template <typename Pixel>
__device__ __forceinline__ void crop(Canvas canvas, int* weights, const View& view, const uint8_t* pixels) {
    int size = canvas.size,
        slot = (2 + max(Axis(view, 0).taps(), Axis(view, 1).taps())) | 1;  // odd: no bank conflicts
    int tile = min(size, ROOM / (2 * slot));
    int64_t pitch = int64_t{3} * view.width;
    const uint8_t* begin = pixels + view.pixels + view.top * pitch + 3 * view.left;
    for (int top = 0; top < size; top += tile) {
        for (int left = 0; left < size; left += tile) {
            int wide = min(tile, size - left), high = min(tile, size - top);
            for (int i = threadIdx.x; i < wide + high; i += blockDim.x) {
                int x = view.flags & FLIP ? size - 1 - left - i : left + i;
                if (i < wide) Axis(view, 0).fill(weights + i * slot, x);
                else Axis(view, 1).fill(weights + i * slot, top + i - wide);
            }
            __syncthreads();
            for (int i = threadIdx.x; i < wide * high; i += blockDim.x) {
                int x = i % wide, y = i / wide;
                Pixel pixel;
                resample(pixel, weights + x * slot, weights + (wide + y) * slot, begin, pitch);
                canvas.set((top + y) * size + left + x, pixel);
            }
            __syncthreads();  // before the next tile's weights, and before others look at the pixels
        }
    }
}

/// What contrast scales around: the mean grey, or each channel's mean, of the pixels as the program's
/// operations before it leave them.
__device__ __forceinline__ int mean_of(Canvas canvas, const View& view, Levels x) {
    unsigned program = before_contrast(view.program), sum = 0;  // of 2^20 levels at most
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

/// The sampled Gaussian, across and then down, zeros outside; a channel at a time. Sums are the host's to the
/// bit.
template <typename Pixel>
__device__ __forceinline__ void blur(Canvas canvas, const float* weights) {
    int size = canvas.size, radius = size / 20;
    Pixel kind{};
    for (int c = 0; c < 3; c++) {
        for (int i = threadIdx.x; i < canvas.count; i += blockDim.x) {
            int x = i % size, first = max(-radius, -x), last = min(radius, size - 1 - x);
            float sum = 0.0f;
            for (int t = first; t <= last; t++)
                sum += times(canvas.channel(kind, i + t, c), weights[radius + t]);
            canvas.other[i] = __float_as_uint(sum);
        }
        __syncthreads();
        for (int i = threadIdx.x; i < canvas.count; i += blockDim.x) {
            int y = i / size, first = max(-radius, -y), last = min(radius, size - 1 - y);
            float sum = 0.0f;
            for (int t = first; t <= last; t++)
                sum += times(__uint_as_float(canvas.other[i + t * size]), weights[radius + t]);
            canvas.set_channel(kind, i, c, sum);
        }
        __syncthreads();
    }
}

/// One of Pillow's box blurs along a line of pixels `step` apart, `rank` of which lie before pixel `i`;
/// borders repeat.
__device__ __forceinline__ void box_blur(unsigned* to, const unsigned* from, int i, int rank, int step,
                                         int size, const View& view) {
    const unsigned* line = from + i - rank * step;
    auto at = [=](int k) { return Levels::of(line[min(max(k, 0), size - 1) * step]); };
    Levels behind = at(rank - view.box - 1), ahead = at(rank + view.box + 1), sum{};
    for (int k = rank - view.box; k <= rank + view.box; k++) {
        Levels x = at(k);
        sum = {sum.r + x.r, sum.g + x.g, sum.b + x.b};
    }
    auto mean = [&view](unsigned inside, unsigned beyond) {
        return static_cast<int>((inside * view.box_weight + beyond * view.box_fraction + (1u << 23)) >> 24);
    };
    to[i] = Levels{mean(sum.r, behind.r + ahead.r), mean(sum.g, behind.g + ahead.g),
                   mean(sum.b, behind.b + ahead.b)}
                .word();
}

/// Pillow's Gaussian blur: three boxes across, three down.
__device__ __forceinline__ void box_blur(Canvas canvas, const View& view) {
    for (int pass = 0; pass < 6; pass++) {
        unsigned *from = pass % 2 ? canvas.other : canvas.pixels,
                 *to = pass % 2 ? canvas.pixels : canvas.other;
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

/// Inverts and normalises what has been blurred, or needed not be.
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

/// One view, by the whole block.
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
    __syncthreads();  // before the next view comes to the canvas
}

template <typename T>
__device__ __forceinline__ void augment(T* out, unsigned* scratch, const uint8_t* pixels,
                                        const uint8_t* views, const float* gaussian, int n, int size) {
    __shared__ int weights[ROOM];
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
