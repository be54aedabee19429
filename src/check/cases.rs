//! The case table: `cases.txt` has a row for each size of each primitive; this file says how a row is run.
//!
//! `scripts/make-goldens` reads the same rows, and `scripts/goldens/primitives.py` says how PyTorch runs them. A new primitive
//! adds rows to `cases.txt`, an entry to [`PRIMITIVES`] and a function to `primitives.py`; `tests/suite/complete.rs` says what is
//! missing.

use crate::arena::SlotKind;
use crate::ops::{self, BatchNorm, Negatives, PairLoss};
use crate::tape::Tape;
use crate::tensor::Tensor;

use super::case::{Build, Case, Input};
use super::seeded;

/// A row: a primitive and its settings.
#[derive(Clone, Debug)]
pub struct Row {
    line: String,
}

impl Row {
    /// A row from its text, words one space apart.
    pub fn new(line: &str) -> Self {
        Self { line: line.split_whitespace().collect::<Vec<_>>().join(" ") }
    }

    /// Its text.
    pub fn line(&self) -> &str {
        &self.line
    }

    /// The primitive's name.
    pub fn primitive(&self) -> &str {
        self.line.split(' ').next().unwrap_or_default()
    }

    /// The value of a key.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.line.split(' ').find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
    }

    #[track_caller]
    fn get(&self, key: &str) -> usize {
        self.number(key) as usize
    }

    #[track_caller]
    fn number(&self, key: &str) -> f64 {
        let text = self.text(key).unwrap_or_else(|| panic!("{}: no {key}", self.line));
        text.parse().unwrap_or_else(|_| panic!("{}: {key} is not a number", self.line))
    }

    /// The numbers of these keys.
    ///
    /// # Panics
    /// If one is missing or not a number.
    pub fn sizes<const N: usize>(&self, keys: [&str; N]) -> [usize; N] {
        keys.map(|key| self.get(key))
    }

    /// The sizes in `shape=7x13`.
    fn shape(&self) -> Vec<usize> {
        let sizes = self.text("shape").unwrap_or_else(|| panic!("{}: no shape", self.line));
        sizes.split('x').map(|size| size.parse().expect("a size")).collect()
    }

    /// An input of values in `[-1, 1)`.
    fn input(&self, name: &'static str, shape: &[usize]) -> Input {
        self.input_of(name, shape, seeded::unit)
    }

    fn input_of(
        &self,
        name: &'static str,
        shape: &[usize],
        values: impl Fn(u64, usize) -> Vec<f64>,
    ) -> Input {
        let values = values(self.seed(name), shape.iter().product());
        Input { name, shape: shape.to_vec(), kind: SlotKind::Matrix, values, step: STEP }
    }

    fn seed(&self, name: &str) -> u64 {
        seeded::seed(&format!("{}|{name}", self.line))
    }

    fn case(self, inputs: Vec<Input>, build: Build) -> Case {
        let loose = if self.text("loose").is_some() { self.number("loose") } else { 1.0 };
        Case { name: self.line, inputs, loose, rounded: false, build }
    }
}

/// What finite differences step by: a power of two, so that inputs of f32 values move by exactly this much.
const STEP: f64 = 1.0 / (1 << 20) as f64;

/// All rows.
pub fn rows() -> Vec<Row> {
    let lines = include_str!("cases.txt").lines().map(str::trim);
    lines.filter(|line| !line.is_empty() && !line.starts_with('#')).map(Row::new).collect()
}

/// The cases of all rows.
pub fn table() -> Vec<Case> {
    rows().iter().map(|row| case(&row.line)).collect()
}

