//! How old the value of a key may be, by patterns.

use pyo3::prelude::*;
use pyo3::types::PyString;

use crate::key::Glob;

/// Maximum ages by glob patterns, of which the first that matches holds.
#[pyclass(frozen, module = "zcache._core")]
#[derive(Debug)]
pub(super) struct Ages {
    rules: Vec<(Glob, Option<f64>)>,
    default: Option<f64>,
}

impl Ages {
    pub(super) fn of_key(&self, key: &str) -> Option<f64> {
        let mut rules = self.rules.iter();
        let found = rules.find(|(glob, _)| glob.matches(key));
        found.map_or(self.default, |(_, age)| *age)
    }
}

#[pymethods]
impl Ages {
    #[new]
    #[pyo3(signature = (rules, default=None, /))]
    fn new(rules: Vec<(String, Option<f64>)>, default: Option<f64>) -> Self {
        let rules = rules.into_iter();
        let rules = rules.map(|(pattern, age)| (Glob::new(&pattern), age));
        let rules = rules.collect();
        Ages { rules, default }
    }

    #[pyo3(signature = (key, /))]
    fn of(&self, key: &Bound<'_, PyString>) -> Option<f64> {
        // Lone surrogates are in no pattern, and never cached.
        self.of_key(key.to_str().unwrap_or_default())
    }
}
