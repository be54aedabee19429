//! Launches of a kernel at one set of sizes after another, and the comparison of what it wrote with the reference.

use std::path::PathBuf;
use std::time::Duration;

use super::random::Random;
use super::{
    Aspect, Bound, Judge, Operand, Primitives, Sizes, Verdict, decode, encode, evaluate,
    read_values,
};
use crate::device::{Device, Failure, Tensor, Value, said};

/// Launches at sizes, one after another.
pub(super) struct Runner<'j, 'p> {
    pub(super) judge: &'j Judge<'j>,
    pub(super) primitives: Primitives<'p>,
    pub(super) library: PathBuf,
    pub(super) patience: Duration,
    /// Started again after a kernel has ended its process.
    pub(super) device: Option<Device>,
    /// Holds the reference kernel.
    pub(super) other: Option<Device>,
    pub(super) bound: Vec<Bound<'j>>,
    pub(super) verdict: Verdict,
}

impl Runner<'_, '_> {
    /// Launches once with new inputs.
    pub(super) fn launch(&mut self, sizes: &Sizes, seed: u64) -> Result<(), String> {
        self.verdict.launches += 1;
        let launch = self.judge.case.launch.at(sizes, seed)?;
        let mut random = Random::new(seed ^ (self.verdict.launches as u64) << 32);
        let mut inputs = Vec::new();
        for bound in &self.bound {
            inputs.push(self.values(bound, sizes, &mut random)?);
        }
        let mut device = match self.device.take() {
            Some(device) => device,
            None => Device::new(self.judge.host, &self.library, self.patience)?,
        };
        let (tensors, arguments) = self.upload(&mut device, &inputs, sizes).map_err(said)?;
        let name = self.judge.kernel();
        match device.launch(name, &launch, &arguments) {
            Ok(()) => {}
            Err(Failure::Refused(why)) => {
                return Err(format!("`{name}` cannot be launched: {why}"));
            }
            Err(Failure::Violation(what)) => {
                self.verdict.found(Aspect::Safe, what, sizes, seed);
                self.device = Some(device);
                return Ok(());
            }
            // A fault that the process did not survive: the next launch starts another.
            Err(Failure::Died(what)) => {
                self.verdict.found(Aspect::Safe, format!("kernel `{name}` {what}"), sizes, seed);
                return Ok(());
            }
        }
        self.check_results(&mut device, &tensors, &inputs, sizes, seed)?;
        self.device = Some(device);
        Ok(())
    }

    /// What an argument holds before the launch; `None` if that is nothing.
    fn values(
        &self,
        bound: &Bound<'_>,
        sizes: &Sizes,
        random: &mut Random,
    ) -> Result<Option<Vec<f64>>, String> {
        let of = bound.of;
        if !bound.argument.pointer || (of.output && of.values.is_none()) {
            return Ok(None);
        }
        let shape = bound.shape(sizes)?;
        let count = shape.iter().product();
        let how = of.values.as_deref().unwrap_or(if bound.argument.element.is_float() {
            "uniform"
        } else {
            "integers(0, 100)"
        });
        let values = match how {
            "uniform" => (0..count).map(|_| random.uniform()).collect(),
            "normal" => (0..count).map(|_| random.normal()).collect(),
            "zeros" => vec![0.0; count],
            "ones" => vec![1.0; count],
            _ if how.starts_with("integers(") => {
                let list = how["integers(".len()..]
                    .strip_suffix(')')
                    .and_then(|list| list.split_once(','));
                let (from, to) =
                    list.ok_or_else(|| format!("`{how}`: it is `integers(from, to)`"))?;
                let (from, to) = (evaluate(from, sizes)?, evaluate(to, sizes)?);
                if from >= to {
                    return Err(format!("`{how}`: there is no number from {from} to below {to}"));
                }
                (0..count)
                    .map(|_| (from + random.below((to - from) as u64) as i64) as f64)
                    .collect()
            }
            _ if how.ends_with(".npy") || how.ends_with(".safetensors") => {
                let path = self.judge.folder.join(how);
                let (found, values) = read_values(&path, &bound.argument.name)?;
                if found != shape {
                    return Err(format!(
                        "{} has the shape {found:?}, and `{}` {shape:?}",
                        path.display(),
                        bound.argument.name
                    ));
                }
                values
            }
            _ => {
                return Err(format!(
                    "`{how}`: values are uniform, normal, zeros, ones, integers(from, to), or a .npy or .safetensors file"
                ));
            }
        };
        // As the kernel sees them: rounded to its type.
        Ok(Some(decode(&encode(&values, bound.argument.element), bound.argument.element)))
    }

