//! Comparisons of results with a reference ([`selfsup::check::compare`]), reported all at once.

pub use selfsup::check::compare::{close, largest, norm, ratio};

/// Fails the test with all failed comparisons at once; otherwise prints the worst error.
#[track_caller]
pub fn report(what: &str, results: Vec<Result<f64, String>>) {
    assert!(!results.is_empty(), "{what}: nothing was compared");
    let count = results.len();
    let complaints: Vec<String> = results.iter().filter_map(|r| r.clone().err()).collect();
    assert!(
        complaints.is_empty(),
        "{what}: {} of {count} comparisons failed\n{}",
        complaints.len(),
        complaints.join("\n")
    );
    let worst = results.into_iter().flatten().fold(0.0, f64::max);
    println!("{what}: {count} comparisons, worst relative error {worst:.2e}");
}
