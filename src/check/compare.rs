//! Comparison of results with a reference, strict enough that no wrong result passes.
//!
//! `|x - ref|_2 / |ref|_2 <= tol` and `max |x - ref| <= 16 tol max |ref|`. A non-finite number on either side or a different
//! length fails. If the reference is all zero, so must be the result.

/// Returns the relative L2 error of `got` against `want`, or a message that says what is wrong.
///
/// # Errors
/// The message, if they are not close.
pub fn close(what: &str, got: &[f64], want: &[f64], tolerance: f64) -> Result<f64, String> {
    if got.len() != want.len() {
        return Err(format!("{what}: {} numbers, expected {}", got.len(), want.len()));
    }
    for (side, values) in [("got", got), ("expected", want)] {
        if let Some(i) = values.iter().position(|v| !v.is_finite()) {
            return Err(format!("{what}: {side} {} at {i} of {}", values[i], values.len()));
        }
    }
    let difference: Vec<f64> = got.iter().zip(want).map(|(g, w)| g - w).collect();
    let error = ratio(norm(&difference), norm(want));
    let (worst, most) = (largest(&difference), largest(want));
    if error <= tolerance && worst <= 16.0 * tolerance * most {
        return Ok(error);
    }
    let at = difference.iter().position(|d| d.abs() == worst).unwrap_or(0);
    Err(format!(
        "{what}: relative error {error:.2e}, tolerance {tolerance:.2e}; worst at {at} of {}: got {}, expected {}",
        got.len(),
        got[at],
        want[at]
    ))
}

/// `a / b`, with `0 / 0 = 0`.
pub fn ratio(a: f64, b: f64) -> f64 {
    if a == 0.0 { 0.0 } else { a / b }
}

/// The L2 norm.
pub fn norm(values: &[f64]) -> f64 {
    values.iter().map(|v| v * v).sum::<f64>().sqrt()
}

/// The largest magnitude.
pub fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |max, v| v.abs().max(max))
}
