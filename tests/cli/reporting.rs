//! `outhaul report`: what builds have downloaded, with a daemon and from the record.

use rustix::process::Signal;
use serde_json::Value;

use crate::support::{World, run};

fn sum(lines: &[Value], field: &str) -> u64 {
    lines.iter().map(|line| line[field].as_u64().unwrap()).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_builds_have_downloaded_is_the_same_however_it_is_grouped() {
    let world = World::new().await;
    let mut server = world.serve(&[]).await;
    world.play(&world.build, server.address()).await;
    let state = world.state();
    run(["wait", &state, "--timeout=60s"]).await.expect(1);
    let report = async |by: &str| {
        let by = format!("--by={by}");
        run(["report", &state, "--json", "--price=0.5", &by])
            .await
            .expect(0)
            .json()
    };
    let by_workspace = report("workspace").await;
    assert_eq!(by_workspace.len(), 1, "{by_workspace:?}");
    let all = &by_workspace[0];
    assert_eq!(all["name"], world.path("workspace"));
    assert_eq!(all["builds"], 1);
    let bytes = all["downloaded_bytes"].as_u64().unwrap();
    assert!(bytes > 0 && all["without_download"].as_u64() > Some(0), "{all}");
    assert!((all["cost"].as_f64().unwrap() - bytes as f64 * 0.5e-9).abs() < 1e-12);
    let status = run(["status", &state, "--json"]).await.expect(0).json();
    let both =
        |line: &Value, second: &str| line["downloaded"].as_u64().unwrap() + line[second].as_u64().unwrap();
    assert_eq!(
        both(all, "without_download"),
        both(&status[0], "present"),
        "{all} {status:?}"
    );
    for by in ["target", "rule", "store", "day"] {
        let lines = report(by).await;
        for field in ["downloaded", "downloaded_bytes", "without_download"] {
            assert_eq!(sum(&lines, field), all[field], "{by} {field}: {lines:?}");
        }
        assert!(lines.iter().all(|line| line["builds"] == 1), "{lines:?}");
        let name = lines[0]["name"].as_str().unwrap();
        match by {
            "store" => assert_eq!(name, world.cache.endpoint()),
            "target" => assert!(name.starts_with("//"), "{name}"),
            _ => assert!(!name.is_empty(), "{by}"),
        }
    }
    // The same build again has everything.
    world.play(&world.build.incremental(), server.address()).await;
    run(["wait", &state, "--timeout=60s"]).await.expect(1);
    let both = report("workspace").await;
    assert_eq!(both[0]["builds"], 2);
    assert_eq!(both[0]["downloaded_bytes"], bytes);
    assert!(both[0]["without_download"].as_u64() > all["without_download"].as_u64());

    // From the record, for people and for spreadsheets.
    server.signal(Signal::TERM);
    server.end().await;
    let table = run(["report", &state]).await.expect(0);
    assert!(table.out().contains(&world.path("workspace")), "{}", table.out());
    assert!(table.err.contains("of 2 builds"), "{}", table.err);
    let csv = run(["report", &state, "--csv", "--by=day"]).await.expect(0).out();
    let mut csv = csv.lines();
    assert_eq!(
        csv.next(),
        Some("name,builds,downloaded,downloaded_bytes,without_download")
    );
    assert!(
        csv.next()
            .unwrap()
            .ends_with(&format!(",{}", both[0]["without_download"]))
    );
    let none = run(["report", &state, "--since=0s", "--json"]).await.expect(0);
    assert_eq!(none.out(), "");
    run(["report", &state, "--since=soon"])
        .await
        .says(2, &["--since=soon"]);
    run(["report", &state, "--price=-1"]).await.says(2, &["--price"]);
}
