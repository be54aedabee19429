// Operands of gemm_tile.cuh that are matrices in memory. Their start and their pitch are multiples of
// ALIGNMENT elements.
#pragma once

#include "gemm_tile.cuh"

/// A K-major operand: a matrix [extent, pitch] whose k is contiguous, columns [k_begin, k_end). The tile has
/// EXTENT of its rows.
template <int EXTENT, int THREADS, int ALIGNMENT = 8>
struct KMajorOperand {
    static constexpr bool K_MAJOR = true;
    using Map = CopyMap<EXTENT, THREADS, ALIGNMENT, true>;

    const int first_chunk = kept(Map::first_chunk());
    const bf16* from;  // this thread's chunk of its first row
    int64_t row_step;  // elements from one of its rows to the next
    int k_left;        // from its chunk to k_end
    int rows_left;     // from its first row to the last that exists

    __device__ __forceinline__ KMajorOperand(const bf16* data, int pitch, int first, int extent, int k_begin,
                                             int k_end) {
        from = data + (int64_t{first} + Map::row(0)) * pitch + k_begin + Map::column();
        row_step = int64_t{Map::ROW_STEP} * pitch;
        k_left = k_end - k_begin - Map::column();
        rows_left = extent - first - Map::row(0);
    }

    __device__ __forceinline__ void copy_async(bf16* smem, bool active) {
        int rows = k_left > 0 ? rows_left : 0;
#pragma unroll
        for (int i = 0; i < Map::COPIES; i++)
            Map::copy_async(smem, first_chunk, i, from + i * row_step, i * Map::ROW_STEP < rows, active);
        from += TILE_K;
        k_left -= TILE_K;
    }
};

/// An MN-major operand: a matrix [k, pitch] whose m or n is contiguous, rows [k_begin, k_end). The tile has
/// EXTENT of its columns.
template <int EXTENT, int THREADS, int ALIGNMENT = 8>
struct MnMajorOperand {
    static constexpr bool K_MAJOR = false;
    using Map = CopyMap<EXTENT, THREADS, ALIGNMENT, false>;

    const int first_chunk = kept(Map::first_chunk());
    const bf16* from;
    int64_t row_step;
    int pitch, k_left;  // from this thread's first row to k_end; 0 if its columns do not exist

    __device__ __forceinline__ MnMajorOperand(const bf16* data, int pitch, int first, int extent, int k_begin,
                                              int k_end)
        : pitch(pitch) {
        from = data + (int64_t{k_begin} + Map::row(0)) * pitch + first + Map::column();
        row_step = int64_t{Map::ROW_STEP} * pitch;
        k_left = first + Map::column() < extent ? k_end - k_begin - Map::row(0) : 0;
    }

    __device__ __forceinline__ void copy_async(bf16* smem, bool active) {
#pragma unroll
        for (int i = 0; i < Map::COPIES; i++)
            Map::copy_async(smem, first_chunk, i, from + i * row_step, i * Map::ROW_STEP < k_left, active);
        from += int64_t{TILE_K} * pitch;
        k_left -= TILE_K;
    }
};