/// A primitive by name, and how a row of the table becomes a case.
type Primitive = (&'static str, fn(Row) -> Case);

/// Primitives without CUDA kernels: losses for ablations on the CPU.
pub const HOST_ONLY: [&str; 1] = ["pair_loss"];

/// Rows whose size fills a GPU, so that its large tiles run, or whose sums are long enough for split-K. PyTorch's results for them are not stored.
pub const LARGE: [&str; 6] = [
    "linear n=16896 d=8 k=128 bias=1",
    "conv2d n=4 h=64 w=66 c=128 k=32 r=1 s=1 stride=2 pad=0",
    "conv2d n=16 h=33 w=32 c=4 k=64 r=3 s=3 stride=1 pad=1",
    "linear n=1100 d=17 k=9 bias=1",
    "linear n=9 d=1100 k=5 bias=0",
    "linear n=5 d=9 k=1601 bias=1",
];

/// Every primitive by name, and how its rows are run.
pub const PRIMITIVES: &[Primitive] = &[
    ("conv2d", conv2d),
    ("linear", linear),
    ("batch_norm", batch_norm),
    ("relu", relu),
    ("add", add),
    ("mul", mul),
    ("scale", scale),
    ("square", square),
    ("mean_of", mean_of),
    ("sum", sum),
    ("mean", mean),
    ("transpose", transpose),
    ("max_pool", max_pool),
    ("mean_pool", mean_pool),
    ("l2_normalize", l2_normalize),
    ("nt_xent", nt_xent),
    ("pair_loss", pair_loss),
    ("cross_entropy", cross_entropy),
    ("neg_cosine", neg_cosine),
    ("info_nce", info_nce),
    ("soft_cross_entropy", soft_cross_entropy),
    ("distillation", distillation),
    ("stream_mean", stream_mean),
    ("stream_select", stream_select),
    ("avg_pool", avg_pool),
    ("gather_rows", gather_rows),
    ("slice_rows", slice_rows),
    ("concat_rows", concat_rows),
];

/// The case of one row.
///
/// # Panics
/// If the primitive is unknown or the row lacks one of its keys.
pub fn case(line: &str) -> Case {
    let row = Row::new(line);
    let entry = PRIMITIVES.iter().find(|(name, _)| *name == row.primitive());
    let (_, build) = entry.unwrap_or_else(|| panic!("{line}: not in PRIMITIVES of cases.rs"));
    build(row)
}

fn conv2d(row: Row) -> Case {
    let [n, h, w, c, k, r, s] = row.sizes(["n", "h", "w", "c", "k", "r", "s"]);
    let [stride, pad] = row.sizes(["stride", "pad"]);
    let inputs = vec![row.input("x", &[n, h, w, c]), row.input("w", &[k, r, s, c])];
    row.case(inputs, Box::new(move |_, v| ops::conv2d(&v[0], &v[1], stride, pad)))
}

fn linear(row: Row) -> Case {
    let [n, d, k] = row.sizes(["n", "d", "k"]);
    let bias = row.get("bias") == 1;
    let mut inputs = vec![row.input("x", &[n, d]), row.input("w", &[k, d])];
    if bias {
        inputs.push(Input { kind: SlotKind::Bias, ..row.input("b", &[k]) });
    }
    row.case(inputs, Box::new(|_, v| ops::linear(&v[0], &v[1], v.get(2))))
}

/// `with` lists what is present, of `gain`, `shift`, `residual` and `relu`; `offset` moves the input's mean.
fn batch_norm(row: Row) -> Case {
    let [rows, c, groups] = row.sizes(["rows", "c", "groups"]);
    let with = |what: &str| row.text("with").is_some_and(|all| all.split('+').any(|w| w == what));
    let offset = if row.text("offset").is_some() { row.number("offset") } else { 0.0 };
    let mut inputs =
        vec![row.input_of("x", &[rows, c], |seed, count| seeded::around(seed, count, offset, 1.0))];
    if with("gain") {
        let around_one = |seed, count| seeded::around(seed, count, 1.0, 0.5);
        let gain = row.input_of("gain", &[c], around_one);
        inputs.push(Input { kind: SlotKind::Gain, ..gain });
    }
    if with("shift") {
        inputs.push(Input { kind: SlotKind::Shift, ..row.input("shift", &[c]) });
    }
    if with("residual") {
        inputs.push(row.input("residual", &[rows, c]));
    }
    let relu = with("relu");
    let place = |name| inputs.iter().position(|input| input.name == name);
    let (gain, shift, residual) = (place("gain"), place("shift"), place("residual"));
    let build: Build = Box::new(move |_, v| {
        let var = |place: Option<usize>| place.map(|i| &v[i]);
        let (gain, shift, residual) = (var(gain), var(shift), var(residual));
        ops::batch_norm(&v[0], BatchNorm { gain, shift, residual, relu, groups, running: None })
    });
    row.case(inputs, build)
}

fn relu(row: Row) -> Case {
    let input = row.input_of("x", &row.sizes(["n", "c"]), seeded::off_zero);
    row.case(vec![input], Box::new(|_, v| ops::relu(&v[0])))
}

fn add(row: Row) -> Case {
    let shape = row.sizes(["n", "c"]);
    let inputs = vec![row.input("a", &shape), row.input("b", &shape)];
    row.case(inputs, Box::new(|_, v| ops::add(&v[0], &v[1])))
}

fn scale(row: Row) -> Case {
    let factor = row.number("factor");
    let input = row.input("x", &row.sizes(["n", "c"]));
    row.case(vec![input], Box::new(move |_, v| ops::scale(&v[0], factor)))
}

fn mul(row: Row) -> Case {
    let shape = row.sizes(["n", "c"]);
    let inputs = vec![row.input("a", &shape), row.input("b", &shape)];
    row.case(inputs, Box::new(|_, v| ops::mul(&v[0], &v[1])))
}

fn square(row: Row) -> Case {
    let input = row.input("x", &row.sizes(["n", "c"]));
    row.case(vec![input], Box::new(|_, v| ops::square(&v[0])))
}

/// `shape` is sizes joined by `x`.
fn sum(row: Row) -> Case {
    let axis = row.get("axis");
    let input = row.input("x", &row.shape());
    row.case(vec![input], Box::new(move |_, v| ops::sum(&v[0], axis)))
}

fn mean(row: Row) -> Case {
    let axis = row.get("axis");
    let input = row.input("x", &row.shape());
    row.case(vec![input], Box::new(move |_, v| ops::mean(&v[0], axis)))
}

fn transpose(row: Row) -> Case {
    let input = row.input("x", &row.sizes(["n", "d"]));
    row.case(vec![input], Box::new(|_, v| ops::transpose(&v[0])))
}

fn mean_of(row: Row) -> Case {
    let names = ["a", "b", "c", "d", "e"];
    let inputs = names[..row.get("terms")].iter().map(|name| row.input(name, &[])).collect();
    row.case(inputs, Box::new(|_, v| ops::mean_of(v)))
}

/// `values` is `distinct`, or `tied`, where finite differences have no meaning.
fn max_pool(row: Row) -> Case {
    let shape = row.sizes(["n", "h", "w", "c"]);
    let [size, stride, pad] = row.sizes(["size", "stride", "pad"]);
    let mut input = match row.text("values") {
        Some("tied") => row.input_of("x", &shape, seeded::tied),
        _ => row.input_of("x", &shape, seeded::distinct),
    };
    if row.text("values") == Some("tied") {
        input.step = 0.0;
    }
    // The padding below and to the right, if it is not that above and to the left.
    let after = row.text("after").map_or(pad, |after| after.parse().expect("a size"));
    row.case(vec![input], Box::new(move |_, v| ops::max_pool(&v[0], size, stride, [pad, after])))
}

fn mean_pool(row: Row) -> Case {
    let input = row.input("x", &row.sizes(["n", "h", "w", "c"]));
    row.case(vec![input], Box::new(|_, v| ops::mean_pool(&v[0])))
}

fn l2_normalize(row: Row) -> Case {
    let scale = row.number("scale");
    let shape = row.sizes(["n", "d"]);
    let mut input =
        row.input_of("x", &shape, |seed, count| seeded::around(seed, count, 0.0, scale));
    input.step = STEP * scale;
    row.case(vec![input], Box::new(|_, v| ops::l2_normalize(&v[0])))
}

fn nt_xent(row: Row) -> Case {
    let temperature = row.number("t");
    let [rows, d] = row.sizes(["rows", "d"]);
    let mut input = row.input_of("z", &[rows, d], |seed, _| seeded::unit_rows(seed, rows, d));
    input.step = STEP * temperature;
    row.case(vec![input], Box::new(move |_, v| ops::nt_xent(&v[0], temperature)))
}

/// `loss` is `xent`, `logistic` or `margin`, of `m`; rows are of any length.
fn pair_loss(row: Row) -> Case {
    let temperature = row.number("t");
    let shape = row.sizes(["rows", "d"]);
    let semi_hard = row.get("hard") == 1;
    let loss = match row.text("loss") {
        Some("xent") => PairLoss::Xent,
        Some("logistic") => PairLoss::Logistic { semi_hard },
        _ => PairLoss::Margin { margin: row.number("m"), semi_hard },
    };
    let input = row.input("z", &shape);
    row.case(vec![input], Box::new(move |_, v| ops::pair_loss(&v[0], loss, temperature)))
}

fn cross_entropy(row: Row) -> Case {
    let [n, k] = row.sizes(["n", "k"]);
    let spread = row.number("spread");
    let labels = seeded::indices(row.seed("labels"), n, k);
    let labels: Vec<i32> = labels.into_iter().map(|label| label as i32).collect();
    let input = row.input_of("x", &[n, k], |seed, count| seeded::around(seed, count, 0.0, spread));
    let build: Build = Box::new(move |tape: &Tape<'_>, v| {
        ops::cross_entropy(&v[0], &Tensor::from_slice(tape.device(), [labels.len()], &labels))
    });
    row.case(vec![input], build)
}

