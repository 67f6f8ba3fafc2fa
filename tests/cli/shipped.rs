//! What people copy from `dist`: the container, the manifests, the templates for CI services and the installer fit the
//! program, the scripts and each other.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::Command,
};

use outhaul::digest::{Digest, DigestFunction};
use outhaul_testkit::{Ran, Running, clean, finish, peers};
use regex::Regex;

use crate::{
    secured::Pki,
    support::{World, outhaul, program, run},
};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

fn read(path: &str) -> String {
    std::fs::read_to_string(repository().join(path)).unwrap()
}

/// The texts of files below a directory, with their paths.
fn files(below: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut directories = vec![below.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(repository().join(&directory)).unwrap() {
            let entry = entry.unwrap();
            let path = format!("{directory}/{}", entry.file_name().to_str().unwrap());
            if entry.file_type().unwrap().is_dir() {
                directories.push(path);
            } else if let Ok(text) = std::fs::read_to_string(entry.path()) {
                found.push((path, text));
            }
        }
    }
    found
}

#[test]
fn files_that_templates_and_documents_name_exist() {
    let name = Regex::new(r"\b(?:dist|scripts)/[A-Za-z0-9@_./-]*[A-Za-z0-9]").unwrap();
    let texts = [files("dist"), files("docs")].concat();
    let single = ["action.yml", "README.md"].map(|path| (path.to_owned(), read(path)));
    let mut seen = 0;
    for (path, text) in texts.into_iter().chain(single) {
        for named in name.find_iter(&text) {
            seen += 1;
            assert!(
                repository().join(named.as_str()).exists(),
                "{path} names {}",
                named.as_str()
            );
        }
    }
    assert!(seen > 30, "{seen}");
}

#[tokio::test(flavor = "multi_thread")]
async fn variables_that_they_set_are_settings() {
    let name = Regex::new(r"\bOUTHAUL_[A-Z_]*[A-Z]").unwrap();
    let variables = |text: &str| -> BTreeSet<String> {
        let found = name.find_iter(text);
        found.map(|found| found.as_str().to_owned()).collect()
    };
    let mut known = BTreeSet::new();
    for command in ["serve", "run", "wait", "fetch blob"] {
        let args = command.split(' ').chain(["--help"]);
        known.extend(variables(&run(args).await.expect(0).out()));
    }
    // Of scripts and templates themselves, each of which says what it is for.
    for (file, own) in [
        ("dist/ci/build", "PORT"),
        ("dist/bazel/tools/bazel", "BES"),
        ("dist/bazel/tools/bazel", "DOWNLOAD_MINIMAL"),
        ("dist/bazel/tools/bazel", "DISABLE"),
        ("dist/bazel/tools/bazel", "RUN"),
        ("dist/bazel/outhaul.bzl", "BINARIES"),
        ("dist/bazel/outhaul.bzl", "WRAPPER"),
        ("dist/compose/compose.yaml", "IMAGE"),
        ("dist/compose/compose.yaml", "USER"),
    ] {
        let own = format!("OUTHAUL_{own}");
        assert!(read(file).contains(&own), "{file} has no {own}");
        known.insert(own);
    }
    let action = ("action.yml".to_owned(), read("action.yml"));
    for (path, text) in files("dist").into_iter().chain([action]) {
        let unknown: Vec<_> = variables(&text).difference(&known).cloned().collect();
        assert_eq!(unknown, Vec::<String>::new(), "{path}");
    }
}

