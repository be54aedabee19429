//! Input pixels of a band of rows, rearranged so that the tile kernels read them at constant
//! distances.
//!
//! Layout `[c/block][row][column phase][column][image][pitch]`; the first `block` of `pitch` floats
//! are channels. Rows and columns that one filter tap reads at successive outputs are neighbours:
//! with stride `t` there are `min(t, taps)` phases, and tap `i` has phase `i % t`, index `i / t`.
//! Columns outside the image are zeros. Rows outside the image stay unwritten: readers skip their
//! taps. Padding channels of a block may hold any values.

/// The dimensions of a slab; [`Slab::pack`] fills one.
#[derive(Clone, Copy, Debug)]
pub struct Slab {
    /// Channels packed, and channels of a pixel of the tensor.
    pub c: usize,
    pub of: usize,
    /// Channels per block, and floats from one pixel to the next, at least `block`: 4, 8, 16 or 32.
    pub block: usize,
    pub pitch: usize,
    pub images: usize,
    /// Filter taps down and across; without taps the slab is empty.
    pub r: usize,
    pub s: usize,
    pub stride_y: usize,
    pub stride_x: usize,
    pub pad_y: isize,
    pub pad_x: isize,
    /// Outputs of the band per image, down and across.
    pub band: usize,
    pub q: usize,
}

impl Slab {
    fn row_phases(&self) -> usize {
        self.stride_y.min(self.r)
    }

    /// Columns of all phases, and columns of one phase.
    fn columns(&self) -> (usize, usize) {
        let columns = if self.s == 0 { 0 } else { self.q + (self.s - 1) / self.stride_x };
        (self.stride_x.min(self.s) * columns, columns)
    }

    fn rows(&self) -> usize {
        if self.r == 0 { 0 } else { (self.band + (self.r - 1) / self.stride_y) * self.row_phases() }
    }

    /// Floats from one column to the next of its phase.
    pub fn column_len(&self) -> usize {
        self.images * self.pitch
    }

    /// Floats from one column phase to the next.
    pub fn phase_len(&self) -> usize {
        self.columns().1 * self.column_len()
    }

    /// Floats from the row of one tap to the row of the next.
    pub fn row_len(&self) -> usize {
        self.columns().0 * self.column_len()
    }

    /// Floats from the first input row of one output row to that of the next output row.
    pub fn output_row_len(&self) -> usize {
        self.row_phases() * self.row_len()
    }

    /// Floats from one block of channels to the next.
    pub fn block_len(&self) -> usize {
        self.rows() * self.row_len()
    }

    /// Floats of the whole slab.
    pub fn len(&self) -> usize {
        self.c.div_ceil(self.block) * self.block_len()
    }

    /// Fills `slab` from the first `self.images` images of `x` `[_, h, w, c]`, for output rows from
    /// `first` on.
    pub fn pack(&self, slab: &mut [f32], x: &[f32], h: usize, w: usize, first: usize) {
        let (row_len, block_len) = (self.row_len(), self.block_len());
        let columns = self.columns().1;
        let slab = &mut slab[..self.len()];
        for row in 0..self.rows() {
            let (i, phase) = (row / self.row_phases(), row % self.row_phases());
            let y = ((first + i) * self.stride_y + phase) as isize - self.pad_y;
            if !(0..h as isize).contains(&y) {
                continue;
            }
            let x_row = &x[y as usize * w * self.of..];
            for phase in 0..self.stride_x.min(self.s) {
                // index i of the phase is column i * stride + phase - pad: inside for left <= i < right
                let before = self.pad_x - phase as isize;
                let columns_up_to = |column: isize| {
                    let stride = self.stride_x as isize;
                    (column + stride - 1).div_euclid(stride).clamp(0, columns as isize) as usize
                };
                let left = columns_up_to(before);
                let right = columns_up_to(w as isize + before).max(left);
                let start = row * row_len + phase * self.phase_len();
                let column_len = self.column_len();
                self.zero(&mut slab[start..], 0..left * self.images, block_len);
                self.zero(
                    &mut slab[start..],
                    right * self.images..columns * self.images,
                    block_len,
                );
                if left == right {
                    continue;
                }
                let column = (left * self.stride_x) as isize - before;
                let from = &x_row[column as usize * self.of..];
                let to = &mut slab[start + left * column_len..];
                self.copy(to, from, right - left, h * w * self.of, block_len);
            }
        }
    }

    /// Zeroes a range of pixels in all blocks, which are `block_len` apart.
    fn zero(&self, slab: &mut [f32], pixels: std::ops::Range<usize>, block_len: usize) {
        if pixels.is_empty() {
            return;
        }
        let range = pixels.start * self.pitch..pixels.end * self.pitch;
        for block in 0..self.c.div_ceil(self.block) {
            slab[block * block_len..][range.clone()].fill(0.0);
        }
    }

    /// Copies `columns` columns of every image to adjacent pixels of all blocks. They are `stride`
    /// columns apart in `x`, which starts at the first of them; an image has `image_len` floats.
    fn copy(
        &self,
        slab: &mut [f32],
        x: &[f32],
        columns: usize,
        image_len: usize,
        block_len: usize,
    ) {
        if (self.images, self.stride_x) == (1, 1) && self.c == self.pitch && self.of == self.c {
            // slab and tensor have the same layout
            let len = columns * self.c;
            slab[..len].copy_from_slice(&x[..len]);
            return;
        }
        match self.pitch {
            4 => self.copy_pitched::<4>(slab, x, columns, image_len, block_len),
            8 => self.copy_pitched::<8>(slab, x, columns, image_len, block_len),
            16 => self.copy_pitched::<16>(slab, x, columns, image_len, block_len),
            32 => self.copy_pitched::<32>(slab, x, columns, image_len, block_len),
            pitch => unreachable!("a slab of pitch {pitch}"),
        }
    }

    fn copy_pitched<const PITCH: usize>(
        &self,
        slab: &mut [f32],
        x: &[f32],
        columns: usize,
        image_len: usize,
        block_len: usize,
    ) {
        for image in 0..self.images {
            for column in 0..columns {
                let pixel = image * image_len + column * self.stride_x * self.of;
                let mut start = (column * self.images + image) * PITCH;
                for c in (0..self.c).step_by(self.block) {
                    let from = pixel + c;
                    // a length known at compile time makes the copy a few moves instead of a call;
                    // it may also copy floats that follow the block, into padding
                    if let Some(channels) = x.get(from..from + PITCH) {
                        slab[start..start + PITCH].copy_from_slice(channels);
                    } else {
                        let channels = self.block.min(self.c - c);
                        slab[start..start + channels].copy_from_slice(&x[from..from + channels]);
                    }
                    start += block_len;
                }
            }
        }
    }
}