    /// Allocates and fills the arguments.
    #[allow(clippy::type_complexity)]
    fn upload(
        &self,
        device: &mut Device,
        inputs: &[Option<Vec<f64>>],
        sizes: &Sizes,
    ) -> Result<(Vec<Option<Tensor>>, Vec<Value>), Failure> {
        device.reset()?;
        let (mut tensors, mut arguments) = (Vec::new(), Vec::new());
        for (bound, input) in self.bound.iter().zip(inputs) {
            let element = bound.argument.element;
            if !bound.argument.pointer {
                let bytes = bound.scalar(sizes).map_err(Failure::Refused)?;
                arguments.push(Value::Bytes(bytes));
                tensors.push(None);
                continue;
            }
            let shape = bound.shape(sizes).map_err(Failure::Refused)?;
            let size = shape.iter().product::<usize>() * element.size();
            let tensor = device.allocate(&bound.argument.name, size)?;
            if let Some(values) = input {
                device.write(tensor, &encode(values, element))?;
            }
            tensors.push(Some(tensor));
            arguments.push(Value::Pointer(tensor));
        }
        Ok((tensors, arguments))
    }

    fn check_results(
        &mut self,
        device: &mut Device,
        tensors: &[Option<Tensor>],
        inputs: &[Option<Vec<f64>>],
        sizes: &Sizes,
        seed: u64,
    ) -> Result<(), String> {
        self.verdict.compared += 1;
        let mut outputs = Vec::new();
        for ((bound, tensor), input) in self.bound.iter().zip(tensors).zip(inputs) {
            let Some(tensor) = tensor else { continue };
            let name = &bound.argument.name;
            let (bytes, unwritten) = device.read(*tensor).map_err(said)?;
            if !bound.of.output {
                let before = input.as_ref().map(|values| encode(values, bound.argument.element));
                if before.is_some_and(|before| before != bytes) {
                    let what = format!(
                        "kernel `{}` writes `{name}`, which is no output",
                        self.judge.kernel()
                    );
                    self.verdict.found(Aspect::Safe, what, sizes, seed);
                }
                continue;
            }
            let shape = bound.shape(sizes)?;
            if let Some(at) = unwritten {
                let element = place(at / bound.argument.element.size(), &shape);
                let what = format!("element {element} of `{name}` was never written");
                self.verdict.found(Aspect::Right, what, sizes, seed);
                return Ok(());
            }
            outputs.push((name.clone(), shape, decode(&bytes, bound.argument.element)));
        }
        let exact = self.exact(inputs, sizes)?;
        if exact.len() != outputs.len() {
            return Err(format!(
                "the reference has {} results, and the case {} outputs",
                exact.len(),
                outputs.len()
            ));
        }
        for ((name, shape, found), exact) in outputs.iter().zip(&exact) {
            if found.len() != exact.len() {
                return Err(format!(
                    "the reference of `{name}` has {} elements, and its shape {}",
                    exact.len(),
                    found.len()
                ));
            }
            self.compare(name, shape, found, exact, sizes, seed)?;
        }
        Ok(())
    }

