//! A receiver's task: posts what its queue holds, one document after the other.

use std::{sync::Arc, time::Instant};

use super::{
    document::Document,
    error::DeliveryError,
    http::Poster,
    queue::Queue,
    retry::{Answer, Patience},
};
use crate::metrics::{Metrics, Notified};

/// Delivers until the queue is closed and empty.
pub(super) async fn deliver(queue: Arc<Queue>, poster: Poster, patience: Patience, metrics: Metrics) {
    while let Some(document) = queue.pop().await {
        let outcome = match deliver_one(&poster, &patience, &document).await {
            Ok(()) => Notified::Sent,
            Err(reason) => {
                tracing::warn!(
                    receiver = %poster.url(),
                    invocation = %document.invocation_id,
                    event = %document.event,
                    delivery = %document.delivery,
                    "failed to deliver a notification: {reason}"
                );
                Notified::Failed
            }
        };
        metrics.notification("url", outcome, 1);
    }
}

async fn deliver_one(poster: &Poster, patience: &Patience, document: &Document) -> Result<(), DeliveryError> {
    let began = Instant::now();
    let mut tries = 0;
    loop {
        let answer = poster.post(document, patience.deadline).await;
        tries += 1;
        let (reason, asked) = match answer {
            Answer::Taken => return Ok(()),
            Answer::Refused(reason) => return Err(DeliveryError::Refused(reason)),
            Answer::Later { reason, asked } => (reason, asked),
        };
        let Some(wait) = patience.wait(tries, began.elapsed(), asked, rand::random()) else {
            return Err(DeliveryError::GivenUp { reason, tries });
        };
        tracing::debug!(receiver = %poster.url(), delivery = %document.delivery, ?wait, "{reason}; retrying");
        tokio::time::sleep(wait).await;
    }
}
