//! What those hear who follow builds.

use super::*;

#[tokio::test]
async fn everybody_hears_of_builds_without_their_single_outputs() {
    let mut f = Fixture::new(false).await;
    let mut changes = f.services.engine.subscribe();
    let digest = f.cache.store().put("bytes");
    f.set("0", vec![output("a", &digest)], &[]).await;
    f.complete("//:a", &["0"]).await;
    f.finish().await;
    let mut heard = Vec::new();
    while !matches!(heard.last(), Some(Change::Settled(_))) {
        let reported = timeout(PATIENCE, changes.recv()).await.expect("in time").unwrap();
        assert_eq!(reported.invocation_id, "invocation");
        heard.push(reported.change);
    }
    assert!(!heard.iter().any(|c| matches!(c, Change::Output(_))));
    assert_eq!(
        states(&heard, "//:a"),
        [TargetState::Completed, TargetState::Settled]
    );
    let settled = report(&heard);
    assert_eq!(
        (&*settled.workspace, &*settled.command, settled.tally.downloaded),
        ("/w", "test", 1)
    );
}

#[tokio::test]
async fn who_asks_about_a_build_that_is_taken_up_hears_which_it_is() {
    let f = Fixture::new(false).await;
    let key = StreamKey {
        build_id: "build".to_owned(),
        invocation_id: "before".to_owned(),
        ..StreamKey::default()
    };
    f.services.record.put_invocation(&InvocationRow {
        invocation_id: key.invocation_id.clone(),
        build_id: key.build_id.clone(),
        workspace: "/w".to_owned(),
        started_ms: 7,
        state: InvocationState::Interrupted,
        ..InvocationRow::default()
    });
    // As a daemon does that finds its journal, before it has read it.
    assert!(f.services.engine.progress(&key).await.is_some());
    let (invocation, _) = f.services.service.invocation("before").await.unwrap();
    assert_eq!((&*invocation.workspace, invocation.started_ms), ("/w", 7));
    assert_eq!(invocation.state(), pb::InvocationState::Running);
}

#[tokio::test]
async fn of_thousands_of_targets_that_settle_at_once_none_is_missed() {
    const TARGETS: usize = 6000;
    let mut f = Fixture::new(false).await;
    let mut reported = f.services.engine.subscribe();
    f.stall();
    let digest = f.cache.store().put("bytes");
    f.set("0", vec![output("a", &digest)], &[]).await;
    for n in 0..TARGETS {
        f.complete(&format!("//:{n}"), &["0"]).await;
    }
    f.finish().await;
    f.cache.faults().clear();
    f.cache.faults().sever_connections();
    // No client takes anything meanwhile.
    timeout(PATIENCE, f.services.engine.settled(&f.key))
        .await
        .expect("in time");
    let mut settled = std::collections::BTreeSet::new();
    loop {
        match timeout(PATIENCE, reported.recv())
            .await
            .expect("in time")
            .unwrap()
            .change
        {
            Change::Target(row) if row.state == TargetState::Settled => {
                assert!(settled.insert(row.label.clone()), "each is reported once");
            }
            Change::Settled(_) => break,
            Change::Output(_) => panic!("single outputs are not for everybody"),
            Change::Begun { .. } | Change::Target(_) => {}
        }
    }
    assert_eq!(settled.len(), TARGETS);
}

#[tokio::test]
async fn every_configuration_of_a_label_is_reported_before_one_of_them_is_complete() {
    let mut f = Fixture::new(false).await;
    let configured = |configuration: &str| TargetId {
        configuration: configuration.to_owned(),
        ..target("//:a")
    };
    f.send(Event::Configured {
        label: "//:a".to_owned(),
        kind: "genrule rule".to_owned(),
        completions: vec![configured("one"), configured("two")],
    })
    .await;
    let mut changes = f.watch().await;
    for configuration in ["one", "two"] {
        let Some(Change::Target(row)) = timeout(PATIENCE, changes.recv()).await.unwrap() else {
            panic!("no target");
        };
        assert_eq!(row.label, "//:a");
        assert_eq!(row.state, TargetState::Announced, "{configuration}");
    }
}

