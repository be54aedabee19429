// Splits rows into the bf16 terms that similarity.cuh multiplies.
#include "rows.cuh"

/// terms [count, rows, pitch] of x [rows, d]; pitch is d rounded up to a multiple of 8, count 1 to 3. A
/// thread does eight elements.
KERNEL void split_rows(bf16* terms, const float* x, int64_t rows, int d, int pitch, int count) {
    int vectors = pitch / 8;
    for (int64_t i = grid_rank(); i < rows * vectors; i += grid_threads()) {
        int64_t row = i / vectors;
        int j = static_cast<int>(i % vectors) * 8;
        Vector8 rest = load_vector8(x + row * d + j, d - j);
        for (int t = 0; t < count; t++) {
            Vector8 term;
#pragma unroll
            for (int k = 0; k < 8; k++) {
                term.v[k] = to_float(from_float<bf16>(rest.v[k]));
                rest.v[k] -= term.v[k];
            }
            store_vector8(terms + (t * rows + row) * pitch + j, term, 8);
        }
    }
}
