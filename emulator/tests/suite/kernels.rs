//! The first kernels against plain host code.

use crate::stage::Stage;

#[test]
fn relu_of_odd_lengths_is_relu() {
    for checked in [false, true] {
        let stage = Stage::take(checked);
        for n in [1, 3, 4, 5, 127, 1001] {
            let x: Vec<f32> = (0..n).map(|i| (i as f32 * 0.7).sin()).collect();
            let (dx, dy) = (stage.upload(&x), stage.room::<f32>(n));
            stage.launch(
                "relu_f32",
                [2, 1, 1],
                [64, 1, 1],
                0,
                &[(&dy).into(), (&dx).into(), (n as i64).into()],
            );
            let want: Vec<f32> = x.iter().map(|x| x.max(0.0)).collect();
            assert_eq!(dy.read(&stage), want, "{n} elements, checked {checked}");
        }
    }
}
