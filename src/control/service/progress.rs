//! How far calls are that are under way, for those who ask meanwhile.

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;

use super::Service;
use crate::materialize::{Counted, Counts};

/// Bytes of a call's name.
const NAME: usize = 64;

/// The calls that are under way, by the names that their callers gave them.
#[derive(Debug, Clone, Default)]
pub(super) struct UnderWay(Arc<Mutex<HashMap<String, Arc<Counted>>>>);

/// A call that can be asked about, until this is dropped.
pub(crate) struct CountedCall {
    under_way: UnderWay,
    name: String,
    /// What is counted of it.
    pub(crate) counted: Arc<Counted>,
}

impl Drop for CountedCall {
    fn drop(&mut self) {
        let mut calls = self.under_way.0.lock();
        // Another call may have been given the same name since.
        let is_ours = calls
            .get(&self.name)
            .is_some_and(|counted| Arc::ptr_eq(counted, &self.counted));
        if is_ours {
            calls.remove(&self.name);
        }
    }
}

impl Service {
    /// A call of this name. One without a name, or with one that is too long, cannot be asked about.
    pub(in crate::control) fn counted_call(&self, name: &str) -> CountedCall {
        let counted = Arc::new(Counted::default());
        if (1..=NAME).contains(&name.len()) {
            let mut calls = self.under_way.0.lock();
            calls.insert(name.to_owned(), counted.clone());
        }
        CountedCall {
            under_way: self.under_way.clone(),
            name: name.to_owned(),
            counted,
        }
    }

    /// How far the call of this name is. `None` if there is none.
    pub(in crate::control) fn progress(&self, name: &str) -> Option<Counts> {
        let calls = self.under_way.0.lock();
        calls.get(name).map(|counted| counted.now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{control::service::calls::tests::service, record::Record};

    #[tokio::test]
    async fn a_call_can_be_asked_about_by_its_name_as_long_as_it_is_under_way() {
        let dir = tempfile::tempdir().unwrap();
        let (record, _) = Record::open(dir.path()).unwrap();
        let service = service(record);
        let first = service.counted_call("x");
        assert_eq!(service.progress("x"), Some(Counts::default()));
        let second = service.clone().counted_call("x");
        drop(first);
        assert!(service.progress("x").is_some(), "the second one still is");
        drop(second);
        assert_eq!(service.progress("x"), None);
        let long = "x".repeat(NAME + 1);
        for name in ["", &long] {
            let _call = service.counted_call(name);
            assert_eq!(service.progress(name), None);
        }
    }
}
