//! Which policy an index goes by: one for all who use it.

use super::cache::Cache;
use super::peers::Peers;
use crate::arena::PolicyState;
use crate::policy::{Eviction, Minimise, Policy, PolicyKind};

impl<S: Peers, T: Clone> Cache<S, T, Policy> {
    /// The policy in force, and what it minimises.
    #[must_use]
    pub fn policy(&self) -> (PolicyKind, Minimise) {
        let minimise = Minimise::of_number(self.arena.header().policy.minimise);
        (self.policy.kind(), minimise)
    }

    /// Has all go by a policy from now on, unless another participant uses the one in force. Returns that one, which stays
    /// as long as this participant uses it.
    pub fn set_policy(&mut self, kind: PolicyKind, minimise: Minimise) -> (PolicyKind, Minimise) {
        self.offer_policy(kind, minimise);
        self.use_policy(true);
        self.policy()
    }

    /// Says whether this participant uses the policy in force, or is content with any.
    pub fn use_policy(&mut self, is_used: bool) {
        self.arena.storage.use_policy(is_used);
    }

    /// The same as `set_policy`, but for others it stays free to choose.
    pub(crate) fn offer_policy(&mut self, kind: PolicyKind, minimise: Minimise) {
        if self.arena.storage.is_policy_used() {
            self.follow_policy();
        } else {
            self.choose_policy(kind, minimise);
            let state = &mut self.arena.header_mut().policy;
            (state.kind, state.minimise) = (kind as u32, minimise as u32);
        }
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

    /// Goes by what the index says: another participant may have chosen anew.
    #[inline]
    pub(crate) fn follow_policy(&mut self) {
        let PolicyState { kind, minimise, .. } = self.arena.header().policy;
        if (kind, minimise) != (self.policy.number(), self.minimise as u32) {
            let kind = PolicyKind::of_number(kind);
            self.choose_policy(kind, Minimise::of_number(minimise));
        }
    }

    /// A request to the source for so many bytes took so many seconds: what counts where seconds are minimised.
    pub fn note_seconds(&mut self, size: u64, seconds: f64) {
        if self.minimise == Minimise::Seconds {
            self.arena.header_mut().policy.note_seconds(size, seconds);
        }
    }
}
