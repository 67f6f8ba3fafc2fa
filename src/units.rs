//! Durations and sizes as people write them, the wall clock, and random ids.

use std::{
    fs::Metadata,
    os::unix::fs::MetadataExt as _,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{anyhow, bail};

/// The wall clock, in milliseconds since the epoch; 0 before that.
pub(crate) fn now_ms() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX))
}

/// The same in nanoseconds.
pub(crate) fn now_ns() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX))
}

/// A UUID of version 4 (RFC 9562).
pub(crate) fn random_uuid() -> String {
    let bits = rand::random::<u128>() & !(0xf << 76 | 0b11 << 62) | 4 << 76 | 0b10 << 62;
    let hex = format!("{bits:032x}");
    format!(
        "{}-{}-{}-{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..]
    )
}

/// Whether HTTP's `date` can express a time: from 1970 to 9999. The HTTP library panics at others.
pub(crate) fn has_date(time: SystemTime) -> bool {
    const YEAR_10000: u64 = 253_402_300_800;
    time.duration_since(UNIX_EPOCH)
        .is_ok_and(|since| since.as_secs() < YEAR_10000)
}

/// The longest duration that is read: 100 years. A moment that is so far from now, or a few times as far, can be
/// reckoned with; one from now until the end of a clock's numbers cannot.
const LONGEST_SECONDS: f64 = 100.0 * 365.0 * 86400.0;

/// Reads a duration: a number with `ms`, `s`, `m`, `h`, `d` or `w`; a bare number is seconds, as in Bazel's flags. What is
/// longer than 100 years is as good as forever, and is read as 100 years.
///
/// # Errors
/// When the text is not of that form.
pub(crate) fn parse_duration(text: &str) -> anyhow::Result<Duration> {
    let error = || anyhow!("{text:?} is not a duration (write 500ms, 30s, 10m, 2h, 1d or 2w)");
    let (number, unit) = split(text);
    let seconds = match unit {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        "d" => 86400.0,
        "w" => 7.0 * 86400.0,
        _ => return Err(error()),
    };
    number
        .parse::<f64>()
        .ok()
        .and_then(|n| Duration::try_from_secs_f64((n * seconds).min(LONGEST_SECONDS)).ok())
        .ok_or_else(error)
}

/// Reads how old something may be: a duration with a unit, since days are meant as easily as seconds.
///
/// # Errors
/// When the text is not of that form.
pub(crate) fn parse_age(text: &str) -> anyhow::Result<Duration> {
    let age = parse_duration(text)?;
    if split(text).1.is_empty() && !age.is_zero() {
        let number = text.trim();
        bail!("{text:?} has no unit (write {number}d, or {number}s for seconds)");
    }
    Ok(age)
}

/// Reads `NAME=VALUE`. Gives which of the names that are known it is, each given with whether its value is a size or else a
/// number, and the value.
///
/// # Errors
/// When the text is not of that form, the name is unknown, or the value is invalid.
pub(crate) fn parse_named<I: Iterator<Item = (&'static str, bool)>>(
    text: &str,
    known: impl Fn() -> I,
) -> anyhow::Result<(usize, u64)> {
    let (name, value) = text
        .split_once('=')
        .ok_or_else(|| anyhow!("must be NAME=VALUE"))?;
    let Some((at, (_, is_size))) = known().enumerate().find(|(_, (known, _))| *known == name) else {
        let known: Vec<_> = known().map(|(name, _)| name).collect();
        bail!("unknown limit; expected one of {}", known.join(", "));
    };
    let value = if is_size {
        parse_size(value)?
    } else {
        value.parse().map_err(|_| anyhow!("{value:?} is not a number"))?
    };
    Ok((at, value))
}

/// Reads a size in bytes: a number with `B`, `K`/`Ki`/`KiB`, `M`/`Mi`/`MiB`, `G`/`Gi`/`GiB`, `T`/`Ti`/`TiB` (powers of 1024) or `KB`,
/// `MB`, `GB`, `TB` (powers of 1000).
///
/// # Errors
/// When the text is not of that form, or the size is larger than 2^63.
pub(crate) fn parse_size(text: &str) -> anyhow::Result<u64> {
    let error = || anyhow!("{text:?} is not a size (write 4096, 64KiB, 10MiB or 2GB)");
    let (number, unit) = split(text);
    let factor: u64 = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "ki" | "kib" => 1 << 10,
        "m" | "mi" | "mib" => 1 << 20,
        "g" | "gi" | "gib" => 1 << 30,
        "t" | "ti" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(error()),
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole
            .checked_mul(factor)
            .filter(|n| *n < 1 << 63)
            .ok_or_else(error);
    }
    let value = number.parse::<f64>().map_err(|_| error())? * factor as f64;
    if value.is_finite() && (0.0..9.2e18).contains(&value) {
        Ok(value as u64)
    } else {
        Err(error())
    }
}

