//! Losses, assignments and nearest neighbours. On a GPU their GEMMs run on bf16 terms of f32 rows: three or six mma for each one
//! that the definition asks for (`ops/gemm/similarity.rs`).

use crate::bench::case::{Case, Extent, Launched, Run, both, filled, forward, suffix};
use crate::bench::{Problem, Unit, Work};
use crate::device::{Device, Group};
use crate::eval::{Features, Knn, knn_accuracy};
use crate::ops::gemm::similarity::{ColumnSplits, TILE, WEIGHT_TILE};
use crate::ops::{
    Negatives, info_nce, l2_normalize, neg_cosine, nt_xent, nt_xent_groups, sinkhorn,
    sinkhorn_rows_per_chunk, soft_cross_entropy,
};
use crate::tensor::{DType, Tensor};

/// Size of an embedding, number of SwAV's prototypes, size of ResNet-18's features.
const D: usize = 128;
const PROTOTYPES: usize = 3000;
const FEATURES: usize = 512;
/// SwAV's Sinkhorn iterations.
const ITERATIONS: usize = 3;
/// Queries of MoCo and of kNN; the extent's queue holds the keys.
const QUERIES: usize = 256;

pub(super) fn cases(extent: &Extent, dtype: DType) -> Vec<Case> {
    let mut all = Vec::new();
    all.extend([false, true].map(|both| nt_xent_case(extent.rows, both, dtype)));
    all.extend([false, true].map(|both| info_nce_case(extent.queue, both, dtype)));
    all.push(l2_normalize_case(extent.rows, dtype));
    all.push(neg_cosine_case(extent.rows, dtype));
    all.push(sinkhorn_case(extent.assigned, dtype));
    all.push(soft_cross_entropy_case(extent.assigned, dtype));
    all.push(softmax_case(extent.assigned, dtype));
    all.push(knn_case(extent.queue));
    all
}

fn way(backward: bool) -> &'static str {
    if backward { "forward+backward" } else { "forward" }
}

/// A launch of blocks of 256 threads.
fn tiled(kernel: &str, blocks: usize, bytes: f64, operations: f64) -> Launched {
    Launched { blocks, ..Launched::over(kernel, bytes, operations) }
}

/// For activations of this dtype: the bf16 terms that an f32 row is split into, the gradient kernel, and the mma per product.
fn terms_of(dtype: DType) -> (f64, &'static str, f64) {
    if dtype == DType::Bf16 { (2.0, "gradient_2", 3.0) } else { (3.0, "gradient_3", 6.0) }
}

/// `z [n, d]`. Similarities are symmetric, so the forward pass computes each pair once; the backward pass computes the pair again
/// and adds to both of its rows.
fn nt_xent_case(n: usize, backward: bool, dtype: DType) -> Case {
    let (pairs, z) = ((n * n) as f64, 4.0 * (n * D) as f64);
    let d = D as f64;
    let (terms, gradient, mma) = terms_of(dtype);
    let split = (4.0 + terms * 2.0) / 4.0 * z;
    let (tiles, [_, groups]) = (n.div_ceil(WEIGHT_TILE), nt_xent_groups(n));
    let splits = ColumnSplits::new(n, n, WEIGHT_TILE);
    let partial = splits.count as f64 * z;
    let read = terms / 2.0 * z;
    let mut launched = vec![
        Launched::over("split_rows", split, 4.0 * z),
        Launched {
            threads: 128,
            mma: mma * pairs * d,
            ..tiled("nt_xent_sums", groups * (groups + 1) / 2, read, pairs / 2.0 * 8.0)
        },
        tiled("nt_xent_finish", n.div_ceil(8), 2.0 * z, 4.0 * z),
    ];
    if backward {
        launched.push(Launched {
            threads: 128,
            mma: mma * pairs * 4.0 * d,
            ..tiled(
                &format!("nt_xent_{gradient}"),
                tiles * splits.count,
                read + partial,
                pairs * 12.0,
            )
        });
        launched.push(Launched::over("split_k_reduce_f32", partial + z, partial / 4.0));
    }
    let gemms = if backward { 4.0 } else { 1.0 };
    Case {
        name: format!("nt_xent {} {n}x{D}", way(backward)),
        count: 0,
        work: Work { operations: gemms * pairs * d, bytes: if backward { 2.0 } else { 1.0 } * z },
        // A GEMM of this size belongs on tensor cores: they set its roofline.
        unit: Unit::Matrix,
        launched,
        problem: None,
        prepare: Box::new(move |device| {
            let z = unit_rows(device, n, D);
            if backward {
                let dy = Tensor::from_f64(device, [], &[1.0]);
                both(device, z, dy, |z| nt_xent(z, 0.5))
            } else {
                forward(device, move |tape| drop(nt_xent(&tape.input(&z), 0.5)))
            }
        }),
    }
}