/// What the image's health check runs.
fn health_check() -> Vec<String> {
    let container = read("dist/container/Containerfile");
    let check = container.lines().find(|line| line.starts_with("HEALTHCHECK"));
    let (_, check) = check.unwrap().split_once("CMD ").unwrap();
    serde_json::from_str(check).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_health_check_fails_without_a_daemon() {
    let world = World::new().await;
    let command = health_check();
    let written = format!("command: [{}, \"{}\"]", command[..3].join(", "), command[3]);
    assert!(
        read("dist/kubernetes/ci-job.yaml").contains(&written),
        "the pod has another one than {written}"
    );
    let state = world.path("state");
    let args: Vec<String> = command[1..]
        .iter()
        .map(|arg| arg.replace("/var/lib/outhaul/state", &state))
        .collect();
    run(&args).await.says(1, &["no daemon answers"]);
    let server = world.serve(&[]).await;
    run(&args).await.expect(0);
    drop(server);
    // What it has left behind answers nothing.
    run(&args).await.says(1, &["no daemon answers"]);
}

/// The arguments of the container that is called `outhaul`: one a line, or in brackets.
fn arguments(manifest: &str) -> Vec<String> {
    let text = read(manifest);
    let (_, args) = text.split_once(" args:").unwrap();
    if let Some(rest) = args.strip_prefix(" [") {
        let (args, _) = rest.split_once(']').unwrap();
        return args.split(", ").map(str::to_owned).collect();
    }
    let lines = args
        .lines()
        .skip(1)
        .map(str::trim)
        .filter(|line| !line.starts_with('#'));
    let args = lines.map_while(|line| line.strip_prefix("- "));
    args.map(str::to_owned).collect()
}

/// A daemon with the arguments of a manifest, where this machine has other addresses and files, and with more of them.
async fn served(world: &World, manifest: &str, here: &[(&str, &str)], more: &[&str]) -> Running {
    let args = arguments(manifest).into_iter().map(|arg| {
        let replaced = here.iter().fold(arg, |arg, (from, to)| arg.replace(from, to));
        replaced.replace("grpcs://cache.example.com", &world.cache.endpoint())
    });
    let mut command = outhaul();
    command.args(args).args(more).arg(world.state());
    Running::serve(command).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_manifests_command_lines_are_daemons() {
    let world = World::new().await;
    let pki = Pki::new(&world);
    let here = [
        ("/etc/outhaul/tls/tls.crt", pki.certificate.as_str()),
        ("/etc/outhaul/tls/tls.key", pki.key.as_str()),
        ("/etc/outhaul/tokens/bes", pki.token.as_str()),
        ("/etc/outhaul/tokens/admin", pki.token.as_str()),
        ("grpcs://bes.example.com", "grpc://127.0.0.1:1"),
        (":8985", ":0"),
        (":8986", ":0"),
    ];
    let proxy = served(&world, "dist/kubernetes/proxy.yaml", &here, &[]).await;
    assert!(proxy.address().starts_with("grpc://0.0.0.0:"), "{proxy}");
    drop(proxy);

    // Its listeners have their usual ports, which may be taken here.
    let exec_roots = world.dir.path().canonicalize().unwrap();
    let here = [("/output", exec_roots.to_str().unwrap())];
    let ports = ["--bes-listen=127.0.0.1:0", "--admin-listen=none"];
    let sidecar = served(&world, "dist/kubernetes/ci-job.yaml", &here, &ports).await;
    world.play(&world.build, sidecar.address()).await;
    world.assert_complete();
}

#[test]
fn the_image_is_made_of_what_the_archive_has() {
    let package = read("scripts/package");
    let container = read("dist/container/Containerfile");
    let mut copied = 0;
    for line in container.lines().filter(|line| line.starts_with("COPY ")) {
        let mut words = line.split(' ').skip(1).filter(|word| !word.starts_with("--"));
        let from = words.next().unwrap();
        // Every system's own.
        if from != "ca-certificates.crt" {
            copied += 1;
            assert!(package.contains(&format!("\"$files/{from}\"")), "{line}");
        }
    }
    assert_eq!(copied, 2);
    assert!(
        package.contains("dist/container"),
        "the archive has no Containerfile"
    );
}

/// The schemas of check-jsonschema and kubernetes-validate, which carry the services'.
#[tokio::test]
async fn the_schemas_take_the_manifests_and_templates() {
    let test = "the_schemas_take_the_manifests_and_templates";
    if !peers::are_there(test, &["schemas-python"]) {
        return;
    }
    let python = async |args: &[&str]| {
        let mut command = clean(Command::new(peers::program("schemas-python")));
        command.current_dir(repository()).arg("-m").args(args);
        finish(command).await.expect(0)
    };
    for (schema, path) in [
        ("github-actions", "action.yml"),
        ("github-workflows", "dist/ci/github.yml"),
        ("gitlab-ci", "dist/ci/gitlab.yml"),
        ("buildkite", "dist/ci/buildkite.yml"),
        ("circle-ci", "dist/ci/circleci.yml"),
        ("compose-spec", "dist/compose/compose.yaml"),
    ] {
        let schema = format!("vendor.{schema}");
        python(&["check_jsonschema", "--builtin-schema", &schema, path]).await;
    }
    for path in ["dist/kubernetes/proxy.yaml", "dist/kubernetes/ci-job.yaml"] {
        python(&["kubernetes_validate", "--strict", path]).await;
    }
}

/// Installs an archive whose program is a script.
async fn installed(dir: &Path, text: &str, sum: Option<&str>, from: &str) -> Ran {
    let files = dir.join("outhaul-0.1.0-here");
    std::fs::create_dir_all(&files).unwrap();
    program(files.join("outhaul"), text);
    let mut tar = Command::new("tar");
    tar.args(["-czf", "archive.tar.gz", "outhaul-0.1.0-here"])
        .current_dir(dir);
    finish(tar).await.expect(0);
    let archive = std::fs::read(dir.join("archive.tar.gz")).unwrap();
    let right = Digest::of(DigestFunction::Sha256, &archive).hash_hex();
    let script = repository().join("dist/devcontainer/outhaul/install.sh");
    let mut command = clean(Command::new(script));
    command
        .current_dir(dir)
        .env("ARCHIVE", from)
        .env("SHA256", sum.unwrap_or(&right))
        .env("PREFIX", dir.join("prefix"));
    finish(command).await
}

#[tokio::test]
async fn only_an_archive_with_the_right_checksum_is_installed() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let program = dir.join("prefix/bin/outhaul");
    let good = "#!/bin/sh\necho outhaul 0.1.0\n";
    let file = "archive.tar.gz";
    let other = "0".repeat(64);
    let ran = installed(dir, good, Some(&other), file).await;
    ran.says(1, &["checksum", &other, "nothing was installed"]);
    let ran = installed(dir, "#!/bin/sh\nexit 126\n", None, file).await;
    ran.says(1, &["does not run on this machine"]);
    assert!(!program.exists());
    for from in [file.to_owned(), format!("file://{}", dir.join(file).display())] {
        let ran = installed(dir, good, None, &from).await.expect(0);
        assert!(ran.out().contains("installed outhaul 0.1.0"), "{ran}");
        assert_eq!(std::fs::read_to_string(&program).unwrap(), good);
        std::fs::remove_file(&program).unwrap();
    }
    let feature = read("dist/devcontainer/outhaul/devcontainer-feature.json");
    let feature: serde_json::Value = serde_json::from_str(&feature).unwrap();
    // Options are given to the script as variables of these names in capitals.
    for option in feature["options"].as_object().unwrap().keys() {
        let script = read("dist/devcontainer/outhaul/install.sh");
        assert!(script.contains(&option.to_uppercase()), "{option}");
    }
}
