//! The operations as sequences of oneDNN's primitives: convolution in its directions, batch norm, pooling, products, softmax and
//! addition.

use std::ptr::{null, null_mut};

use super::super::{Convolution, Direction, Lack, Operand, Peer, Pooling, Prepared, Product};
use super::{
    BACKWARD_DATA, BINARY_ADD, CONVOLUTION_DIRECT, DIFF_DST, DIFF_SRC, DIFF_SRC_1, DIFF_WEIGHTS,
    DIFF_WEIGHTS_LAYOUT, DST, FUSE_ADD_RELU, FUSE_RELU, Interface, Layout, MEAN, OneDnn,
    POOLING_MAX, POOLING_MEAN, Place, SOFTMAX_ACCURATE, SRC, SRC_1, Sequence, TRAINING, VARIANCE,
    WEIGHTS, WEIGHTS_LAYOUT, WORKSPACE, dims,
};

impl Peer for OneDnn {
    fn name(&self) -> &str {
        &self.name
    }

    fn convolution<'a>(
        &'a self,
        d: &Convolution,
        direction: Direction,
        a: Operand<'a>,
        b: Operand<'a>,
    ) -> Prepared<'a> {
        let (a, b) = (a.host(), b.host());
        let mut all = Sequence::new(self);
        let [k, r, s, c] = d.filters;
        let (strides, pad, dilation) = (dims([d.stride; 2]), dims([d.pad; 2]), dims([0; 2]));
        let (x, y) = (all.last(d.x)?, all.last(d.y)?);
        let any = all.layout([k, c, r, s], None)?;
        let filters = all.layout([k, c, r, s], Some([r * s * c, 1, s * c, c]))?;
        // SAFETY: here and below, the functions read layouts and sizes that outlive the call and fill in what `describe` gives
        // them.
        let forward = all.describe(
            "convolution",
            null_mut(),
            |calls, out| unsafe {
                let (x, w, y) = (x.at(), any.at(), y.at());
                let kind = CONVOLUTION_DIRECT;
                (calls.conv_forward)(out, TRAINING, kind, x, w, null(), y, &strides, &pad, &pad)
            },
            |calls, out, engine| unsafe {
                let (x, w, y, kind) = (x.at(), any.at(), y.at(), CONVOLUTION_DIRECT);
                (calls.conv_forward)(
                    out,
                    engine,
                    TRAINING,
                    kind,
                    x,
                    w,
                    null(),
                    y,
                    &strides,
                    &dilation,
                    &pad,
                    &pad,
                    null(),
                )
            },
        )?;
        match direction {
            Direction::Forward => {
                let own = all.chosen(forward, WEIGHTS_LAYOUT);
                let w = all.filters(&filters, &own, b)?;
                let result = all.result(&y);
                all.step(
                    forward,
                    &[(SRC, &x, Place::Input(a)), (WEIGHTS, &own, w), (DST, &y, result)],
                )?;
            }
            Direction::DataGradient => {
                let description = all.describe(
                    "data gradient of a convolution",
                    forward,
                    // SAFETY: as above.
                    |calls, out| unsafe {
                        let (x, w, y, kind) = (x.at(), any.at(), y.at(), CONVOLUTION_DIRECT);
                        (calls.conv_data)(out, kind, x, w, y, &strides, &pad, &pad)
                    },
                    // SAFETY: as above.
                    |calls, out, engine| unsafe {
                        let (x, w, y, kind) = (x.at(), any.at(), y.at(), CONVOLUTION_DIRECT);
                        (calls.conv_data)(
                            out,
                            engine,
                            kind,
                            x,
                            w,
                            y,
                            &strides,
                            &dilation,
                            &pad,
                            &pad,
                            forward,
                            null(),
                        )
                    },
                )?;
                let own = all.chosen(description, WEIGHTS_LAYOUT);
                let w = all.filters(&filters, &own, b)?;
                let result = all.result(&x);
                let dy = Place::Input(a);
                all.step(
                    description,
                    &[(DIFF_DST, &y, dy), (WEIGHTS, &own, w), (DIFF_SRC, &x, result)],
                )?;
            }
            Direction::WeightGradient => {
                let description = all.describe(
                    "weight gradient of a convolution",
                    forward,
                    // SAFETY: as above.
                    |calls, out| unsafe {
                        let (x, w, y, kind) = (x.at(), any.at(), y.at(), CONVOLUTION_DIRECT);
                        (calls.conv_weights)(out, kind, x, w, null(), y, &strides, &pad, &pad)
                    },
                    // SAFETY: as above.
                    |calls, out, engine| unsafe {
                        let (x, w, y, kind) = (x.at(), any.at(), y.at(), CONVOLUTION_DIRECT);
                        (calls.conv_weights)(
                            out,
                            engine,
                            kind,
                            x,
                            w,
                            null(),
                            y,
                            &strides,
                            &dilation,
                            &pad,
                            &pad,
                            forward,
                            null(),
                        )
                    },
                )?;
                let own = all.chosen(description, DIFF_WEIGHTS_LAYOUT);
                let result = all.result(&filters);
                let direct = all.equal(&own, &filters);
                let to = if direct { result } else { Place::Buffer(all.buffer(&own)) };
                let (x_at, dy) = (Place::Input(a), Place::Input(b));
                all.step(
                    description,
                    &[(SRC, &x, x_at), (DIFF_DST, &y, dy), (DIFF_WEIGHTS, &own, to)],
                )?;
                if !direct {
                    all.reorder((&own, to), (&filters, result))?;
                }
            }
        }
        Ok(Box::new(all))
    }

    fn batch_norm<'a>(
        &'a self,
        shape: [usize; 4],
        epsilon: f32,
        x: Operand<'a>,
        residual: Option<Operand<'a>>,
        dy: Option<Operand<'a>>,
    ) -> Prepared<'a> {
        let (x, residual, dy) = (x.host(), residual.map(Operand::host), dy.map(Operand::host));
        let mut all = Sequence::new(self);
        let three = matches!(self.interface, Interface::Three(_));
        let flags = match residual {
            Some(_) if three => FUSE_ADD_RELU,
            Some(_) => return Err(format!("{} has no batch norm with an addition", self.name)),
            None => FUSE_RELU[usize::from(three)],
        };
        let layout = all.last(shape)?;
        let channels = all.layout([shape[3]], Some([1]))?;
        let what = match residual {
            Some(_) => "batch norm with an addition",
            None => "batch norm with a ReLU",
        };
        let at = layout.at();
        let forward = all.describe(
            what,
            null_mut(),
            // SAFETY: the layout outlives the call; so below.
            |calls, out| unsafe { (calls.norm_forward)(out, TRAINING, at, epsilon, flags) },
            // SAFETY: as above.
            |calls, out, engine| unsafe {
                (calls.norm_forward)(out, engine, TRAINING, at, at, epsilon, flags, null())
            },
        )?;
        let [mean, variance] = [(); 2].map(|()| Place::Buffer(all.buffer(&channels)));
        let workspace = all.workspace(forward);
        let y = all.result(&layout);
        let mut arguments = vec![
            (SRC, &layout, Place::Input(x)),
            (DST, &layout, y),
            (MEAN, &channels, mean),
            (VARIANCE, &channels, variance),
        ];
        arguments.extend(workspace.iter().map(|(layout, place)| (WORKSPACE, layout, *place)));
        arguments.extend(residual.map(|other| (SRC_1, &layout, Place::Input(other))));
        all.step(forward, &arguments)?;
        if let Some(dy) = dy {
            let backward = all.describe(
                what,
                forward,
                // SAFETY: as above.
                |calls, out| unsafe {
                    (calls.norm_backward)(out, BACKWARD_DATA, at, at, epsilon, flags)
                },
                // SAFETY: as above.
                |calls, out, engine| unsafe {
                    (calls.norm_backward)(
                        out,
                        engine,
                        BACKWARD_DATA,
                        at,
                        at,
                        at,
                        epsilon,
                        flags,
                        forward,
                        null(),
                    )
                },
            )?;
            let dx = all.result(&layout);
            let mut arguments = vec![
                (SRC, &layout, Place::Input(x)),
                (DIFF_DST, &layout, Place::Input(dy)),
                (MEAN, &channels, mean),
                (VARIANCE, &channels, variance),
                (DIFF_SRC, &layout, dx),
            ];
            arguments.extend(workspace.iter().map(|(layout, place)| (WORKSPACE, layout, *place)));
            if residual.is_some() {
                let other = Place::Buffer(all.buffer(&layout));
                arguments.push((DIFF_SRC_1, &layout, other));
            }
            all.step(backward, &arguments)?;
        }
        Ok(Box::new(all))
    }

    fn pooling<'a>(&'a self, d: &Pooling, x: Operand<'a>, dy: Option<Operand<'a>>) -> Prepared<'a> {
        let (x, dy) = (x.host(), dy.map(Operand::host));
        let mut all = Sequence::new(self);
        let kind = if d.max { POOLING_MAX } else { POOLING_MEAN };
        let (window, strides, dilation) = (dims(d.size), dims([d.stride; 2]), dims([0; 2]));
        let pad = dims([d.pad; 2]);
        // What the last window needs beyond the image.
        let after = dims(
            [1, 2]
                .map(|i| ((d.y[i] - 1) * d.stride + d.size[i - 1]).saturating_sub(d.x[i] + d.pad)),
        );
        let (from, to) = (all.last(d.x)?, all.last(d.y)?);
        let (a, b) = (from.at(), to.at());
        let forward = all.describe(
            "pooling",
            null_mut(),
            // SAFETY: layouts and sizes outlive the call; so below.
            |calls, out| unsafe {
                (calls.pool_forward)(out, TRAINING, kind, a, b, &strides, &window, &pad, &after)
            },
            // SAFETY: as above.
            |calls, out, engine| unsafe {
                (calls.pool_forward)(
                    out,
                    engine,
                    TRAINING,
                    kind,
                    a,
                    b,
                    &strides,
                    &window,
                    &dilation,
                    &pad,
                    &after,
                    null(),
                )
            },
        )?;
        let workspace = all.workspace(forward);
        let y = all.result(&to);
        let mut arguments = vec![(SRC, &from, Place::Input(x)), (DST, &to, y)];
        arguments.extend(workspace.iter().map(|(layout, place)| (WORKSPACE, layout, *place)));
        all.step(forward, &arguments)?;
        if let Some(dy) = dy {
            let backward = all.describe(
                "backward pooling",
                forward,
                // SAFETY: as above.
                |calls, out| unsafe {
                    (calls.pool_backward)(out, kind, a, b, &strides, &window, &pad, &after)
                },
                // SAFETY: as above.
                |calls, out, engine| unsafe {
                    (calls.pool_backward)(
                        out,
                        engine,
                        kind,
                        a,
                        b,
                        &strides,
                        &window,
                        &dilation,
                        &pad,
                        &after,
                        forward,
                        null(),
                    )
                },
            )?;
            let dx = all.result(&from);
            let mut arguments = vec![(DIFF_DST, &to, Place::Input(dy)), (DIFF_SRC, &from, dx)];
            arguments.extend(workspace.iter().map(|(layout, place)| (WORKSPACE, layout, *place)));
            all.step(backward, &arguments)?;
        }
        Ok(Box::new(all))
    }

    fn product<'a>(&'a self, p: &Product, a: Operand<'a>, b: Operand<'a>) -> Prepared<'a> {
        let (a, b) = (a.host(), b.host());
        let mut all = Sequence::new(self);
        let Product { m, n, k, .. } = *p;
        let left = all.layout([m, k], Some(if p.transpose_a { [1, m] } else { [k, 1] }))?;
        let right = all.layout([k, n], Some(if p.transpose_b { [1, k] } else { [n, 1] }))?;
        let to = all.layout([m, n], Some([n, 1]))?;
        let (x, w, y) = (left.at(), right.at(), to.at());
        let description = all.describe(
            "product",
            null_mut(),
            // SAFETY: the layouts outlive the call.
            |calls, out| unsafe { (calls.matmul)(out, x, w, null(), y) },
            // SAFETY: as above.
            |calls, out, engine| unsafe { (calls.matmul)(out, engine, x, w, null(), y, null()) },
        )?;
        let result = all.result(&to);
        let [a, b] = [a, b].map(Place::Input);
        all.step(description, &[(SRC, &left, a), (WEIGHTS, &right, b), (DST, &to, result)])?;
        Ok(Box::new(all))
    }

    fn softmax<'a>(&'a self, rows: usize, columns: usize, x: Operand<'a>) -> Prepared<'a> {
        let x = x.host();
        let mut all = Sequence::new(self);
        let layout = all.layout([rows, columns], Some([columns, 1]))?;
        let at = layout.at();
        let description = all.describe(
            "softmax",
            null_mut(),
            // SAFETY: the layout outlives the call.
            |calls, out| unsafe { (calls.softmax)(out, TRAINING, at, 1) },
            // SAFETY: as above.
            |calls, out, engine| unsafe {
                (calls.softmax)(out, engine, TRAINING, SOFTMAX_ACCURATE, at, at, 1, null())
            },
        )?;
        let result = all.result(&layout);
        all.step(description, &[(SRC, &layout, Place::Input(x)), (DST, &layout, result)])?;
        Ok(Box::new(all))
    }

    fn add<'a>(&'a self, _: [usize; 4], a: Operand<'a>, b: Operand<'a>) -> Prepared<'a> {
        let (a, b) = (a.host(), b.host());
        let mut all = Sequence::new(self);
        let layout = all.layout([a.len()], Some([1]))?;
        let at = layout.at();
        let description = all.describe(
            "addition",
            null_mut(),
            // SAFETY: the layout outlives the call.
            |calls, out| unsafe { (calls.binary)(out, BINARY_ADD, at, at, at) },
            // SAFETY: as above.
            |calls, out, engine| unsafe {
                (calls.binary)(out, engine, BINARY_ADD, at, at, at, null())
            },
        )?;
        let result = all.result(&layout);
        let [a, b] = [a, b].map(Place::Input);
        all.step(description, &[(SRC, &layout, a), (SRC_1, &layout, b), (DST, &layout, result)])?;
        Ok(Box::new(all))
    }
}

impl<'a> Sequence<'a> {
    /// Filters in the library's own layout: those of the caller, or reordered by a step of each run.
    fn filters(
        &mut self,
        ours: &Layout<'_>,
        own: &Layout<'_>,
        w: &'a [f32],
    ) -> std::result::Result<Place<'a>, Lack> {
        if self.equal(ours, own) {
            return Ok(Place::Input(w));
        }
        let to = Place::Buffer(self.buffer(own));
        self.reorder((ours, Place::Input(w)), (own, to))?;
        Ok(to)
    }
}
