//! The policies by their names.

use super::adaptive::Adaptive;
use super::entries::Entries;
use super::lru::Lru;
use super::none::NoEviction;
use super::policy::{Eviction, Newcomer};
use crate::arena::List;
use crate::error::Result;

/// An eviction policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PolicyKind {
    /// What was used least recently goes first.
    #[default]
    Lru,
    /// What came first stays.
    None,
    /// The best of several rules, by what the traffic shows.
    Adaptive,
}

impl PolicyKind {
    /// All of them.
    pub const ALL: [PolicyKind; 3] = [PolicyKind::Lru, PolicyKind::None, PolicyKind::Adaptive];

    /// The name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            PolicyKind::Lru => "lru",
            PolicyKind::None => "none",
            PolicyKind::Adaptive => "adaptive",
        }
    }

    /// The policy of this name.
    #[must_use]
    pub fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == name)
    }

    /// The policy that a header names; one that none has is the default.
    pub(crate) fn of_number(number: u32) -> Self {
        let mut all = Self::ALL.into_iter();
        all.find(|kind| *kind as u32 == number).unwrap_or_default()
    }
}

/// What the adaptive policy and plans make least of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Minimise {
    /// Requests to the source: each miss costs the same.
    #[default]
    Requests,
    /// Bytes from the source.
    Bytes,
    /// Seconds of waiting for the source: a latency for each request, and a time for each byte, as measured.
    Seconds,
}

impl Minimise {
    /// All of them.
    pub const ALL: [Minimise; 3] = [Minimise::Requests, Minimise::Bytes, Minimise::Seconds];

    /// The name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Minimise::Requests => "requests",
            Minimise::Bytes => "bytes",
            Minimise::Seconds => "seconds",
        }
    }

    /// What has this name.
    #[must_use]
    pub fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|what| what.as_str() == name)
    }

    /// What a header names.
    pub(crate) fn of_number(number: u32) -> Self {
        let mut all = Self::ALL.into_iter();
        all.find(|what| *what as u32 == number).unwrap_or_default()
    }
}

/// The policy of an index, chosen when it is opened.
#[derive(Debug)]
pub enum Policy {
    /// See [`PolicyKind::Lru`].
    Lru(Lru),
    /// See [`PolicyKind::None`].
    None(NoEviction),
    /// See [`PolicyKind::Adaptive`].
    Adaptive(Adaptive),
}

impl Default for Policy {
    fn default() -> Self {
        Policy::of(PolicyKind::default())
    }
}

impl Policy {
    /// A policy of this kind.
    #[must_use]
    pub fn of(kind: PolicyKind) -> Self {
        match kind {
            PolicyKind::Lru => Policy::Lru(Lru::default()),
            PolicyKind::None => Policy::None(NoEviction),
            PolicyKind::Adaptive => Policy::Adaptive(Adaptive::default()),
        }
    }

    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> PolicyKind {
        match self {
            Policy::Lru(_) => PolicyKind::Lru,
            Policy::None(_) => PolicyKind::None,
            Policy::Adaptive(_) => PolicyKind::Adaptive,
        }
    }
}

macro_rules! each {
    ($policy:expr, $name:ident => $call:expr) => {
        match $policy {
            Policy::Lru($name) => $call,
            Policy::None($name) => $call,
            Policy::Adaptive($name) => $call,
        }
    };
}

impl Eviction for Policy {
    fn insert<E: Entries>(&mut self, entries: &mut E, entry: u32) -> Result<()> {
        each!(self, policy => policy.insert(entries, entry))
    }
    #[inline]
    fn touch<E: Entries>(&mut self, entries: &mut E, entry: u32) -> Result<()> {
        each!(self, policy => policy.touch(entries, entry))
    }
    fn remove<E: Entries>(&mut self, entries: &mut E, entry: u32) -> Result<()> {
        each!(self, policy => policy.remove(entries, entry))
    }
    fn admits<E: Entries>(&mut self, entries: &mut E, newcomer: Newcomer) -> Result<bool> {
        each!(self, policy => policy.admits(entries, newcomer))
    }
    fn turn_away<E: Entries>(&mut self, entries: &mut E, newcomer: Newcomer) -> Result<()> {
        each!(self, policy => policy.turn_away(entries, newcomer))
    }
    fn victim<E: Entries>(&mut self, entries: &mut E) -> Result<Option<u32>> {
        each!(self, policy => policy.victim(entries))
    }
    fn least<E: Entries>(&mut self, entries: &mut E) -> Result<Option<u32>> {
        each!(self, policy => policy.least(entries))
    }
    fn first_of<E: Entries>(&mut self, entries: &mut E, list: List) -> Result<Option<u32>> {
        each!(self, policy => policy.first_of(entries, list))
    }
    fn order<E: Entries>(&self, entries: &E) -> Result<Vec<u32>> {
        each!(self, policy => policy.order(entries))
    }
    fn validate<E: Entries>(&self, entries: &E) -> Result<()> {
        each!(self, policy => policy.validate(entries))
    }
    fn number(&self) -> u32 {
        self.kind() as u32
    }
    fn reset(&mut self) {
        each!(self, policy => policy.reset());
    }
}
