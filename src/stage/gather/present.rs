//! What earlier stages have put there that is what is wanted, unchanged: their markers say.

use std::{
    collections::{HashMap, HashSet},
    path::Path,
    sync::Arc,
};

use super::{Gather, Got, Source, Taken};
use crate::{
    archive::Mode,
    digest::Digest,
    materialize::place::Check,
    output::{Class, OutputContent},
    stage::{
        check,
        ended::Brought,
        error::StageError,
        marker::{self, Marker},
        together::Together,
    },
};

impl Gather {
    /// Finds what earlier stages have put there that is what is wanted, unchanged: these are their markers. Blocks.
    pub(in crate::stage) fn find_present(
        &mut self,
        directory: &Path,
        markers: &[Marker],
        together: &Together,
    ) -> Result<(), StageError> {
        if self.sources.is_empty() {
            return Ok(());
        }
        let by_name: Vec<_> = markers
            .iter()
            .map(|marker| (marker, files_by_name(marker)))
            .collect();
        for source in self.sources.iter_mut() {
            let mut found = None;
            for (marker, files) in &by_name {
                let of_it = files.get(source.name.as_str()).map_or(&[][..], Vec::as_slice);
                source.earlier.extend(of_it.iter().map(|file| file.path.clone()));
                found = source.listed_in(marker, of_it).or(found);
            }
            let (Some((digest, files)), None) = (found, &source.end) else {
                continue;
            };
            let names: HashSet<String> = files.iter().map(|file| file.path.clone()).collect();
            let names = Arc::new(names);
            together.join(&names);
            let wanted = files.iter().map(|file| {
                file.content()
                    .ok()
                    .map(|(path, content)| (path, content, file.stamp))
            });
            let Some(wanted) = wanted.collect::<Option<Vec<_>>>() else {
                continue;
            };
            let looked = check::look(directory, &wanted)?;
            let stamped = files.into_iter().zip(looked).map(|(file, looked)| match looked {
                Ok(Check::Present { stamp, .. }) => Some(file.stamped(Some(stamp))),
                _ => None,
            });
            let Some(files) = stamped.collect::<Option<Vec<_>>>() else {
                continue;
            };
            // What is optional takes nothing from what is required; see `keep_optional`.
            if source.wanted.class == Class::Required {
                for (path, content, _) in wanted {
                    let owner = (content, source.name.to_string());
                    self.taken.insert(path.to_string(), owner);
                }
            }
            self.names.push(names);
            self.listable.hold(files.len() as u64);
            source.end = Some(Ok(Got {
                outcome: Brought::Present,
                digest,
                files,
            }));
        }
        Ok(())
    }

    /// Keeps what is there of optional files, now that what is required is there too, if they can be side by side.
    pub(super) fn keep_optional(&mut self) {
        for at in 0..self.sources.len() {
            let source = &self.sources[at];
            let (Class::Optional, Some(Ok(got))) = (source.wanted.class, &source.end) else {
                continue;
            };
            let files: Vec<_> = got.files.iter().filter_map(|file| file.content().ok()).collect();
            let clash = files.iter().find_map(|(path, content)| {
                let owner = clash(&self.taken, path.as_str(), content)?;
                Some(contradiction(path.as_str(), owner))
            });
            if let Some(reason) = clash {
                self.sources[at].end = Some(Err(reason));
                continue;
            }
            let name = source.name.to_string();
            let owned = files
                .into_iter()
                .map(|(path, content)| (path.to_string(), (content, name.clone())));
            self.taken.extend(owned);
        }
    }
}

/// What has a path already, with other content, or where a directory must be.
pub(super) fn clash<'a>(taken: &'a Taken, path: &str, content: &OutputContent) -> Option<&'a str> {
    if let Some((other, owner)) = taken.get(path)
        && !other.is_same(content)
    {
        return Some(owner);
    }
    let below = format!("{path}/");
    if *content != OutputContent::Directory
        && let Some((first, (_, owner))) = taken.range(below.clone()..).next()
        && first.starts_with(&below)
    {
        return Some(owner);
    }
    let mut above = marker::above(path).filter_map(|dir| taken.get(dir));
    let in_the_way = above.find(|(content, _)| *content != OutputContent::Directory);
    in_the_way.map(|(_, owner)| owner.as_str())
}

/// Why a file cannot be put beside what is there.
pub(super) fn contradiction(path: &str, owner: &str) -> String {
    format!("it has {path}, where {owner} has something else")
}

/// A marker's files by the name of what they are from.
fn files_by_name(marker: &Marker) -> HashMap<&str, Vec<&marker::File>> {
    let mut all: HashMap<&str, Vec<&marker::File>> = HashMap::new();
    for file in &marker.files {
        all.entry(&file.exec_path).or_default().push(file);
    }
    all
}

impl Source {
    /// Where it is, and the entity tag that the list has, if it stands for the bytes: some stores write none, or an empty one.
    pub(super) fn tag(&self) -> Option<String> {
        let is_strong = |tag: &&String| !tag.starts_with("W/") && !tag.trim_matches('"').is_empty();
        let tag = self.wanted.item.etag.as_ref().filter(is_strong)?;
        Some(format!("{} {tag}", self.wanted.address()))
    }

    /// What a marker lists of it, if that is what is wanted: its digest, and its files.
    fn listed_in(&self, marker: &Marker, files: &[&marker::File]) -> Option<(Digest, Vec<marker::File>)> {
        let fits = |digest: &Digest, etag: Option<&String>| match &self.wanted.checksum {
            Some(sum) => sum.fits(digest),
            // The list says that it has not changed.
            None => {
                etag.is_some() && etag == self.tag().as_ref() && self.wanted.item.size == Some(digest.size())
            }
        };
        if self.mode.is_none() {
            let file = files.iter().find(|file| file.path == self.place)?;
            let digest: Digest = file.digest.as_ref()?.parse().ok()?;
            return fits(&digest, file.etag.as_ref()).then(|| (digest, vec![(*file).clone()]));
        }
        let is_flat = self.mode == Some(Mode::Flatten);
        let archive = marker
            .archives
            .iter()
            .find(|one| (one.name.as_str(), &one.place) == (self.name.as_str(), &self.place))?;
        let is_same_mode = marker.from.is_empty() || marker.request.flatten == is_flat;
        let digest: Digest = archive.digest.parse().ok()?;
        let same = is_same_mode && fits(&digest, archive.etag.as_ref());
        same.then(|| (digest, files.iter().map(|file| (*file).clone()).collect()))
    }
}
