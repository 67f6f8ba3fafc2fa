//! Whether the cache is asked to keep what was not downloaded.

use clap::Args;

use super::{ConfigError, duration};
use crate::lease::LeaseOptions;

/// Flags of leases.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Leases")]
pub(crate) struct LeaseArgs {
    /// How often to ask the remote cache for the outputs of each output root that were not downloaded, so that it keeps
    /// them, and to report those it has lost; choose less than the time after which the cache evicts unused blobs
    #[arg(long, value_name = "DURATION", env = "OUTHAUL_LEASE_RENEWAL")]
    pub lease_renewal: Option<String>,

    /// How long after an output root's newest build to keep renewing the leases of its outputs
    #[arg(
        long,
        value_name = "DURATION",
        env = "OUTHAUL_LEASE_AGE",
        default_value = "1d"
    )]
    pub lease_age: String,

    /// Maximum number of leases to renew per second
    #[arg(long, value_name = "N", env = "OUTHAUL_LEASE_RATE", default_value_t = 2000)]
    pub lease_rate: u32,
}

impl LeaseArgs {
    /// How leases are kept, if they are.
    ///
    /// # Errors
    /// Naming the flag that is wrong.
    pub(crate) fn options(&self) -> Result<Option<LeaseOptions>, ConfigError> {
        let age = duration("--lease-age", &self.lease_age)?;
        if self.lease_rate == 0 {
            return Err(ConfigError::new("--lease-rate=0", "must be at least 1"));
        }
        let Some(text) = &self.lease_renewal else {
            return Ok(None);
        };
        let interval = duration("--lease-renewal", text)?;
        if interval.is_zero() {
            return Err(ConfigError::new(
                format!("--lease-renewal={text}"),
                "must be greater than zero",
            ));
        }
        Ok(Some(LeaseOptions {
            interval,
            age,
            rate: self.lease_rate,
        }))
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Alone {
        #[command(flatten)]
        lease: LeaseArgs,
    }

    fn options(args: &[&str]) -> Result<Option<LeaseOptions>, ConfigError> {
        let args = [&["outhaul"], args].concat();
        Alone::try_parse_from(args).unwrap().lease.options()
    }

    #[test]
    fn leases_are_kept_on_request_only() {
        assert_eq!(options(&[]), Ok(None));
        let kept = options(&["--lease-renewal=1h"]).unwrap().unwrap();
        assert_eq!(
            (kept.interval.as_secs(), kept.age.as_secs(), kept.rate),
            (3600, 86400, 2000)
        );
        for bad in [
            "--lease-renewal=0",
            "--lease-renewal=often",
            "--lease-rate=0",
            "--lease-age=old",
        ] {
            let error = options(
                &["--lease-renewal=1h"][..usize::from(!bad.contains("renewal"))]
                    .iter()
                    .copied()
                    .chain([bad])
                    .collect::<Vec<_>>(),
            )
            .unwrap_err();
            assert!(error.flag.starts_with(bad.split('=').next().unwrap()), "{error}");
        }
    }
}
