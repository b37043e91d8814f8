//! Which policy an index goes by: one for all who use it.

use super::cache::Cache;
use super::peers::Peers;
use crate::policy::{Eviction, Minimise, Policy, PolicyKind};

impl<S: Peers, T: Clone> Cache<S, T, Policy> {
    /// The policy in force, and what it minimises.
    #[must_use]
    pub fn policy(&self) -> (PolicyKind, Minimise) {
        let minimise = Minimise::of_number(self.arena.header().policy.minimise);
        (self.policy.kind(), minimise)
    }

    /// Goes by a policy from now on, unless others use the index. Returns the one in force.
    pub fn set_policy(&mut self, kind: PolicyKind, minimise: Minimise) -> (PolicyKind, Minimise) {
        if self.arena.storage.has_others() {
            self.follow_policy();
        } else {
            self.choose_policy(kind, minimise);
            let state = &mut self.arena.header_mut().policy;
            (state.kind, state.minimise) = (kind as u32, minimise as u32);
        }
        self.policy()
    }

    /// The policy that an empty index gets from here.
    pub(crate) fn wanted_policy(&self) -> (PolicyKind, Minimise) {
        (self.policy.kind(), self.minimise)
    }

    /// Sets the same.
    pub(crate) fn choose_policy(&mut self, kind: PolicyKind, minimise: Minimise) {
        self.minimise = minimise;
        if self.policy.kind() != kind {
            // Uses that wait for their batch are not lost on the way.
            let _ = self.policy.victim(&mut self.arena);
            self.policy = Policy::of(kind);
        }
    }

    /// Goes by what the index says.
    pub(crate) fn follow_policy(&mut self) {
        let state = self.arena.header().policy;
        self.minimise = Minimise::of_number(state.minimise);
        let kind = PolicyKind::of_number(state.kind);
        if self.policy.kind() != kind {
            self.policy = Policy::of(kind);
        }
    }

    /// A request to the source for so many bytes took so many seconds: what counts where seconds are minimised.
    pub fn note_seconds(&mut self, size: u64, seconds: f64) {
        if self.minimise == Minimise::Seconds {
            self.arena.header_mut().policy.note_seconds(size, seconds);
        }
    }
}