/// Queries times the queue in the forward pass; the backward pass computes the logits again, then the gradient of the queries.
fn info_nce_case(m: usize, backward: bool, dtype: DType) -> Case {
    let n = QUERIES.min(m);
    let (pairs, d) = ((n * m) as f64, D as f64);
    let bytes = 4.0 * (n * D * 2 + m * D) as f64;
    let (terms, gradient, mma) = terms_of(dtype);
    let split = (4.0 + terms * 2.0) / 4.0;
    let (sums, weights) = (ColumnSplits::new(n, m, TILE), ColumnSplits::new(n, m, WEIGHT_TILE));
    let mut launched = vec![
        Launched::over("split_rows", split * 4.0 * (n * D) as f64, 0.0),
        Launched::over("split_rows", split * 4.0 * (m * D) as f64, 4.0 * (m * D) as f64),
        Launched {
            threads: 128,
            mma: mma * 2.0 * pairs * d,
            ..tiled(
                "info_nce_sums",
                n.div_ceil(TILE) * sums.count,
                terms / 2.0 * bytes,
                pairs * 8.0,
            )
        },
        tiled("info_nce_finish", n.div_ceil(8), 0.0, 0.0),
    ];
    if backward {
        let partial = 4.0 * (weights.count * n * D) as f64;
        launched.extend([
            Launched {
                threads: 128,
                mma: mma * 4.0 * pairs * d,
                ..tiled(
                    &format!("info_nce_{gradient}"),
                    n.div_ceil(WEIGHT_TILE) * weights.count,
                    terms / 2.0 * bytes + partial,
                    pairs * 8.0,
                )
            },
            tiled("info_nce_query_finish", n.div_ceil(8), partial, partial / 4.0),
            tiled("info_nce_key_gradient", n.div_ceil(8), 0.0, 0.0),
        ]);
    }
    let passes = if backward { 3.0 } else { 1.0 };
    Case {
        name: format!("info_nce {} {n}x{m}x{D}", way(backward)),
        count: 0,
        work: Work {
            operations: passes * 2.0 * pairs * d,
            bytes: if backward { 2.0 } else { 1.0 } * bytes,
        },
        unit: Unit::Matrix,
        launched,
        problem: None,
        prepare: Box::new(move |device| {
            let (q, k, queue) =
                (unit_rows(device, n, D), unit_rows(device, n, D), unit_rows(device, m, D));
            if backward {
                let dy = Tensor::from_f64(device, [], &[1.0]);
                both(device, q, dy, move |q| {
                    let negatives = Negatives { queue: &queue, own: None };
                    info_nce(q, &q.tape().input(&k), &negatives, 0.2)
                })
            } else {
                forward(device, move |tape| {
                    let negatives = Negatives { queue: &queue, own: None };
                    drop(info_nce(&tape.input(&q), &tape.input(&k), &negatives, 0.2));
                })
            }
        }),
    }
}

