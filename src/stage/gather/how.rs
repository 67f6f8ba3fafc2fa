//! How files are verified and brought, as far as a request says.

use std::sync::Arc;

use crate::{
    archive::Limits,
    collection::{Checking, Checksums},
    stage::{error::StageError, request::Manner},
};

/// Bytes of all checksums of one request.
const CHECKSUMS: usize = 16 << 20;

/// A [`Manner`] that has been read.
pub(super) struct How {
    pub(super) checking: Checking,
    pub(super) checksums: Arc<Checksums>,
    pub(super) jobs: usize,
    pub(super) limits: Limits,
}

impl Default for How {
    fn default() -> Self {
        Self {
            checking: Checking::default(),
            checksums: Arc::default(),
            jobs: Manner::JOBS.into(),
            limits: Limits::default(),
        }
    }
}

impl How {
    /// Reads it, for a caller who may not ask for more than the defaults if `is_bounded`. Blocks.
    ///
    /// # Errors
    /// Naming the flag whose value cannot be used.
    pub(super) fn new(manner: &Manner, is_bounded: bool) -> Result<Self, StageError> {
        let setting = |flag: String, reason: String| StageError::Setting { flag, reason };
        let denied = "callers of this port may only ask for less than the default, not for more";
        let most = if is_bounded {
            Manner::JOBS
        } else {
            Manner::MOST_JOBS
        };
        let jobs = match manner.jobs {
            0 => Manner::JOBS.into(),
            jobs if jobs <= most.into() => jobs,
            jobs => {
                let reason = if is_bounded {
                    denied.to_owned()
                } else {
                    format!("must be from 1 to {}", Manner::MOST_JOBS)
                };
                return Err(setting(format!("--jobs={jobs}"), reason));
            }
        };
        let limits =
            Limits::parse(&manner.limits).map_err(|e| setting("--limit".to_owned(), e.to_string()))?;
        if let Some(limit) = limits.exceeds(&Limits::default()).filter(|_| is_bounded) {
            return Err(setting(format!("--limit={limit}"), denied.to_owned()));
        }
        let flag = || "--checksum-file".to_owned();
        if manner.checksums.len() > CHECKSUMS {
            return Err(setting(flag(), format!("has more than {} MiB", CHECKSUMS >> 20)));
        }
        Ok(Self {
            checking: manner.checking,
            checksums: Checksums::parse(&manner.checksums)
                .map_err(|e| setting(flag(), e.to_string()))?
                .into(),
            jobs: jobs as usize,
            limits,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::Limit;

    #[test]
    fn a_caller_elsewhere_may_ask_for_less_and_not_for_more() {
        let manner = |jobs, limit: &str| Manner {
            jobs,
            limits: vec![limit.to_owned()],
            ..Manner::default()
        };
        for (jobs, limit, here, elsewhere) in [
            (0, "archive-depth=256", true, true),
            (3, "archive-depth=9", true, true),
            (11, "archive-depth=9", true, false),
            (10, "archive-size=17GiB", true, false),
            (129, "archive-depth=9", false, false),
            (1, "no-such=9", false, false),
        ] {
            for (is_bounded, expected) in [(false, here), (true, elsewhere)] {
                let read = How::new(&manner(jobs, limit), is_bounded);
                assert_eq!(read.is_ok(), expected, "{jobs} {limit} {is_bounded}");
            }
        }
        let how = How::new(&manner(3, "archive-depth=9"), true).unwrap();
        assert_eq!((how.jobs, how.limits[Limit::Depth]), (3, 9));
        let wrong = Manner {
            checksums: "abc  file".to_owned(),
            ..Manner::default()
        };
        let error = How::new(&wrong, false).err().unwrap().to_string();
        assert!(error.starts_with("--checksum-file: line 1 "), "{error}");
    }
}