fn split(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    (&text[..end], text[end..].trim_start())
}

/// The space that the file system gives to a file, in bytes.
pub(crate) fn allocated(metadata: &Metadata) -> u64 {
    metadata.blocks() * 512
}

/// A size for people: `512 B`, `3.4 MiB`.
pub(crate) fn show_size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// A count for people, with commas between thousands: `4,120`.
pub(crate) fn show_count(count: u64) -> String {
    let digits = count.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// A duration for people: `850ms`, `0.42s` becomes `420ms`, `12.5s`, `3m20s`.
pub(crate) fn show_duration(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    if seconds < 1.0 {
        format!("{seconds:.2}s")
    } else if seconds < 60.0 {
        format!("{seconds:.1}s")
    } else {
        format!("{}m{:02}s", duration.as_secs() / 60, duration.as_secs() % 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_written_as_far_as_the_library_can() {
        let day = Duration::from_secs(86_400);
        let last = httpdate::parse_http_date("Fri, 31 Dec 9999 23:59:59 GMT").unwrap();
        for (time, reported) in [
            (UNIX_EPOCH - Duration::from_nanos(1), false),
            (UNIX_EPOCH - 20_000 * day, false),
            (UNIX_EPOCH, true),
            (SystemTime::now(), true),
            (last, true),
            (last + Duration::from_secs(1), false),
        ] {
            assert_eq!(has_date(time), reported, "{time:?}");
            let shown = std::panic::catch_unwind(|| httpdate::fmt_http_date(time));
            assert_eq!(shown.is_ok(), reported, "{time:?}: what it is for");
        }
    }

    #[test]
    fn durations_read_as_written() {
        for (text, millis) in [
            ("500ms", 500),
            ("30s", 30_000),
            ("10m", 600_000),
            ("2h", 7_200_000),
            ("7", 7000),
            ("2w", 1_209_600_000),
            ("1.5s", 1500),
            ("0", 0),
        ] {
            assert_eq!(
                parse_duration(text).unwrap(),
                Duration::from_millis(millis),
                "{text}"
            );
        }
        for text in ["", "s", "-1s", "10 parsecs", "1e400s", "nan"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_age_has_a_unit() {
        for (text, seconds) in [
            ("14d", 1_209_600),
            ("2w", 1_209_600),
            ("90s", 90),
            ("0", 0),
            ("0d", 0),
        ] {
            assert_eq!(parse_age(text).unwrap().as_secs(), seconds, "{text}");
        }
        assert_eq!(
            parse_age("14").unwrap_err().to_string(),
            "\"14\" has no unit (write 14d, or 14s for seconds)"
        );
        assert!(parse_age("1.5").is_err() && parse_age("soon").is_err());
    }

    #[test]
    fn a_duration_without_end_can_be_reckoned_with() {
        for text in ["18446744073709551615s", "99999999999999d", &"9".repeat(400)] {
            let read = parse_duration(text).unwrap();
            assert_eq!(read.as_secs(), 100 * 365 * 86400, "{text}");
            assert!(std::time::Instant::now().checked_add(read * 10).is_some());
            assert!(i64::try_from(read.as_millis() * 10).is_ok());
        }
    }

    #[test]
    fn sizes_read_as_written() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("64KiB", 65536),
            ("10 MiB", 10 << 20),
            ("2GB", 2_000_000_000),
            ("1.5K", 1536),
            ("5Mi", 5 << 20),
            ("20Gi", 20 << 30),
        ] {
            assert_eq!(parse_size(text).unwrap(), bytes, "{text}");
        }
        for text in ["", "KiB", "-4", "3 apples", "99999999999TiB"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn numbers_show_for_people() {
        assert_eq!(show_size(0), "0 B");
        assert_eq!(show_size(3_565_158), "3.4 MiB");
        assert_eq!(show_size((1 << 20) - 1), "1.0 MiB");
        assert_eq!(show_count(4120), "4,120");
        assert_eq!(show_count(12), "12");
        assert_eq!(show_count(1_234_567), "1,234,567");
        assert_eq!(show_duration(Duration::from_millis(420)), "0.42s");
        assert_eq!(show_duration(Duration::from_secs(200)), "3m20s");
    }
}
