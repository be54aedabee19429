//! Batch norm as a layer; and convolution, batch norm, residual and ReLU as one unit.

use crate::arena::{Init, Layout, Param, SlotKind};
use crate::ops::{self, BatchNorm, Moments, Running};
use crate::tape::Var;
use crate::tensor::device_channels;

/// A batch norm's slots, named as torchvision names them.
#[derive(Clone, Copy, Debug)]
pub struct Norm {
    gain: Option<Param>,
    shift: Option<Param>,
    running: Running,
    groups: usize,
}

impl Norm {
    /// Adds the slots of a batch norm of `c` channels under `name`. It normalises `groups` groups of consecutive rows
    /// separately.
    ///
    /// `gain` is the initial scale, `None` for no scale; `shift` says whether there is a shift.
    pub fn new(
        layout: &mut Layout,
        name: &str,
        c: usize,
        gain: Option<f64>,
        shift: bool,
        groups: usize,
    ) -> Self {
        let gain = gain.map(|v| {
            layout.param(format!("{name}.weight"), [c], SlotKind::Gain, Init::Constant(v))
        });
        let shift = shift.then(|| {
            layout.param(format!("{name}.bias"), [c], SlotKind::Shift, Init::Constant(0.0))
        });
        let running = Running {
            mean: layout.stat(format!("{name}.running_mean"), c, SlotKind::RunningMean, 0.0),
            variance: layout.stat(format!("{name}.running_var"), c, SlotKind::RunningVariance, 1.0),
        };
        Self { gain, shift, running, groups }
    }

    /// Normalises `x`, then adds `residual`, then applies a ReLU if `relu`.
    #[track_caller]
    pub fn forward<'t>(&self, x: &Var<'t>, residual: Option<&Var<'t>>, relu: bool) -> Var<'t> {
        self.forward_with_moments(None, x, residual, relu)
    }

    /// [`Norm::forward`] with the moments of `x`, if the operation that made `x` computed them.
    #[track_caller]
    fn forward_with_moments<'t>(
        &self,
        moments: Option<Moments>,
        x: &Var<'t>,
        residual: Option<&Var<'t>>,
        relu: bool,
    ) -> Var<'t> {
        let tape = x.tape();
        let (gain, shift) = (self.gain.map(|p| tape.param(p)), self.shift.map(|p| tape.param(p)));
        ops::batch_norm_by(
            x,
            BatchNorm {
                gain: gain.as_ref(),
                shift: shift.as_ref(),
                residual,
                relu,
                groups: self.groups,
                running: Some(self.running),
            },
            moments,
        )
    }
}

/// Convolution without bias, batch norm, an optional residual, an optional ReLU: the building block of ResNets. In bf16 the
/// convolution's epilogue computes the batch statistics, which saves one read of its output; [`ops::conv2d`] followed by
/// [`Norm::forward`] gives the same result.
#[derive(Clone, Copy, Debug)]
pub struct ConvBn {
    filters: Param,
    stride: usize,
    pad: usize,
    norm: Norm,
}

impl ConvBn {
    /// Adds the slots for `k` filters of `size x size` over `c` channels, padded so that stride 1 keeps the image's size.
    /// `names` are the names of convolution and batch norm; `gain` is the batch norm's initial scale.
    ///
    /// Filters are initialised like torchvision's (`kaiming_normal`, fan out: He et al. 2015): std `sqrt(2 / (k size²))`.
    #[allow(clippy::too_many_arguments)] // each is one property of the layer; a struct would only rename them
    pub fn new(
        layout: &mut Layout,
        names: (&str, &str),
        c: usize,
        k: usize,
        size: usize,
        stride: usize,
        gain: f64,
        groups: usize,
    ) -> Self {
        // A layer over RGB images, which a device pads.
        let device_c = if c == 3 { device_channels(c) } else { c };
        Self::padded(layout, names, [c, device_c], [k, size, stride], gain, groups)
    }

    /// As [`ConvBn::new`] with a gain of 1, over images of `c` channels, which a device pads with zeros
    /// ([`device_channels`]): in files the filters have `c`. `[k, size, stride]` are number and side of the filters, and their step.
    pub fn over_images(
        layout: &mut Layout,
        names: (&str, &str),
        c: usize,
        filters: [usize; 3],
        groups: usize,
    ) -> Self {
        Self::padded(layout, names, [c, device_channels(c)], filters, 1.0, groups)
    }

    fn padded(
        layout: &mut Layout,
        names: (&str, &str),
        [c, device_c]: [usize; 2],
        [k, size, stride]: [usize; 3],
        gain: f64,
        groups: usize,
    ) -> Self {
        let init = Init::Normal((2.0 / (k * size * size) as f64).sqrt());
        let name = format!("{}.weight", names.0);
        let shape = [k, size, size, device_c];
        let filters = layout.padded_param(name, shape, SlotKind::Filter, init, c);
        let norm = Norm::new(layout, names.1, k, Some(gain), true, groups);
        Self { filters, stride, pad: size / 2, norm }
    }

    /// `relu(norm(conv(x)) + residual)`, with residual and ReLU optional.
    #[track_caller]
    pub fn forward<'t>(&self, x: &Var<'t>, residual: Option<&Var<'t>>, relu: bool) -> Var<'t> {
        let tape = x.tape();
        let groups = tape.batch_statistics().then_some(self.norm.groups);
        let (y, moments) =
            ops::conv2d_with_moments(x, &tape.param(self.filters), self.stride, self.pad, groups);
        self.norm.forward_with_moments(moments, &y, residual, relu)
    }
}
