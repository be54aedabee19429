//! The sizes of a convolution, shared by every device.

use crate::device::elements;

/// The sizes of a convolution. Output sizes always agree with input, filters, stride and padding, and image, filters, output
/// and padded image fit into memory: [`Conv2dDims::new`] is the only way to make them, and kernels rely on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Conv2dDims {
    pub(crate) n: usize,
    pub(crate) h: usize,
    pub(crate) w: usize,
    pub(crate) c: usize,
    pub(crate) k: usize,
    pub(crate) r: usize,
    pub(crate) s: usize,
    pub(crate) p: usize,
    pub(crate) q: usize,
    pub(crate) stride: usize,
    pub(crate) pad: usize,
}

/// The most elements of any array of a convolution. Workspaces of the CPU kernels are larger than the arrays by constant
/// factors, which must not overflow.
const MAX_ELEMENTS: usize = 1 << 48;

impl Conv2dDims {
    /// The sizes for an input `[n, h, w, c]` and filters `[k, r, s, c]`.
    ///
    /// # Panics
    /// If the channels differ, `stride` is 0, the filter is larger than the padded image, or memory cannot hold the padded
    /// image or the output.
    #[track_caller]
    pub fn new(input: [usize; 4], filters: [usize; 4], stride: usize, pad: usize) -> Self {
        let ([n, h, w, c], [k, r, s, filter_c]) = (input, filters);
        assert_eq!(
            c, filter_c,
            "conv2d: input {input:?} and filters {filters:?} differ in channels"
        );
        assert!(stride > 0, "conv2d: stride 0");
        let padded = |size: usize| pad.checked_mul(2).and_then(|pad| pad.checked_add(size));
        let (Some(padded_h), Some(padded_w)) = (padded(h), padded(w)) else {
            panic!("conv2d: padding {pad} is too large")
        };
        assert!(
            r > 0 && s > 0 && padded_h >= r && padded_w >= s,
            "conv2d: filters {filters:?} are larger than the input {input:?} padded by {pad}"
        );
        // A larger stride has the same single output in each direction.
        let stride = stride.min(padded_h.max(padded_w));
        let (p, q) = ((padded_h - r) / stride + 1, (padded_w - s) / stride + 1);
        for (what, sizes) in [
            ("padded input", [n, padded_h, padded_w, c]),
            ("filters", filters),
            ("output", [n, p, q, k]),
        ] {
            // The product without empty sizes: partial products must not overflow either.
            let all = elements(&sizes.map(|size| size.max(1)));
            assert!(
                all.is_some_and(|all| all <= MAX_ELEMENTS),
                "conv2d: {what} {sizes:?} has more elements than memory can hold (input {input:?}, padding {pad})"
            );
        }
        Self { n, h, w, c, k, r, s, p, q, stride, pad }
    }

    /// Images.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Input height.
    pub fn h(&self) -> usize {
        self.h
    }

    /// Input width.
    pub fn w(&self) -> usize {
        self.w
    }

    /// Input channels.
    pub fn c(&self) -> usize {
        self.c
    }

    /// Output channels.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Filter height.
    pub fn r(&self) -> usize {
        self.r
    }

    /// Filter width.
    pub fn s(&self) -> usize {
        self.s
    }

    /// Output height.
    pub fn p(&self) -> usize {
        self.p
    }

    /// Output width.
    pub fn q(&self) -> usize {
        self.q
    }

    /// Step of the filter in both directions, at most the size of the padded image.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Zeros around the image, on all four sides.
    pub fn pad(&self) -> usize {
        self.pad
    }

    /// Whether input, filters or output have no elements: all sums are empty then.
    pub(crate) fn is_empty(&self) -> bool {
        [self.n, self.h, self.w, self.c, self.k].contains(&0)
    }

    /// A 1x1 convolution of stride 1 as a GEMM: every pixel becomes an image of one pixel. Others stay as they are.
    pub(super) fn flattened(self) -> Self {
        if (self.r, self.s, self.stride, self.pad) == (1, 1, 1, 0) {
            Self { n: self.n * self.h * self.w, h: 1, w: 1, p: 1, q: 1, ..self }
        } else {
            self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absurd_sizes_are_refused() {
        let refused = |input, filters, stride, pad| {
            let panic = std::panic::catch_unwind(|| Conv2dDims::new(input, filters, stride, pad));
            let message = *panic.unwrap_err().downcast::<String>().unwrap();
            assert!(message.starts_with("conv2d: "), "{message}");
        };
        let filters = [4, 3, 3, 4];
        for pad in [usize::MAX, 1 << 63, 1 << 40, 1 << 24] {
            refused([1, 4, 4, 4], filters, 1, pad);
        }
        refused([1, 1 << 40, 1 << 20, 4], filters, 1, 1);
        refused([1 << 60, 4, 4, 4], filters, 1, 1);
        refused([0, 1 << 40, 1 << 40, 4], filters, 1, 0);
        refused([1, 2, 2, 4], filters, 1, 0);
    }

    #[test]
    fn a_stride_beyond_the_image_is_that_of_the_image() {
        let d = Conv2dDims::new([1, 5, 4, 4], [4, 3, 3, 4], usize::MAX, 1);
        assert_eq!((d.p(), d.q(), d.stride()), (1, 1, 7));
    }
}
