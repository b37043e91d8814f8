//! Writes and deletes in the source: what they make void, and what they drop.

use super::{BATCH, Cache, Victim, shared_hash};
use crate::block::Block;
use crate::cell::State;
use crate::cells::{Cells, List, ROOT};
use crate::error::Res;
use crate::flights::{Flights, Ticket};
use crate::key::{self, Span};

impl<B: Block, T: Clone> Cache<B, T> {
    pub(super) fn drop_key(&mut self, key: &str) -> Res<Vec<Victim>> {
        let mut cells = Vec::new();
        cells.extend(self.cells.find(key, Span::Full)?);
        if let Some(object) = self.cells.find_object(key)? {
            cells.extend(self.cells.entries_below(object, usize::MAX, in_reach)?);
        }
        self.drop_all(&cells)
    }

    /// A write of this key begins: nothing that is cached of it is valid from now on.
    pub fn begin_write(&mut self, key: &str) -> Res<Vec<Victim>> {
        self.put_in_order()?;
        // First what may find the index damaged: a step that is taken again must not count twice.
        let victims = self.drop_key(key)?;
        self.change(key);
        self.mark_key(key, true);
        self.flights.begin_write(key, self.version(key));
        Ok(victims)
    }

    /// A write of this key has ended. Where it succeeded and no other write overlapped it, the
    /// ticket allows its value to be cached.
    pub fn end_write(&mut self, key: &str, ok: bool) -> Res<(Vec<Victim>, Option<Ticket>)> {
        self.put_in_order()?;
        let victims = self.drop_key(key)?;
        let alone = self.flights.end_write(key, self.version(key));
        self.change(key);
        self.mark_key(key, false);
        let version = self.version(key);
        let ticket = (ok && alone).then(|| self.flights.open(key, Span::Full, None, version));
        Ok((victims, ticket))
    }

    pub(super) fn change(&mut self, key: &str) {
        if !B::EXCLUSIVE {
            self.cells.block.change_key(shared_hash(key));
        }
    }

    pub(super) fn mark_key(&mut self, key: &str, begins: bool) {
        if !B::EXCLUSIVE {
            self.cells.block.mark_write(shared_hash(key), begins);
        }
    }

    /// The source has no such key.
    pub fn forget(&mut self, key: &str) -> Res<Vec<Victim>> {
        self.put_in_order()?;
        self.drop_key(key)
    }

    /// Makes the flights and writes below a prefix void; "" is everything. To be followed by
    /// [`Cache::sweep`].
    pub fn void_prefix(&mut self, prefix: &str) {
        let prefix = prefix.trim_end_matches('/');
        self.change(prefix);
        self.flights.void_where(|key| is_below(key, prefix));
    }

    /// A write of whatever is below a prefix begins or ends: until then nothing of that is kept.
    pub fn mark_change(&mut self, prefix: &str, begins: bool) {
        let prefix = prefix.trim_end_matches('/');
        self.flights.mark_change(prefix, begins);
        self.mark_key(prefix, begins);
    }

    /// Drops entries below a prefix ("" is everything), a batch at a time; to be called until it
    /// returns nothing. The keys outside the prefix are not looked at, save that a prefix that ends
    /// inside chunk coordinates (`a/c/12`, or a number below numbers) looks at the chunks beside it.
    pub fn sweep(&mut self, prefix: &str) -> Res<Vec<Victim>> {
        self.put_in_order()?;
        let prefix = prefix.trim_end_matches('/');
        if prefix.is_empty() {
            let cells = self.cells.entries_below(ROOT, BATCH, present)?;
            return self.drop_all(&cells);
        }
        let mut found = Vec::new();
        found.extend(self.cells.find(prefix, Span::Full)?);
        if let Some(object) = self.cells.find_object(prefix)? {
            found.extend(self.cells.entries_below(object, BATCH, present)?);
        }
        let dirs = format!("{prefix}/");
        if let Some(dir) = self.cells.find_dir(&dirs)? {
            found.extend(self.cells.entries_below(dir, BATCH, present)?);
        }
        for above in key::above_tails_below(prefix) {
            if let Some(dir) = self.cells.find_dir(&above)? {
                found.extend(self.cells.entries_in(dir, BATCH, |cells, i| {
                    Ok(present(cells, i)? && is_below(&cells.name(i)?.0, prefix))
                })?);
            }
        }
        let mut victims = Vec::new();
        for i in found {
            if present(&self.cells, i)? {
                self.take(i, &mut victims)?;
            }
        }
        Ok(victims)
    }

