//! The service between a build tool and an upstream service, on a network that fails by schedules, with processes that
//! die. The journal's files are real, and all that a daemon leaves to the next one.

mod bazel;
mod daemon;
mod ledger;
mod upstream;

use std::{cell::RefCell, collections::BTreeMap, rc::Rc, sync::Arc, time::Duration};

use self::{
    daemon::{Daemon, Seen},
    ledger::{Ledger, Plan},
    upstream::{Answers, Service},
};
use crate::{
    bes::{BesOptions, HoldMode, HoldPolicy},
    simulated::{
        Chance, Schedule, Totals, each_seed, is_custom, net, run,
        schedule::{Change, Link},
    },
};

const NEAR: Link = ("bazel", "outhaul");
const FAR: Link = ("outhaul", "upstream");
const GHOSTLY: Link = ("ghost", "outhaul");

/// Faults begin within so long.
const TROUBLE: Duration = Duration::from_secs(60);

/// By when all must be over, when nothing is wrong any more: the longest wait between two tries to reach upstream, after
/// one that began on a connection that is dead, and then the stream.
const CONCLUDED: Duration = Duration::from_secs(300);

/// Everything about a schedule but its faults.
struct Setting {
    ledger: Arc<Ledger>,
    /// How long each stream's client lets the build take.
    streams: Vec<(String, bazel::Manner, Chance)>,
    ghost: bool,
    options: BesOptions,
    service: Option<Service>,
}

fn options(chance: &mut Chance) -> BesOptions {
    BesOptions {
        hold: HoldPolicy {
            mode: chance.pick(&[HoldMode::None, HoldMode::Invocation, HoldMode::Invocation]),
            timeout: Duration::from_secs(chance.pick(&[5, 30, 600])),
            strict: false,
            is_followed: false,
        },
        linger: Duration::from_secs(chance.between(1, 30)),
        // Small, so that events are queued by their places in the journal as well.
        stream_bytes: chance.pick(&[4 << 10, 1 << 20, 32 << 20]),
        ..BesOptions::default()
    }
}

impl Setting {
    fn new(chance: &mut Chance, forwards: bool, dir: std::path::PathBuf) -> Self {
        let options = options(chance);
        let ghost = chance.happens(0.3);
        let mut names: Vec<_> = (0..chance.between(1, 3)).map(|n| format!("build-{n}")).collect();
        let mut streams = Vec::new();
        let mut plans = BTreeMap::new();
        if ghost {
            names.push("ghost".to_owned());
        }
        for name in names {
            let count = chance.pick(&[1, 5, 30, 150]);
            let count = chance.between(1, count);
            let settles = match chance.below(10) {
                // It is unknown when; what waits for it has a deadline.
                0 if options.hold.timeout < Duration::from_secs(60) => None,
                _ => Some(chance.time(Duration::from_secs(20))),
            };
            let manner = if name != "ghost" && chance.happens(0.15) {
                bazel::Manner::Cancels(chance.below(count + 1) as i64)
            } else {
                bazel::Manner::Stays
            };
            let stays = name != "ghost" && matches!(manner, bazel::Manner::Stays);
            let plan = Plan {
                calls: forwards && stays && chance.happens(0.5),
                requests: ledger::requests(chance, &name, count as i64),
                settles,
                pace: chance.pick(&[0, 0, 20, 500]),
            };
            streams.push((name.clone(), manner, chance.another()));
            plans.insert(name, plan);
        }
        let ledger = Arc::new(Ledger::new(dir, plans, options.hold, chance.happens(0.5)));
        let answers = chance.pick(&[Answers::AtOnce, Answers::AtOnce, Answers::Late, Answers::AtTheEnd]);
        let service = forwards.then(|| Service::new(&ledger, answers, chance.another()));
        Self {
            ledger,
            streams,
            ghost,
            options,
            service,
        }
    }

    fn schedule(&self, chance: &mut Chance, near: bool) -> Schedule {
        let (mut links, mut hosts) = (Vec::new(), Vec::new());
        if near {
            links.push(NEAR);
            hosts.push("outhaul");
        }
        if self.service.is_some() {
            links.push(FAR);
            hosts.push("upstream");
        }
        let schedule = Schedule::random(chance, &links, &hosts, TROUBLE);
        if !self.ghost {
            return schedule;
        }
        let at = chance.time(TROUBLE / 2);
        // Without a word.
        schedule.and([(at, Change::Cut(GHOSTLY)), (at, Change::Crash("ghost"))])
    }
}

