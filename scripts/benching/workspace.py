"""The shapes of builds, and a real Bazel that makes them."""

import dataclasses
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import time

PROJECT = pathlib.Path(__file__).resolve().parent.parent.parent

# Nothing here takes longer, however busy the machine is.
BUILD_TIMEOUT_S = 900

# The ratio of a shape's goal with a cache by HTTP.
HTTP_RATIO = 0.5


@dataclasses.dataclass(frozen=True)
class Shape:
    """A build by numbers, and what is wanted of it."""

    targets: int
    files: int  # of each target
    least: int  # size of a file in bytes
    most: int
    ratio: float | None = None  # most that Outhaul may add, as a part of what Bazel's own download adds
    hold_s: float | None = None  # longest that a null build's end may be held
    hold_share: float | None = None  # the same, as a part of Bazel's own null build

    def sizes(self):
        """Sizes of a target's files: spread over the range, the same in every target."""
        return [self.least + number * 2654435761 % (self.most - self.least + 1) for number in range(self.files)]

    def scaled(self, part):
        """A part of it: fewer targets, or where those are few, smaller files."""
        if self.targets >= 20:
            return dataclasses.replace(self, targets=max(1, round(self.targets * part)))
        return dataclasses.replace(self, least=max(1, round(self.least * part)), most=max(1, round(self.most * part)))

    def by_http(self):
        """With the goal of a cache that is asked for each file by itself."""
        return dataclasses.replace(self, ratio=HTTP_RATIO)

    def __str__(self):
        def show(size):
            return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"

        sizes = show(self.most) if self.least == self.most else f"{show(self.least)} to {show(self.most)}"
        return f"{self.targets * self.files:,} files of {sizes}, {self.targets} targets"


SHAPES = {
    "small": Shape(200, 100, 4 << 10, 4 << 10, ratio=0.6, hold_s=0.3),
    "large": Shape(4, 1, 256 << 20, 256 << 20, ratio=0.8, hold_s=0.3),
    # The workloads of benches/workloads.
    "S": Shape(1000, 100, 1 << 10, 4 << 10, ratio=0.2, hold_share=0.25),
    "M": Shape(50, 100, 200 << 10, 200 << 10),
    "L": Shape(4, 1, 1 << 30, 1 << 30, ratio=0.6),
}

DEFS = '''
def _files(ctx):
    outs = [ctx.actions.declare_file("%s/f%d.out" % (ctx.label.name, n)) for n in range(len(ctx.attr.sizes))]
    ctx.actions.run_shell(
        outputs = outs,
        inputs = [ctx.file.generator],
        command = 'exec python3 "$@"',
        arguments = [ctx.file.generator.path, outs[0].dirname, ctx.label.name] + [str(size) for size in ctx.attr.sizes],
        mnemonic = "Files",
    )
    return [DefaultInfo(files = depset(outs))]

files = rule(
    implementation = _files,
    attrs = {
        "sizes": attr.int_list(mandatory = True),
        "generator": attr.label(allow_single_file = True, default = "//:generate.py"),
    },
)
'''

# The same bytes whenever an action is run, and none twice.
GENERATE = '''
import random, sys
directory, seed, sizes = sys.argv[1], sys.argv[2], sys.argv[3:]
source = random.Random(seed)
for number, size in enumerate(map(int, sizes)):
    with open("%s/f%d.out" % (directory, number), "wb") as out:
        for start in range(0, size, 1 << 20):
            piece = min(size - start, 1 << 20)
            out.write(source.getrandbits(8 * piece).to_bytes(piece, "little"))
'''


class Bazel:
    """One workspace of one shape and the server that builds it."""

    def __init__(self, program, base, shape, cache):
        self.program = program
        self.is_7 = pathlib.Path(program).name != "bazel4"
        self.workspace = base / "workspace"
        self.user_root = base / "bazel"
        self.cache = f"--remote_cache={cache}"
        self.least = shape.least
        sizes = shape.sizes()
        self.expected = {f"p{n}/t{n}/f{m}.out": size for n in range(shape.targets) for m, size in enumerate(sizes)}
        self.workspace.mkdir(parents=True)
        # The settings that let this Bazel run without a network are those of the tests' workspace.
        shutil.copy(PROJECT / "tests/workspace/.bazelrc", self.workspace)
        shutil.copytree(PROJECT / "tests/workspace/stubs", self.workspace / "stubs")
        shutil.copy(PROJECT / "tests/workspace/WORKSPACE", self.workspace)
        (self.workspace / ".bazelignore").write_text("stubs\n")
        (self.workspace / "defs.bzl").write_text(DEFS)
        (self.workspace / "generate.py").write_text(GENERATE)
        (self.workspace / "BUILD").write_text('exports_files(["generate.py"])\n')
        for number in range(shape.targets):
            package = self.workspace / f"p{number}"
            package.mkdir()
            (package / "BUILD").write_text(
                'load("//:defs.bzl", "files")\n'
                f'files(name = "t{number}", sizes = {sizes}, visibility = ["//visibility:public"])\n'
            )

    def change(self, targets, by):
        """Makes the first targets' files again, each with another first byte and size."""
        for number in range(targets):
            file = self.workspace / f"p{number}/BUILD"
            file.write_text(re.sub(r"sizes = \[\d+", f"sizes = [{self.least + by}", file.read_text()))
            self.expected[f"p{number}/t{number}/f0.out"] = self.least + by

    def run(self, *arguments):
        """Runs a command and gives its wall time in seconds."""
        command = [self.program, f"--output_user_root={self.user_root}", *arguments]
        start = time.monotonic()
        done = subprocess.run(
            command, cwd=self.workspace, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=BUILD_TIMEOUT_S, check=False,
        )
        took = time.monotonic() - start
        self.output = done.stdout.decode(errors="replace")
        if done.returncode != 0:
            raise SystemExit(f"bench: {' '.join(command)}: exit {done.returncode}\n{self.output[-4000:]}")
        return took

    def build(self, download, *flags):
        config = ["--config=bazel7"] if self.is_7 else []
        return self.run("build", *config, self.cache, f"--remote_download_{download}", *flags, "//...")

    def clean(self):
        self.run("clean")

    def outputs(self):
        """Where the outputs are: found by the convenience symlink, as a user would."""
        return self.workspace / "bazel-bin"

    def check_sizes(self):
        """Fails unless every output is there with its size."""
        for name, size in self.expected.items():
            try:
                actual = os.stat(self.outputs() / name).st_size
            except OSError as error:
                raise SystemExit(f"bench: an output is missing: {error}") from error
            if actual != size:
                raise SystemExit(f"bench: {name} has {actual} bytes instead of {size}")

    def digests(self):
        """The SHA-256 of every output."""
        found = {}
        for name in self.expected:
            with open(self.outputs() / name, "rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
        return found
