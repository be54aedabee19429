//! Eigenvalues and triangular factors of symmetric matrices in f64, for what is measured of features.

/// Eigenvalues of a symmetric matrix `a [n, n]`, row-major, in no order: Householder's tridiagonal form, then implicit QL steps.
///
/// # Panics
/// If `a` does not hold `n * n` numbers.
pub(super) fn symmetric_eigenvalues(mut a: Vec<f64>, n: usize) -> Vec<f64> {
    assert_eq!(a.len(), n * n, "eigenvalues: a matrix of {n} rows");
    let (mut d, mut e) = (vec![0.0; n], vec![0.0; n]);
    for i in (1..n).rev() {
        // The last row of the part that is left is reflected onto its last place but one.
        let (upper, lower) = a.split_at_mut(i * n);
        let row = &mut lower[..i];
        let scale: f64 = row[..i - 1].iter().map(|v| v.abs()).sum();
        if scale == 0.0 {
            e[i] = row[i - 1];
            d[i] = lower[i];
            continue;
        }
        let scale = scale + row[i - 1].abs();
        row.iter_mut().for_each(|v| *v /= scale);
        let h: f64 = row.iter().map(|v| v * v).sum();
        let f = row[i - 1];
        let g = -h.sqrt().copysign(f);
        e[i] = scale * g;
        let h = h - f * g;
        row[i - 1] = f - g;
        // p = A u / h, of which the lower triangle alone is stored.
        let u = row.to_vec();
        let mut p = vec![0.0; i];
        for (j, line) in upper.chunks_exact(n).enumerate() {
            let own: f64 = line[..=j].iter().zip(&u).map(|(a, u)| a * u).sum();
            p[j] += own;
            p[..j].iter_mut().zip(line).for_each(|(p, a)| *p += a * u[j]);
        }
        p.iter_mut().for_each(|p| *p /= h);
        let k: f64 = p.iter().zip(&u).map(|(p, u)| p * u).sum::<f64>() / (2.0 * h);
        p.iter_mut().zip(&u).for_each(|(p, u)| *p -= k * u);
        for (j, line) in upper.chunks_exact_mut(n).enumerate() {
            for ((a, p_k), u_k) in line[..=j].iter_mut().zip(&p).zip(&u) {
                *a -= u[j] * p_k + p[j] * u_k;
            }
        }
        d[i] = lower[i];
    }
    if n > 0 {
        d[0] = a[0];
    }
    tridiagonal_eigenvalues(&mut d, &mut e);
    d
}

/// Eigenvalues of a tridiagonal matrix with diagonal `d` and, from `e[1]` on, the numbers beside it; they replace `d`.
fn tridiagonal_eigenvalues(d: &mut [f64], e: &mut [f64]) {
    let n = d.len();
    e.rotate_left(usize::from(n > 0)); // e[i] now lies between i and i + 1
    for l in 0..n {
        for _ in 0..60 {
            let small = |m: &usize| e[*m].abs() <= f64::EPSILON * (d[*m].abs() + d[*m + 1].abs());
            let m = (l..n - 1).find(small).unwrap_or(n - 1);
            if m == l {
                break;
            }
            let g = (d[l + 1] - d[l]) / (2.0 * e[l]);
            let r = g.hypot(1.0);
            let mut g = d[m] - d[l] + e[l] / (g + r.copysign(g));
            let (mut s, mut c, mut p) = (1.0, 1.0, 0.0);
            let mut early = false;
            for i in (l..m).rev() {
                let (f, b) = (s * e[i], c * e[i]);
                let r = f.hypot(g);
                e[i + 1] = r;
                if r == 0.0 {
                    (d[i + 1], e[m]) = (d[i + 1] - p, 0.0);
                    early = true;
                    break;
                }
                (s, c) = (f / r, g / r);
                g = d[i + 1] - p;
                let r = (d[i] - g) * s + 2.0 * c * b;
                p = s * r;
                d[i + 1] = g + p;
                g = c * r - b;
            }
            if !early {
                d[l] -= p;
                (e[l], e[m]) = (g, 0.0);
            }
        }
    }
}

/// Lanes of a sum, so that the compiler may use vectors.
const LANES: usize = 8;

/// The product of the common part of two rows.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let n = a.len().min(b.len());
    let (a, b) = (&a[..n], &b[..n]);
    let (mut sums, whole) = ([0.0; LANES], n - n % LANES);
    for (a, b) in a[..whole].chunks_exact(LANES).zip(b[..whole].chunks_exact(LANES)) {
        (0..LANES).for_each(|i| sums[i] += a[i] * b[i]);
    }
    let rest: f64 = a[whole..].iter().zip(&b[whole..]).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f64>() + rest
}

/// The product `x^T x [d, d]` of rows `x [n, d]`, both triangles.
pub(super) fn gram(x: &[f64], d: usize) -> Vec<f64> {
    let n = x.len() / d.max(1);
    let columns = transposed(x, n, d);
    products(&columns, n)
}

