//! The graph of named sets, and the targets that wait for parts of it.
//!
//! A build of a million files names them in a graph of sets that targets share, so nothing here is copied per
//! target and nothing recurses. Normally a set comes after those it includes and before those that refer to it;
//! older build tools had races between threads, and a resumed stream may repeat itself. So a reference to a set
//! that has not come is an open end, not an error: targets that need it are parked and released when it closes, or at
//! the end of the stream.
//!
//! A set is *complete* when it and all it includes have come. That is counted along the edges as sets arrive: over
//! a whole stream, the work is linear in the graph. A set on a cycle, which no build tool sends, becomes complete
//! only at the end of the stream.

mod faults;

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::Arc,
};

use foldhash::fast::RandomState;

use self::faults::Faults;
use crate::bep::event::{File, NamedSet};

/// How many missing sets are named for one target at the end of a stream.
pub(crate) const MISSING_NAMED: usize = 16;

/// A set's number within its [`NamedSets`]: dense, from 0, in the order in which sets were first heard of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SetIndex(usize);

/// Stands for somebody who waits for sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(u64);

impl fmt::Display for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A ticket released at the end of the stream, although sets are missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Released {
    /// The ticket.
    pub ticket: Ticket,
    /// Ids of sets it waited for that never came, at most [`MISSING_NAMED`]; empty when it waited for a cycle.
    pub missing: Vec<String>,
}

/// A set of [`SetIndex`], one bit each: what a caller has gone through already.
#[derive(Debug, Clone, Default)]
pub(crate) struct SetBits(Vec<u64>);

impl SetBits {
    /// Adds an index. Returns whether it was there before, which is what [`NamedSets::expand`] asks for.
    pub(crate) fn test_and_set(&mut self, index: SetIndex) -> bool {
        let (word, bit) = (index.0 / 64, 1_u64 << (index.0 % 64));
        if word >= self.0.len() {
            self.0.resize(word + 1, 0);
        }
        let was = self.0[word] & bit != 0;
        self.0[word] |= bit;
        was
    }

    /// Whether an index was added.
    pub(crate) fn contains(&self, index: SetIndex) -> bool {
        self.0
            .get(index.0 / 64)
            .is_some_and(|word| word & (1 << (index.0 % 64)) != 0)
    }
}

/// Who waits for a set to become complete. One entry for each edge, so a double edge is counted twice.
#[derive(Debug, Clone, Copy)]
enum Waiter {
    Set(SetIndex),
    Ticket(Ticket),
}

#[derive(Debug)]
struct Node {
    id: Arc<str>,
    /// `None` until the set has come.
    files: Option<Arc<[File]>>,
    children: Box<[SetIndex]>,
    /// How many edges lead to incomplete children.
    open: usize,
    waiters: Vec<Waiter>,
}

impl Node {
    const fn is_complete(&self) -> bool {
        self.files.is_some() && self.open == 0
    }
}

/// The named sets of one stream.
#[derive(Debug, Default)]
pub struct NamedSets {
    nodes: Vec<Node>,
    index: HashMap<Arc<str>, SetIndex, RandomState>,
    /// Per parked ticket, how many edges lead to incomplete roots.
    parked: HashMap<Ticket, usize>,
    next_ticket: u64,
    arrived: usize,
    /// How many sets came again and were ignored.
    pub repeated: u64,
    ended: bool,
    /// From the first failure on.
    faults: Option<Box<Faults>>,
}

impl NamedSets {
    /// An empty graph.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a set. Returns the tickets that wait for nothing any more, in the order in which they were parked.
    ///
    /// An id that came before is counted and otherwise ignored: a stream sends each set once, so a second one is a
    /// repetition, and targets may have been expanded with the first.
    pub fn insert(&mut self, set: NamedSet) -> Vec<Ticket> {
        let index = self.intern(&set.id);
        if self.nodes[index.0].files.is_some() {
            self.repeated += 1;
            return Vec::new();
        }
        self.arrived += 1;
        let children: Box<[SetIndex]> = set.children.iter().map(|id| self.intern(id)).collect();
        if let Some(faults) = &mut self.faults {
            faults.insert(index, &children);
        }
        let mut open = 0;
        for &child in &children {
            let child = &mut self.nodes[child.0];
            if !child.is_complete() {
                child.waiters.push(Waiter::Set(index));
                open += 1;
            }
        }
        let node = &mut self.nodes[index.0];
        node.files = Some(set.files.into());
        node.children = children;
        node.open = open;
        if open == 0 {
            self.completed(index)
        } else {
            Vec::new()
        }
    }

