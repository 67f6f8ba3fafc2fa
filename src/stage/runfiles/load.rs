//! The runfiles of a build from elsewhere, as they came with it.

use std::{collections::HashMap, fmt::Display};

use bytes::Bytes;

use super::{
    super::{
        carried::{Carried, What},
        error::StageError,
    },
    Runfile, refused,
};
use crate::{
    digest::{Digest, DigestFunction},
    exec_path::ExecPath,
    output::OutputContent,
};

/// What came with a build.
pub(super) struct Load {
    files: HashMap<Digest, Bytes>,
    /// By their programs.
    runfiles: HashMap<String, Vec<Runfile>>,
}

impl Load {
    /// # Errors
    /// When something that is to be a runfile cannot be one.
    pub(super) fn of(carried: &[Carried], function: DigestFunction) -> Result<Self, StageError> {
        let files = carried.iter().filter_map(|one| match &one.what {
            Some(What::Bytes(bytes)) => Some((Digest::of(function, bytes), bytes.clone())),
            _ => None,
        });
        let files: HashMap<Digest, Bytes> = files.collect();
        let mut runfiles: HashMap<String, Vec<Runfile>> = HashMap::new();
        for one in carried.iter().filter(|one| !one.program.is_empty()) {
            let of_program = runfiles.entry(one.program.clone()).or_default();
            of_program.push(runfile(one, &files)?);
        }
        Ok(Self { files, runfiles })
    }

    /// What a program needs; `None` of what is not a program.
    pub(super) fn of_program(&mut self, program: &ExecPath) -> Option<Vec<Runfile>> {
        self.runfiles.remove(program.as_str())
    }

    /// An output's content, with its bytes if they came along.
    pub(super) fn with_bytes(&self, content: OutputContent) -> OutputContent {
        match &content {
            OutputContent::Blob(digest) => self
                .files
                .get(digest)
                .map_or(content.clone(), |bytes| OutputContent::Inline(bytes.clone())),
            _ => content,
        }
    }
}

fn runfile(one: &Carried, files: &HashMap<Digest, Bytes>) -> Result<Runfile, StageError> {
    let invalid = |reason: &dyn Display| refused(format!("{}: {reason}", one.name));
    let content = match &one.what {
        Some(What::File(digest)) => {
            let digest: Digest = digest.parse().map_err(|e| invalid(&e))?;
            Ok(match files.get(&digest) {
                Some(bytes) => OutputContent::Inline(bytes.clone()),
                None => OutputContent::Blob(digest),
            })
        }
        Some(What::Link(target)) => Ok(OutputContent::Symlink(target.clone())),
        Some(What::Directory(_)) => Ok(OutputContent::Directory),
        Some(What::Absent(reason)) => Err(format!("where it was exported: {reason}")),
        Some(What::Bytes(_)) | None => return Err(invalid(&"it is not a runfile")),
    };
    Ok(Runfile {
        name: one.name.clone(),
        exec_path: ExecPath::new(&one.exec_path).map_err(|e| refused(e.to_string()))?,
        content,
    })
}
