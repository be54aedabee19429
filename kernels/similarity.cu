// Rows as the bf16 planes that similarity.cuh multiplies.
#include "rows.cuh"

/// planes [count, rows, pitch] of x [rows, d]; pitch is d rounded up to a multiple of 8, count 1 to 3. A
/// thread does eight elements.
KERNEL void split_rows(bf16* planes, const float* x, int64_t rows, int d, int pitch, int count) {
    int pieces = pitch / 8;
    for (int64_t i = grid_rank(); i < rows * pieces; i += grid_threads()) {
        int64_t row = i / pieces;
        int j = static_cast<int>(i % pieces) * 8;
        Piece left = load_piece(x + row * d + j, d - j);
        for (int p = 0; p < count; p++) {
            Piece plane;
#pragma unroll
            for (int k = 0; k < 8; k++) {
                plane.v[k] = to_float(from_float<bf16>(left.v[k]));
                left.v[k] -= plane.v[k];
            }
            store_piece(planes + (p * rows + row) * pitch + j, plane, 8);
        }
    }
}
