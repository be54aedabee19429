//! Times the sum of 11 and 25 million floats over all ranks, the gradients of ResNet-18 and ResNet-50:
//! `mpiexec -n 2 target/release/examples/all_reduce`.

use std::time::Instant;

use selfsup::device::Group;

/// Runs the example.
pub fn main() -> selfsup::Result<()> {
    let group = Group::launched()?;
    for (network, count) in [("ResNet-18", 11_000_000), ("ResNet-50", 25_000_000)] {
        let mut values = vec![1.0_f32; count];
        let mut times = Vec::new();
        for _ in 0..12 {
            values.fill(1.0);
            group.barrier("start");
            let begin = Instant::now();
            group.all_reduce_sum("values", &mut values);
            times.push(1e3 * begin.elapsed().as_secs_f64());
        }
        group.check()?;
        assert!(values.iter().all(|&v| v == group.size() as f32));
        times.sort_by(f64::total_cmp);
        if group.leads() {
            let (median, fastest) = (times[times.len() / 2], times[0]);
            println!(
                "{} ranks, {count} floats ({network}): median {median:.1} ms, fastest {fastest:.1} ms",
                group.size()
            );
        }
    }
    group.leave();
    Ok(())
}