/// Rows of unit length, in the device's own dtype.
fn unit_rows(device: &Device, n: usize, d: usize) -> Tensor {
    let mut rows: Vec<f32> =
        (0..n * d).map(|i| ((i.wrapping_mul(2_654_435_761) >> 9) & 1023) as f32 - 511.5).collect();
    for row in rows.chunks_exact_mut(d) {
        let length = row.iter().map(|v| v * v).sum::<f32>().sqrt();
        row.iter_mut().for_each(|v| *v /= length);
    }
    Tensor::from_slice(device, [n, d], &rows).cast(DType::of(device))
}

fn l2_normalize_case(n: usize, dtype: DType) -> Case {
    let (len, name) = ((n * D) as f64, suffix(dtype));
    let e = dtype.size() as f64;
    Case {
        name: format!("l2_normalize forward+backward {n}x{D}"),
        count: 0,
        work: Work { operations: 9.0 * len, bytes: 5.0 * e * len },
        unit: Unit::Vector,
        launched: vec![
            tiled(&format!("l2_normalize_{name}"), n.div_ceil(8), 2.0 * e * len, 3.0 * len),
            tiled(
                &format!("l2_normalize_backward_{name}"),
                n.div_ceil(8),
                3.0 * e * len,
                6.0 * len,
            ),
        ],
        problem: None,
        prepare: Box::new(move |device| {
            let (x, dy) = (filled(device, &[n, D]), filled(device, &[n, D]));
            both(device, x, dy.cast(DType::of(device)), l2_normalize)
        }),
    }
}

fn neg_cosine_case(n: usize, dtype: DType) -> Case {
    let (len, name) = ((n * D) as f64, suffix(dtype));
    let e = dtype.size() as f64;
    Case {
        name: format!("neg_cosine forward+backward {n}x{D}"),
        count: 0,
        work: Work { operations: 14.0 * len, bytes: 5.0 * e * len },
        unit: Unit::Vector,
        launched: vec![
            tiled(&format!("neg_cosine_{name}"), n.div_ceil(8), 2.0 * e * len, 6.0 * len),
            tiled("row_losses_mean", 1, 4.0 * n as f64, n as f64),
            tiled(&format!("neg_cosine_backward_{name}"), n.div_ceil(8), 3.0 * e * len, 8.0 * len),
        ],
        problem: None,
        prepare: Box::new(move |device| {
            let (p, z) = (filled(device, &[n, D]), filled(device, &[n, D]));
            let dy = Tensor::from_f64(device, [], &[1.0]);
            both(device, p, dy, move |p| neg_cosine(p, &p.tape().input(&z)))
        }),
    }
}

/// One pass for the maximum, one per iteration (its second read hits the cache), and one for the assignments.
fn sinkhorn_case(b: usize, dtype: DType) -> Case {
    let (len, e, name) = ((b * PROTOTYPES) as f64, dtype.size() as f64, suffix(dtype));
    let chunks = b.div_ceil(sinkhorn_rows_per_chunk(b));
    let partial = 8.0 * (chunks * PROTOTYPES) as f64;
    let mut launched = vec![tiled(&format!("sinkhorn_max_{name}"), 256, e * len, len)];
    for _ in 0..ITERATIONS {
        let columns = format!("sinkhorn_columns_{name}");
        launched.extend([
            tiled(&columns, chunks, e * len + partial, 12.0 * len),
            tiled("sinkhorn_column_factors", PROTOTYPES.div_ceil(32), partial, partial / 8.0),
        ]);
    }
    launched.push(tiled(
        &format!("sinkhorn_assign_{name}"),
        b.div_ceil(8),
        (e + 4.0) * len,
        14.0 * len,
    ));
    Case {
        name: format!("sinkhorn {b}x{PROTOTYPES}"),
        count: 0,
        // Scores are read and assignments written; everything in between could stay on chip.
        work: Work { operations: (5.0 + 4.0 * ITERATIONS as f64) * len, bytes: (e + 4.0) * len },
        unit: Unit::Vector,
        launched,
        problem: None,
        prepare: Box::new(move |device| {
            let scores = filled(device, &[b, PROTOTYPES]);
            let run: Run =
                Box::new(move || drop(sinkhorn(&scores, 0.05, ITERATIONS, &Group::default())));
            run
        }),
    }
}

