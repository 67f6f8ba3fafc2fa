//! Output roots that another process places outputs in.

use super::*;

/// As if another process were in the middle of placing an older build's file, until this is dropped.
fn placing_elsewhere(f: &Fixture) -> std::fs::File {
    let path = f.dir.path().join(".outhaul-newest._main");
    let file = std::fs::File::open(path).unwrap();
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockShared).unwrap();
    file
}

#[tokio::test]
async fn what_another_process_places_late_is_put_right_before_anything_is_reported_to_be_there() {
    for version in ["7.7.1", "4.2.3"] {
        let mut f = Fixture::new(false).await;
        f.finish().await;
        timeout(PATIENCE, f.services.engine.settled(&f.key))
            .await
            .unwrap();
        let other = placing_elsewhere(&f);
        f.key.invocation_id = "newer".to_owned();
        f.send(Event::Started(Started {
            command: "build".to_owned(),
            workspace: "/w".to_owned(),
            build_tool_version: version.to_owned(),
            ..Started::default()
        }))
        .await;
        let root = f.dir.path().join("execroot/_main");
        f.send(Event::ExecRoot(root.display().to_string())).await;
        let digest = f.cache.store().put("newer");
        let link = File {
            content: Content::Symlink("file".to_owned()),
            ..output("link", &digest)
        };
        f.set("0", vec![output("file", &digest), link], &[]).await;
        let last = f.complete("//:a", &["0"]).await;
        let mut progress = f.progress().await;
        let (file, link) = (
            root.join("bazel-out/k8/bin/file"),
            root.join("bazel-out/k8/bin/link"),
        );
        let is_there = async {
            while !file.exists() || link.symlink_metadata().is_err() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, is_there).await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(progress.borrow_and_update().through < last, "it is not sure yet");
        // Now the older files come.
        let late = f.dir.path().join("late");
        std::fs::write(&late, "older").unwrap();
        std::fs::rename(&late, &file).unwrap();
        std::os::unix::fs::symlink("older", &late).unwrap();
        std::fs::rename(&late, &link).unwrap();
        drop(other);
        reached(&mut progress, last).await;
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "newer");
        assert_eq!(std::fs::read_link(&link).unwrap().to_str(), Some("file"));
        f.finish().await;
        let settled = timeout(PATIENCE, f.services.engine.settled(&f.key))
            .await
            .unwrap();
        assert_eq!((settled.failed, settled.messages.len()), (0, 0));
        let row = f.services.engine.snapshot("newer").await.unwrap().0;
        assert_eq!(
            row.outputs.downloaded + row.outputs.present,
            2,
            "each counts once"
        );
    }
}
