"""Rules with the kinds of output that genrule cannot make."""

def _shell(ctx, outputs, command, mnemonic = "Shell", inputs = []):
    ctx.actions.run_shell(
        outputs = outputs,
        inputs = inputs,
        arguments = [o.path for o in outputs],
        command = command,
        mnemonic = mnemonic,
    )

def _tree_impl(ctx):
    tree = ctx.actions.declare_directory(ctx.label.name + ".d")
    _shell(ctx, [tree], ctx.attr.command, "Tree")
    return [DefaultInfo(files = depset([tree]))]

tree = rule(
    doc = "One directory, filled by a shell command that gets its path as $1.",
    implementation = _tree_impl,
    attrs = {"command": attr.string(mandatory = True)},
)

def _link_impl(ctx):
    real = ctx.actions.declare_file(ctx.label.name + ".real.txt")
    _shell(ctx, [real], "echo 'behind a link' > $1", "Real")
    link = ctx.actions.declare_file(ctx.label.name + ".txt")
    ctx.actions.symlink(output = link, target_file = real)
    return [DefaultInfo(files = depset([link]))]

link = rule(
    doc = "A symlink to a file that is itself not asked for.",
    implementation = _link_impl,
)

def _groups_impl(ctx):
    main = ctx.actions.declare_file(ctx.label.name + ".main.txt")
    extra = ctx.actions.declare_file(ctx.label.name + ".extra.txt")
    _shell(ctx, [main], "echo main > $1", "Main")
    _shell(ctx, [extra], "echo extra > $1", "Extra")
    return [
        DefaultInfo(files = depset([main])),
        OutputGroupInfo(extra = depset([extra])),
    ]

groups = rule(
    doc = "A default output, and another only in the output group `extra`.",
    implementation = _groups_impl,
)

def _half_impl(ctx):
    good = ctx.actions.declare_file(ctx.label.name + ".good.txt")
    bad = ctx.actions.declare_file(ctx.label.name + ".bad.txt")
    _shell(ctx, [good], "echo good > $1", "Good")
    _shell(ctx, [bad], "echo 'half fails on purpose' >&2; exit 1", "Bad")
    return [
        DefaultInfo(files = depset([bad])),
        OutputGroupInfo(good = depset([good]), mixed = depset([good, bad])),
    ]

half = rule(
    doc = "Fails by default; the output group `good` is complete, `mixed` is half there.",
    implementation = _half_impl,
)

def _program_impl(ctx):
    out = ctx.actions.declare_file(ctx.label.name)
    _shell(ctx, [out], "printf '#!/bin/sh\\necho program\\n' > $1 && chmod +x $1", "Program")
    return [DefaultInfo(executable = out)]

program = rule(
    doc = "An executable output.",
    implementation = _program_impl,
    executable = True,
)

def _written_impl(ctx):
    out = ctx.actions.declare_file(ctx.label.name + ".txt")
    ctx.actions.write(out, "written by Bazel itself\n")
    return [DefaultInfo(files = depset([out]))]

written = rule(
    doc = "Written by Bazel itself: no spawn, so neither looked up in the cache nor uploaded with an action.",
    implementation = _written_impl,
)

def _report_impl(target, ctx):
    out = ctx.actions.declare_file(target.label.name + ".report.txt")
    ctx.actions.run_shell(
        outputs = [out],
        arguments = [out.path, str(target.label.name)],
        command = "echo \"report on $2\" > $1",
        mnemonic = "Report",
    )
    return [OutputGroupInfo(report = depset([out]))]

report = aspect(
    doc = "`--aspects=//rules:defs.bzl%report --output_groups=+report`: one more file for each target asked for.",
    implementation = _report_impl,
)

def _made_test_impl(ctx):
    out = ctx.actions.declare_file(ctx.label.name)
    _shell(ctx, [out], "printf '#!/bin/sh\\necho made\\n' > $1 && chmod +x $1", "Made")
    return [DefaultInfo(executable = out)]

made_test = rule(
    doc = "A test whose executable is the output of an action; that of sh_test is a link to a source file.",
    implementation = _made_test_impl,
    test = True,
)

def _runnable_impl(ctx):
    name = ctx.label.name

    # In a directory of its own, as go_binary has it: nothing about its place follows from the label.
    program = ctx.actions.declare_file("%s_/%s.sh" % (name, name))
    _shell(ctx, [program], """cat > $1 <<'END'
#!/bin/sh
cd "$0.runfiles" || exit 1
find -L . -type f ! -name MANIFEST ! -name _repo_mapping | LC_ALL=C sort | while read -r file; do
    echo "$file: $(tail -n 1 "$file")"
done
END
""", "Runnable")
    data = ctx.actions.declare_file(name + ".data.txt")
    other = ctx.actions.declare_file(name + ".other.txt")
    _shell(ctx, [data, other], "echo data > $1; echo other > $2", "Data")
    tree = ctx.actions.declare_directory(name + ".tree")
    _shell(ctx, [tree], "mkdir $1/sub; echo top > $1/top.txt; echo sub > $1/sub/with\\ space.txt", "DataTree")
    link = ctx.actions.declare_file(name + ".link.txt")
    ctx.actions.symlink(output = link, target_file = data)
    files = [data, tree, link] + ctx.files.data
    if ctx.attr.links_tree:
        tree_link = ctx.actions.declare_directory(name + ".tree_link")
        ctx.actions.symlink(output = tree_link, target_file = tree)
        files.append(tree_link)
    runfiles = ctx.runfiles(
        files = files,
        symlinks = {"elsewhere/%s.txt" % name: data},
        root_symlinks = {name + ".at_the_root.txt": other},
    )
    for one in ctx.attr.data:
        runfiles = runfiles.merge(one[DefaultInfo].default_runfiles)
    files = [program] if ctx.attr.is_listed else [other]
    return [DefaultInfo(executable = program, files = depset(files), runfiles = runfiles)]

runnable = rule(
    doc = "A program that shows its runfiles: generated files, a tree, links, and what `data` has.",
    implementation = _runnable_impl,
    attrs = {
        "data": attr.label_list(allow_files = True),
        "is_listed": attr.bool(doc = "Whether the program is among the target's outputs.", default = True),
        "links_tree": attr.bool(doc = "A link to a tree as well, which Bazel 4 can't make."),
    },
    executable = True,
)
