//! The configuration file: TOML with a flag's name (without dashes in front) as key.
//!
//! It is turned into arguments that stand before the user's own, so that one parser checks both; keys whose
//! environment variable is set are left out, so that the order flag, environment, file holds.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use super::ConfigError;

const REMOTE_CACHE: &str = "--remote-cache";

/// Puts the configuration file's settings before a subcommand's own arguments. Without `--config` (or
/// `OUTHAUL_CONFIG`) the file is `outhaul/config.toml` below the XDG configuration directory, and need not exist. Keys
/// at the top level count for every subcommand that has such a flag; a table named after a subcommand counts for it
/// alone. `known` says whether the subcommand has a flag, and whether it takes a value.
///
/// # Errors
/// Naming the file and the key: the file is missing or not TOML, or a key is not a flag.
pub(crate) fn with_config_file(
    mut args: Vec<OsString>,
    subcommands: &[String],
    known: impl Fn(&str, &str) -> Option<bool>,
    known_anywhere: impl Fn(&str) -> bool,
) -> Result<Vec<OsString>, ConfigError> {
    if args.get(1).is_some_and(|word| word == "help") {
        return Ok(args);
    }
    let Some(position) = args.iter().position(|arg| {
        arg.to_str()
            .is_some_and(|arg| subcommands.iter().any(|s| s == arg))
    }) else {
        return Ok(args);
    };
    let subcommand = args[position].to_string_lossy().into_owned();
    let Some((path, text)) = read(&args)? else {
        return Ok(args);
    };
    let mut inserted = file_arguments(&path, &text, &subcommand, subcommands, known, known_anywhere)?;
    // Other lists grow by what the command line adds; the caches of the command line stand for the file's.
    let is_cache = |arg: &OsString| {
        let arg = arg.to_str().unwrap_or_default();
        arg == REMOTE_CACHE
            || arg
                .strip_prefix(REMOTE_CACHE)
                .is_some_and(|rest| rest.starts_with('='))
    };
    if args.iter().take_while(|arg| *arg != "--").any(is_cache) {
        inserted.retain(|arg| !is_cache(arg));
    }
    args.splice(position + 1..position + 1, inserted);
    Ok(args)
}

/// A file's settings as a subcommand's arguments.
pub(crate) fn file_arguments(
    path: &Path,
    text: &str,
    subcommand: &str,
    subcommands: &[String],
    known: impl Fn(&str, &str) -> Option<bool>,
    known_anywhere: impl Fn(&str) -> bool,
) -> Result<Vec<OsString>, ConfigError> {
    let at = |key: &str, reason: &str| ConfigError::new(format!("{}: {key}", path.display()), reason);
    let table: toml::Table = text
        .parse()
        .map_err(|e: toml::de::Error| ConfigError::new(path.display().to_string(), e.message()))?;
    let mut inserted = Vec::new();
    let mut add = |key: &str, value: &toml::Value, own: bool| -> Result<(), ConfigError> {
        let flag = key.replace('_', "-");
        let Some(takes_value) = known(subcommand, &flag) else {
            return if own || !known_anywhere(&flag) {
                Err(at(key, "unknown setting"))
            } else {
                Ok(())
            };
        };
        let variable = format!("OUTHAUL_{}", flag.to_ascii_uppercase().replace('-', "_"));
        if std::env::var_os(variable).is_some() {
            return Ok(());
        }
        let values = match value {
            toml::Value::Array(values) => values.clone(),
            single => vec![single.clone()],
        };
        for value in values {
            let text = match value {
                toml::Value::String(text) => text,
                toml::Value::Integer(number) => number.to_string(),
                toml::Value::Boolean(on) if takes_value => on.to_string(),
                toml::Value::Boolean(true) => {
                    inserted.push(format!("--{flag}").into());
                    continue;
                }
                toml::Value::Boolean(false) => continue,
                _ => {
                    return Err(at(
                        key,
                        "must be a string, a number, true or false, or a list of these",
                    ));
                }
            };
            inserted.push(OsString::from(format!("--{flag}={text}")));
        }
        Ok(())
    };
    for (key, value) in &table {
        match value {
            toml::Value::Table(own) if key == subcommand => {
                for (key, value) in own {
                    add(key, value, true)?;
                }
            }
            toml::Value::Table(_) if subcommands.contains(key) => {}
            value => add(key, value, false)?,
        }
    }
    Ok(inserted)
}

/// Arguments that name the default configuration file, if they name none and there is one at present: anyone who reads
/// it again with them gets an error when it is gone, which is something else than no settings.
pub(crate) fn naming_the_file(mut args: Vec<OsString>) -> Vec<OsString> {
    if named(&args).is_none()
        && let Some(path) = default_file().filter(|path| path.exists())
    {
        let mut flag = OsString::from("--config=");
        flag.push(path);
        args.insert(args.len().min(1), flag);
    }
    args
}

