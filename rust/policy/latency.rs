//! How long the source takes: a latency for each request, and a time for each byte.

use crate::arena::PolicyState;

/// By how much each request that is measured counts less than the next one.
const FADE: f64 = 1.0 - 1.0 / 256.0;
/// Requests before the measurement counts.
const ENOUGH: f64 = 8.0;
/// Where all requests are alike, or take no time for their bytes: a request alone costs what so many bytes do.
const DEFAULT: u64 = 1 << 20;
/// The most that a request alone may cost, in bytes.
const MOST: f64 = (1u64 << 40) as f64;

impl PolicyState {
    /// Takes a request into account: a line is fitted to the latest ones, by least squares.
    pub(crate) fn note_seconds(&mut self, size: u64, seconds: f64) {
        if !seconds.is_finite() || seconds < 0.0 {
            return;
        }
        let bytes = size as f64;
        let more = [1.0, bytes, seconds, bytes * bytes, bytes * seconds];
        let mut sums = [0.0; 5];
        for ((sum, kept), more) in sums.iter_mut().zip(&mut self.measured).zip(more) {
            let before = f64::from_bits(*kept);
            let before = if before.is_finite() && before > 0.0 {
                before
            } else {
                0.0
            };
            *sum = before * FADE + more;
            *kept = sum.to_bits();
        }
        let [count, bytes, seconds, squares, products] = sums;
        if count < ENOUGH {
            return;
        }
        let spread = count * squares - bytes * bytes;
        let rise = (count * products - bytes * seconds) / spread;
        let start = (seconds - rise * bytes) / count;
        let ratio = start / rise;
        // Less than one part in a thousand of spread is none.
        let is_known = spread > 1e-3 * bytes * bytes && rise > 0.0 && ratio.is_finite();
        self.request_bytes = if is_known {
            ratio.clamp(0.0, MOST) as u64
        } else {
            DEFAULT
        };
    }
}
