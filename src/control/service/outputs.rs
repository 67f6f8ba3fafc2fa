//! What is recorded of outputs.

use std::{collections::HashMap, path::PathBuf};

use tokio::{sync::mpsc, task::spawn_blocking};

use super::{Service, find::Found, show};
use crate::{
    control::staging,
    proto::outhaul::v1 as pb,
    record::{InvocationRow, OutputState},
};

impl Service {
    /// What is recorded of outputs, with their state checked against the disk; an empty entry for what is not found.
    /// With an invocation, only those of its output root.
    ///
    /// # Errors
    /// In words: there is no such invocation, or it has no output root.
    pub async fn stat(&self, paths: Vec<String>, invocation: &str) -> Result<Vec<pb::Output>, String> {
        let only = match invocation {
            "" => None,
            id => Some(self.row_of(id)?.root.ok_or("the invocation has no output root")?),
        };
        let service = self.clone();
        let answer = spawn_blocking(move || {
            let mut placers = HashMap::new();
            paths
                .iter()
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

    /// An invocation, the newest for an empty id.
    fn row_of(&self, id: &str) -> Result<InvocationRow, String> {
        let row = if id.is_empty() {
            self.newest()
        } else {
            self.record.invocation(id)
        };
        row.ok_or_else(|| match id {
            "" => "no invocation is recorded".to_owned(),
            id => format!("no invocation {id:?} is recorded"),
        })
    }

    /// Every recorded output of an invocation's root, the newest invocation's for an empty id; of one class, if given.
    /// Answers through the channel, which holds it back.
    ///
    /// # Errors
    /// In words: there is no such invocation, or it has no output root.
    pub async fn outputs(&self, id: &str, class: &str) -> Result<mpsc::Receiver<pb::Output>, String> {
        let row = self.row_of(id)?;
        let exec_root = PathBuf::from(&row.exec_root);
        let (answer, outputs) = mpsc::channel(256);
        let Some(root) = row.root else {
            let named = self.named(row).await?;
            tokio::spawn(staging::tell(named, class.to_owned(), answer));
            return Ok(outputs);
        };
        let (service, class) = (self.clone(), class.to_owned());
        spawn_blocking(move || {
            let mut placers = HashMap::new();
            for (path, row) in service.record.scan_outputs(root, "") {
                if !class.is_empty() && row.class.name() != class {
                    continue;
                }
                let found = Found {
                    root,
                    exec_root: exec_root.clone(),
                    path,
                    row,
                };
                let present =
                    found.row.state == OutputState::Materialized && service.is_present(&mut placers, &found);
                if answer.blocking_send(show::output(&found, present)).is_err() {
                    break;
                }
            }
        });
        Ok(outputs)
    }
}
