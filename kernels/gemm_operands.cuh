// Operands of gemm_tile.cuh that are matrices in memory, of which every line and every start is a multiple of
// RUN elements.
#pragma once

#include "gemm_tile.cuh"

/// A matrix [extent, pitch] of which a tile has EXTENT lines; depth runs along them, over columns [begin,
/// end).
template <int EXTENT, int THREADS, int RUN = 8>
struct Lines {
    static constexpr bool INNER = true;
    using Of = Pieces<EXTENT, THREADS, RUN, true>;

    const bf16* at;  // this thread's piece of its first line
    int64_t step;    // from one of its lines to the next
    int left;        // elements from here to the end of depth
    unsigned lines;  // bit i: its line i exists

    __device__ __forceinline__ Lines(const bf16* data, int pitch, int first, int extent, int begin, int end) {
        at = data + (int64_t{first} + Of::line(0)) * pitch + begin + Of::column();
        step = int64_t{Of::STEP} * pitch;
        left = end - begin - Of::column();
        lines = 0;
#pragma unroll
        for (int i = 0; i < Of::COUNT; i++) lines |= static_cast<unsigned>(first + Of::line(i) < extent) << i;
    }

    __device__ __forceinline__ void issue(bf16* panel) {
        unsigned now = left > 0 ? lines : 0;
#pragma unroll
        for (int i = 0; i < Of::COUNT; i++) Of::copy(panel, i, at + i * step, now >> i & 1);
        at += DEPTH;
        left -= DEPTH;
    }
};

/// A matrix [depth, pitch] of which a tile has EXTENT columns; depth runs across its lines [begin, end).
template <int EXTENT, int THREADS, int RUN = 8>
struct Across {
    static constexpr bool INNER = false;
    using Of = Pieces<EXTENT, THREADS, RUN, false>;

    const bf16* at;
    int64_t step;
    int pitch, left;  // lines from this thread's first to the end of depth; 0 where its column does not exist

    __device__ __forceinline__ Across(const bf16* data, int pitch, int first, int extent, int begin, int end)
        : pitch(pitch) {
        at = data + (int64_t{begin} + Of::line(0)) * pitch + first + Of::column();
        step = int64_t{Of::STEP} * pitch;
        left = first + Of::column() < extent ? end - begin - Of::line(0) : 0;
    }

    __device__ __forceinline__ void issue(bf16* panel) {
#pragma unroll
        for (int i = 0; i < Of::COUNT; i++) Of::copy(panel, i, at + i * step, i * Of::STEP < left);
        at += int64_t{DEPTH} * pitch;
        left -= DEPTH;
    }
};
