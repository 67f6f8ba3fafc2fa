//! How many connections a listener holds, and which of them goes when there is no place for the next one.
//!
//! Anyone who can connect takes a descriptor of ours, whatever they are answered. So a listener has a number of places. A
//! connection without a call that was let in goes first, those longest without one before others: who only holds
//! connections open displaces themselves, and no build.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use rustix::process::{Resource, getrlimit};
use tokio_util::sync::CancellationToken;

/// How long a connection may be open without any call. A client connects when it has one to make.
const SILENCE: Duration = Duration::from_secs(60);
/// How long it may be open between calls. Clients of gRPC let go of idle connections after half an hour themselves.
const IDLENESS: Duration = Duration::from_secs(3600);
/// The fewest places of a listener.
const FEWEST: usize = 8;

/// Places of a listener: one `part`-th of the files that we may have open, but at most `most`. The others are for what is done
/// for those who are in: journals, directories, files.
pub(crate) fn places(part: usize, most: usize) -> usize {
    let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let files = usize::try_from(files).unwrap_or(usize::MAX);
    (files / part.max(1)).min(most).max(FEWEST)
}

/// What is known of a connection for the decision; who is lower goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Standing {
    /// No call of it has come.
    Silent,
    /// It has made calls that are open to all.
    Heard,
    /// A call of it was let in by the rules.
    Admitted,
}

/// The places of a listener. Cheap to clone.
#[derive(Clone)]
pub(super) struct Room(Arc<Shared>);

struct Shared {
    places: usize,
    silence: Duration,
    idleness: Duration,
    present: Mutex<Present>,
}

#[derive(Default)]
struct Present {
    /// Counts comings, and beginnings of idleness.
    moments: u64,
    guests: HashMap<u64, Guest>,
    /// Those that may be asked to leave, by when they became so.
    idle: BTreeMap<(Standing, u64), u64>,
    /// How many were asked to leave and have not left yet.
    leaving: usize,
    /// Whom to notify when one has.
    comer: Option<Waker>,
}

struct Guest {
    standing: Standing,
    /// Calls under way that were let in.
    calls: usize,
    /// Since when there was none, and the same in moments.
    since: Instant,
    moment: u64,
    leave: CancellationToken,
}

impl Room {
    /// With a limit of this many connections, and a time that a connection may be open without a call, if not the usual
    /// ones.
    pub(super) fn new(places: usize, patience: Option<Duration>) -> Self {
        Self(Arc::new(Shared {
            places,
            silence: patience.unwrap_or(SILENCE),
            idleness: patience.unwrap_or(IDLENESS),
            present: Mutex::default(),
        }))
    }

    /// A place for one more connection, once one has left for it; none if all have calls under way.
    pub(super) fn poll_enter(&self, cx: &mut Context<'_>) -> Poll<Option<ConnectionSlot>> {
        let mut present = self.0.present.lock();
        if present.guests.len() >= self.0.places {
            if !present.make_place() {
                return Poll::Ready(None);
            }
            present.comer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let leave = CancellationToken::new();
        present.moments += 1;
        let id = present.moments;
        present.guests.insert(
            id,
            Guest {
                standing: Standing::Silent,
                calls: 0,
                since: Instant::now(),
                moment: id,
                leave: leave.clone(),
            },
        );
        present.idle.insert((Standing::Silent, id), id);
        Poll::Ready(Some(ConnectionSlot {
            visit: Visit {
                room: self.0.clone(),
                id,
            },
            leave,
        }))
    }

    /// Asks one to leave, unless somebody is on the way out already. Not if all have calls under way.
    pub(super) fn make_place(&self) -> bool {
        self.0.present.lock().make_place()
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.0.present.lock().guests.is_empty()
    }

    /// Asks those to leave that have been idle for too long. Whether anybody is there at all.
    pub(super) fn tidy(&self, now: Instant) -> bool {
        let mut present = self.0.present.lock();
        for standing in [Standing::Silent, Standing::Heard, Standing::Admitted] {
            let patience = match standing {
                Standing::Silent => self.0.silence,
                _ => self.0.idleness,
            };
            loop {
                let mut oldest = present.idle.range((standing, 0)..=(standing, u64::MAX));
                let Some((&key, id)) = oldest.next() else { break };
                let since = present.guests.get(id).map(|guest| guest.since);
                if since.is_some_and(|since| now.saturating_duration_since(since) < patience) {
                    break;
                }
                present.dismiss(key);
            }
        }
        !present.guests.is_empty()
    }
}

impl Present {
    fn make_place(&mut self) -> bool {
        if self.leaving > 0 {
            return true;
        }
        let first = self.idle.first_key_value().map(|(key, _)| *key);
        first.is_some_and(|key| self.dismiss(key))
    }

    fn dismiss(&mut self, key: (Standing, u64)) -> bool {
        let Some(guest) = self.idle.remove(&key).and_then(|id| self.guests.get(&id)) else {
            return false;
        };
        self.leaving += 1;
        guest.leave.cancel();
        true
    }

    /// From now on, the guest is as long idle as nobody else.
    fn idle_from_now(&mut self, id: u64) {
        let Some(guest) = self.guests.get_mut(&id) else {
            return;
        };
        self.moments += 1;
        guest.moment = self.moments;
        guest.since = Instant::now();
        if !guest.leave.is_cancelled() {
            self.idle.insert((guest.standing, guest.moment), id);
        }
    }
}

/// A connection's place. It is free again when this is dropped, which is to be after the connection's descriptor.
pub(super) struct ConnectionSlot {
    visit: Visit,
    leave: CancellationToken,
}

impl ConnectionSlot {
    /// Whose the calls are.
    pub(super) fn visit(&self) -> Visit {
        self.visit.clone()
    }

