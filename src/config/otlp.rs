//! Where traces and metrics are exported to.

use clap::Args;

use super::ConfigError;
use crate::telemetry::{Collector, Exporter};

/// Flags of OpenTelemetry.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "OpenTelemetry")]
pub(crate) struct OtlpArgs {
    /// Collector to export traces of builds and metrics to, by OTLP over gRPC: http://HOST:PORT, https://HOST:PORT or
    /// unix:PATH. OTEL_EXPORTER_OTLP_HEADERS, OTEL_SERVICE_NAME and other variables of OpenTelemetry are honoured
    #[arg(
        long,
        value_name = "URL",
        env = "OUTHAUL_OTLP_ENDPOINT",
        hide_env_values = true
    )]
    pub otlp_endpoint: Option<String>,
}

impl OtlpArgs {
    /// The collector, if one is named. To be called within the runtime.
    ///
    /// # Errors
    /// Naming the flag or the variable that is wrong.
    pub(crate) fn collector(&self) -> Result<Option<Collector>, ConfigError> {
        // An empty one takes back that of the environment or the file.
        let Some(url) = self.otlp_endpoint.as_deref().filter(|url| !url.is_empty()) else {
            return Ok(None);
        };
        // One that is not Unicode must not count as not set: then it is wrong.
        let variable = |name: &str| Some(std::env::var_os(name)?.to_string_lossy().into_owned());
        let collector = Collector::new("--otlp-endpoint", url, variable)?;
        Exporter::check(&collector)?;
        Ok(Some(collector))
    }
}