    /// Ends a reservation whose holder is gone. Nobody knows how far it came: what it has begun, and
    /// the deletes that it waits for, are left to later deletes.
    pub fn abandon(&mut self, id: u64) -> Res<()> {
        self.put_in_order()?;
        let Some(mut reservation) = self.reservations.remove(&id) else {
            return Ok(());
        };
        let asked = std::mem::take(&mut reservation.asked);
        let settled = self.settled(&[], &asked);
        self.reservations.insert(id, reservation);
        settled?;
        let victims = self.abort(id)?;
        self.settled_victims(&victims)
    }

    /// After a fork: what other threads of the parent had in flight will never land here.
    ///
    /// Returns the flights, for their payloads are the caller's to release.
    pub fn after_fork(&mut self) -> Res<Flights<T>> {
        self.put_in_order()?;
        let flights = self.flights.take();
        self.reservations.clear();
        self.cells.header_mut().promised = 0;
        for i in self.cells.walk(List::Busy)? {
            self.cells.orphan(i)?;
        }
        Ok(flights)
    }

    /// Somebody has emptied the index: nothing that was begun before counts any more.
    pub(crate) fn renew(&mut self) {
        self.flights.void_all();
        self.reservations.clear();
        self.touched.clear();
        self.seen.clear();
    }

    /// Says once more what is being written, in an index that was emptied meanwhile.
    pub(crate) fn mark_writes(&mut self) {
        self.mark_all(&self.writes());
    }

    /// What is being written here, by what its versions go by.
    pub(crate) fn writes(&self) -> Vec<u64> {
        self.flights.changed().map(shared_hash).collect()
    }

    pub(crate) fn mark_all(&mut self, writes: &[u64]) {
        for &hash in writes {
            self.cells.block.mark_write(hash, true);
        }
    }

    /// Takes over what participants had in hand that are dead now.
    pub(crate) fn bury(&mut self, dead: &[usize]) -> Res<()> {
        self.put_in_order()?;
        for &n in dead {
            let block = &mut self.cells.block;
            let gone = block.bury(n);
            let header = block.header_mut();
            header.promised = header.promised.saturating_sub(gone.promised);
            if gone.is_writing() {
                // What was read while it wrote may be older than what it has written.
                block.change_all();
            }
            for i in self.cells.walk(List::Busy)? {
                if self.cells.get(i)?.earlier as usize == n + 1 {
                    self.cells.orphan(i)?;
                }
            }
        }
        Ok(())
    }

    /// Enters a value that a walk of the cache store has found, unless it is known. Values are to
    /// be given in the order of their fetch; 0 is for one that cannot be dated. Returns whether it was new.
    pub fn adopt(&mut self, cache_key: &str, size: u64, fetched: u64) -> Res<bool> {
        self.put_in_order()?;
        let Some((key, span)) = Span::parse(cache_key) else {
            return Ok(false);
        };
        // A key that was written since the index was emptied: the walk may have seen the old value.
        let written = self.version(key) != self.cells.block.first_version();
        let Some(i) = self.cells.begin_writing(key, span, size)? else {
            return Ok(false);
        };
        if written {
            self.cells.get_mut(i)?.set_state(State::Dropping);
            self.cells.orphan(i)?;
            return Ok(true);
        }
        self.cells.make_present(i, None, fetched)?;
        if fetched == 0 {
            self.cells.undate(i)?;
        }
        Ok(true)
    }
}

fn in_reach<B: Block>(cells: &Cells<B>, i: u32) -> Res<bool> {
    Ok(matches!(
        cells.get(i)?.state(),
        State::Present | State::Orphan
    ))
}

fn present<B: Block>(cells: &Cells<B>, i: u32) -> Res<bool> {
    Ok(cells.get(i)?.state() == State::Present)
}

fn is_below(key: &str, prefix: &str) -> bool {
    prefix.is_empty()
        || key
            .strip_prefix(prefix)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}
