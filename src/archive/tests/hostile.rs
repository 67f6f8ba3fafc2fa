//! Archives that are damaged, or that mean harm: an error that says what is wrong, and nothing in the target.

use std::{fs, io};

use ::tar::EntryType;

use super::*;

const TARS: [Format; 4] = [Format::Tar, Format::TarGz, Format::TarZst, Format::TarXz];

/// Bytes that hardly compress.
fn noise(length: usize) -> String {
    let mut chance = outhaul_testkit::Chance::new(7);
    (0..length)
        .map(|_| char::from(b'a' + chance.below(26) as u8))
        .collect()
}

#[test]
fn an_archive_is_whole_or_an_error_wherever_it_is_cut() {
    let tar = Tar::default()
        .file("a", "one")
        .directory("d")
        .file("d/b", &noise(1500))
        .symlink("l", "a")
        .end();
    for format in TARS {
        let whole = compress(format, &tar);
        let how = How::of(format);
        let dir = tempfile::tempdir().unwrap();
        how.all(&dir.path().join("t"), &[&whole]).unwrap();
        assert_eq!(tree(dir.path()).len(), 5);
        // Between two members, and between streams of a compressor, a cut is seen by nothing but the missing end.
        let step = if format == Format::Tar { 128 } else { 13 };
        for length in (0..whole.len()).step_by(step).chain([whole.len() - 1]) {
            let error = how.error(&whole[..length]);
            assert!(
                error.starts_with("0.tar is damaged"),
                "{format:?} {length}: {error}"
            );
        }
    }
}

#[test]
fn nothing_may_follow_the_end() {
    let tar = Tar::default().file("a", "one").end();
    let padded = [&tar[..], &[0; 20 * 512]].concat();
    let twice = [&tar[..], &Tar::default().file("b", "two").end()].concat();
    for format in TARS {
        let how = How::of(format);
        let dir = tempfile::tempdir().unwrap();
        how.all(&dir.path().join("t"), &[&compress(format, &padded)])
            .unwrap();
        let error = how.error(&compress(format, &twice));
        assert!(error.contains("something follows its end"), "{error}");
        // After the end of the compressor's last stream.
        for follows in [&b"garbage"[..], b"\0\0\0\0x"] {
            let garbage = [&compress(format, &tar)[..], follows].concat();
            assert!(how.error(&garbage).starts_with("0.tar is damaged"), "{format:?}");
        }
        // Zeros are no more than padding there, too.
        let dir = tempfile::tempdir().unwrap();
        let filled = [&compress(format, &tar)[..], &[0; 200 << 10]].concat();
        how.all(&dir.path().join("t"), &[&filled]).unwrap();
        assert_eq!(tree(dir.path()).len(), 2, "{format:?}");
    }
}

#[test]
fn streams_of_a_compressor_may_be_several() {
    let tar = Tar::default().file("a", "one").file("b", "two").end();
    for format in TARS {
        let parts = tar.chunks(700).map(|part| compress(format, part));
        let mut whole = parts.collect::<Vec<_>>().concat();
        if format == Format::TarZst {
            // Skippable frames, as bazel-remote and pzstd write them.
            let skippable = [&0x184d_2a50_u32.to_le_bytes()[..], &3_u32.to_le_bytes(), b"xyz"].concat();
            whole = [&skippable[..], &whole, &skippable].concat();
        }
        let dir = tempfile::tempdir().unwrap();
        How::of(format).all(dir.path(), &[&whole]).unwrap();
        assert_eq!(
            tree(dir.path()),
            lines(&[("a", "644 one"), ("b", "644 two")]),
            "{format:?}"
        );
    }
}