    /// Tells everybody who waits for a set that it is complete, and for those it completes in turn.
    fn completed(&mut self, index: SetIndex) -> Vec<Ticket> {
        let mut released = Vec::new();
        let mut complete = vec![index];
        while let Some(index) = complete.pop() {
            for waiter in std::mem::take(&mut self.nodes[index.0].waiters) {
                match waiter {
                    Waiter::Set(parent) if count_down(&mut self.nodes[parent.0].open) => {
                        complete.push(parent)
                    }
                    Waiter::Ticket(ticket) if self.parked.get_mut(&ticket).is_some_and(count_down) => {
                        self.parked.remove(&ticket);
                        released.push(ticket);
                    }
                    Waiter::Set(_) | Waiter::Ticket(_) => {}
                }
            }
        }
        released.sort_unstable();
        released
    }

    /// Parks somebody until all these sets are complete: [`insert`](Self::insert) or [`finish`](Self::finish) gives
    /// the ticket back. `None` when they are complete already, or the stream has ended.
    pub fn park<'a>(&mut self, roots: impl IntoIterator<Item = &'a str>) -> Option<Ticket> {
        if self.ended {
            return None;
        }
        let ticket = Ticket(self.next_ticket);
        let mut open = 0;
        for root in roots {
            let root = self.intern(root);
            let node = &mut self.nodes[root.0];
            if !node.is_complete() {
                node.waiters.push(Waiter::Ticket(ticket));
                open += 1;
            }
        }
        if open == 0 {
            return None;
        }
        self.next_ticket += 1;
        self.parked.insert(ticket, open);
        Some(ticket)
    }

    /// Ends the stream: every parked ticket is released, with the ids of sets that never came. From now on nothing
    /// is waited for.
    pub fn finish(&mut self) -> Vec<Released> {
        self.ended = true;
        let mut missing: HashMap<Ticket, Vec<SetIndex>> = self
            .parked
            .drain()
            .map(|(ticket, _)| (ticket, Vec::new()))
            .collect();
        if missing.is_empty() {
            return Vec::new();
        }
        // From every missing set upwards along the edges that are still open. What is found below a set is bounded,
        // so each is passed at most `MISSING_NAMED` times.
        let mut found: HashMap<SetIndex, Vec<SetIndex>> = HashMap::new();
        let mut todo: Vec<(SetIndex, SetIndex)> = self.unknown().map(|index| (index, index)).rev().collect();
        while let Some((index, lost)) = todo.pop() {
            if !note(found.entry(index).or_default(), lost) {
                continue;
            }
            for waiter in &self.nodes[index.0].waiters {
                let ticket = match waiter {
                    Waiter::Set(parent) => {
                        todo.push((*parent, lost));
                        continue;
                    }
                    Waiter::Ticket(ticket) => ticket,
                };
                if let Some(list) = missing.get_mut(ticket) {
                    note(list, lost);
                }
            }
        }
        let mut released: Vec<Released> = missing
            .into_iter()
            .map(|(ticket, missing)| Released {
                ticket,
                missing: missing
                    .into_iter()
                    .map(|index| self.id(index).to_owned())
                    .collect(),
            })
            .collect();
        released.sort_unstable_by_key(|released| released.ticket);
        released
    }

    /// Goes through all sets below these roots, each once, parents before children.
    ///
    /// `skip` is asked at most once for each set; where it says true, neither that set nor what only it leads to is
    /// gone through. A caller that wants every set once over many targets keeps a [`SetBits`] and passes
    /// [`test_and_set`](SetBits::test_and_set). That is safe because `skip` is only asked of complete sets, or after
    /// the end of the stream: nothing that comes after a skipped one can be lost. The work is linear in the
    /// edges of the sets gone through.
    pub(crate) fn expand<'s, 'r, S: FnMut(SetIndex) -> bool>(
        &'s self,
        roots: impl IntoIterator<Item = &'r str>,
        skip: S,
    ) -> Expansion<'s, S> {
        let mut stack = Vec::new();
        let mut missing = Vec::new();
        let mut unknown = HashSet::new();
        for root in roots {
            match self.index.get(root) {
                Some(&index) => stack.push(index),
                None => {
                    if unknown.insert(root) {
                        missing.push(root.to_owned());
                    }
                }
            }
        }
        stack.reverse();
        Expansion {
            sets: self,
            skip,
            stack,
            visited: HashSet::default(),
            missing,
        }
    }

    /// The set of an id, if it was heard of.
    pub fn find(&self, id: &str) -> Option<SetIndex> {
        self.index.get(id).copied()
    }

    /// A set's id.
    pub fn id(&self, index: SetIndex) -> &str {
        self.nodes.get(index.0).map_or("", |node| &node.id)
    }

    /// A set's own files; `None` when it has not come.
    pub fn files(&self, id: &str) -> Option<&Arc<[File]>> {
        let index = self.index.get(id)?;
        self.nodes[index.0].files.as_ref()
    }

    /// The same by its number.
    pub fn files_of(&self, index: SetIndex) -> Option<&Arc<[File]>> {
        self.nodes.get(index.0)?.files.as_ref()
    }

    /// Every set that has come, with its own files, in the order in which they were first heard of.
    pub fn iter(&self) -> impl Iterator<Item = (SetIndex, &Arc<[File]>)> {
        let nodes = self.nodes.iter().enumerate();
        nodes.filter_map(|(index, node)| Some((SetIndex(index), node.files.as_ref()?)))
    }

    /// Whether these sets and all they include have come.
    #[cfg(test)]
    pub(crate) fn is_complete<'a>(&self, roots: impl IntoIterator<Item = &'a str>) -> bool {
        roots.into_iter().all(|id| {
            self.index
                .get(id)
                .is_some_and(|index| self.nodes[index.0].is_complete())
        })
    }

    /// Ids of all sets that were referred to and have not come.
    pub fn missing(&self) -> impl Iterator<Item = &str> {
        self.unknown().map(|index| self.id(index))
    }

    /// How many sets have come.
    pub const fn len(&self) -> usize {
        self.arrived
    }

    /// Whether no set has come.
    pub const fn is_empty(&self) -> bool {
        self.arrived == 0
    }

    /// How many tickets are parked.
    #[cfg(test)]
    pub(crate) fn parked(&self) -> usize {
        self.parked.len()
    }

    fn unknown(&self) -> impl DoubleEndedIterator<Item = SetIndex> {
        let nodes = self.nodes.iter().enumerate();
        nodes
            .filter(|(_, node)| node.files.is_none())
            .map(|(index, _)| SetIndex(index))
    }

    fn intern(&mut self, id: &str) -> SetIndex {
        if let Some(&index) = self.index.get(id) {
            return index;
        }
        let index = SetIndex(self.nodes.len());
        let id: Arc<str> = id.into();
        self.nodes.push(Node {
            id: Arc::clone(&id),
            files: None,
            children: Box::default(),
            open: 0,
            waiters: Vec::new(),
        });
        self.index.insert(id, index);
        index
    }
}

