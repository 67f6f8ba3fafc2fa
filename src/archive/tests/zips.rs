//! Zips: of the programs that make them, and such as no program makes.

use std::{fs, process::Command};

use super::{
    make::{Zip, ZipEntry},
    tools::{compare, has, run, source},
    *,
};

#[test]
fn zips_of_python_and_info_zip_are_unpacked() {
    let dir = tempfile::tempdir().unwrap();
    let source = source(dir.path());
    // Python's `write` would follow them, and `zip` cannot write them to a pipe.
    for name in ["d/link", "long-link", "dangling"] {
        fs::remove_file(source.join(name)).unwrap();
    }
    if has("python3") {
        for method in ["STORED", "DEFLATED"] {
            let archive = dir.path().join(format!("{method}.zip"));
            let script = format!(
                "import os, sys, zipfile\n\
                 with zipfile.ZipFile(sys.argv[1], 'w', zipfile.ZIP_{method}) as z:\n    \
                 for at, ds, fs in os.walk(sys.argv[2]):\n        \
                 for n in ds + fs:\n            \
                 p = os.path.join(at, n); z.write(p, os.path.relpath(p, sys.argv[2]))\n"
            );
            run(Command::new("python3")
                .arg("-c")
                .arg(script)
                .arg(&archive)
                .arg(&source));
            compare(&archive, &source);
        }
    }
    if has("zip") {
        // To a pipe: sizes follow the data. It cannot have symlinks.
        let piped = dir.path().join("piped.zip");
        let mut zip = Command::new("zip");
        let output = zip.current_dir(&source).args(["-qr", "-", "."]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        fs::write(&piped, output.stdout).unwrap();
        compare(&piped, &source);
        std::os::unix::fs::symlink("../a", source.join("d/link")).unwrap();
        let archive = dir.path().join("info.zip");
        run(Command::new("zip")
            .current_dir(&source)
            .args(["-qry"])
            .arg(&archive)
            .arg("."));
        compare(&archive, &source);
    }
}

#[test]
fn a_zip_is_whole_or_an_error_wherever_it_is_cut_or_changed() {
    let how = How::of(Format::Zip);
    let text = "one, ".repeat(200);
    let whole = Zip::default()
        .file("a", "one")
        .entry(&ZipEntry {
            is_deflated: true,
            ..ZipEntry::new("d/b", &text)
        })
        .end();
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("t");
    how.all(&target, &[&whole]).unwrap();
    let good = tree(&target);
    assert_eq!(good.len(), 3);
    for length in 0..whole.len() {
        assert!(
            how.error(&whole[..length]).starts_with("0.tar is damaged"),
            "{length}"
        );
    }
    let longer = [&whole[..], b"x"].concat();
    assert!(how.error(&longer).contains("0.tar is damaged"));
    for at in 0..whole.len() {
        let mut changed = whole.clone();
        changed[at] ^= 1;
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("t");
        if how.all(&target, &[&changed]).is_ok() {
            // Times, versions, modes of no meaning, or the names of members in both headers are no content.
            for (name, what) in tree(&target) {
                let content = what.split_once(' ').unwrap().1.to_owned();
                assert!(
                    good.values().any(|what| what.ends_with(&content)),
                    "{at}: {name} {what}"
                );
            }
        } else {
            assert_eq!(tree(dir.path()).len(), 0, "{at}");
        }
    }
}

#[test]
fn backslashes_are_slashes_where_windows_wrote_them() {
    for (made_on, expected) in [
        (
            0,
            &[("a", "755 directory"), ("a/b", "644 one"), ("d", "755 directory")][..],
        ),
        (
            10,
            &[("a", "755 directory"), ("a/b", "644 one"), ("d", "755 directory")],
        ),
        (3, &[("a\\b", "644 one"), ("d\\", "644 ")]),
    ] {
        let entry = |name, data| ZipEntry {
            made_on,
            ..ZipEntry::new(name, data)
        };
        let zip = Zip::default()
            .entry(&entry("a\\b", "one"))
            .entry(&entry("d\\", ""));
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("t");
        How::of(Format::Zip).all(&target, &[&zip.end()]).unwrap();
        assert_eq!(tree(&target), lines(expected), "{made_on}");
        let up = Zip::default()
            .entry(&entry("..\\x", ""))
            .entry(&entry("e/..\\x", ""));
        if made_on != 3 {
            assert!(How::of(Format::Zip).error(&up.end()).contains("\"..\""));
        }
    }
}

#[test]
fn a_name_in_utf8_goes_before_the_other_one_if_it_is_of_it() {
    let field = |of: &str, name: &str| {
        let mut field = [&[0x75, 0x70], &(name.len() as u16 + 5).to_le_bytes()[..], &[1]].concat();
        field.extend_from_slice(&rawzip::crc32(of.as_bytes()).to_le_bytes());
        field.extend_from_slice(name.as_bytes());
        field
    };
    let (right, stale, up) = (field("_.txt", "\u{e4}.txt"), field("b", "c"), field("d", "../d"));
    let entry = |name, extra| ZipEntry {
        extra,
        ..ZipEntry::new(name, "")
    };
    let zip = Zip::default()
        .entry(&entry("_.txt", &right))
        .entry(&entry("a", &stale))
        .entry(&entry("e", b"\x75\x70\x01\0\x01"));
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("t");
    How::of(Format::Zip).all(&target, &[&zip.end()]).unwrap();
    let expected = [("a", "644 "), ("e", "644 "), ("\u{e4}.txt", "644 ")];
    assert_eq!(tree(&target), lines(&expected));
    let up = Zip::default().entry(&entry("d", &up)).end();
    assert!(How::of(Format::Zip).error(&up).contains("\"..\""));
}

#[test]
fn a_zip_may_have_more_members_than_it_can_count() {
    let mut zip = Zip::default();
    for _ in 0..=1 << 16 {
        zip = zip.file("d/", "");
    }
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("t");
    How::of(Format::Zip).all(&target, &[&zip.end()]).unwrap();
    assert_eq!(tree(&target), lines(&[("d", "755 directory")]));
    let error = How::of(Format::Zip).error(&Zip::default().file("a", "").counting(2).end());
    assert!(error.contains("has 1 members where it says 2"), "{error}");
}

#[test]
fn what_cannot_be_unpacked_of_a_zip_is_named() {
    let file = |name| Zip::default().file(name, "data");
    let entry = |name| ZipEntry::new(name, "data");
    let link = |to| ZipEntry {
        mode: 0o120_777,
        ..ZipEntry::new("d/l", to)
    };
    let zeros = "\0".repeat(1 << 20);
    for (expected, zip) in [
        ("\"..\"", file("../x")),
        ("it is absolute", file("/x")),
        ("empty component", file("")),
        ("has data, but is not a file", file("d/")),
        ("reserved", file(".outhaul-tmp/x")),
        ("different content", file("a").file("a", "other")),
        ("would be a file or a link", file("a").file("a/b", "")),
        (
            "would be a file or a link",
            Zip::default()
                .entry(&ZipEntry {
                    name: "l",
                    ..link("d")
                })
                .file("l/x", ""),
        ),
        ("absolute path", Zip::default().entry(&link("/etc"))),
        ("leads out", Zip::default().entry(&link("../../x"))),
        ("too long", Zip::default().entry(&link(&zeros))),
        (
            "nothing else is unpacked",
            Zip::default().entry(&ZipEntry {
                mode: 0o010_644,
                ..entry("p")
            }),
        ),
        (
            "nothing else is unpacked",
            Zip::default().entry(&ZipEntry {
                mode: 0o020_644,
                ..entry("c")
            }),
        ),
        (
            "is encrypted",
            Zip::default().entry(&ZipEntry {
                flags: 1,
                ..entry("e")
            }),
        ),
        (
            "is compressed with",
            Zip::default().entry(&ZipEntry {
                method: Some(12),
                ..entry("b")
            }),
        ),
        (
            "damaged",
            Zip::default().entry(&ZipEntry {
                crc: Some(1),
                ..entry("a")
            }),
        ),
        (
            "damaged",
            Zip::default().entry(&ZipEntry {
                size: Some(3),
                ..entry("a")
            }),
        ),
        (
            "damaged",
            Zip::default().entry(&ZipEntry {
                size: Some(5),
                ..entry("a")
            }),
        ),
        (
            "another name",
            Zip::default().entry(&ZipEntry {
                local_name: Some("b"),
                ..entry("a")
            }),
        ),
        (
            "shares its bytes",
            file("a").entry(&ZipEntry {
                overlaps: true,
                ..entry("a")
            }),
        ),
    ] {
        let error = How::of(Format::Zip).error(&zip.end());
        assert!(
            error.contains(expected) && error.contains("0.tar"),
            "{expected}: {error}"
        );
    }
    let mut how = How::of(Format::Zip);
    how.mode = Mode::Flatten;
    assert!(how.error(&file("a").end()).contains("it is not a tar"));
    let bomb = Zip::default().entry(&ZipEntry {
        is_deflated: true,
        ..ZipEntry::new("a", &zeros)
    });
    let bomb = bomb.end();
    for (limit, value) in [
        (Limit::Bytes, (1 << 20) - 1),
        (Limit::Entries, 0),
        (Limit::Depth, 0),
    ] {
        let mut how = How::of(Format::Zip);
        how.limits.set(limit, value);
        let error = how.error(&bomb);
        assert!(
            error.contains(&format!("limit {limit}={value};")),
            "{limit}: {error}"
        );
    }
}

#[test]
fn a_zstd_member_is_unpacked_within_its_window() {
    use std::io::Write as _;
    let data = "zstd ".repeat(1000);
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
    encoder.window_log(22).unwrap();
    encoder.write_all(data.as_bytes()).unwrap();
    let packed = encoder.finish().unwrap();
    let zip = Zip::default().entry(&ZipEntry {
        data: &packed,
        method: Some(93),
        size: Some(data.len() as u64),
        crc: Some(rawzip::crc32(data.as_bytes())),
        ..ZipEntry::new("a", "")
    });
    let zip = zip.end();
    let dir = tempfile::tempdir().unwrap();
    let mut how = How::of(Format::Zip);
    how.all(dir.path(), &[&zip]).unwrap();
    assert_eq!(fs::read_to_string(dir.path().join("a")).unwrap(), data);
    how.limits.set(Limit::ZstdWindow, 1 << 20);
    assert!(how.error(&zip).contains("archive-zstd-window"));
}
