"""Pinned binaries of Outhaul, and the program that puts them behind a repository's tools/bazel."""

# As `uname` has them, in small letters: the wrapper asks that.
_PLATFORMS = ["linux-x86_64", "linux-aarch64"]

_binary = tag_class(
    doc = "An archive of `scripts/package` for one platform. Only the root module's count.",
    attrs = {
        "platform": attr.string(mandatory = True, values = _PLATFORMS),
        "sha256": attr.string(mandatory = True, doc = "The archive's, from SHA256SUMS."),
        "urls": attr.string_list(mandatory = True, allow_empty = False),
    },
)

def _binaries_impl(repository):
    for platform, sha256 in repository.attr.sha256.items():
        repository.download_and_extract(
            url = repository.attr.urls[platform],
            output = platform,
            sha256 = sha256,
        )
    repository.file("BUILD.bazel", """
filegroup(
    name = "binaries",
    srcs = glob(["*/*/outhaul"], allow_empty = True),
    visibility = ["//visibility:public"],
)
""")

_binaries = repository_rule(
    implementation = _binaries_impl,
    attrs = {
        "sha256": attr.string_dict(),
        "urls": attr.string_list_dict(),
    },
)

def _outhaul_impl(context):
    sha256 = {}
    urls = {}
    for module in context.modules:
        for binary in module.tags.binary if module.is_root else []:
            if binary.platform in sha256:
                fail("outhaul.binary: %s is pinned twice" % binary.platform)

            # Without one, Bazel would take whatever comes.
            if len(binary.sha256) != 64:
                fail("outhaul.binary: sha256 of %s must be the 64 digits of a line of SHA256SUMS, not %r" % (binary.platform, binary.sha256))
            sha256[binary.platform] = binary.sha256
            urls[binary.platform] = binary.urls
    _binaries(name = "outhaul_binaries", sha256 = sha256, urls = urls)

outhaul = module_extension(
    implementation = _outhaul_impl,
    doc = "Downloads the binaries that the root module pins.",
    tag_classes = {"binary": _binary},
)

def _outhaul_wrapper_impl(context):
    program = context.actions.declare_file(context.label.name)
    context.actions.symlink(output = program, target_file = context.file.install, is_executable = True)
    return [
        DefaultInfo(
            executable = program,
            runfiles = context.runfiles([context.file.wrapper] + context.files.binaries),
        ),
        # Relative to where `bazel run` starts it.
        RunEnvironmentInfo({
            "OUTHAUL_BINARIES": "\n".join([file.short_path for file in context.files.binaries]),
            "OUTHAUL_WRAPPER": context.file.wrapper.short_path,
        }),
    ]

outhaul_wrapper = rule(
    implementation = _outhaul_wrapper_impl,
    doc = "`bazel run` of it writes tools/bazel and tools/outhaul.sha256, and installs this machine's binary.",
    attrs = {
        "binaries": attr.label(mandatory = True, doc = "Files named PLATFORM/*/outhaul."),
        "install": attr.label(mandatory = True, allow_single_file = True),
        "wrapper": attr.label(mandatory = True, allow_single_file = True),
    },
    executable = True,
)
