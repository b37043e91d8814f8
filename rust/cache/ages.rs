//! Which entries are too old for everybody: for each store that has their source open, in any process.
//!
//! Each participant tells the others the longest age of each source that it has open. An entry is of use as long as it is
//! younger than one of those of its source; where no participant names the source, nothing is known of it, so always.

use bytemuck::{Pod, Zeroable};
use smallvec::SmallVec;

use super::cache::{Cache, Freshness};
use super::peers::Peers;
use crate::arena::{End, ROOT};
use crate::error::Result;
use crate::policy::Eviction;

/// Sources that one participant names to the others.
pub const SOURCES: usize = 16;

/// Sources with an age that one reservation looks at; the next one goes on from there.
const LOOKS: usize = 8;

/// The age of a source with values that are of use always.
const ALWAYS: u64 = u64::MAX;

/// A source: what the 32 hex digits of its folder stand for; of a place that holds one source alone, zeros.
type Label = [u8; 16];
const WHOLE: Label = [0; 16];

/// How long the values of a source are of use.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct SourceAge {
    label: Label,
    /// Milliseconds after the fetch.
    age: u64,
}

impl SourceAge {
    /// That of the source in this folder, the name of which is 32 hex digits; `None` where it is not.
    #[must_use]
    pub fn of(folder: &str, age: Option<u64>) -> Option<Self> {
        Some(SourceAge {
            label: label_of(folder)?,
            age: limit(age),
        })
    }

    /// That of a place that holds one source alone.
    pub(super) fn of_place(age: Option<u64>) -> Self {
        SourceAge {
            label: WHOLE,
            age: limit(age),
        }
    }

    fn is_limited(&self) -> bool {
        self.age != ALWAYS
    }
}

/// However long an age is, what is from the future is of none.
fn limit(age: Option<u64>) -> u64 {
    age.map_or(ALWAYS, |age| age.min(ALWAYS - 1))
}

/// What one participant tells the others.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct ToldAges {
    /// The shortest ages first.
    told: [SourceAge; SOURCES],
    count: u64,
    /// The longest age of the sources that it has open beside these, if it has any; any source may be one of them.
    longest_other: u64,
}

impl ToldAges {
    fn of(all: &[SourceAge]) -> Self {
        let mut sorted: SmallVec<[SourceAge; SOURCES]> = all.into();
        sorted.sort_unstable_by_key(|one| (one.age, one.label));
        let (told, others) = sorted.split_at(sorted.len().min(SOURCES));
        let mut ages = ToldAges {
            count: told.len() as u64,
            longest_other: others.last().map_or(0, |one| one.age),
            ..ToldAges::default()
        };
        for (to, from) in ages.told.iter_mut().zip(told) {
            *to = *from;
        }
        ages
    }

    fn all(&self) -> &[SourceAge] {
        self.told.get(..self.count as usize).unwrap_or_default()
    }

    /// The age for which values of this source may be of use to it; `None` for none.
    fn of_source(&self, label: &Label) -> Option<u64> {
        let told = self.all().iter().find(|one| one.label == *label);
        let other = Some(self.longest_other).filter(|age| *age != 0);
        told.map(|one| one.age).or(other)
    }
}

/// What this participant knows of its own sources.
#[derive(Debug, Default)]
pub(super) struct Ages {
    /// By their labels.
    all: Vec<SourceAge>,
    /// Those with an age.
    limited: Vec<SourceAge>,
    /// Of all that are limited, here and elsewhere, the one that is looked at next.
    next: usize,
}

impl Ages {
    fn of(mut all: Vec<SourceAge>) -> Self {
        all.sort_unstable_by_key(|one| (one.label, one.age));
        // Several have the same source open: the longest age.
        all.reverse();
        all.dedup_by_key(|one| one.label);
        all.reverse();
        let limited = all.iter().filter(|one| one.is_limited()).copied();
        Ages {
            limited: limited.collect(),
            next: 0,
            all,
        }
    }

    fn of_source(&self, label: &Label) -> Option<u64> {
        let at = self.all.binary_search_by_key(label, |one| one.label);
        at.ok().and_then(|at| self.all.get(at)).map(|one| one.age)
    }
}

impl<S: Peers, T: Clone, P: Eviction> Cache<S, T, P> {
    /// Says which sources this participant has open, and for how long their values are of use.
    pub fn set_ages(&mut self, all: Vec<SourceAge>) {
        self.ages = Ages::of(all);
        let told = self.told_ages();
        self.arena.storage.set_ages(&told);
    }

