//! The inverse DCT of libjpeg's accurate integer method (`jidctint.c`, after Loeffler, Ligtenberg and Moschytz),
//! to the bit.

/// Bits of the constants' fractions.
const CONST_BITS: u32 = 13;
/// Extra bits that the first pass keeps.
const PASS1_BITS: u32 = 2;

/// A one-dimensional transform of each column, in place, with a rounded shift to the right.
///
/// Sums wrap: coefficients of sound files are far from the limit.
#[allow(clippy::needless_range_loop)] // The loop runs over the columns, which become the lanes of vectors.
#[inline(always)]
fn columns<const SHIFT: u32>(v: &mut [[i32; 8]; 8]) {
    for i in 0..8 {
        let times = |x: i32, factor: i32| x.wrapping_mul(factor);
        let [a, b] = [v[2][i], v[6][i]];
        let z1 = times(a.wrapping_add(b), 4433);
        let t2 = z1.wrapping_sub(times(b, 15137));
        let t3 = z1.wrapping_add(times(a, 6270));
        let t0 = v[0][i].wrapping_add(v[4][i]) << CONST_BITS;
        let t1 = v[0][i].wrapping_sub(v[4][i]) << CONST_BITS;
        let (even0, even3) = (t0.wrapping_add(t3), t0.wrapping_sub(t3));
        let (even1, even2) = (t1.wrapping_add(t2), t1.wrapping_sub(t2));

        let [o0, o1, o2, o3] = [v[7][i], v[5][i], v[3][i], v[1][i]];
        let (z3, z4) = (o0.wrapping_add(o2), o1.wrapping_add(o3));
        let z5 = times(z3.wrapping_add(z4), 9633);
        let z1 = times(o0.wrapping_add(o3), -7373);
        let z2 = times(o1.wrapping_add(o2), -20995);
        let z3 = times(z3, -16069).wrapping_add(z5);
        let z4 = times(z4, -3196).wrapping_add(z5);
        let o0 = times(o0, 2446).wrapping_add(z1).wrapping_add(z3);
        let o1 = times(o1, 16819).wrapping_add(z2).wrapping_add(z4);
        let o2 = times(o2, 25172).wrapping_add(z2).wrapping_add(z3);
        let o3 = times(o3, 12299).wrapping_add(z1).wrapping_add(z4);

        let rounded = |x: i32| x.wrapping_add(1 << (SHIFT - 1)) >> SHIFT;
        v[0][i] = rounded(even0.wrapping_add(o3));
        v[7][i] = rounded(even0.wrapping_sub(o3));
        v[1][i] = rounded(even1.wrapping_add(o2));
        v[6][i] = rounded(even1.wrapping_sub(o2));
        v[2][i] = rounded(even2.wrapping_add(o1));
        v[5][i] = rounded(even2.wrapping_sub(o1));
        v[3][i] = rounded(even3.wrapping_add(o0));
        v[4][i] = rounded(even3.wrapping_sub(o0));
    }
}

/// Written as AVX2's shuffles: the plain double loop becomes 64 scalar loads and stores.
#[inline(always)]
fn transposed(v: &[[i32; 8]; 8]) -> [[i32; 8]; 8] {
    let low = |a: [i32; 8], b: [i32; 8]| [a[0], b[0], a[1], b[1], a[4], b[4], a[5], b[5]];
    let high = |a: [i32; 8], b: [i32; 8]| [a[2], b[2], a[3], b[3], a[6], b[6], a[7], b[7]];
    let t = [
        low(v[0], v[1]),
        high(v[0], v[1]),
        low(v[2], v[3]),
        high(v[2], v[3]),
        low(v[4], v[5]),
        high(v[4], v[5]),
        low(v[6], v[7]),
        high(v[6], v[7]),
    ];
    let low = |a: [i32; 8], b: [i32; 8]| [a[0], a[1], b[0], b[1], a[4], a[5], b[4], b[5]];
    let high = |a: [i32; 8], b: [i32; 8]| [a[2], a[3], b[2], b[3], a[6], a[7], b[6], b[7]];
    let u = [
        low(t[0], t[2]),
        high(t[0], t[2]),
        low(t[1], t[3]),
        high(t[1], t[3]),
        low(t[4], t[6]),
        high(t[4], t[6]),
        low(t[5], t[7]),
        high(t[5], t[7]),
    ];
    let low = |a: [i32; 8], b: [i32; 8]| [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]];
    let high = |a: [i32; 8], b: [i32; 8]| [a[4], a[5], a[6], a[7], b[4], b[5], b[6], b[7]];
    [
        low(u[0], u[4]),
        low(u[1], u[5]),
        low(u[2], u[6]),
        low(u[3], u[7]),
        high(u[0], u[4]),
        high(u[1], u[5]),
        high(u[2], u[6]),
        high(u[3], u[7]),
    ]
}

/// The transposed bytes of eight rows of eight.
#[inline(always)]
fn transposed_bytes(v: &[[u8; 8]; 8]) -> [[u8; 8]; 8] {
    let mut words = v.map(u64::from_le_bytes);
    // Swaps the off-diagonal quarters of blocks of 8, 4 and 2 rows.
    for (apart, mask) in
        [(4, 0x0000_0000_FFFF_FFFF), (2, 0x0000_FFFF_0000_FFFF), (1, 0x00FF_00FF_00FF_00FFu64)]
    {
        for i in (0..8).filter(|i| i & apart == 0) {
            let swapped = (words[i] >> (8 * apart) ^ words[i + apart]) & mask;
            words[i + apart] ^= swapped;
            words[i] ^= swapped << (8 * apart);
        }
    }
    words.map(u64::to_le_bytes)
}

/// Writes the 8 x 8 samples of a block of quantized coefficients to the beginning of `into`, whose rows are `stride`
/// apart.
#[inline(always)]
pub fn idct(coefficients: &[i16; 64], quant: &[i32; 64], into: &mut [u8], stride: usize) {
    let mut v = [[0; 8]; 8];
    for (i, row) in v.iter_mut().enumerate() {
        for (j, place) in row.iter_mut().enumerate() {
            *place = i32::from(coefficients[8 * i + j]).wrapping_mul(quant[8 * i + j]);
        }
    }
    columns::<{ CONST_BITS - PASS1_BITS }>(&mut v);
    v = transposed(&v);
    columns::<{ CONST_BITS + PASS1_BITS + 3 }>(&mut v);
    let bytes = v.map(|row| row.map(|value| value.wrapping_add(128).clamp(0, 255) as u8));
    for (row, values) in transposed_bytes(&bytes).iter().enumerate() {
        let Some(out) = into[row * stride..].first_chunk_mut::<8>() else { return };
        *out = *values;
    }
}

/// As [`idct`] for a block whose only coefficient is the first.
#[inline(always)]
pub fn idct_of_mean(mean: i16, quant: i32, into: &mut [u8], stride: usize) {
    let scaled = i32::from(mean).wrapping_mul(quant) << PASS1_BITS;
    let value = scaled.wrapping_add(1 << (PASS1_BITS + 2)) >> (PASS1_BITS + 3);
    let value = (value.wrapping_add(128)).clamp(0, 255) as u8;
    for row in 0..8 {
        into[row * stride..][..8].fill(value);
    }
}