#[test]
fn a_flipped_bit_in_a_compressed_archive_is_noticed() {
    let tar = Tar::default().file("a", &noise(3000)).end();
    for format in [Format::TarGz, Format::TarZst, Format::TarXz] {
        let whole = compress(format, &tar);
        let mut checked = 0;
        for at in (0..whole.len()).step_by(97) {
            let mut flipped = whole.clone();
            flipped[at] ^= 4;
            let dir = tempfile::tempdir().unwrap();
            let target = dir.path().join("t");
            match How::of(format).all(&target, &[&flipped]) {
                // Header fields that mean nothing, such as the time in gzip's.
                Ok(_) => assert!(tree(&target)["a"].starts_with("644 3000 "), "{format:?} {at}"),
                Err(_) => assert_eq!(tree(dir.path()).len(), 0),
            }
            checked += 1;
        }
        assert!(checked > 10);
    }
}

#[test]
fn what_cannot_be_unpacked_is_named() {
    let tar = Tar::default;
    let entry = Entry::new;
    let long = format!("d/{}", "n".repeat(300));
    for (expected, tar) in [
        ("\"../x\"", tar().file("../x", "")),
        ("\"a/../../x\"", tar().file("a/../../x", "")),
        ("it is absolute", tar().file("/etc/x", "")),
        ("empty component", tar().file("", "")),
        ("\".\"", tar().file(".", "")),
        ("255 bytes", tar().file(&long, "")),
        (
            "NUL",
            tar().pax(EntryType::XHeader, &[("path", "a\0b")]).file("x", ""),
        ),
        ("reserved", tar().file(".outhaul-tmp/x", "")),
        (
            "not UTF-8",
            tar().entry(Entry {
                name: b"\xff",
                ..entry(EntryType::Regular, "")
            }),
        ),
        ("a device", tar().entry(entry(EntryType::Char, "c"))),
        ("a device", tar().entry(entry(EntryType::Block, "b"))),
        ("a named pipe", tar().entry(entry(EntryType::Fifo, "p"))),
        (
            "of the type 'V'",
            tar().entry(Entry {
                data: b"x",
                ..entry(EntryType::new(b'V'), "v")
            }),
        ),
        ("of the type 'M'", tar().entry(entry(EntryType::new(b'M'), "v"))),
        ("absolute path", tar().symlink("l", "/etc/passwd")),
        ("leads out", tar().symlink("l", "../x")),
        ("\"..\" after a name", tar().symlink("l", "a/../../x")),
        ("no file can have that name", tar().symlink("l", "")),
        (
            "would be a file or a link",
            tar().symlink("d", "e").directory("e").file("d/x", ""),
        ),
        ("would be a file or a link", tar().file("d", "").file("d/x", "")),
        ("is a directory in one", tar().directory("d").file("d", "")),
        ("is a directory in one", tar().file("d/x", "").symlink("d", "e")),
        ("would be a file or a link", tar().file("d", "").directory("d")),
        ("different content", tar().file("a", "1").file("a", "2")),
        ("different content", tar().symlink("a", "1").symlink("a", "2")),
        ("a file in one and a link", tar().file("a", "1").symlink("a", "b")),
        ("comes before it", tar().hard_link("a", "b").file("b", "")),
        ("comes before it", tar().hard_link("a", "a")),
        ("comes before it", tar().directory("d").hard_link("a", "d")),
        ("leads out", tar().symlink("d/b", "../c").hard_link("a", "d/b")),
        (
            "comes before it",
            tar().file("d/x", "").symlink("e", "d").hard_link("a", "e/x"),
        ),
        ("itself", tar().file("a", "").hard_link("a", "a")),
        ("is absolute", tar().hard_link("a", "/etc/passwd")),
        ("\"..\"", tar().hard_link("a", "../x")),
        (
            "has data, but is not a file",
            tar().entry(Entry {
                data: b"x",
                ..entry(EntryType::Directory, "d")
            }),
        ),
        (
            "sparse in PAX format",
            tar()
                .pax(EntryType::XHeader, &[("GNU.sparse.major", "1")])
                .file("x", ""),
        ),
        (
            "sets \"path\" twice",
            tar()
                .pax(EntryType::XHeader, &[("path", "a"), ("path", "b")])
                .file("x", ""),
        ),
        (
            "for all members",
            tar()
                .pax(EntryType::XGlobalHeader, &[("path", "a")])
                .file("x", ""),
        ),
        (
            "malformed",
            tar().raw_pax(EntryType::XHeader, b"8 path=a\n").file("x", ""),
        ),
        (
            "malformed",
            tar()
                .raw_pax(EntryType::XHeader, b"10 path=a\n10 path=b\r")
                .file("x", ""),
        ),
        // A name that other programs do not see, or see otherwise.
        (
            "a value of several lines",
            tar()
                .pax(EntryType::XHeader, &[("comment", "a\n10 path=b")])
                .file("x", ""),
        ),
        (
            "a value of several lines",
            tar().pax(EntryType::XHeader, &[("path", "a\nb")]).file("x", ""),
        ),
        (
            "a value of several lines",
            tar()
                .pax(EntryType::XHeader, &[("comment", "a\nb"), ("size", "0")])
                .file("x", ""),
        ),
        (
            "a value of several lines",
            tar()
                .pax(EntryType::XHeader, &[("comment", "a\n\nb"), ("path", "y")])
                .file("x", ""),
        ),
        (
            "malformed",
            tar().raw_pax(EntryType::XGlobalHeader, b"nonsense").file("x", ""),
        ),
        (
            "no future member",
            tar().pax(EntryType::XHeader, &[("path", "a")]),
        ),
        (
            "damaged",
            tar()
                .file("a", "")
                .entry(Entry {
                    size: Some(0),
                    data: b"x",
                    ..entry(EntryType::Regular, "b")
                })
                .file("c", ""),
        ),
        (
            "archive-size",
            tar().entry(Entry {
                size: Some(1 << 40),
                ..entry(EntryType::Regular, "a")
            }),
        ),
        (
            "damaged",
            tar().entry(Entry {
                size: Some(4096),
                ..entry(EntryType::Regular, "a")
            }),
        ),
    ] {
        let error = How::default().error(&tar.end());
        assert!(
            error.contains(expected) && error.contains("0.tar"),
            "{expected}: {error}"
        );
    }
}