#[tokio::test]
async fn a_slow_follower_hears_of_each_target_in_order_and_keeps_a_page_of_them() {
    let mut f = Fixture::new(false).await;
    let digest = f.cache.store().put("bytes");
    f.stall();
    f.set("0", vec![output("a", &digest)], &[]).await;
    let many = 3 * crate::invocation::watching::PAGE + 10;
    let mut last = 0;
    for n in 0..many {
        last = f.complete(&format!("//:{n}"), &["0"]).await;
    }
    let mut progress = f.progress().await;
    let mut slow = f.watch().await;
    let mut heard = Vec::new();
    for _ in 0..10 {
        heard.push(timeout(PATIENCE, slow.recv()).await.unwrap().unwrap());
    }
    let unread = f.watch().await;
    // All others change while it has not heard of them.
    f.cache.faults().clear();
    f.cache.faults().sever_connections();
    reached(&mut progress, last).await;
    f.finish().await;
    heard.extend(self::heard(slow).await);
    let mut reported: std::collections::HashMap<String, Vec<TargetState>> = Default::default();
    for change in &heard {
        if let Change::Target(row) = change {
            reported.entry(row.label.clone()).or_default().push(row.state);
        }
    }
    assert_eq!(reported.len(), many);
    for (label, mut states) in reported {
        // The record has it once more, if the task has released its targets meanwhile.
        states.dedup();
        let is_right = matches!(
            states[..],
            [TargetState::Settled] | [TargetState::Completed, TargetState::Settled]
        );
        assert!(is_right, "{label}: {states:?}");
    }
    assert!(report(&heard).failed == 0);
    drop(unread);
}

#[tokio::test]
async fn who_fetches_or_follows_keeps_the_daemon_at_work() {
    let mut f = Fixture::new(false).await;
    let service = f.services.service.clone();
    let digest = f.cache.store().put("bytes");
    f.set("0", vec![output("a", &digest)], &[]).await;
    f.complete("//:a", &["0"]).await;
    f.finish().await;
    timeout(PATIENCE, f.services.engine.settled(&f.key))
        .await
        .expect("in time");
    assert!(!service.is_busy());
    let idle = async || {
        while service.is_busy() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let next = pb::InvocationChoice {
        next: true,
        ..pb::InvocationChoice::default()
    };
    let following = service.watch(next, true);
    assert!(service.is_busy());
    drop(following);
    timeout(PATIENCE, idle()).await.expect("it has gone");
    // Gone from the disk, and slow to come back.
    let path = f.dir.path().join("execroot/_main/bazel-out/k8/bin/a");
    std::fs::remove_file(&path).unwrap();
    f.stall();
    let fetching = tokio::spawn({
        let (service, path) = (service.clone(), path.display().to_string());
        async move { service.materialize(vec![path]).await }
    });
    let begun = async {
        while !service.is_busy() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, begun).await.expect("it begins");
    f.cache.faults().clear();
    f.cache.faults().sever_connections();
    let fetched = timeout(PATIENCE, fetching).await.expect("in time").unwrap();
    assert!(fetched[0].error.is_empty() && path.exists(), "{fetched:?}");
    assert!(!service.is_busy());
}

#[tokio::test]
async fn what_is_asked_for_together_is_answered_in_order() {
    let mut f = Fixture::new(false).await;
    let names = ["a", "b", "c"];
    let outputs = names.map(|name| output(name, &f.cache.store().put(name)));
    f.set("0", outputs.into(), &[]).await;
    f.complete("//:a", &["0"]).await;
    f.finish().await;
    timeout(PATIENCE, f.services.engine.settled(&f.key))
        .await
        .expect("in time");
    let bin = f.dir.path().join("execroot/_main/bazel-out/k8/bin");
    for name in names {
        std::fs::remove_file(bin.join(name)).unwrap();
    }
    let asked = ["c", "none", "a", "c", "b"].map(|name| bin.join(name).display().to_string());
    let got = f.services.service.materialize(asked.to_vec()).await;
    let paths: Vec<&String> = got.iter().map(|result| &result.path).collect();
    assert_eq!(paths, asked.iter().collect::<Vec<_>>());
    let came = got.iter().map(|result| result.error.is_empty());
    assert_eq!(
        came.collect::<Vec<_>>(),
        [true, false, true, true, true],
        "{got:?}"
    );
}