fn neg_cosine(row: Row) -> Case {
    let scale = row.number("scale");
    let shape = row.sizes(["n", "d"]);
    let input = |name| {
        let values = |seed, count| seeded::around(seed, count, 0.0, scale);
        Input { step: STEP * scale, ..row.input_of(name, &shape, values) }
    };
    let inputs = vec![input("p"), input("z")];
    row.case(inputs, Box::new(|_, v| ops::neg_cosine(&v[0], &v[1])))
}

fn info_nce(row: Row) -> Case {
    let temperature = row.number("t");
    let [n, m, d] = row.sizes(["n", "m", "d"]);
    let own = row.text("own").map(|text| {
        let (from, to) = text.split_once("..").expect("own is a range");
        [from, to].map(|end| end.parse::<i32>().expect("an end"))
    });
    let input = |name| {
        let values = |seed, _| seeded::unit_rows(seed, n, d);
        Input { step: STEP * temperature, ..row.input_of(name, &[n, d], values) }
    };
    let inputs = vec![input("q"), input("k")];
    let queue = seeded::unit_rows(row.seed("queue"), m, d);
    let build: Build = Box::new(move |tape: &Tape<'_>, v| {
        let queue = Tensor::from_f64(tape.device(), [m, d], &queue);
        let own = own.map(|own| Tensor::from_slice(tape.device(), [2], &own));
        let negatives = Negatives { queue: &queue, own: own.as_ref() };
        ops::info_nce(&v[0], &v[1], &negatives, temperature)
    });
    row.case(inputs, build)
}

