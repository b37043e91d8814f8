//! Numbers that are read without the lock, while another process may write to them.
//!
//! It writes plainly, and knows of no such reader. On all machines that Rust has, a number in its place is read and
//! written as one all the same; an atomic load has the compiler read it once, and no sooner than it is asked to.

#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// A number of 64 bits, as it is now.
#[inline]
pub(crate) fn load_u64(number: &u64) -> u64 {
    if align_of::<u64>() < align_of::<AtomicU64>() {
        // Such a machine reads it in two halves anyway.
        return *number;
    }
    let number = std::ptr::from_ref(number).cast_mut();
    // SAFETY: What a reference points to can be read, and is aligned. Nothing is written.
    unsafe { AtomicU64::from_ptr(number) }.load(Ordering::Relaxed)
}

/// A byte, as it is now.
#[inline]
pub(crate) fn load_u8(byte: &u8) -> u8 {
    let byte = std::ptr::from_ref(byte).cast_mut();
    // SAFETY: As above.
    unsafe { AtomicU8::from_ptr(byte) }.load(Ordering::Relaxed)
}
