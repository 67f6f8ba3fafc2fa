# The chores by name. Each is a script or a single cargo command that works without just as well.

# What there is
default:
    @just --list --unsorted

# Show the whole thing without a build tool or a server
demo:
    cargo run --release -- demo

# Before a commit: formatting, lints, tests (arguments go to cargo test)
check *ARGS:
    scripts/check {{ARGS}}

# The tests alone; those that need a Bazel or a cache that is not installed are skipped
test *ARGS:
    cargo test {{ARGS}}

# Format the sources
fmt:
    cargo fmt --all

# The crate's documentation, in target/doc
doc:
    RUSTDOCFLAGS=-Dwarnings cargo doc --no-deps

# Licences, duplicates, sources and known vulnerabilities of the dependencies
deny:
    scripts/deny

# Install the real Bazels and caches that the end-to-end tests run against (Debian, root)
peers *NAMES:
    scripts/install-peers {{NAMES}}

# All that CI runs
ci:
    bash .ci/run