#[test]
fn harmless_oddities_are_unpacked() {
    let long = format!("d\u{e4}/{}", "n".repeat(120));
    let tar = Tar::default()
        .entry(Entry::new(EntryType::new(b'V'), "/of all"))
        .pax(EntryType::XGlobalHeader, &[("comment", "a commit")])
        .directory("./")
        .file("./a", "one")
        .file(".//a", "one")
        .entry(Entry {
            mode: 0o6755,
            data: b"run",
            ..Entry::new(EntryType::Regular, "./setuid")
        })
        .entry(Entry {
            mode: 0o001,
            ..Entry::new(EntryType::new(b'7'), "odd")
        })
        .entry(Entry::new(EntryType::Regular, "old/"))
        .directory("old/")
        // As macOS and `tar --acls` write them: a value is as long as it says.
        .pax(
            EntryType::XHeader,
            &[
                ("path", "d\u{e4}/b"),
                (
                    "SCHILY.acl.access",
                    "user::rw-\ngroup::r--\n\n9 x=y\nother::r--\n",
                ),
                ("mtime", "1.5"),
            ],
        )
        .file("short", "two")
        .pax(EntryType::XHeader, &[("comment", "a\nb"), ("linkpath", "../old")])
        .symlink(&long, "no")
        .hard_link("d\u{e4}/c", "./a")
        .hard_link("run", "setuid")
        .symlink("d\u{e4}/l", "../old")
        .hard_link("d\u{e4}/m", "d\u{e4}/l")
        .symlink("gone", "nothing")
        .symlink("gone", "nothing")
        .end();
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("deep/er/t");
    let published = How::default().all(&target, &[&tar]).unwrap();
    let expected = [
        ("a", "644 one"),
        ("d\u{e4}", "755 directory"),
        ("d\u{e4}/b", "644 two"),
        ("d\u{e4}/c", "644 one"),
        ("d\u{e4}/l", "-> ../old"),
        ("d\u{e4}/m", "-> ../old"),
        (long.as_str(), "-> ../old"),
        ("gone", "-> nothing"),
        ("odd", "755 "),
        ("old", "755 directory"),
        ("run", "755 run"),
        ("setuid", "755 run"),
    ];
    assert_eq!(tree(&target), lines(&expected));
    assert_eq!((published.files, published.existed), (10, false));
    use std::os::unix::fs::MetadataExt as _;
    let meta = |name: &str| fs::metadata(target.join(name)).unwrap();
    assert_eq!((meta("a").nlink(), meta("run").nlink()), (1, 1));
    assert_eq!(fs::read_dir(dir.path().join("deep/er")).unwrap().count(), 1);
}

