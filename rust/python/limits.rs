//! The limits of an index, its eviction policy, and what counts against the bound.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::backing::step;
use super::convert::{age, policy, policy_names, when_to_verify};
use super::index::Index;
use crate::cache::SourceAge;

fn source_ages(ages: Vec<(String, Option<f64>)>) -> PyResult<Vec<SourceAge>> {
    let one = |(label, seconds): (String, Option<f64>)| {
        SourceAge::of(&label, seconds.map(age))
            .ok_or_else(|| PyValueError::new_err(format!("{label:?} is no label of a source")))
    };
    ages.into_iter().map(one).collect()
}

#[pymethods]
impl Index {
    #[pyo3(signature = (max_size, max_age, verify, uses_policy, ages=None, /))]
    fn set_limits(
        &self,
        py: Python<'_>,
        max_size: Option<u64>,
        max_age: Option<f64>,
        verify: &str,
        uses_policy: bool,
        ages: Option<Vec<(String, Option<f64>)>>,
    ) -> PyResult<()> {
        let verify = when_to_verify(verify)?;
        let ages = ages.map(source_ages).transpose()?;
        step!(self, py, |cache| {
            cache.set_limits(max_size.unwrap_or(u64::MAX), max_age.map(age), verify);
            cache.use_policy(uses_policy);
            if let Some(ages) = &ages {
                cache.set_ages(ages.clone());
            }
            Ok(())
        })
    }

    #[getter]
    fn bound(&self, py: Python<'_>) -> PyResult<Option<u64>> {
        let bound = step!(self, py, |cache| Ok(cache.bound()))?;
        Ok(Some(bound).filter(|bound| *bound != u64::MAX))
    }

    #[getter]
    fn excess(&self, py: Python<'_>) -> PyResult<u64> {
        step!(self, py, |cache| cache.excess())
    }

    fn folder_sum(&self, py: Python<'_>) -> PyResult<u64> {
        step!(self, py, |cache| Ok(cache.folder_sum()))
    }

    #[pyo3(signature = (size, /))]
    fn count_folders(&self, py: Python<'_>, size: i64) -> PyResult<()> {
        step!(self, py, |cache| {
            cache.count_folders(size);
            Ok(())
        })
    }

    #[pyo3(signature = (folder_sum, size, /))]
    fn count_folders_since(
        &self,
        py: Python<'_>,
        folder_sum: Option<u64>,
        size: i64,
    ) -> PyResult<()> {
        step!(self, py, |cache| {
            cache.count_folders_since(folder_sum, size);
            Ok(())
        })
    }

    fn policy(&self, py: Python<'_>) -> PyResult<(&'static str, &'static str)> {
        let policy = step!(self, py, |cache| Ok(cache.policy()))?;
        Ok(policy_names(policy))
    }

    #[pyo3(signature = (eviction, minimise, /))]
    fn set_policy(
        &self,
        py: Python<'_>,
        eviction: &str,
        minimise: &str,
    ) -> PyResult<(&'static str, &'static str)> {
        let (kind, minimise) = policy(eviction, minimise)?;
        let policy = step!(self, py, |cache| Ok(cache.set_policy(kind, minimise)))?;
        Ok(policy_names(policy))
    }

    #[pyo3(signature = (size, seconds, /))]
    fn note_seconds(&self, py: Python<'_>, size: u64, seconds: f64) -> PyResult<()> {
        step!(self, py, |cache| {
            cache.note_seconds(size, seconds);
            Ok(())
        })
    }
}
