//! Input pixels of a band of rows, rearranged so that the tile kernels meet them at constant
//! distances.
//!
//! Layout `[c/block][row][column phase][column][image][pitch]`, of which the first `block` floats
//! are channels. Rows and columns that one filter tap meets at successive outputs are neighbours:
//! with stride `t` there are `min(t, taps)` phases, and tap `i` is phase `i % t`, place `i / t`.
//! Columns outside the image are zeros. Rows outside it stay unwritten: whoever reads a slab skips
//! their taps. Channels that a block does not have may hold anything.

/// The extent of a slab; [`Slab::pack`] fills one.
#[derive(Clone, Copy, Debug)]
pub struct Slab {
    /// Channels taken, and channels of a pixel of the tensor.
    pub c: usize,
    pub of: usize,
    /// Channels in a block, and floats from a pixel to the next, at least as many: 4, 8, 16 or 32.
    pub block: usize,
    pub pitch: usize,
    pub images: usize,
    /// Filter taps down and across; none make an empty slab.
    pub r: usize,
    pub s: usize,
    pub stride_y: usize,
    pub stride_x: usize,
    pub pad_y: isize,
    pub pad_x: isize,
    /// Outputs that the band computes per image, down and across.
    pub band: usize,
    pub q: usize,
}

impl Slab {
    fn row_phases(&self) -> usize {
        self.stride_y.min(self.r)
    }

    /// Column phases times places, and places of one phase.
    fn columns(&self) -> (usize, usize) {
        let places = if self.s == 0 { 0 } else { self.q + (self.s - 1) / self.stride_x };
        (self.stride_x.min(self.s) * places, places)
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

    /// Floats from the row of one tap to that of the next.
    pub fn row_len(&self) -> usize {
        self.columns().0 * self.column_len()
    }

    /// Floats from the first row of one output row to that of the next.
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

    /// Fills `slab` from the first `self.images` images of `x` `[_, h, w, c]`, for outputs from row
    /// `first` on.
    pub fn pack(&self, slab: &mut [f32], x: &[f32], h: usize, w: usize, first: usize) {
        let (row_len, block_len) = (self.row_len(), self.block_len());
        let places = self.columns().1;
        let slab = &mut slab[..self.len()];
        for row in 0..self.rows() {
            let (place, phase) = (row / self.row_phases(), row % self.row_phases());
            let y = ((first + place) * self.stride_y + phase) as isize - self.pad_y;
            if !(0..h as isize).contains(&y) {
                continue;
            }
            let x_row = &x[y as usize * w * self.of..];
            for phase in 0..self.stride_x.min(self.s) {
                // the column of place i is i * stride + phase - pad: inside for left <= i < right
                let before = self.pad_x - phase as isize;
                let places_up_to = |column: isize| {
                    let stride = self.stride_x as isize;
                    (column + stride - 1).div_euclid(stride).clamp(0, places as isize) as usize
                };
                let left = places_up_to(before);
                let right = places_up_to(w as isize + before).max(left);
                let start = row * row_len + phase * self.phase_len();
                let column_len = self.column_len();
                self.zero(&mut slab[start..], 0..left * self.images, block_len);
                self.zero(&mut slab[start..], right * self.images..places * self.images, block_len);
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

    /// Zeros for a range of pixels of all blocks, `block_len` apart.
    fn zero(&self, slab: &mut [f32], pixels: std::ops::Range<usize>, block_len: usize) {
        if pixels.is_empty() {
            return;
        }
        let range = pixels.start * self.pitch..pixels.end * self.pitch;
        for block in 0..self.c.div_ceil(self.block) {
            slab[block * block_len..][range.clone()].fill(0.0);
        }
    }

    /// `columns` columns of every image, `stride` columns apart in `x` (which starts at the first;
    /// an image has `image_len` floats), to adjacent pixels of all blocks.
    fn copy(
        &self,
        slab: &mut [f32],
        x: &[f32],
        columns: usize,
        image_len: usize,
        block_len: usize,
    ) {
        if (self.images, self.stride_x) == (1, 1) && self.c == self.pitch && self.of == self.c {
            // a row as it is
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
                    // a length known to the compiler makes a copy a few moves in place of a call:
                    // take what follows the block along
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
