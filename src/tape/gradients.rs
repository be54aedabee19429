//! Where the gradients of a backward pass are summed.

use super::VarId;
use crate::arena::Layout;
use crate::device::Device;
use crate::tensor::{DType, Shape, Tensor, TensorMut};

/// The gradients of a backward pass in progress.
#[derive(Debug)]
pub struct Gradients<'g> {
    pub(super) device: &'g Device,
    pub(super) layout: &'g Layout,
    pub(super) nodes: Vec<Option<Tensor>>,
    /// Shape and dtype of the nodes' values.
    pub(super) values: Vec<(Shape, DType)>,
    pub(super) arena: &'g mut Tensor,
}

impl Gradients<'_> {
    /// The destination for the gradient of `id`, and whether to add to its contents (`true`) or to overwrite unspecified
    /// contents (`false`). `None` if no gradient is wanted. Gradients of parameters have the arena's dtype, others the dtype
    /// of their value.
    ///
    /// # Panics
    /// If `shape` is not the shape of the value, or the value is on another tape.
    #[track_caller]
    pub fn target(&mut self, id: VarId, shape: &Shape) -> Option<(TensorMut<'_>, bool)> {
        match id {
            VarId::Constant => None,
            VarId::Param(param) => {
                self.layout.expect_param(param);
                assert_eq!(param.shape(), shape, "a gradient's shape must be its parameter's");
                Some((self.arena.view_mut().slice(param.offset(), *shape), true))
            }
            VarId::Node(index) => {
                let (of_value, dtype) = self.value(index);
                assert_eq!(&of_value, shape, "a gradient's shape must be its value's");
                let slot = &mut self.nodes[index];
                let accumulate = slot.is_some();
                let tensor = slot.get_or_insert_with(|| Tensor::empty(self.device, dtype, *shape));
                if !tensor.is_unique() {
                    *tensor = tensor.copy(); // an `add` shared it with another value's gradient
                }
                Some((tensor.view_mut(), accumulate))
            }
        }
    }

    /// [`Gradients::target`] for a kernel that writes this dtype. If the gradient has another one (f32 for a parameter), the
    /// target is made in `own`, for the caller to [add](Gradients::add) afterwards.
    #[track_caller]
    pub(crate) fn target_as<'t>(
        &'t mut self,
        id: VarId,
        dtype: DType,
        shape: &Shape,
        own: &'t mut Option<Tensor>,
    ) -> Option<(TensorMut<'t>, bool)> {
        let of_gradient = match id {
            VarId::Constant => return None,
            VarId::Param(_) => self.arena.dtype(),
            VarId::Node(index) => self.value(index).1,
        };
        if dtype == of_gradient {
            return self.target(id, shape);
        }
        let own = own.insert(Tensor::empty(self.device, dtype, *shape));
        Some((own.view_mut(), false))
    }

    /// [`Gradients::target_as`] for a kernel that writes the dtype and shape of `like`.
    #[track_caller]
    pub(crate) fn target_like<'t>(
        &'t mut self,
        id: VarId,
        like: &Tensor,
        own: &'t mut Option<Tensor>,
    ) -> Option<(TensorMut<'t>, bool)> {
        self.target_as(id, like.dtype(), like.shape(), own)
    }

    /// Adds `dx` to the gradient of `id`, in the gradient's dtype. The first one of that dtype is kept without a copy.
    ///
    /// # Panics
    /// If the shape of `dx` is not the shape of the value, `dx` lives on another device, or the value is on another tape.
    #[track_caller]
    pub fn add(&mut self, id: VarId, dx: Tensor) {
        dx.expect_on(self.device, "backward");
        if let VarId::Node(index) = id {
            let (shape, dtype) = self.value(index);
            assert_eq!(&shape, dx.shape(), "a gradient's shape must be its value's");
            if self.nodes[index].is_none() {
                self.nodes[index] = Some(dx.cast(dtype));
                return;
            }
        }
        let device = self.device;
        if let Some((mut target, _)) = self.target(id, dx.shape()) {
            crate::tensor::add_into(device, &mut target, &dx);
        }
    }

    /// Shape and dtype of a node's value.
    #[track_caller]
    fn value(&self, index: usize) -> (Shape, DType) {
        *self.values.get(index).expect("a gradient of a value on another tape")
    }
}
