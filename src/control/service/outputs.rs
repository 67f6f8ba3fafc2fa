//! What is recorded of outputs.

use std::{collections::HashMap, path::PathBuf};

use tokio::sync::mpsc;
use tonic::Status;

use super::{Service, find::Found, show};
use crate::{
    control::staging,
    exec_path::ExecPath,
    materialize::place::Placer,
    proto::outhaul::v1 as pb,
    record::{InvocationRow, OutputRow, OutputState, RootId, Which},
};

/// Rows that are looked at in one go.
const PAGE: usize = 1024;

impl Service {
    /// What is recorded of outputs, with their state checked against the disk; an empty entry for what is not found.
    /// With an invocation, only those of its output root.
    ///
    /// # Errors
    /// When there is no such invocation, or it has no output root.
    pub async fn stat(&self, paths: Vec<String>, invocation: &str) -> Result<Vec<pb::Output>, Status> {
        self.catch_up().await;
        let only = match invocation {
            "" => None,
            id => Some(
                self.named_row(id)
                    .await?
                    .root
                    .ok_or_else(|| Status::not_found("the invocation has no output root"))?,
            ),
        };
        let answer = self.read(move |service, gone| {
            let mut placers = HashMap::new();
            paths
                .iter()
                .take_while(|_| !gone.is_cancelled())
                .map(|path| match service.find(path, only) {
                    Some(found) => {
                        let present = service.is_present(&mut placers, &found);
                        show::output(&found, present)
                    }
                    None => pb::Output::default(),
                })
                .collect()
        });
        Ok(answer.await.unwrap_or_default())
    }

    /// An invocation, the newest build for an empty id.
    async fn named_row(&self, id: &str) -> Result<InvocationRow, Status> {
        let which = Which::of(id);
        let row = self.row_of(id).await;
        row.ok_or_else(|| Status::not_found(which.not_recorded()))
    }

    /// Every recorded output of an invocation's root, the newest build's for an empty id; of one class, if given.
    /// Answers through the channel, which holds it back.
    ///
    /// # Errors
    /// When there is no such invocation, or what it named is not known.
    pub async fn outputs(
        &self,
        id: &str,
        class: pb::OutputClass,
    ) -> Result<mpsc::Receiver<pb::Output>, Status> {
        self.catch_up().await;
        let row = self.named_row(id).await?;
        let exec_root = PathBuf::from(&row.exec_root);
        let (answer, outputs) = mpsc::channel(256);
        let Some(root) = row.root else {
            let named = self.named(row).await?;
            tokio::spawn(staging::tell(named, class, answer));
            return Ok(outputs);
        };
        let mut listing = Listing {
            root,
            exec_root,
            class,
            rows: None,
            placers: HashMap::new(),
        };
        let service = self.clone();
        tokio::spawn(async move {
            // Page by page: anyone who takes them slowly keeps nobody else from reading.
            loop {
                let read = service.read(move |service, _| {
                    let page = listing.page(service);
                    (listing, page)
                });
                let Some((rest, (page, is_last))) = read.await else {
                    return;
                };
                listing = rest;
                for output in page {
                    if answer.send(output).await.is_err() {
                        return;
                    }
                }
                if is_last {
                    return;
                }
            }
        });
        Ok(outputs)
    }
}

/// A root's outputs on their way to who asked for them.
struct Listing {
    root: RootId,
    exec_root: PathBuf,
    class: pb::OutputClass,
    rows: Option<Box<dyn Iterator<Item = (ExecPath, OutputRow)> + Send>>,
    placers: HashMap<RootId, Option<Placer>>,
}

impl Listing {
    /// The next of them, and whether they are the last. Blocks.
    fn page(&mut self, service: &Service) -> (Vec<pb::Output>, bool) {
        let root = self.root;
        let rows = self
            .rows
            .get_or_insert_with(|| Box::new(service.record.scan_outputs(root, "")));
        let (mut page, mut seen) = (Vec::new(), 0);
        for (path, row) in rows.take(PAGE) {
            seen += 1;
            if self.class != pb::OutputClass::Unspecified && self.class != row.class.into() {
                continue;
            }
            let found = Found {
                root,
                exec_root: self.exec_root.clone(),
                path,
                row,
            };
            let present =
                found.row.state == OutputState::Materialized && service.is_present(&mut self.placers, &found);
            page.push(show::output(&found, present));
        }
        (page, seen < PAGE)
    }
}
