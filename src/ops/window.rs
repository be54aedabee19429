//! Which pixels and outputs of a convolution or a pooling have anything to do with each other: what its launches read and write.

/// One axis of an image under windows of `taps` pixels, the first of which begins `pad` pixels before the image.
#[derive(Clone, Copy, Debug)]
pub(super) struct Axis {
    /// Pixels of the image.
    pub(super) size: usize,
    pub(super) taps: usize,
    /// Pixels from window to window.
    pub(super) stride: usize,
    pub(super) pad: usize,
    /// Windows; at least one.
    pub(super) outputs: usize,
}

impl Axis {
    /// The pixels that some window covers: a stride longer than the window leaves pixels out, and so does the end of the image.
    pub(super) fn pixels_covered(self) -> usize {
        // The last window that begins before it; those before that one end earlier.
        let last = |at: usize| (at / self.stride).min(self.outputs - 1) * self.stride;
        (self.pad..self.size + self.pad).filter(|&at| at - last(at) < self.taps).count()
    }

    /// The windows that cover some pixel, not only padding.
    pub(super) fn outputs_inside(self) -> usize {
        let end = self.size + self.pad;
        let starts = (0..self.outputs).map(|output| output * self.stride);
        starts.filter(|&start| start < end && start + self.taps > self.pad).count()
    }

    /// The pixels whose phase of the stride has taps.
    pub(super) fn pixels_with_taps(self) -> usize {
        (self.pad..self.size + self.pad).filter(|at| at % self.stride < self.taps).count()
    }

    /// The taps whose phase of the stride has pixels.
    pub(super) fn taps_with_pixels(self) -> usize {
        let phase = |at: usize| at % self.stride;
        let has_pixels =
            |tap: &usize| (self.pad..self.size + self.pad).any(|at| phase(at) == phase(*tap));
        (0..self.taps).filter(has_pixels).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By looking at every pair of a window and a tap.
    #[test]
    fn axes_are_what_their_windows_cover() {
        let mut count = 0;
        for size in 1..9 {
            for (taps, stride, pad) in
                (1..5).flat_map(|t| (1..5).flat_map(move |s| (0..4).map(move |p| (t, s, p))))
            {
                if size + 2 * pad < taps {
                    continue;
                }
                let outputs = (size + 2 * pad - taps) / stride + 1;
                let axis = Axis { size, taps, stride, pad, outputs };
                let (mut pixels, mut inside) = (vec![false; size], vec![false; outputs]);
                for (output, tap) in (0..outputs).flat_map(|o| (0..taps).map(move |t| (o, t))) {
                    let at = (output * stride + tap).checked_sub(pad).filter(|&at| at < size);
                    if let Some(at) = at {
                        (pixels[at], inside[output]) = (true, true);
                    }
                }
                let number = |of: &[bool]| of.iter().filter(|&&is| is).count();
                assert_eq!(axis.pixels_covered(), number(&pixels), "{axis:?}");
                assert_eq!(axis.outputs_inside(), number(&inside), "{axis:?}");
                // Of the data gradient's phases: without an end of the windows.
                let meet = |at: usize, tap: usize| (at + pad) % stride == tap % stride;
                let with_taps = (0..size).filter(|&at| (0..taps).any(|tap| meet(at, tap)));
                assert_eq!(axis.pixels_with_taps(), with_taps.count(), "{axis:?}");
                let with_pixels = (0..taps).filter(|&tap| (0..size).any(|at| meet(at, tap)));
                assert_eq!(axis.taps_with_pixels(), with_pixels.count(), "{axis:?}");
                count += 1;
            }
        }
        assert!(count > 400, "{count}");
    }
}