#[test]
fn leading_components_are_cut_from_names_and_hard_links() {
    let tar = Tar::default()
        .directory("top")
        .file("top/a", "one")
        .file("other", "left out")
        .hard_link("top/d/b", "top/a")
        .symlink("top/d/l", "../a")
        .end();
    let how = How {
        mode: Mode::Extract { strip_components: 1 },
        ..How::default()
    };
    let dir = tempfile::tempdir().unwrap();
    how.all(dir.path(), &[&tar]).unwrap();
    let expected = [
        ("a", "644 one"),
        ("d", "755 directory"),
        ("d/b", "644 one"),
        ("d/l", "-> ../a"),
    ];
    assert_eq!(tree(dir.path()), lines(&expected));
    // Where a link lies decides about its target: one level less is out of the directory.
    let out = Tar::default().symlink("top/l", "../x").end();
    assert!(how.error(&out).contains("leads out"));
}

#[test]
fn unsafe_links_are_kept_but_never_followed() {
    let dir = tempfile::tempdir().unwrap();
    let elsewhere = dir.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let to = elsewhere.to_str().unwrap();
    let mut how = How::default();
    how.options.unsafe_links = true;
    let target = dir.path().join("t");
    how.all(&target, &[&Tar::default().symlink("d", to).end()])
        .unwrap();
    assert_eq!(tree(&target), lines(&[("d", &format!("-> {to}"))]));
    let through = Tar::default().symlink("e", to).file("e/x", "").end();
    assert!(how.all(&target, &[&through]).is_err());
    // The link of the first time is in the target now.
    let error = how
        .all(&target, &[&Tar::default().file("d/x", "").end()])
        .unwrap_err();
    assert!(
        error.to_string().contains("a symlink where a directory is to be"),
        "{error}"
    );
    assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 0);
}

#[test]
fn every_limit_ends_an_archive_that_is_over_it() {
    let zeros = "\0".repeat(80 << 20);
    let bomb = Tar::default().file("a", &zeros).end();
    let padded = [&*Tar::default().end(), &[0; 1 << 20]].concat();
    let links = (0..9).fold(Tar::default().file("a", &noise(1000)), |tar, n| {
        tar.hard_link(&format!("l{n}"), "a")
    });
    let long = "n/".repeat(1000);
    let deep = format!("{}/x", ["d"; 10].join("/"));
    let manifest = Tar::default().file("artifact_manifest.txt", &noise(2000)).end();
    let small = Tar::default().file("a", &noise(100_000)).end();
    let xz = {
        use io::Write as _;
        let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 9);
        encoder.write_all(&small).unwrap();
        encoder.finish().unwrap()
    };
    let zst = {
        use io::Write as _;
        let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(25).unwrap();
        encoder.write_all(&small).unwrap();
        encoder.finish().unwrap()
    };
    for (limit, value, how, bytes) in [
        (
            Limit::Ratio,
            200,
            How::of(Format::TarZst),
            compress(Format::TarZst, &bomb),
        ),
        (
            Limit::Ratio,
            200,
            How::of(Format::TarXz),
            compress(Format::TarXz, &bomb),
        ),
        (Limit::Bytes, 5000, How::default(), links.clone().end()),
        (
            Limit::Bytes,
            5000,
            How::of(Format::TarZst),
            compress(Format::TarZst, &padded),
        ),
        (Limit::Entries, 9, How::default(), links.end()),
        // Directories that are only implied count.
        (
            Limit::Entries,
            10,
            How::default(),
            Tar::default().file(&deep, "").end(),
        ),
        (
            Limit::Depth,
            10,
            How::default(),
            Tar::default().file(&deep, "").end(),
        ),
        (
            Limit::Header,
            1500,
            How::default(),
            Tar::default().directory(&long).end(),
        ),
        (Limit::Manifest, 1999, How::flatten(), manifest),
        (Limit::XzMemory, 1 << 20, How::of(Format::TarXz), xz),
        (Limit::ZstdWindow, 16 << 20, How::of(Format::TarZst), zst),
    ] {
        let mut how = how;
        how.limits.set(limit, value);
        let error = how.error(&bytes);
        assert!(
            error.contains(&format!("limit {limit}={};", limit.shown(value))),
            "{limit}: {error}"
        );
    }
}

