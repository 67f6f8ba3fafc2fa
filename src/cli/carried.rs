//! What the programs of a build need at run time, for a file that carries the build elsewhere.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::File,
    io::{self, Read as _, Write as _},
};

use bytes::Bytes;

use super::{client::Client, exit::Failure, print, stage::failure};
use crate::{
    digest::Digest,
    journal::{Entry, RecordKind},
    printable::printable,
    proto::outhaul::v1 as pb,
    stage::{Carried, What},
    units::show_size,
};

/// How many files that were left out are named.
const NAMED: usize = 10;

/// Runfiles on their way into the file.
#[derive(Default)]
struct Packing {
    carried: Vec<Carried>,
    /// Bytes that may still go in.
    left: u64,
    packed: HashSet<Digest>,
    left_out: HashMap<Digest, String>,
}

/// The runfiles of all programs among a build's outputs, with the bytes of those that no cache need have, up to a limit.
pub(super) async fn of_build(
    client: &mut Client,
    invocation_id: &str,
    limit: u64,
) -> Result<Vec<Carried>, Failure> {
    let request = pb::StageRequest {
        invocation_id: invocation_id.to_owned(),
        dry_run: true,
        wish: Some(pb::StageWish {
            runfiles: true,
            ..pb::StageWish::default()
        }),
        ..pb::StageRequest::default()
    };
    let planned = client.stage(request).await.map_err(|s| failure(&s))?;
    let outputs: HashMap<&str, &pb::StagedOutput> = planned
        .outputs
        .iter()
        .filter(|output| output.path == output.exec_path)
        .map(|output| (output.path.as_str(), output))
        .collect();
    let mut packing = Packing {
        left: limit,
        ..Packing::default()
    };
    for output in &planned.outputs {
        let ends = output.path.match_indices(".runfiles/");
        let mut programs =
            ends.filter_map(|(at, dot)| Some((output.path.get(..at)?, &output.path[at + dot.len()..])));
        let Some((program, name)) = programs.find(|(program, _)| outputs.contains_key(program)) else {
            continue;
        };
        // Of what is staged anyway, there is a link.
        let itself = outputs.get(output.exec_path.as_str()).copied().unwrap_or(output);
        let what = packing.what(output, itself)?;
        packing.carried.push(Carried {
            program: program.to_owned(),
            name: name.to_owned(),
            exec_path: output.exec_path.clone(),
            what: Some(what),
        });
    }
    packing.print_left_out(limit)?;
    Ok(packing.carried)
}

/// The runfiles that came with a build from elsewhere.
pub(super) fn of_journal(entry: &Entry) -> Result<Vec<Carried>, Failure> {
    let mut carried = Vec::new();
    for record in entry.read().map_err(Failure::failed)? {
        let record = record.map_err(Failure::failed)?;
        if record.kind == RecordKind::Runfile {
            carried.extend(Carried::read(record.payload));
        }
    }
    Ok(carried)
}

/// Says which runfiles are missing, and so from the file, too. Whether none is.
pub(super) fn print_missing<'a>(carried: impl Iterator<Item = &'a Carried>) -> Result<bool, Failure> {
    let missing: BTreeMap<&str, &str> = carried
        .filter_map(|one| match &one.what {
            Some(What::Absent(reason)) => Some((one.exec_path.as_str(), reason.as_str())),
            _ => None,
        })
        .collect();
    if missing.is_empty() {
        return Ok(true);
    }
    let named = missing
        .iter()
        .map(|(path, reason)| printable(&format!("{path} ({reason})")).to_string());
    writeln!(
        print::err(),
        "outhaul: {} runfiles are not in the file, since they are not available here: {}",
        missing.len(),
        listed(named.collect())
    )?;
    Ok(false)
}

/// The first of some names, and how many more there are.
fn listed(mut names: Vec<String>) -> String {
    let more = names.len().saturating_sub(NAMED);
    names.truncate(NAMED);
    let shown = names.join(", ");
    if more > 0 {
        format!("{shown} and {more} more")
    } else {
        shown
    }
}

impl Packing {
    fn what(&mut self, output: &pb::StagedOutput, itself: &pb::StagedOutput) -> Result<What, Failure> {
        if !output.error.is_empty() {
            return Ok(What::Absent(output.error.clone()));
        }
        let Some(digest) = &itself.digest else {
            return Ok(if itself.directory {
                What::Directory(true)
            } else {
                What::Link(itself.symlink_target.clone())
            });
        };
        let digest: Digest = format!("{}/{}/{}", digest.function, digest.hash, digest.size)
            .parse()
            .map_err(|e| Failure::failed(format!("{}: {e}", itself.exec_path)))?;
        if !itself.local_path.is_empty() && !self.packed.contains(&digest) {
            if digest.size() > self.left {
                self.left_out.insert(digest.clone(), itself.exec_path.clone());
            } else {
                match read(&itself.local_path, &digest) {
                    Ok(bytes) => {
                        self.left -= digest.size();
                        self.carried.push(Carried::bytes(bytes));
                        self.packed.insert(digest.clone());
                    }
                    Err(error) => return Ok(What::Absent(format!("{}: {error}", itself.local_path))),
                }
            }
        }
        Ok(What::File(format!(
            "{}/{}/{}",
            digest.function().name(),
            digest.hash_hex(),
            digest.size()
        )))
    }

    fn print_left_out(&self, limit: u64) -> Result<(), Failure> {
        if self.left_out.is_empty() {
            return Ok(());
        }
        let bytes: u64 = self.left_out.keys().map(Digest::size).sum();
        let mut names: Vec<&str> = self.left_out.values().map(String::as_str).collect();
        names.sort_unstable();
        let shown = names.iter().map(|name| printable(name).to_string());
        writeln!(
            print::err(),
            "outhaul: left out {} files of {} beyond --runfiles-limit={}, which must then be in the remote cache: {}",
            names.len(),
            show_size(bytes),
            show_size(limit),
            listed(shown.collect())
        )?;
        Ok(())
    }
}

fn read(path: &str, digest: &Digest) -> io::Result<Bytes> {
    let mut bytes = Vec::new();
    File::open(path)?
        .take(digest.size() + 1)
        .read_to_end(&mut bytes)?;
    if Digest::of(digest.function(), &bytes) == *digest {
        Ok(bytes.into())
    } else {
        Err(io::Error::other("it has just been changed"))
    }
}