    /// Cancelled when another needs the place more, or the time is up.
    pub(super) fn leave(&self) -> CancellationToken {
        self.leave.clone()
    }
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        let mut present = self.visit.room.present.lock();
        if let Some(guest) = present.guests.remove(&self.visit.id) {
            present.idle.remove(&(guest.standing, guest.moment));
            if guest.leave.is_cancelled() {
                present.leaving -= 1;
            }
        }
        let comer = present.comer.take();
        drop(present);
        if let Some(comer) = comer {
            comer.wake();
        }
    }
}

/// A connection, as its calls know it. Cheap to clone.
#[derive(Clone)]
pub(super) struct Visit {
    room: Arc<Shared>,
    id: u64,
}

impl Visit {
    /// A call that is open to all has come.
    pub(super) fn heard(&self) {
        let mut present = self.room.present.lock();
        let Some(guest) = present.guests.get_mut(&self.id) else {
            return;
        };
        let key = (guest.standing, guest.moment);
        guest.standing = guest.standing.max(Standing::Heard);
        if guest.calls == 0 {
            present.idle.remove(&key);
            present.idle_from_now(self.id);
        }
    }

    /// A call was let in. As long as it is under way, the connection keeps its place.
    pub(super) fn admitted(&self) -> Call {
        let mut present = self.room.present.lock();
        if let Some(guest) = present.guests.get_mut(&self.id) {
            let key = (guest.standing, guest.moment);
            guest.standing = Standing::Admitted;
            guest.calls += 1;
            present.idle.remove(&key);
        }
        Call(self.clone())
    }
}

/// A call that is under way.
pub(crate) struct Call(Visit);

impl Drop for Call {
    fn drop(&mut self) {
        let mut present = self.0.room.present.lock();
        let Some(guest) = present.guests.get_mut(&self.0.id) else {
            return;
        };
        guest.calls -= 1;
        if guest.calls == 0 {
            present.idle_from_now(self.0.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enter(room: &Room) -> Poll<Option<ConnectionSlot>> {
        room.poll_enter(&mut Context::from_waker(Waker::noop()))
    }

    fn come(room: &Room) -> ConnectionSlot {
        match enter(room) {
            Poll::Ready(Some(place)) => place,
            _ => panic!("it is full"),
        }
    }

    fn asked(place: &ConnectionSlot) -> bool {
        place.leave().is_cancelled()
    }

    #[test]
    fn the_connection_without_a_call_for_longest_goes_first_and_one_for_each_that_comes() {
        let room = Room::new(4, None);
        let (a, b, c, d) = (come(&room), come(&room), come(&room), come(&room));
        drop(a.visit().admitted());
        b.visit().heard();
        assert!(
            enter(&room).is_pending() && enter(&room).is_pending(),
            "one is enough"
        );
        assert_eq!([&a, &b, &c, &d].map(asked), [false, false, true, false]);
        drop(c);
        assert!(room.make_place() && asked(&d));
        drop(d);
        assert!(room.make_place() && asked(&b), "before one that was let in once");
        drop(b);
        assert!(room.make_place() && asked(&a));
        drop(a);
        assert!(!room.make_place(), "nobody is there");
        assert!(room.is_empty());
        assert!(!room.tidy(Instant::now()));
    }

    #[test]
    fn a_connection_with_a_call_under_way_stays() {
        let room = Room::new(2, None);
        let (a, b) = (come(&room), come(&room));
        let calls = [a.visit().admitted(), a.visit().admitted(), b.visit().admitted()];
        assert!(matches!(enter(&room), Poll::Ready(None)));
        assert!(room.tidy(Instant::now() + 2 * IDLENESS));
        a.visit().heard();
        assert!(!room.make_place());
        let [first, second, of_b] = calls;
        drop(second);
        assert!(!room.make_place());
        drop(of_b);
        drop(first);
        assert!(room.make_place());
        assert!(!asked(&a) && asked(&b), "which has been idle for longer");
    }

    #[test]
    fn silence_and_idleness_have_an_end() {
        let room = Room::new(9, None);
        let (silent, heard, admitted, busy) = (come(&room), come(&room), come(&room), come(&room));
        heard.visit().heard();
        drop(admitted.visit().admitted());
        let _call = busy.visit().admitted();
        let now = Instant::now();
        let who = || [&silent, &heard, &admitted, &busy].map(asked);
        room.tidy(now + SILENCE / 2);
        assert_eq!(who(), [false; 4]);
        room.tidy(now + SILENCE * 2);
        assert_eq!(who(), [true, false, false, false]);
        room.tidy(now + IDLENESS * 2);
        assert_eq!(who(), [true, true, true, false]);
        // A call that comes as it is asked changes nothing any more.
        drop(heard.visit().admitted());
        drop((silent, heard, admitted));
        assert!(!room.make_place());
    }

    #[test]
    fn a_listener_may_have_less_patience_whatever_its_connections_have_called() {
        let room = Room::new(9, Some(SILENCE * 5));
        let (silent, heard, admitted) = (come(&room), come(&room), come(&room));
        heard.visit().heard();
        drop(admitted.visit().admitted());
        let now = Instant::now();
        let who = || [&silent, &heard, &admitted].map(asked);
        room.tidy(now + SILENCE * 4);
        assert_eq!(who(), [false; 3]);
        room.tidy(now + SILENCE * 6);
        assert_eq!(who(), [true; 3]);
    }

    #[test]
    fn a_listener_has_a_part_of_the_files_that_may_be_open() {
        assert_eq!(places(1, 3), FEWEST);
        assert_eq!(places(usize::MAX, 100), FEWEST);
        assert_eq!(places(1, 20), 20);
        assert_eq!(places(0, 20), 20);
    }
}