    fn compare(
        &mut self,
        name: &str,
        shape: &[usize],
        found: &[f64],
        exact: &[f64],
        sizes: &Sizes,
        seed: u64,
    ) -> Result<(), String> {
        if exact.iter().any(|value| !value.is_finite()) {
            return Err(format!("the reference of `{name}` is not finite: it cannot judge"));
        }
        let magnitude = exact.iter().fold(0.0_f64, |all, value| all.max(value.abs()));
        let scale = if magnitude > 0.0 { magnitude } else { 1.0 };
        let (mut worst, mut at) = (0.0, 0);
        for (i, (a, b)) in found.iter().zip(exact).enumerate() {
            let error = (a - b).abs() / scale;
            let error = if error.is_nan() { f64::INFINITY } else { error };
            if error > worst {
                (worst, at) = (error, i);
            }
        }
        self.verdict.error = self.verdict.error.max(worst);
        if worst > self.verdict.tolerance {
            let (is, should) = (found[at], exact[at]);
            let element = place(at, shape);
            let error = if worst.is_finite() {
                format!("{worst:.1e} of the largest magnitude")
            } else {
                "not a number".into()
            };
            let what = format!(
                "element {element} of `{name}` is {is} and should be {should} ({error}; {:.0e} passes)",
                self.verdict.tolerance
            );
            self.verdict.found(Aspect::Right, what, sizes, seed);
        }
        Ok(())
    }

    /// The results of the reference.
    fn exact(
        &mut self,
        inputs: &[Option<Vec<f64>>],
        sizes: &Sizes,
    ) -> Result<Vec<Vec<f64>>, String> {
        let reference = &self.judge.case.reference;
        if let Some(mut other) = self.other.take() {
            let name = reference.kernel.as_deref().unwrap_or_default();
            let failed = |why: String| format!("the reference `{name}` fails: {why}");
            let launch =
                reference.launch.as_ref().unwrap_or(&self.judge.case.launch).at(sizes, 1)?;
            let (tensors, arguments) =
                self.upload(&mut other, inputs, sizes).map_err(|f| failed(said(f)))?;
            other.launch(name, &launch, &arguments).map_err(|f| failed(said(f)))?;
            let mut results = Vec::new();
            for (bound, tensor) in self.bound.iter().zip(tensors) {
                if let (true, Some(tensor)) = (bound.of.output, tensor) {
                    let (bytes, unwritten) = other.read(tensor).map_err(|f| failed(said(f)))?;
                    if unwritten.is_some() {
                        return Err(failed(format!(
                            "it leaves a part of `{}` unwritten",
                            bound.argument.name
                        )));
                    }
                    results.push(decode(&bytes, bound.argument.element));
                }
            }
            self.other = Some(other);
            return Ok(results);
        }
        if let Some(path) = &reference.expected {
            let outputs = self.bound.iter().filter(|bound| bound.of.output);
            return outputs
                .map(|bound| {
                    read_values(&self.judge.folder.join(path), &bound.argument.name)
                        .map(|(_, values)| values)
                })
                .collect();
        }
        let mut operands = Vec::new();
        for (bound, input) in self.bound.iter().zip(inputs) {
            let Some(values) = input else { continue };
            let wanted = match &reference.of {
                Some(names) => names.contains(&bound.argument.name),
                None => !bound.of.output,
            };
            if wanted {
                operands.push((
                    bound.argument.name.clone(),
                    Operand { shape: bound.shape(sizes)?, values: values.clone() },
                ));
            }
        }
        if let Some(names) = &reference.of {
            let place = |name: &String| names.iter().position(|known| known == name);
            operands.sort_by_key(|(name, _)| place(name));
            if operands.len() != names.len() {
                return Err("`of` names an argument that is no tensor with values".into());
            }
        }
        let operands: Vec<Operand> = operands.into_iter().map(|(_, operand)| operand).collect();
        let name = reference.primitive.as_deref().unwrap_or_default();
        (self.primitives)(name, &operands, &reference.with)
            .map_err(|why| format!("the primitive `{name}`: {why}"))
    }
}

/// An element's position in a shape.
fn place(mut at: usize, shape: &[usize]) -> String {
    let mut all = Vec::new();
    for &side in shape.iter().rev() {
        all.push((at % side.max(1)).to_string());
        at /= side.max(1);
    }
    all.reverse();
    format!("[{}]", all.join(", "))
}
