//! Absences: keys that the source is known not to have.
//!
//! An absence is made as an entry is: under the ticket of the flight that brought it, so a change of
//! the source that came in between keeps it out. It stands for no bytes, so that one step makes it,
//! and it takes part in no bound but its own: absences only ever push each other out, the least
//! recently used first.
//!
//! Metadata documents are asked for where there may be none yet, so the absence of one counts only
//! while another one shows that there is a node, and that of attributes only if it was learned after the
//! source was last asked for that one: see [`Cache::knows_absent`] and [`Cache::drop_older_absences`].

use super::cache::{BATCH, Cache, Found, Freshness, Victim};
use super::entry::SKEW;
use super::in_flight::{ClosedFlight, Ticket};
use super::keys::{Rest, START};
use super::lookup::can_serve;
use super::peers::Peers;
use crate::arena::{Arena, End, Kind, List, ROOT, State, Storage};
use crate::error::{Error, Result};
use crate::key::{self, Asked, ByteRange};
use crate::policy::Eviction;

/// Absences that an index holds at most, ...
pub const MAX_ABSENCES: u64 = 1 << 20;
/// ... one for so many bytes of the bound, which is about four times what one takes in memory, ...
pub const BOUND_PER_ABSENCE: u64 = 256;
/// ... but so many in any case, unless nothing is cached at all.
pub const FEW_ABSENCES: u64 = 1024;

/// Metadata documents that make a node, in both formats of Zarr, ...
pub const NODES: [&str; 3] = ["zarr.json", ".zarray", ".zgroup"];
/// ... and those that a node may have besides.
pub const BESIDES: [&str; 2] = [".zattrs", ".zmetadata"];

/// Which absences a look-up believes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AbsenceAges {
    /// Those that were learned less than so many milliseconds ago; `None` for any age.
    pub own: Option<u64>,
    /// Of a metadata document, beside another one that was fetched less than so many milliseconds ago.
    pub node: Option<u64>,
}

/// What an index answers to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer<F> {
    /// An entry serves it.
    Found(F),
    /// The source has no such key.
    Absent,
    /// There is an absence, and its greatest age was not given: ask again.
    PerhapsAbsent,
    /// Only the source can tell.
    Unknown,
}

/// The node of a metadata document, with a slash unless it is the root, and its name.
fn split_document(key: &str) -> (&str, &str) {
    key.split_at(key.rfind('/').map_or(0, |slash| slash + 1))
}

impl<S: Peers, T: Clone, P: Eviction> Cache<S, T, P> {
    /// Absences, those that are too old among them.
    #[must_use]
    pub fn absences(&self) -> u64 {
        self.arena.header().absences
    }

    /// Absences that this index may hold.
    #[must_use]
    pub fn max_absences(&self) -> u64 {
        match self.bound() {
            0 => 0,
            bound => (bound / BOUND_PER_ABSENCE).clamp(FEW_ABSENCES, MAX_ABSENCES),
        }
    }

    /// The source has no such key: its entries go, it is remembered as missing if that is to be `kept`,
    /// and the flight of the ticket is closed. Only the last where the ticket is void, or where a process
    /// has found the key later than this read has begun.
    pub fn commit_absence(
        &mut self,
        key: &str,
        ticket: Ticket,
        fetched: u64,
        now: u64,
        kept: bool,
    ) -> Result<(Vec<Victim>, Option<ClosedFlight<T>>)> {
        let mut victims = Vec::new();
        if self.valid_key(key, ticket).is_some() && !self.is_known_since(key, fetched, now)? {
            self.arena.storage.check_place()?;
            victims = self.drop_key(key)?;
            // What is not listed yet may be older than this, and would come before it.
            if kept && self.arena.storage.is_complete() && key::labels_fit(key) {
                self.add_absence(key, fetched.min(now))?;
            }
        }
        Ok((victims, self.flights.close(key, ticket)))
    }

