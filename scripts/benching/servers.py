"""What runs beside the build: the cache and the daemon."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

CACHES = ("buildbox-casd", "bazel-remote", "nginx")


def peer(name):
    """A peer's program: what scripts/install-peers installed, or on the PATH; None if there is none."""
    installed = pathlib.Path(os.environ.get("OUTHAUL_PEERS", pathlib.Path.home() / ".cache/outhaul-peers")) / "bin" / name
    return str(installed) if os.access(installed, os.X_OK) else shutil.which(name)


def cache_command(kind, program, port, store):
    """How a cache is started that keeps its blobs below `store`."""
    if kind == "buildbox-casd":
        return [program, "--bind", f"127.0.0.1:{port}", "--log-level", "warning", str(store)]
    store.mkdir()
    if kind == "nginx":
        (store / "root").mkdir()
        config = store / "nginx.conf"
        text = (pathlib.Path(__file__).resolve().parent.parent / "nginx.conf").read_text()
        config.write_text(text.replace("ADDRESS", f"127.0.0.1:{port}").replace("DIR", str(store)))
        return [program, "-p", str(store), "-c", str(config)]
    return [
        program, "--dir", str(store), "--max_size=12", "--log_timezone=none", "--access_log_level=none",
        f"--grpc_address=127.0.0.1:{port}", f"--http_address=127.0.0.1:{free_port()}",
    ]


def cache_url(kind, port):
    """As `--remote_cache` takes it."""
    return f"{'http' if kind == 'nginx' else 'grpc'}://127.0.0.1:{port}"


def say(text):
    print(f"bench: {text}", file=sys.stderr, flush=True)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(command, port, log):
    """A server that is ready when its port answers, and ends with the block."""
    with open(log, "ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"bench: {command[0]} did not start: {pathlib.Path(log).read_text()[-2000:]}")
            time.sleep(0.02)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Daemon:
    """A running `outhaul serve`, looked at from outside."""

    def __init__(self, program, state, pid, port):
        self.program, self.state, self.pid = program, state, pid
        self.flag = f"--bes_backend=grpc://127.0.0.1:{port}"

    def last(self):
        """The newest invocation, once it is settled."""
        deadline = time.monotonic() + 10
        while True:
            shown = subprocess.run(
                [self.program, "status", "--json", "--limit=1", f"--state-dir={self.state}"],
                capture_output=True, timeout=30, check=True,
            )
            invocation = json.loads(shown.stdout.splitlines()[0])
            if invocation["state"] == "settled" and invocation["hold_us"] > 0:
                if invocation["failed"]:
                    raise SystemExit(f"bench: {invocation['failed']} outputs failed: {invocation['errors']}")
                return invocation
            if time.monotonic() > deadline:
                raise SystemExit(f"bench: the build is not settled: {invocation}")
            time.sleep(0.05)

    def peak_kib(self):
        for line in pathlib.Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
        raise SystemExit("bench: the daemon is gone")

    def cpu_s(self):
        fields = pathlib.Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