/// `targets` is `normal`, rows that sum to 1; `any`, numbers in `[0, 1)`; or `hot`, a 1 among zeros.
fn soft_cross_entropy(row: Row) -> Case {
    let [n, k] = row.sizes(["n", "k"]);
    let (spread, temperature) = (row.number("spread"), row.number("t"));
    let mut targets = seeded::around(row.seed("targets"), n * k, 0.5, 0.5);
    if row.text("targets") != Some("any") {
        for (i, target) in targets.chunks_exact_mut(k).enumerate() {
            let sum = target.iter().fold(0.0, |sum, q| sum + q);
            let hot = row.text("targets") == Some("hot");
            let new = |(j, q): (usize, &f64)| {
                if hot { f64::from(j == i % k) } else { seeded::rounded(q / sum) }
            };
            let new: Vec<f64> = target.iter().enumerate().map(new).collect();
            target.copy_from_slice(&new);
        }
    }
    let values = |seed, count| seeded::around(seed, count, 0.0, spread);
    let input = Input { step: STEP * temperature, ..row.input_of("x", &[n, k], values) };
    let build: Build = Box::new(move |tape: &Tape<'_>, v| {
        let targets = Tensor::from_f64(tape.device(), [n, k], &targets);
        ops::soft_cross_entropy(&v[0], &targets, temperature)
    });
    row.case(vec![input], build)
}

