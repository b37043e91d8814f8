//! A table that mostly holds one thing at a time, or none. That one is found without a hash: who reads
//! one key after the other has one flight and one reservation.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::Hash;

use foldhash::fast::RandomState;

/// The first comes into a place of its own, what comes while that is taken into a hash table.
#[derive(Debug)]
pub(crate) struct Few<K, V> {
    one: Option<(K, V)>,
    others: HashMap<K, V, RandomState>,
}

impl<K: Eq + Hash, V> Few<K, V> {
    /// Enters what is not there yet.
    #[inline]
    pub(crate) fn insert(&mut self, key: K, value: V) {
        if self.one.is_none() {
            self.one = Some((key, value));
        } else {
            self.others.insert(key, value);
        }
    }

    #[inline]
    pub(crate) fn get<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> Option<(&K, &V)>
    where
        K: Borrow<Q>,
    {
        match &self.one {
            Some((one, value)) if one.borrow() == key => Some((one, value)),
            _ => self.others.get_key_value(key),
        }
    }

    #[inline]
    pub(crate) fn get_mut<Q: Eq + Hash + ?Sized>(&mut self, key: &Q) -> Option<&mut V>
    where
        K: Borrow<Q>,
    {
        match &mut self.one {
            Some((one, value)) if (*one).borrow() == key => Some(value),
            _ => self.others.get_mut(key),
        }
    }

    #[inline]
    pub(crate) fn remove<Q: Eq + Hash + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        match self.one.take_if(|(one, _)| (*one).borrow() == key) {
            Some((_, value)) => Some(value),
            None => self.others.remove(key),
        }
    }

    /// Takes something out of a value, and the value out of the table where that has emptied it; with
    /// one hash.
    #[inline]
    pub(crate) fn take_from<R>(
        &mut self,
        key: K,
        take: impl FnOnce(&mut V) -> R,
        is_empty: impl FnOnce(&V) -> bool,
    ) -> Option<R> {
        if let Some((one, value)) = &mut self.one
            && *one == key
        {
            let taken = take(value);
            if is_empty(value) {
                self.one = None;
            }
            return Some(taken);
        }
        let Entry::Occupied(mut entry) = self.others.entry(key) else {
            return None;
        };
        let taken = take(entry.get_mut());
        if is_empty(entry.get()) {
            entry.remove();
        }
        Some(taken)
    }

    pub(crate) fn values(&self) -> impl Iterator<Item = &V> {
        let one = self.one.iter().map(|(_, value)| value);
        one.chain(self.others.values())
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (&K, &mut V)> {
        let one = self.one.iter_mut().map(|(key, value)| (&*key, value));
        one.chain(self.others.iter_mut())
    }

    pub(crate) fn len(&self) -> usize {
        usize::from(self.one.is_some()) + self.others.len()
    }

    pub(crate) fn clear(&mut self) {
        self.one = None;
        self.others.clear();
    }
}

impl<K, V> Default for Few<K, V> {
    fn default() -> Self {
        Few {
            one: None,
            others: HashMap::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_table_however_many_there_are() {
        let mut few = Few::<u64, u64>::default();
        let mut table = HashMap::new();
        let mut seed = 1u64;
        for step in 0..100_000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let key = (seed >> 33) % 7;
            match (seed >> 40) % 8 {
                0..3 if !table.contains_key(&key) => {
                    few.insert(key, step);
                    table.insert(key, step);
                }
                3 => assert_eq!(few.remove(&key), table.remove(&key)),
                4 => {
                    if let Some(value) = few.get_mut(&key) {
                        *value += 1;
                    }
                    table.entry(key).and_modify(|value| *value += 1);
                }
                5 => {
                    let taken = few.take_from(key, |value| *value, |value| value % 2 == 0);
                    assert_eq!(taken, table.get(&key).copied());
                    table.retain(|other, value| *other != key || *value % 2 != 0);
                }
                6 if step % 50 == 0 => {
                    few.clear();
                    table.clear();
                }
                _ => assert_eq!(few.get(&key), table.get_key_value(&key)),
            }
            assert_eq!(few.len(), table.len());
            assert_eq!(few.values().sum::<u64>(), table.values().sum::<u64>());
            assert_eq!(few.iter_mut().count(), table.len());
        }
    }
}
