//! The sizes of a convolution, shared by every device.

/// The sizes of a convolution. Output sizes always agree with input, filters, stride and padding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Conv2dDims {
    /// Images.
    pub n: usize,
    /// Input height.
    pub h: usize,
    /// Input width.
    pub w: usize,
    /// Input channels.
    pub c: usize,
    /// Output channels.
    pub k: usize,
    /// Filter height.
    pub r: usize,
    /// Filter width.
    pub s: usize,
    /// Output height.
    pub p: usize,
    /// Output width.
    pub q: usize,
    /// Step of the filter in both directions.
    pub stride: usize,
    /// Zeros around the image, on all four sides.
    pub pad: usize,
}

impl Conv2dDims {
    /// The sizes for an input `[n, h, w, c]` and filters `[k, r, s, c]`.
    ///
    /// # Panics
    /// If the channels differ, `stride` is 0, or the filter is larger than the padded image.
    #[track_caller]
    pub fn new(input: [usize; 4], filters: [usize; 4], stride: usize, pad: usize) -> Self {
        let ([n, h, w, c], [k, r, s, filter_c]) = (input, filters);
        assert_eq!(
            c, filter_c,
            "conv2d: input {input:?} and filters {filters:?} differ in channels"
        );
        assert!(stride > 0, "conv2d: stride 0");
        assert!(
            r > 0 && s > 0 && h + 2 * pad >= r && w + 2 * pad >= s,
            "conv2d: filters {filters:?} do not fit the input {input:?} padded by {pad}"
        );
        let p = (h + 2 * pad - r) / stride + 1;
        let q = (w + 2 * pad - s) / stride + 1;
        Self { n, h, w, c, k, r, s, p, q, stride, pad }
    }
}
