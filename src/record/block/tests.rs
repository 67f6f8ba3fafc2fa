use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::record::value::ValueError;

fn content() -> impl Strategy<Value = OutputContent> {
    let digest = (0..6usize, any::<Vec<u8>>(), any::<u64>()).prop_map(|(function, seed, size)| {
        let function = DigestFunction::ALL[function];
        let hash = Digest::of(function, &seed);
        OutputContent::Blob(Digest::new(function, hash.hash(), size).unwrap())
    });
    prop_oneof![
        digest,
        any::<Vec<u8>>().prop_map(|b| OutputContent::Inline(Bytes::from(b))),
        any::<String>().prop_map(OutputContent::Symlink),
        Just(OutputContent::Directory),
    ]
}

fn stamp() -> impl Strategy<Value = Stamp> {
    any::<(u64, i64, i64, u64, u64, i64)>().prop_map(|(size, mtime_ns, ctime_ns, inode, device, taken_ns)| {
        Stamp {
            size,
            mtime_ns,
            ctime_ns,
            inode,
            device,
            taken_ns,
        }
    })
}

fn output() -> impl Strategy<Value = OutputRow> {
    let state = prop_oneof![
        Just(OutputState::Known),
        Just(OutputState::Materialized),
        Just(OutputState::Evicted),
        Just(OutputState::Failed),
    ];
    let class = prop_oneof![Just(Class::Known), Just(Class::Optional), Just(Class::Required)];
    let texts = any::<(String, String, String, String, String, String, String, String)>();
    (
        content(),
        state,
        class,
        texts,
        proptest::option::of(stamp()),
        any::<(i64, u64, u64)>(),
    )
        .prop_map(|(content, state, class, texts, stamp, numbers)| OutputRow {
            content,
            state,
            class,
            rule: texts.0.into(),
            label: texts.1.into(),
            aspect: texts.2.into(),
            output_group: texts.3.into(),
            invocation_id: texts.4.into(),
            event: texts.5.into(),
            stamp,
            source: texts.6.into(),
            materialized_at_ms: numbers.0,
            took_us: numbers.1,
            error: texts.7,
            version: numbers.2,
        })
}

/// Rows by directory and name.
type Rows = BTreeMap<(String, String), Option<OutputRow>>;

fn rows() -> impl Strategy<Value = Rows> {
    let place = (
        prop_oneof![Just(""), Just("a/"), Just("a-b/"), Just("a/b/"), Just("é/")],
        "[a-c.é]{1,2}",
    );
    let place = place.prop_map(|(directory, name)| (directory.to_owned(), name));
    prop::collection::btree_map(place, proptest::option::weighted(0.9, output()), 0..12)
}

fn block(rows: &Rows) -> Block {
    let mut builder = Builder::default();
    for ((directory, name), row) in rows {
        let directory = directory.as_str().into();
        match row {
            Some(row) => builder.push(&directory, name, row),
            None => builder.push_removal(&directory, name),
        }
    }
    builder.finish()
}

fn unsealed(value: Vec<u8>) -> Result<Block, ValueError> {
    unseal(value.into(), &mut Texts::default())
}

fn holds(block: &Block, rows: &Rows) -> Result<(), TestCaseError> {
    prop_assert_eq!(block.len(), rows.len());
    for (i, ((directory, name), expected)) in rows.iter().enumerate() {
        for likely in [0, i, rows.len()] {
            prop_assert_eq!(block.find(directory, name, likely), Ok(i));
        }
        let row = block.row(i).unwrap();
        prop_assert_eq!(row.is_removal(), expected.is_none());
        prop_assert_eq!(row.path(), ExecPath::new(&format!("{directory}{name}")).ok());
        prop_assert_eq!(&row.to_row(), expected);
        if let Some(expected) = expected {
            prop_assert!(row.content_is(&expected.content));
            let other = OutputContent::Symlink("another link's target".into());
            prop_assert!(!row.content_is(&other), "it is not what the strategy makes");
            prop_assert_eq!(row.stamp(), expected.stamp);
        }
    }
    prop_assert!(block.find("a/", "zz", 0).is_err());
    Ok(())
}