    /// Whether a value of a key, or a range, was fetched after this time. One from the future does not count.
    fn is_known_since(&self, key: &str, fetched: u64, now: u64) -> Result<bool> {
        let since = fetched.saturating_add(1)..=now.saturating_add(SKEW);
        let value = self.arena.find(key, ByteRange::Full)?;
        let object = self.arena.find_object(key)?;
        let newest = object.map(|i| Ok(self.arena.get(i)?.later)).transpose()?;
        for i in value.into_iter().chain(newest.filter(|i| *i != 0)) {
            let cell = self.arena.get(i)?;
            if cell.is_entry() && cell.state() == State::Live && since.contains(&cell.time()) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn add_absence(&mut self, key: &str, fetched: u64) -> Result<()> {
        let most = self.max_absences();
        // More than one where the bound has become smaller.
        for _ in 0..BATCH {
            if self.absences() < most {
                break;
            }
            match self.arena.end(List::Absences, End::First)? {
                Some(i) => self.remove_absence(i)?,
                None => return Ok(()),
            }
        }
        if self.absences() >= most {
            return Ok(());
        }
        let i = match self.arena.insert_absence(key) {
            Ok(Some(i)) => i,
            // An index that cannot grow does without.
            Ok(None) => return Ok(()),
            Err(error) if !error.is_fatal() => return Ok(()),
            Err(error) => return Err(error),
        };
        let epoch = self.epoch();
        let header = self.arena.header_mut();
        header.absences = header.absences.saturating_add(1);
        header.absences_made = header.absences_made.saturating_add(1);
        let number = header.absences_made;
        let cell = self.arena.get_mut(i)?;
        cell.set_time(fetched.max(1));
        cell.set_absence_number(number);
        cell.later = epoch;
        self.arena.link(List::Absences, i, End::Last)?;
        self.tell_absences();
        Ok(())
    }

    fn remove_absence(&mut self, i: u32) -> Result<()> {
        self.arena.unlink(List::Absences, i)?;
        self.arena.remove(i)?;
        let header = self.arena.header_mut();
        let rest = header.absences.checked_sub(1);
        header.absences = rest.ok_or(Error::Corrupt("fewer absences than counted"))?;
        self.tell_absences();
        Ok(())
    }

    /// Notes their number for those who ask without the lock.
    pub(crate) fn tell_absences(&self) {
        let count = self.absences();
        let told = &self.tally.absences;
        told.store(count, std::sync::atomic::Ordering::Relaxed);
    }

    /// Changes when any key may have been written by a process that cannot use the index.
    fn epoch(&self) -> u32 {
        self.arena.storage.epoch()
    }

    /// Ends the absence of a key.
    pub(super) fn drop_absence(&mut self, key: &str) -> Result<()> {
        if self.absences() != 0
            && let Some(i) = self.arena.find_absence(key)?
        {
            self.remove_absence(i)?;
        }
        Ok(())
    }

    /// The source has this document, of which a flight was opened: if it makes a node real, the absences of
    /// what belongs to the node end that were made before that, when there may have been no node.
    ///
    /// A node has one of the documents that make it real, so the absences of the others hold.
    pub(super) fn drop_older_absences(&mut self, key: &str, ticket: Ticket) -> Result<()> {
        let (node, name) = split_document(key);
        if self.absences() == 0 || !NODES.contains(&name) {
            return Ok(());
        }
        let made = self.flights.absences_made(key, ticket).unwrap_or(u64::MAX);
        for other in BESIDES {
            if let Some(i) = self.arena.find_absence(&format!("{node}{other}"))?
                && self.arena.get(i)?.absence_number() <= made
            {
                self.remove_absence(i)?;
            }
        }
        Ok(())
    }

    /// Ends absences below a prefix ("" is everything), a batch at a time, from [`START`] on. Returns where to go on.
    ///
    /// Keys outside the prefix are looked at only as in [`Cache::drain_prefix`].
    pub fn drain_absences(&mut self, prefix: &str, at: Rest) -> Result<Option<Rest>> {
        if self.absences() == 0 {
            return Ok(None);
        }
        let prefix = prefix.trim_end_matches('/');
        if prefix.is_empty() {
            for _ in 0..BATCH {
                match self.arena.end(List::Absences, End::First)? {
                    Some(i) => self.remove_absence(i)?,
                    None => return Ok(None),
                }
            }
            return Ok(Some(START));
        }
        let walk = self.walk_of(at);
        let (found, next) = match walk {
            None => {
                self.drop_absence(prefix)?;
                self.absences_below(prefix)?
            }
            Some(walk) => self.next_cut_off(prefix, walk, true, is_absence)?,
        };
        for i in found {
            self.remove_absence(i)?;
        }
        if walk.is_none() {
            self.check_taken(prefix, next, is_absence)?;
        }
        Ok(next)
    }

    /// Absences below a prefix, a batch or a few more at most; and where to go on.
    fn absences_below(&self, prefix: &str) -> Result<(Vec<u32>, Option<Rest>)> {
        let mut found = Vec::new();
        if let Some(dir) = self.arena.find_dir(&format!("{prefix}/"))?
            && dir != ROOT
        {
            found = self.arena.absences_below(dir, BATCH)?;
        }
        let next = (found.len() >= BATCH).then_some(START);
        let cut = self.arena.cut_by(prefix, true)?;
        found.extend(self.arena.cut_off_in_few(&cut, true)?);
        if next.is_none() && self.arena.is_of_many(&cut, true)? {
            return Ok((found, Some(self.walk())));
        }
        Ok((found, next))
    }

    /// Whether the source is known not to have a key.
    ///
    /// That of a metadata document counts only while another document of the same node is cached that
    /// makes the node real: who waits for a node to appear asks the source each time.
    pub fn knows_absent(&self, key: &str, now: u64, ages: AbsenceAges) -> Result<bool> {
        let Some(i) = self.find_absence(key)? else {
            return Ok(false);
        };
        let cell = self.arena.get(i)?;
        let fresh = Freshness::from((now, ages.own));
        if cell.later != self.epoch() || fresh.is_stale(cell.time()) {
            return Ok(false);
        }
        self.is_vouched_for(key, (now, ages.node).into())
    }

    fn find_absence(&self, key: &str) -> Result<Option<u32>> {
        if self.absences() == 0 {
            return Ok(None);
        }
        self.arena.find_absence(key)
    }

    /// Whether the absence of a key can be believed, or an entry shows that its node is there.
    fn is_vouched_for(&self, key: &str, fresh: Freshness) -> Result<bool> {
        let (node, name) = split_document(key);
        if !NODES.contains(&name) && !BESIDES.contains(&name) {
            return Ok(true);
        }
        for other in NODES.into_iter().filter(|other| *other != name) {
            let found = self
                .arena
                .find(&format!("{node}{other}"), ByteRange::Full)?;
            if let Some(i) = found
                && can_serve(self.arena.get(i)?, fresh)
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Finds what serves a request, and touches it. Where `ages` are not given, the answer may be
    /// [`Answer::PerhapsAbsent`].
    pub fn ask(
        &mut self,
        key: &str,
        asked: impl Into<Asked>,
        fresh: impl Into<Freshness>,
        ages: Option<AbsenceAges>,
    ) -> Result<Answer<Found>> {
        let fresh = fresh.into();
        if let Some(found) = self.peek(key, asked, fresh)? {
            self.policy.touch(&mut self.arena, found.handle as u32)?;
            self.read_planned(key, Some(found.handle as u32));
            return Ok(Answer::Found(found));
        }
        if let Some(i) = self.find_absence(key)? {
            let Some(ages) = ages else {
                return Ok(Answer::PerhapsAbsent);
            };
            if self.knows_absent(key, fresh.now, ages)? {
                if self.arena.list(List::Absences)[1] != i {
                    self.arena.unlink(List::Absences, i)?;
                    self.arena.link(List::Absences, i, End::Last)?;
                }
                return Ok(Answer::Absent);
            }
        }
        self.read_planned(key, None);
        Ok(Answer::Unknown)
    }

    /// Keys that are remembered as missing, least recently used first, for tests and tools.
    pub fn absent_keys(&self) -> Result<Vec<String>> {
        let cells = self.arena.list_cells(List::Absences)?;
        let known = |i: &u32| self.arena.get(*i).is_ok_and(|c| c.later == self.epoch());
        let names = cells.into_iter().filter(known).map(|i| self.arena.name(i));
        names.map(|name| Ok(name?.0)).collect()
    }
}

fn is_absence<S: Storage>(arena: &Arena<S>, i: u32) -> Result<bool> {
    Ok(arena.get(i)?.kind()? == Kind::Absent)
}