fn one_schedule(seed: u64) -> Result<Totals, String> {
    let mut chance = Chance::new(seed);
    let builder = net::network(&mut chance);
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let forwards = chance.happens(0.7);
    // Where only upstream has its troubles, the build tool must not feel them.
    let near = !forwards || chance.happens(0.6);
    let setting = Setting::new(&mut chance, forwards, dir.path().join("journal"));
    let mut schedule = setting.schedule(&mut chance, near);
    let ledger = Arc::clone(&setting.ledger);
    let mut sim = builder.build();
    let seen = Rc::new(RefCell::new(Seen::default()));

    if let Some(service) = &setting.service {
        let service = service.clone();
        sim.host("upstream", move || service.clone().serve());
    }
    let daemon = Daemon {
        ledger: Arc::clone(&ledger),
        options: setting.options.clone(),
        forwards,
        seen: Rc::clone(&seen),
    };
    sim.host("outhaul", move || daemon.clone().live());
    let mut clients: BTreeMap<&str, Vec<_>> = BTreeMap::new();
    for (name, manner, chance) in setting.streams {
        let host = if name == "ghost" { "ghost" } else { "bazel" };
        clients.entry(host).or_default().push((name, manner, chance));
    }
    for (host, streams) in clients {
        let (ledger, quick) = (Arc::clone(&ledger), !near && host == "bazel");
        sim.host(host, move || {
            let (ledger, streams) = (Arc::clone(&ledger), streams.clone());
            async move {
                let play = streams.into_iter().map(|(name, manner, chance)| {
                    bazel::play(Arc::clone(&ledger), name, manner, chance, quick)
                });
                futures::future::join_all(play).await;
                Ok(())
            }
        });
    }

    let healed = schedule.healed;
    let mut quiet = healed;
    // Looking is reading journals.
    let mut look = Duration::ZERO;
    let verdict = ledger.verdict.clone();
    let elapsed = {
        let limit = healed + Duration::from_secs(1200);
        let (ledger, service) = (&ledger, &setting.service);
        run(&mut sim, &mut schedule, &verdict, limit, |at| {
            if !ledger.clients_are_gone() {
                quiet = at.max(healed);
                return false;
            }
            if at < look {
                return false;
            }
            look = at + Duration::from_millis(500);
            at > healed
                && seen.borrow().is_idle(ledger)
                && service
                    .as_ref()
                    .is_none_or(|service| service.has_everything(ledger))
        })
        .map_err(|why| format!("{why}{}", ledger.state(&seen.borrow(), setting.service.as_ref())))?
    };
    ledger.check_journal();
    if let Some(broken) = verdict.broken() {
        return Err(format!("in the end: {broken}\n{schedule}"));
    }
    let concluding = elapsed.saturating_sub(quiet);
    if concluding > CONCLUDED {
        return Err(format!(
            "it took {concluding:?} until nothing was left to do\n{schedule}"
        ));
    }
    let mut totals = ledger.totals();
    totals.elapsed = elapsed;
    totals.most("seconds to conclude", concluding.as_secs());
    totals.count("faults", schedule.faults());
    totals.count(
        "deaths of the daemon",
        schedule.count(|c| *c == Change::Crash("outhaul")),
    );
    totals.count(
        "ends of the daemon",
        schedule.count(|c| *c == Change::Stop("outhaul")),
    );
    totals.count(
        "deaths of upstream",
        schedule.count(|c| *c == Change::Crash("upstream")),
    );
    if let Some(service) = &setting.service {
        totals.count("events upstream", service.received());
        totals.count("connections upstream", service.connections());
    }
    Ok(totals)
}

#[test]
fn whatever_the_network_does_what_is_acknowledged_is_kept_and_arrives() {
    let totals = each_seed(
        "whatever_the_network_does_what_is_acknowledged_is_kept_and_arrives",
        30,
        one_schedule,
    );
    if !is_custom() {
        for what in [
            "events acknowledged",
            "connections",
            "connections upstream",
            "events upstream",
            "ghosts",
            "cancelled",
            "deaths of the daemon",
            "deaths of upstream",
            "ends of the daemon",
            "calls",
        ] {
            assert!(totals.get(what) > 0, "{what}: never met");
        }
        assert!(
            totals.get("connections") > totals.get("streams"),
            "no client came back"
        );
    }
}
