//! The index: how it is made, the views that stores and sources have of it, and the keys of a view.
//!
//! What it does is bound in a file for each idea: [`super::lookups`], [`super::flights`],
//! [`super::reserve`], and so on. A method extracts, takes a step, and converts; why the lock is
//! never held for long, see [`super::backing`].

use std::borrow::Cow;
use std::hash::{BuildHasher, RandomState};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::backing::Backing;
use super::convert::{limits, policy};
use super::counters::ReadCounters;
use super::pool::Source;
use super::reservation::Abandoned;
use crate::arena::Heap;
use crate::cache::{Cache, Tally};
use crate::key::{Asked, ByteRange};
use crate::policy::{Minimise, PolicyKind};
use crate::shared::{Opening, SharedIndex};

/// An index with its bounds, flights and reservations, behind one lock.
#[pyclass(frozen, module = "zcache._core")]
pub(super) struct Index {
    pub(super) backing: Arc<Backing>,
    pub(super) abandoned: Arc<Abandoned>,
    pub(super) tally: Arc<Tally>,
    /// Of the store that these lookups are for.
    pub(super) counters: Option<Py<ReadCounters>>,
    /// Whether its requests go into the sample.
    pub(super) sampled: bool,
    /// Whether each hit is told with its entry.
    pub(super) tells_entries: bool,
    /// Whether the source of these keys slices as Python does.
    slices_like_python: bool,
    /// Of a pool: the source that these keys have.
    pub(super) source: Option<Arc<Source>>,
}

impl Index {
    fn over(backing: Backing, tally: Arc<Tally>, slices_like_python: bool) -> Self {
        Index {
            backing: Arc::new(backing),
            abandoned: Arc::default(),
            tally,
            counters: None,
            sampled: false,
            tells_entries: false,
            slices_like_python,
            source: None,
        }
    }

    /// A key in the index: that of a source of a pool is below the folder of the source.
    #[inline]
    pub(super) fn whole<'a>(&self, key: &'a str) -> Cow<'a, str> {
        match &self.source {
            None => Cow::Borrowed(key),
            Some(source) => Cow::Owned([&*source.folder, key].concat()),
        }
    }

    /// The same for a prefix: "" is all of the source.
    pub(super) fn below<'a>(&self, prefix: &'a str) -> Cow<'a, str> {
        match &self.source {
            Some(source) if prefix.is_empty() => Cow::Owned(source.label().to_owned()),
            _ => self.whole(prefix),
        }
    }

    /// The folder of the source, "" where there is none.
    pub(super) fn folder(&self) -> &str {
        self.source.as_ref().map_or("", |source| &*source.folder)
    }

    /// A key as its source has it.
    pub(super) fn own_key<'a>(&self, key: &'a str) -> &'a str {
        key.strip_prefix(self.folder()).unwrap_or(key)
    }

    /// The same in its place; false where it is another source's.
    pub(super) fn make_own(&self, key: &mut String) -> bool {
        let folder = self.folder();
        let is_own = key.starts_with(folder);
        if is_own {
            key.drain(..folder.len());
        }
        is_own
    }

    pub(super) fn own_keys(&self, mut keys: Vec<String>) -> Vec<String> {
        keys.retain_mut(|key| self.make_own(key));
        keys
    }

    /// Decoded chunks have an index of their own, so what takes many of them at once knows no sources.
    pub(super) fn require_own_keys(&self) -> PyResult<()> {
        match &self.source {
            None => Ok(()),
            Some(_) => Err(PyValueError::new_err(
                "many keys at once: not for the view that a source has of a pool",
            )),
        }
    }

    /// What is asked for, as the source slices.
    #[inline]
    pub(super) fn asked(&self, range: ByteRange) -> Asked {
        Asked {
            range,
            slices_like_python: self.slices_like_python,
        }
    }
}