    /// The same, before the storage can be used.
    pub(crate) fn note_ages(&mut self, all: Vec<SourceAge>) {
        self.ages = Ages::of(all);
    }

    /// What the others are told.
    pub(crate) fn told_ages(&self) -> ToldAges {
        ToldAges::of(&self.ages.all)
    }

    fn others(&self) -> impl Iterator<Item = &ToldAges> + Clone {
        let own = self.arena.storage.own_slot();
        let all = self.arena.storage.participants().iter().enumerate();
        all.filter(move |(n, other)| *n != own && other.live != 0)
            .map(|(_, other)| &other.ages)
    }

    /// Sources with an age, as participants have told it; one that several have open comes more than once.
    fn limited(&self) -> impl Iterator<Item = &SourceAge> + Clone {
        let told = self.others().flat_map(|other| {
            let told = other.all().iter();
            told.take_while(|one| one.is_limited())
        });
        self.ages.limited.iter().chain(told)
    }

    /// Which entries of a source are of use to any store; `None` where it is all of them.
    fn use_of(&self, label: &Label, now: u64) -> Option<Freshness> {
        let own = self.ages.of_source(label);
        let others = self.others().filter_map(|other| other.of_source(label));
        let max_age = own.into_iter().chain(others).max();
        let max_age = max_age.filter(|age| *age != ALWAYS)?;
        Some((now, Some(max_age)).into())
    }

    /// Whether an entry is of no use to any store any more.
    pub(super) fn is_useless(&self, i: u32, now: u64) -> Result<bool> {
        // Most are of use whatever their source is.
        let fetched = self.arena.get(i)?.time();
        let shortest = self.limited().map(|one| one.age).min();
        if !Freshness::from((now, shortest)).is_stale(fetched) {
            return Ok(false);
        }
        let label = match self.arena.source_of(i)? {
            ROOT => Some(WHOLE),
            folder => label_of(&self.arena.name(folder)?.0),
        };
        let fresh = label.and_then(|label| self.use_of(&label, now));
        Ok(fresh.is_some_and(|fresh| fresh.is_stale(fetched)))
    }

    /// An entry of no use to any store, if one is found among the next few sources with an age.
    pub(super) fn next_useless(&mut self, now: u64) -> Result<Option<u32>> {
        let count = self.limited().count();
        if count == 0 {
            return Ok(None);
        }
        let first = self.ages.next % count;
        let next = self.limited().cycle().skip(first).take(count.min(LOOKS));
        let labels: SmallVec<[Label; LOOKS]> = next.map(|one| one.label).collect();
        for (n, label) in labels.iter().enumerate() {
            let Some(fresh) = self.use_of(label, now) else {
                continue;
            };
            let Some(folder) = self.folder_of(label)? else {
                continue;
            };
            // Those that are too old are at one end of the ring, those from the future at the other.
            for end in [End::First, End::Last] {
                if let Some(i) = self.arena.oldest_or_newest(folder, end)?
                    && fresh.is_stale(self.arena.get(i)?.time())
                {
                    // There may be more of this source.
                    self.ages.next = first + n;
                    return Ok(Some(i));
                }
            }
        }
        self.ages.next = first + labels.len();
        Ok(None)
    }

    fn folder_of(&self, label: &Label) -> Result<Option<u32>> {
        if *label == WHOLE {
            return Ok(Some(ROOT));
        }
        let mut folder = [b'/'; 2 * size_of::<Label>() + 1];
        for (to, byte) in folder.chunks_exact_mut(2).zip(label) {
            to.copy_from_slice(&[byte >> 4, byte & 15].map(digit));
        }
        match std::str::from_utf8(&folder) {
            Ok(folder) => self.arena.find_dir(folder),
            Err(_) => Ok(None),
        }
    }
}

fn digit(value: u8) -> u8 {
    match value {
        0..10 => b'0' + value,
        _ => b'a' + value - 10,
    }
}

fn label_of(folder: &str) -> Option<Label> {
    let mut label = Label::default();
    let digits = folder.as_bytes();
    if digits.len() != 2 * label.len() {
        return None;
    }
    for (to, pair) in label.iter_mut().zip(digits.chunks_exact(2)) {
        for &digit in pair {
            let value = match digit {
                b'0'..=b'9' => digit - b'0',
                b'a'..=b'f' => digit - b'a' + 10,
                _ => return None,
            };
            *to = *to << 4 | value;
        }
    }
    Some(label)
}
