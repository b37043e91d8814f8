//! When sampled requests were made, counted in requests of all keys.

use bytemuck::{Pod, Zeroable};

use super::sample::REQUESTS;

/// Sampled requests from one mark to the next.
const STEP: u64 = 8192;
const MARKS: usize = REQUESTS / STEP as usize;

/// For one of so many sampled requests how many requests, sampled or not, were made before it. These
/// numbers wrap around: only their differences count.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct Marks([u64; MARKS]);

impl Marks {
    /// Whether the sampled request with this number is to be marked.
    #[inline]
    pub(super) fn has(number: u64) -> bool {
        number.is_multiple_of(STEP)
    }

    /// Marks a sampled request, the first one of its step that is known.
    pub(super) fn set(&mut self, number: u64, made: u64) {
        if let Some(mark) = self.0.get_mut((number / STEP) as usize % MARKS) {
            *mark = made;
        }
    }

    /// Counts from so many requests later on.
    pub(super) fn shift(&mut self, requests: u64) {
        for mark in &mut self.0 {
            *mark = mark.wrapping_sub(requests);
        }
    }

    /// Requests that were made before a sampled one, about: between two marks they count as even. `end`
    /// is the number of the next sampled request, before which `requests` were made.
    pub(super) fn made_before(&self, number: u64, end: u64, requests: u64) -> u64 {
        let at = |step: u64| self.0.get(step as usize % MARKS).copied().unwrap_or(0);
        let step = number / STEP;
        let begin = step.saturating_mul(STEP);
        let next = begin.saturating_add(STEP);
        let before = at(step);
        let (next, after) = if next < end {
            (next, at(step + 1))
        } else {
            (end.max(begin + 1), requests)
        };
        let part = (number - begin) as f64 / (next - begin) as f64;
        before.wrapping_add((after.wrapping_sub(before) as f64 * part) as u64)
    }
}