#[pymethods]
impl Index {
    #[new]
    #[pyo3(signature = (*, max_size=None, max_age=None, slices_like_python=false, flat_namespace=false,
                        verify="never", seed=None, complete=true, unit=1,
                        eviction=PolicyKind::default().as_str(), minimise=Minimise::default().as_str(),
                        holes=None, sources=false))]
    #[allow(clippy::too_many_arguments)] // As many options as there are.
    fn new(
        max_size: Option<u64>,
        max_age: Option<f64>,
        slices_like_python: bool,
        flat_namespace: bool,
        verify: &str,
        seed: Option<u64>,
        complete: bool,
        unit: u64,
        eviction: &str,
        minimise: &str,
        holes: Option<bool>,
        sources: bool,
    ) -> PyResult<Self> {
        let (kind, minimise) = policy(eviction, minimise)?;
        let limits = limits(max_size, max_age, flat_namespace, verify)?;
        let block = if complete {
            Heap::default()
        } else {
            Heap::rebuilding()
        };
        let block = match holes {
            Some(_) => block.with_places().with_sources(),
            None if sources => block.with_sources(),
            None => block,
        };
        // One that cannot be guessed: keys could else be chosen so that they collide.
        let seed = seed.unwrap_or_else(|| RandomState::new().hash_one(0));
        let mut cache = Cache::new(block, limits, seed)?;
        cache.set_unit(unit);
        cache.set_policy(kind, minimise);
        cache.set_one_value_a_segment(holes == Some(false));
        let tally = cache.tally();
        Ok(Index::over(Backing::own(cache), tally, slices_like_python))
    }

    /// Opens the index of a cache directory; see the stub.
    #[staticmethod]
    #[pyo3(signature = (root, /, *, max_size=None, max_age=None, slices_like_python=false,
                        flat_namespace=false, verify="never", seed=0, unit=1, timeout=1.0,
                        eviction=PolicyKind::default().as_str(), minimise=Minimise::default().as_str(),
                        holes=None))]
    #[allow(clippy::too_many_arguments)] // As many options as there are.
    fn open(
        py: Python<'_>,
        root: PathBuf,
        max_size: Option<u64>,
        max_age: Option<f64>,
        slices_like_python: bool,
        flat_namespace: bool,
        verify: &str,
        seed: u64,
        unit: u64,
        timeout: f64,
        eviction: &str,
        minimise: &str,
        holes: Option<bool>,
    ) -> PyResult<(Self, bool)> {
        let policy = policy(eviction, minimise)?;
        let limits = limits(max_size, max_age, flat_namespace, verify)?;
        let opening = Opening {
            unit,
            patience: Duration::try_from_secs_f64(timeout).unwrap_or_default(),
            policy,
            with_places: holes.is_some(),
            one_value_a_segment: holes == Some(false),
            ..Opening::new(limits, seed)
        };
        let (directory, fresh) = py.detach(|| SharedIndex::open(&root, &opening))?;
        let tally = directory.tally();
        let index = Index::over(Backing::shared(directory), tally, slices_like_python);
        Ok((index, fresh))
    }

    #[pyo3(signature = (counters, sampled=false, tells_entries=false, /))]
    fn view(&self, counters: Py<ReadCounters>, sampled: bool, tells_entries: bool) -> Self {
        Index {
            backing: Arc::clone(&self.backing),
            abandoned: Arc::clone(&self.abandoned),
            tally: Arc::clone(&self.tally),
            counters: Some(counters),
            sampled,
            tells_entries,
            slices_like_python: self.slices_like_python,
            source: self.source.clone(),
        }
    }

    #[pyo3(signature = (label, slices_like_python, /))]
    fn within(&self, py: Python<'_>, label: &str, slices_like_python: bool) -> Self {
        Index {
            backing: Arc::clone(&self.backing),
            abandoned: Arc::clone(&self.abandoned),
            tally: Arc::clone(&self.tally),
            counters: self
                .counters
                .as_ref()
                .map(|counters| counters.clone_ref(py)),
            sampled: self.sampled,
            tells_entries: self.tells_entries,
            slices_like_python,
            source: Some(Arc::new(Source::new(label))),
        }
    }
}