/// The product `x x^T [n, n]` of rows `x [n, d]`, both triangles.
pub(super) fn products(x: &[f64], d: usize) -> Vec<f64> {
    let n = x.len() / d.max(1);
    let row = |i: usize| &x[i * d..][..d];
    let mut all = vec![0.0; n * n];
    all.chunks_exact_mut(n.max(1)).enumerate().for_each(|(i, line)| {
        for (j, to) in line[..=i].iter_mut().enumerate() {
            *to = dot(row(i), row(j));
        }
    });
    for i in 0..n {
        for j in 0..i {
            all[j * n + i] = all[i * n + j];
        }
    }
    all
}

/// `x [n, d]` with rows and columns exchanged.
pub(super) fn transposed(x: &[f64], n: usize, d: usize) -> Vec<f64> {
    (0..n * d).map(|i| x[i % n * d + i / n]).collect()
}

/// Replaces a symmetric positive definite matrix `a [n, n]` by its lower factor `l` with `a = l l^T`, zeros above; `false` if it is
/// not positive definite.
pub(super) fn cholesky(a: &mut [f64], n: usize) -> bool {
    for i in 0..n {
        let (done, rest) = a.split_at_mut(i * n);
        let line = &mut rest[..n];
        for j in 0..i {
            let other = &done[j * n..][..n];
            let sum = dot(&line[..j], other);
            line[j] = (line[j] - sum) / other[j];
        }
        let rest = line[i] - dot(&line[..i], &line[..i]);
        if rest.is_nan() || rest <= 0.0 {
            return false;
        }
        line[i] = rest.sqrt();
        line[i + 1..].fill(0.0);
    }
    true
}

/// Solves `l y = b` in place for each of the rows `b [m, n]`; `l [n, n]` is a lower factor.
pub(super) fn solve_lower(l: &[f64], n: usize, b: &mut [f64]) {
    b.chunks_exact_mut(n.max(1)).for_each(|row| {
        for i in 0..n {
            let sum = dot(&l[i * n..][..i], row);
            row[i] = (row[i] - sum) / l[i * n + i];
        }
    });
}

/// Solves `l^T x = y` in place for each of the rows `y [m, n]`.
pub(super) fn solve_upper(l: &[f64], n: usize, y: &mut [f64]) {
    y.chunks_exact_mut(n.max(1)).for_each(|row| {
        for i in (0..n).rev() {
            row[i] /= l[i * n + i];
            let x = row[i];
            row[..i].iter_mut().zip(&l[i * n..]).for_each(|(y, l)| *y -= x * l);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Philox, Purpose};

    fn random(count: usize) -> Vec<f64> {
        let mut rng = Philox::new(3, Purpose::Test, 0, 0);
        (0..count).map(|_| rng.normal()).collect()
    }

    #[test]
    fn eigenvalues_have_the_matrixs_moments_and_known_ones_are_found() {
        for n in [1, 2, 3, 7, 40, 129] {
            let x = random(n * n);
            let a = products(&x, n); // eigenvalues of many sizes
            let found = symmetric_eigenvalues(a.clone(), n);
            let power = |k: i32| found.iter().map(|v| v.powi(k)).sum::<f64>();
            let trace: f64 = (0..n).map(|i| a[i * n + i]).sum();
            let squares: f64 = a.iter().map(|v| v * v).sum();
            assert!((power(1) / trace - 1.0).abs() < 1e-12, "{n}");
            assert!((power(2) / squares - 1.0).abs() < 1e-12, "{n}");
            assert!(found.iter().all(|&v| v > -1e-9 * trace), "{n}");
        }
        // A path of 5 nodes: 2 cos(k pi / 6).
        let path = |i: usize| f64::from(u8::from((i / 5).abs_diff(i % 5) == 1));
        let mut found = symmetric_eigenvalues((0..25).map(path).collect(), 5);
        found.sort_by(f64::total_cmp);
        for (k, value) in found.iter().rev().enumerate() {
            let known = 2.0 * (std::f64::consts::PI * (k + 1) as f64 / 6.0).cos();
            assert!((value - known).abs() < 1e-14, "{found:?}");
        }
        let mut diagonal = vec![0.0; 9];
        (diagonal[0], diagonal[4], diagonal[8]) = (3.0, 0.0, -2.0);
        let mut found = symmetric_eigenvalues(diagonal, 3);
        found.sort_by(f64::total_cmp);
        assert_eq!(found, [-2.0, 0.0, 3.0]);
        assert!(symmetric_eigenvalues(Vec::new(), 0).is_empty());
    }

    #[test]
    fn a_factor_solves_its_equations() {
        let n = 30;
        let mut a = products(&random(n * n), n);
        (0..n).for_each(|i| a[i * n + i] += 1.0);
        let full = a.clone();
        assert!(cholesky(&mut a, n));
        let b = random(3 * n);
        let mut x = b.clone();
        solve_lower(&a, n, &mut x);
        solve_upper(&a, n, &mut x);
        for (x, b) in x.chunks_exact(n).zip(b.chunks_exact(n)) {
            for i in 0..n {
                let product: f64 = full[i * n..][..n].iter().zip(x).map(|(a, x)| a * x).sum();
                assert!((product - b[i]).abs() < 1e-9);
            }
        }
        assert!(!cholesky(&mut [1.0, 2.0, 2.0, 1.0], 2));
        assert_eq!(gram(&[1.0, 2.0, 3.0, 4.0], 2), [10.0, 14.0, 14.0, 20.0]);
    }
}
