//! A case: one primitive at one size, and how it is run.

use std::fmt;
use std::sync::Arc;

use crate::arena::{Arena, Init, Layout, Param, SlotKind};
use crate::device::Device;
use crate::error::Result;
use crate::ops;
use crate::tape::{self, Tape, Var};
use crate::tensor::Tensor;

use super::seeded;

/// What builds a primitive's output from its differentiated inputs.
pub type Build = Box<dyn for<'t> Fn(&'t Tape<'t>, &[Var<'t>]) -> Var<'t> + Sync>;

/// A differentiated input.
#[derive(Debug)]
pub struct Input {
    /// Its name in the primitive's documentation.
    pub name: &'static str,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Decides its type on a device that multiplies in bf16.
    pub kind: SlotKind,
    /// f32 values, the same on every device.
    pub values: Vec<f64>,
    /// What finite differences step by; 0 where they have no meaning.
    pub step: f64,
}

/// One row of the table.
pub struct Case {
    /// The row as it stands in `cases.txt`; goldens have this name.
    pub name: String,
    /// Its differentiated inputs.
    pub inputs: Vec<Input>,
    /// Multiplies the tolerance in f32; `cases.txt` says why.
    pub loose: f64,
    /// Inputs and the weights of the loss are bf16 numbers where a GPU holds them as such.
    pub rounded: bool,
    /// The primitive.
    pub build: Build,
}

impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// How an input reaches the primitive, which decides how its gradient is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// As a parameter: gradients add to the arena's zeros.
    Param,
    /// Through an operation: the first gradient overwrites.
    Node,
    /// Through an operation and used twice, each half of the loss: the second gradient adds to the first.
    Twice,
}

/// All routes.
pub const ROUTES: [Route; 3] = [Route::Param, Route::Node, Route::Twice];

/// What a run gave.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// The loss.
    pub loss: f64,
    /// The primitive's value.
    pub output: Vec<f64>,
    /// One for each input.
    pub gradients: Vec<Vec<f64>>,
}

impl Outcome {
    /// Output and gradients by name, in order.
    pub fn parts<'a>(&'a self, case: &'a Case) -> impl Iterator<Item = (String, &'a [f64])> {
        let names = case.inputs.iter().map(|input| format!("d{}", input.name));
        let all = std::iter::once(&self.output).chain(&self.gradients);
        std::iter::once("y".to_owned()).chain(names).zip(all.map(Vec::as_slice))
    }
}

/// The nearest bf16 number.
fn round(value: &mut f64) {
    *value = half::bf16::from_f64(*value).to_f64();
}

impl Case {
    /// The primitive's name.
    pub fn primitive(&self) -> &str {
        self.name.split(' ').next().unwrap_or_default()
    }

    /// The case on inputs that bf16 holds exactly, so that what is compared is the primitive and not its inputs.
    pub fn rounded(mut self) -> Self {
        self.rounded = true;
        for input in self.inputs.iter_mut().filter(|input| input.kind == SlotKind::Matrix) {
            input.values.iter_mut().for_each(round);
        }
        self
    }

    /// An arena with a slot for each input, its values as given, and the handles on them.
    pub fn arena(&self, device: &Device) -> (Arena, Vec<Param>) {
        let mut layout = Layout::new();
        let params = self.inputs.iter().map(|input| {
            let init = Init::Constant(0.0);
            layout.param(input.name, input.shape.as_slice(), input.kind, init)
        });
        let params = params.collect();
        let mut arena = Arena::new(&Arc::new(layout), device, 0);
        for (slot, input) in self.inputs.iter().enumerate() {
            write_slot(&mut arena, slot, &input.values);
        }
        (arena, params)
    }

    /// Forward and backward of `dot(y, w)`, `w` seeded.
    ///
    /// # Panics
    /// If the device fails.
    pub fn run(&self, device: &Device, route: Route) -> Outcome {
        self.run_with(device, route, &|y| y)
    }

