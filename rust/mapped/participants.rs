//! Who shares a mapped index: those who live, those who are dead, and who fills it.

use bytemuck::Zeroable;
use rustix::fs::fstat;

use super::Mapped;
use super::files::is_alive;
use crate::block::{Block, Participant};

impl Mapped {
    /// The other participants that live, as far as the head can be read, without what they have been
    /// promised.
    pub(super) fn living(&self) -> Vec<(usize, Participant)> {
        // What is cut off cannot even be looked at.
        let mapped = self.maps[0].len() as u64;
        let is_whole = fstat(&self.files[0]).is_ok_and(|status| status.st_size as u64 >= mapped);
        if !is_whole || !self.head().looks_right() {
            return Vec::new();
        }
        let list = self.participants().iter().copied().enumerate();
        let others = list.filter(|(n, other)| *n != self.me && other.live != 0);
        let living = others.filter(|(n, _)| is_alive(&self.root, *n));
        living
            .map(|(n, other)| {
                (
                    n,
                    Participant {
                        promised: 0,
                        ..other
                    },
                )
            })
            .collect()
    }

    /// Writes this participant into the list. The lock must be held.
    pub fn register(&mut self) {
        let (me, bound) = (self.me, self.bound);
        self.generation = self.head().generation;
        let fresh = Participant {
            live: 1,
            bound,
            ..Participant::zeroed()
        };
        self.head_mut().enter(me, fresh);
    }

    /// Says that the index is complete, if it is for this participant to say so.
    pub fn complete(&mut self) {
        if self.is_rebuilder() {
            self.head_mut().rebuilding = 0;
        }
    }

    /// Whether this participant fills the index.
    #[must_use]
    pub fn is_rebuilder(&self) -> bool {
        self.rebuilder() == Some(self.me)
    }

    /// The participant that fills the index.
    #[must_use]
    pub fn rebuilder(&self) -> Option<usize> {
        (self.head().rebuilding as usize).checked_sub(1)
    }

    /// Participants that are in the list but not alive any more.
    #[must_use]
    pub fn dead(&self) -> Vec<usize> {
        let list = self.participants().iter().enumerate();
        let others = list.filter(|(n, participant)| *n != self.me && participant.live != 0);
        others
            .map(|(n, _)| n)
            .filter(|n| !is_alive(&self.root, *n))
            .collect()
    }

    /// Whether whoever was filling the index does not live any more.
    #[must_use]
    pub fn is_left_empty(&self) -> bool {
        let others = self.rebuilder().filter(|n| *n != self.me);
        others.is_some_and(|n| {
            let known = self.participants().get(n).is_some_and(|p| p.live != 0);
            !known || !is_alive(&self.root, n)
        })
    }
}
