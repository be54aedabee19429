//! Seeded random legal shapes, to find cases that nobody listed.

use selfsup::device::Device;

use crate::case::{ROUTES, Route};
use crate::cases::case;
use crate::compare::{close, report};
use crate::seeded;

/// Draws one number after another.
struct Draw {
    seed: u64,
    count: u64,
}

impl Draw {
    fn new(what: &str) -> Self {
        Self { seed: seeded::seed(what), count: 0 }
    }

    /// In `low..=high`.
    fn number(&mut self, low: usize, high: usize) -> usize {
        self.count += 1;
        low + (seeded::bits(self.seed, self.count) % (high - low + 1) as u64) as usize
    }
}

fn agree(lines: Vec<String>, tolerance: f64) {
    let (cpu, reference) = (Device::cpu(2).unwrap().poisoned(), Device::reference().poisoned());
    let mut results = Vec::new();
    for (i, line) in lines.iter().enumerate() {
        let case = case(line);
        let want = case.run(&reference, Route::Param);
        let got = case.run(&cpu, ROUTES[i % ROUTES.len()]);
        for ((part, got), (_, want)) in got.parts(&case).zip(want.parts(&case)) {
            results.push(close(&format!("{line}|{part}"), got, want, tolerance));
        }
    }
    report("random shapes", results);
}

#[test]
fn convolutions_of_random_shapes_agree_with_the_reference() {
    let mut draw = Draw::new("conv2d");
    let line = |_| {
        let (r, s, stride, pad) =
            (draw.number(1, 7), draw.number(1, 7), draw.number(1, 4), draw.number(0, 3));
        let least = |filter: usize| filter.saturating_sub(2 * pad).max(1);
        let (h, w) = (least(r) + draw.number(0, 14), least(s) + draw.number(0, 30));
        let (n, c, k) = (draw.number(1, 9), draw.number(1, 40), draw.number(1, 40));
        format!("conv2d n={n} h={h} w={w} c={c} k={k} r={r} s={s} stride={stride} pad={pad}")
    };
    agree((0..24).map(line).collect(), 1e-5);
}

#[test]
fn batch_norms_of_random_shapes_agree_with_the_reference() {
    let mut draw = Draw::new("batch_norm");
    let line = |i: usize| {
        let groups = draw.number(1, 4);
        // Rows enough that gradients do not cancel to nothing, which f32 could not follow.
        let rows = groups * draw.number(8, 300);
        let c = draw.number(1, 150);
        let parts = ["gain", "shift", "residual", "relu"];
        let with: Vec<&str> = (0..4).filter(|bit| i >> bit & 1 == 1).map(|b| parts[b]).collect();
        format!("batch_norm rows={rows} c={c} groups={groups} with={}", with.join("+"))
    };
    agree((0..16).map(line).collect(), 1e-5);
}

#[test]
fn linear_layers_of_random_shapes_agree_with_the_reference() {
    let mut draw = Draw::new("linear");
    let line = |i: usize| {
        let (n, d, k) = (draw.number(1, 140), draw.number(1, 140), draw.number(1, 140));
        format!("linear n={n} d={d} k={k} bias={}", i % 2)
    };
    agree((0..10).map(line).collect(), 1e-5);
}

#[test]
fn max_pools_of_random_shapes_agree_with_the_reference() {
    let mut draw = Draw::new("max_pool");
    let line = |i: usize| {
        let (size, stride) = (draw.number(1, 5), draw.number(1, 4));
        let pad = draw.number(0, size / 2);
        let least = size.saturating_sub(2 * pad).max(1);
        let (h, w) = (least + draw.number(0, 9), least + draw.number(0, 9));
        let (n, c) = (draw.number(1, 4), draw.number(1, 20));
        let values = ["distinct", "tied"][i % 2];
        format!(
            "max_pool n={n} h={h} w={w} c={c} size={size} stride={stride} pad={pad} values={values}"
        )
    };
    agree((0..12).map(line).collect(), 1e-6);
}

#[test]
fn sums_and_transposes_of_random_shapes_agree_with_the_reference() {
    let mut draw = Draw::new("sum");
    let line = |i: usize| {
        let rank = draw.number(1, 4);
        let sizes: Vec<String> = (0..rank).map(|_| draw.number(1, 40).to_string()).collect();
        let (axis, shape) = (draw.number(0, rank - 1), sizes.join("x"));
        match i % 3 {
            0 => format!("sum shape={shape} axis={axis}"),
            1 => format!("mean shape={shape} axis={axis}"),
            _ => format!("transpose n={} d={}", draw.number(1, 140), draw.number(1, 140)),
        }
    };
    agree((0..18).map(line).collect(), 1e-5);
}
