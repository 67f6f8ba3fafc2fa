# The chores by name. Each is a script or a single cargo command that works without just as well.

# What there is
default:
    @just --list --unsorted

# Show the whole thing without a build tool or a server
demo:
    cargo run -- demo

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
    RUSTDOCFLAGS=-Dwarnings cargo doc --no-deps --document-private-items

# Every decoder on inputs that a fuzzer makes up, so many seconds each: `just fuzz 60 journal`
fuzz *ARGS:
    scripts/fuzz {{ARGS}}

# Kill, damage and double the daemon many times: `just crash 300 /some/ext4`
crash *ARGS:
    scripts/crash {{ARGS}}

# The daemon for so many minutes, with everything that goes wrong
soak *ARGS:
    scripts/soak {{ARGS}}

# Licences, duplicates, sources and known vulnerabilities of the dependencies
deny:
    scripts/deny

# What people install, in target/dist: archive, Debian package, list of components, checksums
package *ARGS:
    scripts/package {{ARGS}}

# Install the real Bazels and caches that the end-to-end tests run against (Debian, root)
peers *NAMES:
    scripts/install-peers {{NAMES}}

# Whole workloads against their goals, on this machine: `just bench S N --rounds 3`; --help tells the rest
bench *ARGS:
    cargo bench --bench workloads -- {{ARGS}}

# The same beside a real Bazel: `just bench-bazel --shape S`; --help tells the rest
bench-bazel *ARGS:
    scripts/bench {{ARGS}}

# Every end-to-end test with both Bazels, every scenario with every kind of cache
e2e *FILTERS:
    scripts/e2e {{FILTERS}}

# All that CI runs
ci:
    bash .ci/run
