"""The tables, and which goals were missed."""

import contextlib
import os
import pathlib
import platform
import statistics
import subprocess

PROXY_GOAL = 1.05
MEMORY_GOAL_MIB = 256
# Reading an action cache of 100,000 outputs, whole and after eight targets in a thousand have changed; and null builds with it.
WHOLE_GOAL_MS = 500
CHANGED_GOAL_MS = 20
HOLD_GOAL = 1.2


def report_proxy(shape, results):
    """The proxy's table; and the goals that were missed."""
    ratio = [p / d for d, p in zip(results["direct"], results["proxied"])]
    null = [p / d for d, p in zip(results["null_direct"], results["null_proxied"])]
    print(f"### Events forwarded: {shape}\n")
    print(f"Medians of {len(ratio)} interleaved rounds, with minimum and maximum.\n")
    print("| what | result | goal |")
    print("|---|---|---|")
    print(f"| build of cache hits, events to the upstream service | {spread(results['direct'])} s | |")
    print(f"| the same through the proxy | {spread(results['proxied'])} s | |")
    print(f"| **through the proxy / direct** | **{spread(ratio)}** | at most {PROXY_GOAL} |")
    print(f"| null build, through the proxy / direct | {spread(null)} | |")
    print(f"| the proxy's processor time per build | {spread(results['cpu'])} s | |")
    print(flush=True)
    middle = statistics.median(ratio)
    return [f"proxy: ratio {middle:.3f}, goal {PROXY_GOAL}"] if middle > PROXY_GOAL else []


def report_action_cache(shape, results):
    """The table for the action cache; and the goals that were missed."""
    ratio = [w / o for w, o in zip(results["with"], results["without"])]
    print(f"### Bazel's action cache: {shape}\n")
    print(f"Medians of {len(ratio)} rounds, with minimum and maximum.\n")
    print("| what | result | goal |")
    print("|---|---|---|")
    print(f"| read whole | {spread(results['whole'], 0)} ms | at most {WHOLE_GOAL_MS} ms |")
    print(f"| read after eight targets in a thousand have changed | {spread(results['changed'], 1)} ms | at most {CHANGED_GOAL_MS} ms |")
    print(f"| hold of a null build | {spread(results['with'], 3)} s | |")
    print(f"| the same with `--no-action-cache` | {spread(results['without'], 3)} s | |")
    print(f"| **with / without** | **{spread(ratio)}** | at most {HOLD_GOAL} |")
    print(flush=True)
    goals = [("whole", WHOLE_GOAL_MS), ("changed", CHANGED_GOAL_MS)]
    middles = [(what, statistics.median(results[what]), goal) for what, goal in goals]
    middles.append(("hold", statistics.median(ratio), HOLD_GOAL))
    return [f"action cache: {what} {middle:.3f}, goal {goal}" for what, middle, goal in middles if middle > goal]


def spread(values, digits=2):
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def report(name, shape, results):
    """One shape's table; and the goals that were missed."""
    rounds = list(zip(results["minimal"], results["toplevel"], results["outhaul"]))
    # Where Bazel's download cost nothing there is nothing to compare with.
    ratios = [(o - m) / (t - m) for m, t, o in rounds if t > m]
    if not ratios:
        raise SystemExit(f"bench: {name}: in no round did Bazel's download take any time")
    shares = [hold / null for hold, null in zip(results["null_hold"], results["null"])]
    peak = results["peak_kib"] / 1024

    def most(goal, unit=""):
        return "" if goal is None else f"at most {goal}{unit}"

    print(f"### {name}: {shape}\n")
    print(f"Medians of {len(rounds)} interleaved rounds, with minimum and maximum.\n")
    print("| what | result | goal |")
    print("|---|---|---|")
    print(f"| `--remote_download_minimal` alone | {spread(results['minimal'])} s | |")
    print(f"| `--remote_download_toplevel` | {spread(results['toplevel'])} s | |")
    print(f"| minimal + Outhaul | {spread(results['outhaul'])} s | |")
    print(f"| **(outhaul − minimal) / (toplevel − minimal)** | **{spread(ratios)}** | {most(shape.ratio)} |")
    print(f"| hold | {spread(results['hold'])} s | |")
    print(f"| the daemon's processor time per build | {spread(results['cpu'])} s | |")
    print(f"| null build, minimal alone | {spread(results['null'])} s | |")
    print(f"| null build, minimal, events to a file | {spread(results['null_file'])} s | |")
    print(f"| null build, minimal + Outhaul | {spread(results['null_outhaul'])} s | |")
    print(f"| null build: hold | {spread(results['null_hold'], 3)} s | {most(shape.hold_s, ' s')} |")
    print(f"| **hold / null build, minimal alone** | {spread(shares, 3)} | {most(shape.hold_share)} |")
    print(f"| the daemon's peak memory over all rounds | {peak:.0f} MiB | at most {MEMORY_GOAL_MIB} MiB |")
    print(flush=True)
    checked = [
        ("ratio", statistics.median(ratios), shape.ratio),
        ("null build held for, in seconds", statistics.median(results["null_hold"]), shape.hold_s),
        ("hold as a share of the null build", statistics.median(shares), shape.hold_share),
        ("peak memory in MiB", peak, MEMORY_GOAL_MIB),
    ]
    return [
        f"{name}: {what} {value:.3f}, goal {goal}" for what, value, goal in checked if goal is not None and value > goal
    ]


def machine():
    model = "unknown processor"
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return f"{len(os.sched_getaffinity(0))} × {model}, Linux {platform.release()}"


def first_line(*command):
    """What a program says of itself."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return (done.stdout.strip().splitlines() or ["unknown"])[0]


def bazel_version(program):
    """What a Bazel says of itself; Debian's build does not know, so its package is asked."""
    said = first_line(program, "--version")
    if said != "bazel no_version":
        return said
    with contextlib.suppress(OSError):
        return "bazel " + first_line("dpkg-query", "-W", "-f", "${Version}", "bazel-bootstrap")
    return said


def file_system(directory):
    return first_line("stat", "-f", "-c", "%T", str(directory))