/// Counts one less; whether that was the last one.
const fn count_down(open: &mut usize) -> bool {
    *open -= 1;
    *open == 0
}

/// Adds to a bounded list. Returns whether it was new and there was room.
fn note(list: &mut Vec<SetIndex>, index: SetIndex) -> bool {
    let new = list.len() < MISSING_NAMED && !list.contains(&index);
    if new {
        list.push(index);
    }
    new
}

/// An iterator over sets and their own files: see [`NamedSets::expand`].
pub(crate) struct Expansion<'s, S> {
    sets: &'s NamedSets,
    skip: S,
    stack: Vec<SetIndex>,
    visited: HashSet<SetIndex, RandomState>,
    missing: Vec<String>,
}

impl<S> Expansion<'_, S> {
    /// Ids of the sets met so far that have not come; all of them once the iterator is exhausted.
    pub(crate) fn missing(&self) -> &[String] {
        &self.missing
    }
}

impl<'s, S: FnMut(SetIndex) -> bool> Iterator for Expansion<'s, S> {
    type Item = (SetIndex, &'s Arc<[File]>);

    fn next(&mut self) -> Option<Self::Item> {
        while let Some(index) = self.stack.pop() {
            if !self.visited.insert(index) {
                continue;
            }
            let node = &self.sets.nodes[index.0];
            let Some(files) = &node.files else {
                self.missing.push(node.id.as_ref().to_owned());
                continue;
            };
            if (self.sets.ended || node.is_complete()) && (self.skip)(index) {
                continue;
            }
            self.stack.extend(node.children.iter().rev());
            return Some((index, files));
        }
        None
    }
}

#[cfg(test)]
mod tests;
