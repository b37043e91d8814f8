//! How often keys were used that are in the cache no more.

/// Halvings after which a frequency is forgotten, or taken for one of so many halvings later.
const CYCLE: u32 = 8;
const FREQUENCY: u16 = 7;
const TAG_AT: u32 = 6;

/// Uses of a key: at most 7, halved now and then. In 6 bits: the uses in the lower three, above them the number
/// of the halving up to which they count.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frequency(u8);

impl Frequency {
    /// So many uses, at this halving.
    pub(super) fn new(uses: u8, halvings: u32) -> Self {
        Frequency(uses.min(FREQUENCY as u8) | ((halvings % CYCLE) as u8) << 3)
    }

    pub(super) fn from_bits(bits: u8) -> Self {
        Frequency(bits & 63)
    }

    pub(super) fn bits(self) -> u8 {
        self.0
    }

    /// Uses, with what was halved since.
    #[inline]
    pub(super) fn at(self, halvings: u32) -> u8 {
        let since = halvings.wrapping_sub(u32::from(self.0 >> 3)) % CYCLE;
        (self.0 & FREQUENCY as u8) >> since
    }
}

/// Slots of 2 bytes in pairs: a tag of the key, and its frequency. The less frequent of a pair makes room.
#[derive(Debug)]
pub(super) struct Ghosts<'a>(&'a [u16]);

impl<'a> Ghosts<'a> {
    pub(super) fn new(words: &'a [u64]) -> Self {
        Ghosts(bytemuck::try_cast_slice(words).unwrap_or_default())
    }

    /// The frequency of a key, 0 where it is not known.
    pub(super) fn get(&self, key: u64, halvings: u32) -> u8 {
        let (pair, tag) = place(key, self.0.len());
        let mut slots = pair.into_iter().filter_map(|at| self.0.get(at));
        let found = slots.find(|slot| **slot >> TAG_AT == tag);
        found.map_or(0, |slot| Frequency::from_bits(*slot as u8).at(halvings))
    }

    /// Remembers the frequency of a key.
    pub(super) fn put(words: &mut [u64], key: u64, uses: u8, halvings: u32) {
        let slots: &mut [u16] = bytemuck::try_cast_slice_mut(words).unwrap_or_default();
        let (pair, tag) = place(key, slots.len());
        let worth = |at: &usize| {
            let slot = slots.get(*at).copied().unwrap_or(0);
            let is_own = slot >> TAG_AT == tag;
            (!is_own, Frequency::from_bits(slot as u8).at(halvings))
        };
        if let Some(at) = pair.into_iter().min_by_key(worth)
            && let Some(slot) = slots.get_mut(at)
        {
            *slot = tag << TAG_AT | u16::from(Frequency::new(uses, halvings).bits());
        }
    }

    /// After the number of slots has doubled: each key may be in either half.
    pub(super) fn doubled(words: &mut [u64]) {
        let half = words.len() / 2;
        words.copy_within(..half, half);
    }
}

/// The slots of a key, of which there are a power of two, and its tag, which is never 0.
fn place(key: u64, slots: usize) -> ([usize; 2], u16) {
    let at = key as usize & slots.wrapping_sub(1);
    ([at, at ^ 1], (key >> 44) as u16 >> TAG_AT | 1)
}
