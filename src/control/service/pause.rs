//! Downloads that are paused on request.

use std::time::Duration;

use tokio::time::Instant;

use super::Service;
use crate::{materialize::Pause, proto::outhaul::v1 as pb, units::now_ms};

/// A pause for longer is one without an end.
const LONGEST: Duration = Duration::from_secs(100 * 365 * 86400);

/// As it is told now.
fn shown(pause: Pause) -> pb::Pause {
    let left = |until: Instant| until.saturating_duration_since(Instant::now()).as_millis();
    let until_ms = pause.until.map_or(0, |until| {
        now_ms().saturating_add(i64::try_from(left(until)).unwrap_or(i64::MAX))
    });
    pb::Pause {
        all: pause.all,
        until_ms,
    }
}

impl Service {
    /// Pauses downloads: no more are begun, those under way are finished.
    pub(in crate::control) fn pause(&self, request: &pb::PauseRequest) -> pb::Pause {
        let after = Duration::from_millis(request.for_ms);
        let pause = Pause {
            all: request.all,
            until: (!after.is_zero() && after < LONGEST).then(|| Instant::now() + after),
        };
        self.materializer.pausing().pause(pause);
        tracing::info!(
            all = pause.all,
            for_ms = request.for_ms,
            "downloads are paused on request"
        );
        shown(pause)
    }

    /// Has downloads go on. Gives back what was paused.
    pub(in crate::control) fn resume(&self) -> Option<pb::Pause> {
        let ended = self.materializer.pausing().resume();
        if ended.is_some() {
            tracing::info!("downloads are resumed on request");
        }
        ended.map(shown)
    }

    /// What is paused at present.
    pub(crate) fn paused(&self) -> Option<pb::Pause> {
        self.materializer.pausing().now().map(shown)
    }
}