fn soft_cross_entropy_case(b: usize, dtype: DType) -> Case {
    let (len, e, name) = ((b * PROTOTYPES) as f64, dtype.size() as f64, suffix(dtype));
    Case {
        name: format!("soft_cross_entropy forward+backward {b}x{PROTOTYPES}"),
        count: 0,
        work: Work { operations: 10.0 * len, bytes: (3.0 * e + 8.0) * len },
        unit: Unit::Vector,
        launched: vec![
            tiled(&format!("soft_cross_entropy_{name}"), b.div_ceil(8), (e + 4.0) * len, 5.0 * len),
            tiled("row_losses_mean", 1, 4.0 * b as f64, b as f64),
            tiled(
                &format!("soft_cross_entropy_backward_{name}"),
                b.div_ceil(8),
                (2.0 * e + 4.0) * len,
                5.0 * len,
            ),
        ],
        problem: None,
        prepare: Box::new(move |device| {
            let x = filled(device, &[b, PROTOTYPES]);
            let q = Tensor::from_slice(
                device,
                [b, PROTOTYPES],
                &vec![1.0 / 3000.0_f32; b * PROTOTYPES],
            );
            let q = q.cast(DType::of(device));
            let dy = Tensor::from_f64(device, [], &[1.0]);
            both(device, x, dy, move |x| soft_cross_entropy(x, &q, 0.1))
        }),
    }
}

/// Of a teacher's logits, in f32 whatever their type.
fn softmax_case(b: usize, dtype: DType) -> Case {
    let (len, e, name) = ((b * PROTOTYPES) as f64, dtype.size() as f64, suffix(dtype));
    let (bytes, problem) = ((e + 4.0) * len, Problem::Softmax { rows: b, columns: PROTOTYPES });
    Case {
        name: format!("softmax {b}x{PROTOTYPES}"),
        count: 0,
        work: Work { operations: 5.0 * len, bytes },
        unit: Unit::Vector,
        launched: vec![tiled(&format!("softmax_{name}"), b.div_ceil(8), bytes, 5.0 * len)],
        problem: Some(problem),
        prepare: Box::new(move |device| problem.prepare(device)),
    }
}

/// Features start and end in host memory, as in an evaluation.
fn knn_case(bank: usize) -> Case {
    let queries = QUERIES.min(bank);
    let (pairs, d) = ((queries * bank) as f64, FEATURES as f64);
    let bytes = 4.0 * d * (queries + bank) as f64;
    Case {
        name: format!("knn {queries}x{bank}x{FEATURES}"),
        count: 0,
        work: Work { operations: 2.0 * pairs * d, bytes },
        unit: Unit::Matrix,
        launched: vec![
            Launched::over("split_rows", 2.5 * bytes, bytes),
            Launched {
                threads: 128,
                mma: 12.0 * pairs * d,
                ..tiled(
                    "knn_similarities",
                    queries.div_ceil(TILE) * bank.div_ceil(TILE),
                    1.5 * bytes + 4.0 * pairs,
                    0.0,
                )
            },
            tiled("knn_top_k", queries, 4.0 * pairs, pairs),
        ],
        problem: None,
        prepare: Box::new(move |device| {
            let set = |n: usize| Features {
                values: (0..n * FEATURES).map(|i| ((i * 37) % 251) as f32 - 125.0).collect(),
                d: FEATURES,
                labels: (0..n as u32).map(|i| i % 10).collect(),
                skipped: Vec::new(),
            };
            let (bank, queries, device) = (set(bank), set(queries), device.clone());
            let run: Run = Box::new(move || {
                knn_accuracy(&bank, &queries, Knn::default(), &device).expect("the device");
            });
            run
        }),
    }
}
