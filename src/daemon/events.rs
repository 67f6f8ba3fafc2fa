//! Listeners for build tools' events that are opened while the daemon runs: one for each command, each with its own way
//! upstream.

use std::{collections::HashSet, sync::Arc};

use tokio::{
    sync::{OnceCell, mpsc},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use super::{DaemonError, Services, recovery::recover};
use crate::{
    bes::{self, BesAddress, BesListener, BesService, HoldPolicy, Upstream, limits::BesLimits},
    journal::Journal,
};

/// Opens listeners. Cheap to clone.
#[derive(Clone)]
pub(crate) struct EventListeners {
    services: Services,
    journal: Option<Journal>,
    hold: HoldPolicy,
    limits: BesLimits,
    /// What the journal has of builds that were not settled is gone on with once, by the first listener. These are they.
    recovered: Arc<OnceCell<HashSet<(String, String)>>>,
    opened: mpsc::UnboundedSender<(BesService, BesListener)>,
}

/// An open listener.
pub(crate) struct EventListener {
    /// Where it is.
    pub address: BesAddress,
    /// What came through it.
    pub service: BesService,
}

impl EventListeners {
    pub(super) fn new(
        services: Services,
        journal: Option<Journal>,
        hold: HoldPolicy,
        limits: BesLimits,
    ) -> (Self, mpsc::UnboundedReceiver<(BesService, BesListener)>) {
        let (opened, opening) = mpsc::unbounded_channel();
        let listeners = Self {
            services,
            journal,
            hold,
            limits,
            recovered: Arc::default(),
            opened,
        };
        (listeners, opening)
    }

    /// Opens a listener on a free port of the loopback interface. What comes through it is passed on upstream, if there is
    /// such a service.
    ///
    /// # Errors
    /// When the system refuses; or the daemon has listeners of its own, or is ending.
    pub(crate) async fn open(&self, upstream: Option<Upstream>) -> Result<EventListener, DaemonError> {
        let any = BesAddress::Tcp(([127, 0, 0, 1], 0).into());
        let listener = BesListener::bind(&any)?;
        let address = listener.address()?;
        let service = self
            .services
            .events(self.hold, self.journal.clone(), upstream, self.limits);
        let journal = self.journal.as_ref();
        let recovering = || async {
            recover(&service, journal).await;
            self.services.engine.streams().into_iter().collect()
        };
        self.recovered.get_or_init(recovering).await;
        self.opened
            .send((service.clone(), listener))
            .map_err(|_| DaemonError::Closed)?;
        Ok(EventListener { address, service })
    }

    /// Whether a build, by its invocation id and its build id, came through a listener, and not from the journal.
    pub(crate) fn came_in(&self, stream: &(String, String)) -> bool {
        // Nothing comes in before there is a listener.
        self.recovered
            .get()
            .is_some_and(|others| !others.contains(stream))
    }
}

/// Serves listeners as they are opened, until the end. One that fails fails alone.
pub(super) async fn serve(
    mut opened: mpsc::UnboundedReceiver<(BesService, BesListener)>,
    stop: CancellationToken,
) -> Result<(), DaemonError> {
    let mut serving = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            Some((service, listener)) = opened.recv() => {
                serving.spawn(bes::serve(service, vec![listener], stop.clone()));
            }
        }
    }
    while let Some(served) = serving.join_next().await {
        let failed = match served {
            Ok(Ok(())) => continue,
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        tracing::error!("a listener for events failed: {failed}");
    }
    Ok(())
}