/// The file that arguments or the environment name.
fn named(args: &[OsString]) -> Option<PathBuf> {
    let mut named = None;
    let mut rest = args.iter().take_while(|arg| *arg != "--");
    while let Some(arg) = rest.next() {
        let Some(arg) = arg.to_str() else { continue };
        if let Some(path) = arg.strip_prefix("--config=") {
            named = Some(PathBuf::from(path));
        } else if arg == "--config" {
            named = rest.next().map(PathBuf::from);
        }
    }
    named.or_else(|| std::env::var_os("OUTHAUL_CONFIG").map(PathBuf::from))
}

fn default_file() -> Option<PathBuf> {
    let absolute = |name: &str| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|p| p.is_absolute())
    };
    let base = absolute("XDG_CONFIG_HOME").or_else(|| absolute("HOME").map(|home| home.join(".config")))?;
    Some(base.join("outhaul/config.toml"))
}

fn read(args: &[OsString]) -> Result<Option<(PathBuf, String)>, ConfigError> {
    let named = named(args);
    let Some(path) = named.clone().or_else(default_file) else {
        return Ok(None);
    };
    match fs::read_to_string(&path) {
        Ok(text) => Ok(Some((path, text))),
        // Where homes are missing, or somebody else's, nobody has put one there.
        Err(_) if named.is_none() && fs::symlink_metadata(&path).is_err() => Ok(None),
        Err(error) => Err(ConfigError::new(format!("--config={}", path.display()), error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(file: &str, args: &[&str]) -> Result<Vec<String>, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        fs::write(&path, file).unwrap();
        let mut all: Vec<OsString> = vec!["outhaul".into(), "serve".into()];
        all.push(format!("--config={}", path.display()).into());
        all.extend(args.iter().map(OsString::from));
        let known = |_: &str, flag: &str| match flag {
            "remote-cache" | "remote-header" | "writers" => Some(true),
            "strict" => Some(false),
            _ => None,
        };
        with_config_file(all, &["serve".to_owned(), "run".to_owned()], known, |flag| {
            flag == "to"
        })
        .map(|args| args.iter().map(|a| a.to_string_lossy().into_owned()).collect())
        .map_err(|e| e.to_string())
    }

    #[test]
    fn keys_become_flags_before_the_users_own() {
        let args = run(
            "remote_cache = 'grpc://h:1'\nremote-header = ['a=b', 'c=d']\nstrict = true\nto = 'x'\n[serve]\nwriters = 3\n[run]\nnonsense = 1\n",
            &["--writers=9"],
        )
        .unwrap();
        let own = args.iter().position(|a| a == "--writers=9").unwrap();
        for flag in [
            "--remote-cache=grpc://h:1",
            "--remote-header=a=b",
            "--remote-header=c=d",
            "--strict",
            "--writers=3",
        ] {
            let position = args.iter().position(|a| a == flag);
            assert!(position.is_some_and(|p| p < own), "{flag} in {args:?}");
        }
    }

    #[test]
    fn the_caches_of_the_command_line_stand_for_the_files() {
        let file = "remote_cache = ['grpc://h:1', 'grpc://h:2']\nremote-header = ['a=b']\n";
        for own in [
            &["--remote-cache=grpc://h:3"][..],
            &["--remote-cache", "grpc://h:3"],
        ] {
            let args = run(file, own).unwrap();
            assert!(!args.iter().any(|arg| arg.contains("grpc://h:1")), "{args:?}");
            assert!(args.iter().any(|arg| arg == "--remote-header=a=b"), "{args:?}");
        }
    }

    #[test]
    fn the_file_may_be_named_before_the_subcommand() {
        let missing = ["outhaul", "--config", "/nowhere.toml", "serve"]
            .map(OsString::from)
            .to_vec();
        let error = with_config_file(missing, &["serve".to_owned()], |_, _| None, |_| false).unwrap_err();
        assert!(error.to_string().contains("/nowhere.toml"), "{error}");
        // What the wrapped command's own --config means is not for us to say.
        let wrapped = [
            "outhaul",
            "--config=/nowhere.toml",
            "run",
            "--",
            "bazel",
            "build",
            "--config=ci",
        ];
        let error = with_config_file(
            wrapped.map(OsString::from).to_vec(),
            &["run".to_owned()],
            |_, _| None,
            |_| false,
        );
        assert!(error.unwrap_err().to_string().contains("/nowhere.toml"));
    }

    #[test]
    fn wrong_files_and_keys_are_named() {
        for (file, part) in [
            ("nonsense = 1", "nonsense"),
            ("a = [", "c.toml"),
            ("writers = 1.5", "writers"),
            ("[serve]\nto = 'x'", "to"),
        ] {
            let error = run(file, &[]).unwrap_err();
            assert!(error.contains(part), "{file}: {error}");
        }
        let missing = vec!["outhaul".into(), "serve".into(), "--config=/nowhere.toml".into()];
        let error = with_config_file(missing, &["serve".to_owned()], |_, _| None, |_| false).unwrap_err();
        assert!(error.to_string().contains("/nowhere.toml"), "{error}");
    }
}
