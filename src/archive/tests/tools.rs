//! Archives of the programs that people make archives with.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use super::*;

/// Whether a program is installed; a test says when it goes without.
pub(super) fn has(program: &str) -> bool {
    let found = Command::new(program)
        .arg("--version")
        .output()
        .is_ok_and(|output| output.status.success());
    if !found {
        eprintln!("SKIPPED: {program} is not installed, so its archives are not tested");
    }
    found
}

pub(super) fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A directory with all that an archive can hold.
pub(super) fn source(dir: &Path) -> PathBuf {
    let source = dir.join("source");
    let deep = format!("long/{}/{}", "d".repeat(120), "e".repeat(130));
    let long = format!("{deep}/{}", "f".repeat(200));
    for directory in ["empty", "d/\u{e4}", &deep] {
        fs::create_dir_all(source.join(directory)).unwrap();
    }
    let mut chance = outhaul_testkit::Chance::new(1);
    for (name, bytes, mode) in [
        ("a", b"one".to_vec(), 0o644),
        ("d/run", b"#!/bin/sh\n".to_vec(), 0o755),
        ("d/\u{e4}/private", b"two".to_vec(), 0o600),
        ("d/nothing", Vec::new(), 0o444),
        ("d/with space and\nnewline", b"three".to_vec(), 0o644),
        ("large", chance.bytes(700_001), 0o750),
        (&long, b"long".to_vec(), 0o644),
    ] {
        fs::write(source.join(name), bytes).unwrap();
        fs::set_permissions(source.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    symlink("../a", source.join("d/link")).unwrap();
    symlink(&long, source.join("long-link")).unwrap();
    symlink("nowhere", source.join("dangling")).unwrap();
    source
}

/// What is expected of that: modes are those of the executable bits.
fn expected(source: &Path) -> BTreeMap<String, String> {
    let mut expected = tree(source);
    for what in expected.values_mut() {
        if let Some((mode, rest)) = what.split_once(' ').filter(|(mode, _)| *mode != "->") {
            let mode = u32::from_str_radix(mode, 8).unwrap();
            *what = format!("{} {rest}", if mode & 0o111 != 0 { "755" } else { "644" });
        }
    }
    expected
}

pub(super) fn compare(archive: &Path, source: &Path) {
    let name = archive.file_name().unwrap().to_str().unwrap();
    let how = How::of(Format::of(name).unwrap());
    let bytes = fs::read(archive).unwrap();
    let target = archive.with_extension("unpacked");
    how.all(&target, &[&bytes])
        .unwrap_or_else(|e| panic!("{name}: {e}"));
    assert_eq!(tree(&target), expected(source), "{name}");
}

#[test]
fn tars_of_gnu_tar_are_unpacked() {
    if !has("tar") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let source = source(dir.path());
    fs::hard_link(source.join("large"), source.join("large-again")).unwrap();
    for format in ["gnu", "pax", "oldgnu", "posix"] {
        for (ending, compressor) in [
            ("tar", ""),
            ("tar.gz", "gzip"),
            ("tar.xz", "xz"),
            ("tar.zst", "zstd"),
        ] {
            if !compressor.is_empty() && !has(compressor) {
                continue;
            }
            let archive = dir.path().join(format!("{format}.{ending}"));
            let mut tar = Command::new("tar");
            tar.arg(format!("--format={format}")).arg("-caf").arg(&archive);
            run(tar.arg("-C").arg(&source).arg("."));
            compare(&archive, &source);
        }
    }
}

#[test]
fn sparse_files_of_gnu_tar_are_unpacked_exactly_or_refused() {
    if !has("tar") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    let file = fs::File::create(source.join("sparse")).unwrap();
    file.set_len(3 << 20).unwrap();
    use std::os::unix::fs::FileExt as _;
    for at in [0, 1 << 20, (3 << 20) - 10] {
        file.write_all_at(b"here", at).unwrap();
    }
    let make = |name: &str, flags: &[&str]| {
        let archive = dir.path().join(name);
        run(Command::new("tar")
            .args(flags)
            .arg("-cSf")
            .arg(&archive)
            .arg("-C")
            .arg(&source)
            .arg("."));
        archive
    };
    compare(&make("gnu.tar", &["--format=gnu"]), &source);
    for version in ["0.0", "0.1", "1.0"] {
        let version = format!("--sparse-version={version}");
        let archive = make("pax.tar", &["--format=pax", &version]);
        let error = How::default().error(&fs::read(archive).unwrap());
        assert!(error.contains("sparse in PAX format"), "{version}: {error}");
    }
}

#[test]
fn tars_of_bsdtar_are_unpacked() {
    if !has("bsdtar") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let source = source(dir.path());
    for ending in ["tar", "tar.gz", "tar.xz", "tar.zst", "zip"] {
        let archive = dir.path().join(format!("bsd.{ending}"));
        run(Command::new("bsdtar")
            .arg("-caf")
            .arg(&archive)
            .arg("-C")
            .arg(&source)
            .arg("."));
        compare(&archive, &source);
    }
}

#[test]
fn tars_of_python_are_unpacked() {
    if !has("python3") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let source = source(dir.path());
    fs::hard_link(source.join("large"), source.join("large-again")).unwrap();
    for format in ["GNU_FORMAT", "PAX_FORMAT"] {
        for (ending, mode) in [("tar", "w"), ("tar.gz", "w:gz"), ("tar.xz", "w:xz")] {
            let archive = dir.path().join(format!("{format}.{ending}"));
            let script = format!(
                "import sys, tarfile\n\
                 with tarfile.open(sys.argv[1], {mode:?}, format=tarfile.{format}) as tar:\n    \
                 tar.add(sys.argv[2], arcname='.')\n"
            );
            run(Command::new("python3")
                .arg("-c")
                .arg(script)
                .arg(&archive)
                .arg(&source));
            compare(&archive, &source);
        }
    }
}