#[test]
fn a_failed_source_is_not_taken_for_damage() {
    struct Failing(Vec<u8>);
    impl Read for Failing {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let length = self.0.len().min(buffer.len()).min(100);
            if length == 0 {
                return Err(io::Error::other("the cache is gone"));
            }
            buffer[..length].copy_from_slice(&self.0[..length]);
            self.0.drain(..length);
            Ok(length)
        }
    }
    for format in TARS {
        let mut bytes = compress(format, &Tar::default().file("a", &noise(9000)).end());
        bytes.truncate(bytes.len() / 2);
        let how = How::of(format);
        let dir = tempfile::tempdir().unwrap();
        let staging = Staging::open(&dir.path().join("t"), how.options).unwrap();
        let error = unpack(Failing(bytes), &how.archive("cas://x", 0), &staging).unwrap_err();
        assert!(
            matches!(error, ArchiveError::Source { .. }),
            "{format:?}: {error:?}"
        );
        assert_eq!(error.to_string(), "failed to read cas://x: the cache is gone");
    }
}

#[test]
fn flattening_cuts_stage_directories_and_leaves_the_manifest_out() {
    let tar = |manifest: &str| Tar::default().file("artifact_manifest.txt", manifest);
    let whole = tar("math/blas/stage\nbase/stage\n")
        .directory("math/blas/stage/lib")
        .file("math/blas/stage/lib/a.so.1", "one")
        .symlink("math/blas/stage/lib/a.so", "a.so.1")
        .file("base/stage/bin/b", "two")
        .hard_link("base/stage/bin/c", "math/blas/stage/lib/a.so.1")
        .end();
    let dir = tempfile::tempdir().unwrap();
    How::flatten().all(dir.path(), &[&whole]).unwrap();
    let expected = [
        ("bin", "755 directory"),
        ("bin/b", "644 two"),
        ("bin/c", "644 one"),
        ("lib", "755 directory"),
        ("lib/a.so", "-> a.so.1"),
        ("lib/a.so.1", "644 one"),
    ];
    assert_eq!(tree(dir.path()), lines(&expected));
    for (expected, bytes) in [
        ("first member is not", Tar::default().end()),
        (
            "first member is not",
            Tar::default().file("base/stage/a", "").end(),
        ),
        (
            "first member is not",
            Tar::default().directory("artifact_manifest.txt").end(),
        ),
        (
            "none of the directories",
            tar("base/stage").file("base/other", "").end(),
        ),
        (
            "none of the directories",
            tar("base/stage").file("base/stage", "").end(),
        ),
        (
            "none of the directories",
            tar("base/stage").file("artifact_manifest.txt", "").end(),
        ),
        (
            "none of the directories",
            tar("base/stage")
                .file("base/stage/a", "")
                .hard_link("base/stage/b", "c")
                .end(),
        ),
        ("line 1 of", tar("../base/stage").file("base/stage/a", "").end()),
        ("\"..\"", tar("base/stage").file("base/stage/../../a", "").end()),
        (
            "leads out",
            tar("base/stage").symlink("base/stage/a", "../x").end(),
        ),
    ] {
        let error = How::flatten().error(&bytes);
        assert!(error.contains(expected), "{expected}: {error}");
    }
}
