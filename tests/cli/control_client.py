"""A client of the control API, generated from its protocol: argument 1 is a JSON object with what to expect.

Shows that what is documented in control.proto is enough to write one. Run by tests/cli/python.rs.
"""

import json
import pathlib
import sys

from grpc_tools import protoc

asked = json.loads(sys.argv[1])
generated = pathlib.Path(asked["generated"])
failed = protoc.main([
    "protoc",
    f"--proto_path={asked['protos']}",
    f"--python_out={generated}",
    f"--grpc_python_out={generated}",
    "outhaul/v1/control.proto",
])
assert not failed, "no stubs could be generated"
sys.path.insert(0, str(generated))

import grpc  # noqa: E402
from outhaul.v1 import control_pb2 as pb  # noqa: E402
from outhaul.v1 import control_pb2_grpc  # noqa: E402

PATIENCE = 60

# The socket has no name that could be an authority.
channel = grpc.insecure_channel(
    f"unix:{asked['socket']}", options=[("grpc.default_authority", "localhost")]
)
control = control_pb2_grpc.ControlStub(channel)

assert not control.ListInvocations(pb.ListInvocationsRequest(), timeout=PATIENCE).invocations

# Both begin before there is a build.
newest = pb.InvocationChoice(workspace=asked["workspace"])
waiting = control.Wait.future(
    pb.WaitRequest(invocation=newest, targets=["//app:app", "//lib/..."], timeout_ms=PATIENCE * 1000)
)
following = pb.InvocationChoice(workspace=asked["workspace"], next=True)
watching = control.WatchInvocation(pb.WatchInvocationRequest(invocation=following), timeout=PATIENCE)
# Once its head is there, nothing that begins is missed.
watching.initial_metadata()
(generated / "listening").touch()

# Outputs are reported from the first message on.
events = [next(watching)]
(generated / "following").touch()
events += watching
kinds = [event.WhichOneof("event") for event in events]
assert kinds[0] == "invocation" and kinds[-1] == "settled", kinds
settled = {event.target_settled.label for event in events if event.HasField("target_settled")}
assert {"//app:app", "//lib:lib", "//broken:broken"} <= settled, settled
outputs = {event.output.exec_path: event.output for event in events if event.HasField("output")}
output = outputs[asked["wanted"]]
assert (output.outcome, output.source, output.bytes) == (pb.OUTPUT_OUTCOME_DOWNLOADED, "stream", asked["size"]), output
assert asked["known"] not in outputs

answer = waiting.result(timeout=PATIENCE)
assert answer.result == pb.WAIT_RESULT_SETTLED, answer
assert {target.label for target in answer.targets} == {"//app:app", "//lib:lib"}, answer

listed = control.ListInvocations(pb.ListInvocationsRequest(limit=5), timeout=PATIENCE).invocations
assert [one.invocation_id for one in listed] == [asked["invocation_id"]], listed
assert listed[0].HasField("exit_code") and listed[0].exit_code == 1, listed

stat = control.BatchStat(
    pb.BatchStatRequest(paths=[asked["wanted"], asked["known"], "bazel-out/none"]), timeout=PATIENCE
).outputs
assert [one.state for one in stat] == [
    pb.OUTPUT_STATE_MATERIALIZED,
    pb.OUTPUT_STATE_KNOWN,
    pb.OUTPUT_STATE_UNSPECIFIED,
], stat
assert stat[0].digest.size == asked["size"] and not stat[2].exec_path, stat

why = control.Why(pb.WhyRequest(paths=[asked["known"]]), timeout=PATIENCE).answers
assert any("//assets:tree" in line for line in why[0].lines), why

got = control.Materialize(pb.OutputsRequest(paths=[asked["known"]]), timeout=PATIENCE).results
assert [one.outcome for one in got] == [pb.OUTPUT_OUTCOME_DOWNLOADED], got

try:
    control.GetInvocation(pb.GetInvocationRequest(invocation_id="nonsense"), timeout=PATIENCE)
    raise AssertionError("there is no such invocation")
except grpc.RpcError as error:
    assert error.code() == grpc.StatusCode.NOT_FOUND, error

print("all answered")