proptest! {
    #[test]
    fn rows_read_back_as_they_were_before_and_after_they_are_sealed(rows in rows()) {
        let block = block(&rows);
        holds(&block, &rows)?;
        holds(&unsealed(seal(&block)).unwrap(), &rows)?;
    }

    #[test]
    fn of_two_blocks_the_newer_ones_rows_stay(older in rows(), newer in rows()) {
        let merged = merge(&unsealed(seal(&block(&older))).unwrap(), &block(&newer));
        let mut expected = older;
        expected.extend(newer);
        holds(&merged, &expected)?;
        holds(&unsealed(seal(&merged)).unwrap(), &expected)?;
    }

    #[test]
    fn a_flipped_bit_anywhere_is_noticed(rows in rows(), at in any::<prop::sample::Index>(), bit in 0..8u8) {
        let mut value = seal(&block(&rows));
        let at = at.index(value.len());
        value[at] ^= 1 << bit;
        prop_assert!(unsealed(value).is_err());
    }

    #[test]
    fn any_bytes_decode_or_fail_without_a_panic(bytes in any::<Vec<u8>>(), rows in rows(),
                                                at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        // Also such as no program writes: the checksum is right, and the rest is not.
        let mut changed = seal(&block(&rows))[5..].to_vec();
        let at = at.index(changed.len());
        changed[at] = byte;
        for bytes in [bytes, changed] {
            let sealed = crate::record::value::seal_value(|value| value.extend_from_slice(&bytes));
            let Ok(block) = unsealed(sealed) else { continue };
            for row in block.rows_from(0) {
                let _ = (row.path(), row.to_row(), row.stamp(), row.content_is(&OutputContent::Directory));
            }
            let _ = block.find("a/", "b", 3);
            let _ = merge(&block, &block);
        }
    }
}

#[test]
fn a_known_file_takes_few_bytes_beyond_its_name() {
    let mut builder = Builder::default();
    let directory: Arc<str> = "bazel-out/k8-fastbuild/bin/some/package/".into();
    let mut row = OutputRow::known(OutputContent::Blob(Digest::of(DigestFunction::Sha256, b"x")));
    row.label = "//some/package:target".into();
    for n in 0..100 {
        builder.push(&directory, &format!("file{n:03}.o"), &row);
    }
    let block = builder.finish();
    let names = 100 * "file000.o".len();
    let beyond = block.bytes() + size_of::<Block>() - names;
    assert!(beyond < 100 * 50, "{beyond} bytes in memory");
    assert!(
        seal(&block).len() - names < 100 * 40,
        "{} bytes in the store",
        seal(&block).len()
    );
}

#[test]
fn rows_of_one_target_share_their_texts() {
    let mut row = OutputRow::known(OutputContent::Directory);
    row.label = "//a:b".into();
    let mut rows = Rows::new();
    rows.insert(("a/".into(), "b".into()), Some(row.clone()));
    rows.insert(("a/".into(), "c".into()), Some(row));
    let block = unsealed(seal(&block(&rows))).unwrap();
    let [first, second] = [0, 1].map(|i| block.row(i).unwrap().to_row().unwrap());
    assert!(Arc::ptr_eq(&first.label, &second.label));
}

#[test]
fn large_blocks_have_wide_offsets() {
    let mut rows = Rows::new();
    for n in 0..30 {
        let row = OutputRow::known(OutputContent::Inline(vec![n; 3000].into()));
        rows.insert((String::new(), format!("{n:02}")), Some(row));
    }
    let block = unsealed(seal(&block(&rows))).unwrap();
    assert!(block.offsets.wide);
    holds(&block, &rows).unwrap();
}
