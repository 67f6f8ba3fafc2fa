//! How fast this machine can be at all: `cargo bench --bench limit`.
//!
//! Prints a Markdown table of what the plain program in `plain/` needs; `pipeline` measures the library against it.

mod plain;

use std::{
    fs,
    io::{self, Write as _},
};

use plain::{ROUNDS, create, directory, folders, look, spread};

fn main() -> io::Result<()> {
    let mut table = io::stdout().lock();
    writeln!(
        table,
        "| plain program, {} threads | median (least to greatest) of {ROUNDS} |",
        plain::THREADS
    )?;
    writeln!(table, "|---|---|")?;
    let small = folders(200, 100, 4096);
    let large = folders(4, 1, 256 << 20);
    let (mut created, mut looked, mut written) = (Vec::new(), Vec::new(), Vec::new());
    let base = directory()?;
    for round in 0..=ROUNDS {
        let here = base.path().join(round.to_string());
        let create_small = create(&here, &small)?.as_secs_f64();
        let look_small = look(&here, &small)?.as_secs_f64();
        fs::remove_dir_all(&here)?;
        let create_large = create(&here, &large)?.as_secs_f64();
        fs::remove_dir_all(&here)?;
        // The first is the warm-up.
        if round > 0 {
            created.push(20_000.0 / create_small / 1000.0);
            looked.push(20_000.0 / look_small / 1000.0);
            written.push(1024.0 / create_large);
        }
    }
    writeln!(
        table,
        "| 20,000 files of 4 KiB hashed and created | {} thousand files/s |",
        spread(&created, 1)
    )?;
    writeln!(
        table,
        "| `lstat` of the 20,000 | {} thousand files/s |",
        spread(&looked, 1)
    )?;
    writeln!(
        table,
        "| 4 files of 256 MiB hashed and written | {} MiB/s |",
        spread(&written, 0)
    )?;
    Ok(())
}