fn distillation(row: Row) -> Case {
    let [n, k] = row.sizes(["n", "k"]);
    let (spread, temperature) = (row.number("spread"), row.number("t"));
    let teacher = seeded::around(row.seed("teacher"), n * k, 0.0, spread);
    let values = |seed, count| seeded::around(seed, count, 0.0, spread);
    let input = Input { step: STEP * temperature, ..row.input_of("x", &[n, k], values) };
    let build: Build = Box::new(move |tape: &Tape<'_>, v| {
        let teacher = Tensor::from_f64(tape.device(), [n, k], &teacher);
        ops::distillation(&v[0], &teacher, temperature)
    });
    row.case(vec![input], build)
}

/// `c` is the channels of one stream.
fn stream_mean(row: Row) -> Case {
    let [n, h, w, c] = row.sizes(["n", "h", "w", "c"]);
    let input = row.input("x", &[n, h, w, 2 * c]);
    row.case(vec![input], Box::new(|_, v| ops::stream_mean(&v[0])))
}

fn stream_select(row: Row) -> Case {
    let [n, h, w, c] = row.sizes(["n", "h", "w", "c"]);
    let inputs = vec![row.input("x", &[n, h, w, 2 * c]), row.input("logits", &[n, 2 * c])];
    row.case(inputs, Box::new(|_, v| ops::stream_select(&v[0], &v[1])))
}

fn avg_pool(row: Row) -> Case {
    let [size, stride] = row.sizes(["size", "stride"]);
    let input = row.input("x", &row.sizes(["n", "h", "w", "c"]));
    row.case(vec![input], Box::new(move |_, v| ops::avg_pool(&v[0], size, stride)))
}

fn gather_rows(row: Row) -> Case {
    let [n, m, d] = row.sizes(["n", "m", "d"]);
    let index = seeded::indices(row.seed("index"), n, m);
    let index: Vec<i32> = index.into_iter().map(|i| i as i32).collect();
    let input = row.input("x", &[m, d]);
    let build: Build = Box::new(move |tape: &Tape<'_>, v| {
        ops::gather_rows(&v[0], &Tensor::from_slice(tape.device(), [index.len()], &index))
    });
    row.case(vec![input], build)
}

fn slice_rows(row: Row) -> Case {
    let [from, count] = row.sizes(["from", "count"]);
    let input = row.input("x", &row.sizes(["n", "d"]));
    row.case(vec![input], Box::new(move |_, v| ops::slice_rows(&v[0], from, count)))
}

fn concat_rows(row: Row) -> Case {
    let [a, b, d] = row.sizes(["a", "b", "d"]);
    let inputs = vec![row.input("a", &[a, d]), row.input("b", &[b, d])];
    row.case(inputs, Box::new(|_, v| ops::concat_rows(v)))
}
