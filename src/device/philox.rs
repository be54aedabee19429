//! Philox4x32-10: random numbers that are a pure function of a key and a counter.
//!
//! Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A stream is identified by a seed, a purpose and
//! two indices (an epoch and a sample, say). Any draw can be repeated without the draws before it, on any number of threads.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// The block function: 128 random bits for one key and one counter, ten rounds.
pub fn philox4x32(mut key: [u32; 2], mut counter: [u32; 4]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        let [low0, high0] = wide_product(MULTIPLIERS[0], counter[0]);
        let [low1, high1] = wide_product(MULTIPLIERS[1], counter[2]);
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0];
    }
    counter
}

fn wide_product(a: u32, b: u32) -> [u32; 2] {
    let product = u64::from(a) * u64::from(b);
    [product as u32, (product >> 32) as u32]
}

/// The use of a stream of random numbers. It is part of the stream's counter, so that no two uses share numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// Initial weights; indexed by slot.
    Weights = 1,
    /// The order of samples; indexed by epoch.
    Order = 2,
    /// Augmentation parameters; indexed by epoch, then sample and view.
    Augmentation = 3,
    /// Choosing label subsets; indexed by class.
    Labels = 4,
    /// Shuffles within a batch (MoCo's keys); indexed by step.
    Shuffle = 6,
    /// Initial contents of a queue of negatives; indexed by row.
    Queue = 7,
    /// Draws of tests and examples.
    Test = 5,
}

/// A stream of random numbers.
#[derive(Clone, Debug)]
pub struct Philox {
    key: [u32; 2],
    counter: [u32; 4],
    block: [u32; 4],
    used: usize,
}

impl Philox {
    /// The stream of `seed` for `purpose` at indices `major` (an epoch) and `minor` (a sample).
    ///
    /// A stream has `2^32` blocks of four words; streams that differ in any argument share no block.
    pub fn new(seed: u64, purpose: Purpose, major: u32, minor: u32) -> Self {
        Self {
            key: [seed as u32, (seed >> 32) as u32],
            counter: [0, major, minor, purpose as u32],
            block: [0; 4],
            used: 4,
        }
    }

    /// The next 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            self.block = philox4x32(self.key, self.counter);
            self.counter[0] = self.counter[0].wrapping_add(1);
            self.used = 0;
        }
        self.used += 1;
        self.block[self.used - 1]
    }

    /// Uniform in `[0, 1)`, a multiple of `2^-24`.
    pub fn uniform(&mut self) -> f32 {
        (self.next_u32() >> 8) as f32 * (1.0 / (1 << 24) as f32)
    }

    /// Uniform in `[low, high)`.
    pub fn uniform_in(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * self.uniform()
    }

    /// True with probability `p` in `0..=1`.
    pub fn chance(&mut self, p: f32) -> bool {
        self.uniform() < p
    }

    /// Uniform in `0..n`, without bias (Lemire's multiplication with rejection). `n > 0`.
    pub fn below(&mut self, n: u32) -> u32 {
        assert!(n > 0, "philox: below(0) has no values to draw from");
        let threshold = n.wrapping_neg() % n;
        loop {
            let product = u64::from(self.next_u32()) * u64::from(n);
            if product as u32 >= threshold {
                return (product >> 32) as u32;
            }
        }
    }

    /// Standard normal (Box-Muller in f64, from two consecutive words).
    pub fn normal(&mut self) -> f64 {
        let u = (f64::from(self.next_u32()) + 1.0) / 4_294_967_296.0; // (0, 1]
        let v = f64::from(self.next_u32()) / 4_294_967_296.0;
        (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    }

    /// Shuffles in place (Fisher-Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u32 + 1) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Known answers of the authors' Random123 (kat_vectors, philox4x32 10).
    #[test]
    fn block_function_matches_the_published_vectors() {
        let zero = philox4x32([0; 2], [0; 4]);
        assert_eq!(zero, [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        let ones = philox4x32([u32::MAX; 2], [u32::MAX; 4]);
        assert_eq!(ones, [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = philox4x32(
            [0xa409_3822, 0x299f_31d0],
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
        );
        assert_eq!(pi, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn streams_of_different_purpose_or_index_differ() {
        let first = |purpose, major, minor| Philox::new(7, purpose, major, minor).next_u32();
        let a = first(Purpose::Order, 0, 0);
        assert_ne!(a, first(Purpose::Augmentation, 0, 0));
        assert_ne!(a, first(Purpose::Order, 1, 0));
        assert_ne!(a, first(Purpose::Order, 0, 1));
    }

    #[test]
    fn shuffle_is_a_permutation_and_normals_have_unit_variance() {
        let mut rng = Philox::new(1, Purpose::Test, 0, 0);
        let mut items: Vec<u32> = (0..101).collect();
        rng.shuffle(&mut items);
        let mut sorted = items.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..101).collect::<Vec<_>>());
        assert_ne!(items, sorted);
        let draws: Vec<f64> = (0..20_000).map(|_| rng.normal()).collect();
        let mean = draws.iter().sum::<f64>() / draws.len() as f64;
        let var = draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / draws.len() as f64;
        assert!(mean.abs() < 0.03 && (var - 1.0).abs() < 0.05, "mean {mean}, variance {var}");
    }
}