    /// [`Case::run`] with something done to the output: for wrong variants.
    pub fn run_with(
        &self,
        device: &Device,
        route: Route,
        change: &dyn for<'t> Fn(Var<'t>) -> Var<'t>,
    ) -> Outcome {
        self.try_run_with(device, route, change).unwrap_or_else(|e| panic!("{self:?}: {e}"))
    }

    /// [`Case::run`] that returns the failure of a device.
    ///
    /// # Errors
    /// If the device fails.
    pub fn try_run(&self, device: &Device, route: Route) -> Result<Outcome> {
        self.try_run_with(device, route, &|y| y)
    }

    fn try_run_with(
        &self,
        device: &Device,
        route: Route,
        change: &dyn for<'t> Fn(Var<'t>) -> Var<'t>,
    ) -> Result<Outcome> {
        let (mut arena, params) = self.arena(device);
        let mut output = Vec::new();
        let loss = tape::step(&mut arena, |tape| {
            let vars: Vec<Var<'_>> = params.iter().map(|&p| tape.param(p)).collect();
            let vars = match route {
                Route::Param => vars,
                Route::Node | Route::Twice => vars.iter().map(|v| ops::scale(v, 1.0)).collect(),
            };
            let y = change((self.build)(tape, &vars));
            output = y.value().to_f64();
            let first = self.dot(&y);
            match route {
                Route::Twice => ops::mean_of(&[first, self.dot(&(self.build)(tape, &vars))]),
                _ => first,
            }
        });
        let loss = loss?.scalar();
        let gradients = params.iter().map(|&p| arena.gradient(p).to_f64()).collect();
        device.check()?;
        Ok(Outcome { loss, output, gradients })
    }

    /// The loss alone.
    ///
    /// # Panics
    /// If the device fails.
    pub fn loss(&self, arena: &mut Arena, params: &[Param]) -> f64 {
        let loss = tape::forward(arena, |tape| {
            let vars: Vec<Var<'_>> = params.iter().map(|&p| tape.param(p)).collect();
            self.dot(&(self.build)(tape, &vars))
        });
        loss.unwrap_or_else(|e| panic!("{self:?}: {e}")).scalar()
    }

    fn dot<'t>(&self, y: &Var<'t>) -> Var<'t> {
        let seed = seeded::seed(&format!("{}|w", self.name));
        let mut weights = seeded::unit(seed, y.value().len());
        if self.rounded {
            weights.iter_mut().for_each(round);
        }
        dot(y, &weights)
    }
}

/// Writes the values of a slot, in the arena's own type.
///
/// # Panics
/// If the slot has another number of elements.
pub fn write_slot(arena: &mut Arena, slot: usize, values: &[f64]) {
    let slot = arena.layout().params()[slot].clone();
    assert_eq!(slot.shape.elements(), values.len(), "slot {}", slot.name);
    let tensor = arena.values_mut();
    write(tensor, slot.offset, values);
}

/// Writes into a float tensor from element `offset` on.
pub fn write(tensor: &mut Tensor, offset: usize, values: &[f64]) {
    tensor.view_mut().slice(offset, [values.len()].into()).write_f64(values);
}

/// `Σ w y`, summed in f64, of any shape: an operation made outside the crate.
pub fn dot<'t>(y: &Var<'t>, weights: &[f64]) -> Var<'t> {
    let device = y.tape().device();
    let w = Tensor::from_f64(device, *y.shape(), weights);
    let sum = y.value().to_f64().iter().zip(weights).map(|(y, w)| y * w).sum::<f64>();
    let id = y.id();
    y.tape().record("dot", Tensor::from_f64(device, [], &[sum]), &[y], move |dy, gradients| {
        let scale = dy.scalar();
        let scaled: Vec<f64> = w.to_f64().iter().map(|w| w * scale).collect();
        gradients.add(id, Tensor::from_f64(w.device(), *w.shape(), &scaled));
    })
}
