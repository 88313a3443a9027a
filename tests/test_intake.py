"""What strangers, and broken nodes, send to a node: refused with a reason each, and the actors live."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from isthmus.policies.dispatch import Compiler
from isthmus.policies.plan import Plan, Stage, split
from isthmus.policies.records import Kind, Span
from isthmus.policies.registry import spec
from isthmus.real.drive import Driven, run_cell
from isthmus.real.fleet import Fleet
from isthmus.real.intake import check
from isthmus.real.letters import Cell, Letter, letter_from, letter_to
from isthmus.real.node import NodeServer
from isthmus.workloads.codecs import CODECS, codec
from isthmus.workloads.errors import InputError
from isthmus.workloads.model import Part
from isthmus.workloads.requests import Request
from isthmus.workloads.testbed import Testbed, TestbedSpec

EXAMPLES = 500
NODES = {"device": "20ms", "edge": "10ms", "cloud": "5ms"}
HERE = "cloud"
"""The node that is sent to: the plan's second stage is on it."""


@dataclass
class Parcel:
    """A valid message for `HERE`, as data: what a letter says, and its tensors."""

    said: list[Any]
    arrays: list[np.ndarray]

    def frames(self) -> list[bytes]:
        return [b"letter", json.dumps(self.said).encode(), *(array.tobytes() for array in self.arrays)]


CELL, PLAN, REQUEST, ATTEMPT, VERSION, MESSAGE, HOP, AT, SPANS, OVERRUNS, TOLERANCE, DOWN, SHAPES = range(13)
"""Places in what a letter says."""


@pytest.fixture(scope="module")
def testbed(synthetic: Any) -> Testbed:
    built: Testbed = synthetic(NODES)
    return built


@pytest.fixture(scope="module")
def valid(testbed: Testbed) -> Callable[..., Parcel]:
    def make(number: int = 0, coded: str | None = None, cell: int = 0) -> Parcel:
        model = testbed.models["chain"]
        [name] = model.cuts[2].crossing
        plan = split(model, (2,), ("device", HERE))
        if coded is not None:
            plan = Plan(plan.stages, ((name, coded),))
        values = np.random.default_rng(number).standard_normal(model.tensors[name].shape).astype(np.float32)
        arrays = list(codec(coded or "fp32").encode(values))
        compiled = Compiler(testbed)(plan, "chain", "device")
        [message] = [m for m in compiled.messages if m.source == 0]
        request = Request(number, "device", "chain", 1.0, 1.5)
        spans = (Span(Kind.COMPUTE, "device", 1.0, 1.02, 1, 0), Span(Kind.SEND, "device>edge", 1.02, 1.04, 1, 0, 4096))
        at = compiled.messages.index(message), message.path.index(HERE)
        letter = Letter(cell, plan, request, 1, model.version, *at, 1.1, spans, 0)
        return Parcel(json.loads(letter_to(letter, [(a.dtype.str, a.shape) for a in arrays])), arrays)

    return make


NOT_THESE = [None, True, "x", "", -7, 0.5, [], {}, [[]], {"a": 1}]
"""What is neither a plan nor a request."""
STAGES: list[Any] = [
    [["moon", "chain", "3f", None]],
    [["device", "other", "3f", None]],
    [["device", "chain", "3", None]],  # layers are missing
    [["device", "chain", "3f", None], ["cloud", "chain", "1", None]],  # a layer twice
    [["device", "chain", "-1", None]],
    [["device", "chain", "f" * 5000, None]],
    [["device", "chain", 63, None]],
    [["device", "chain", "5", None], ["cloud", "chain", "3a", None]],  # not convex
    [["device", "chain", "3f", [5]]],
    [["device", "chain", "3f", [0]]],
    [["device", "chain", "3f", "x"]],
    [[["device"], "chain", "3f", None]],
    [],
    None,
]
WHOLE = [["cloud", "chain", "3f", None]]
PLANS = [{"stages": stages, "codecs": [], "exit": None} for stages in STAGES] + [
    {"stages": WHOLE, "codecs": [], "exit": None} | more
    for more in (
        {"exit": "early"},
        {"exit": []},
        {"codecs": [["x", "zip"]]},
        {"codecs": [["no", "fp16"]]},
        {"codecs": 5},
        {"codecs": [[[], []]]},
        {"stages": 5},
    )
]
SPOILT: dict[int, list[Any]] = {
    # What may stand in a place of a letter and be right after all is left out.
    PLAN: [*NOT_THESE, *map(json.dumps, PLANS), json.dumps({"stages": WHOLE}), "[" * 5000],
    REQUEST: [
        *NOT_THESE,
        [-1, "device", "chain", 1.0, None, None, 0],
        [0, "nobody", "chain", 1.0, None, None, 0],
        [0, "device", "other", 1.0, None, None, 0],
        [0, "device", "chain", "now", None, None, 0],
        [0, "device", "chain", 1.0, "soon", None, 0],
        [0, "device", "chain", 1.0, None, None, 0.5],
        [0, ["device"], "chain", 1.0, None, None, 0],
        ["0", "device", "chain", 1.0, None, None, 0],
        [0, "device", "chain", float("nan"), None, None, 0],
    ],
    ATTEMPT: [0, -1, 99, 2**52, 1.0, "1", None, [1]],
    VERSION: [None, True, 7, 0.5, [], {}],
    MESSAGE: [-1, 99, 2**52, 1.0, "1", None, [1]],
    HOP: [-1, 0, 1, 3, 99, "2", None],
    DOWN: [5, None, "x", ["xy"], [["device"]], [["device", "moon"]], [[1, 2]], [["device", "edge", "cloud"]]],
    AT: [float("nan"), float("inf"), -1e9, 1e300, "1", None, [], True],
    SPANS: [
        *(None, "x", 5, [None], [[]], [[1] * 7], ["x"]),
        *(
            [span]
            for span in (
                ["compute", "nowhere", 0, 1, 1, 0, None],
                ["send", "cloud>device", 0, 1, 1, 0, 5],  # there is no such link
                ["send", "device", 0, 1, 1, 0, 5],
                ["compute", "device>edge", 0, 1, 1, 0, None],
                ["cook", "device", 0, 1, 1, 0, None],
                ["compute", "device", 2, 1, 1, 0, None],
                ["compute", "device", 0, float("nan"), 1, 0, None],
                ["compute", "device", 0, 1e300, 1, 0, None],
                ["compute", ["device"], 0, 1, 1, 0, None],
                ["send", "device>edge", 0, 1, 1, 0, -5],
                ["send", "device>edge", 0, 1, "1", 0, 5],
            )
        ),
    ],
    OVERRUNS: [-1, "0", None, 0.0],
    TOLERANCE: [-1, 1e300, float("nan"), "0", None],
    SHAPES: [None, "x", [], [["<f4"]], [["<f4", "x"]], [[[], []]], 5],
}
CLAIMS = [["|O", []], ["<f4", [2**40]], ["<f4", [-1]], ["<U8", [4]], ["<f4", [2**32, 2**32]], ["V8", [1]], ["<f4", [0]],
          ["M8[s]", [1]], ["nonsense", [1]], ["<f4", [1] * 100]]  # fmt: skip

Spoil = Callable[[Parcel], list[bytes]]
"""Takes a valid message, and gives the frames of one that is not."""


def _field(place: int, value: Any) -> Spoil:
    return lambda parcel: Parcel([*parcel.said[:place], value, *parcel.said[place + 1 :]], parcel.arrays).frames()


def _arrays(change: Callable[[list[np.ndarray]], list[np.ndarray]]) -> Spoil:
    """The letter says truly what comes with it."""

    def spoil(parcel: Parcel) -> list[bytes]:
        arrays = change(list(parcel.arrays))
        said = [*parcel.said[:SHAPES], [[a.dtype.str, list(a.shape)] for a in arrays]]
        return Parcel(said, arrays).frames()

    return spoil


def _with_nan(arrays: list[np.ndarray]) -> list[np.ndarray]:
    last = arrays[-1].astype(arrays[-1].dtype)
    if last.dtype.kind == "f":
        last.flat[-1] = np.nan
        return [*arrays[:-1], last]
    return []


def _swapped(array: np.ndarray) -> np.ndarray:
    return array.astype(array.dtype.newbyteorder(">")) if array.dtype.itemsize > 1 else array[..., :1]


EVERY: list[Spoil] = [
    *(_field(place, value) for place, values in SPOILT.items() for value in values),
    *(_field(SHAPES, [claim]) for claim in CLAIMS),
    _arrays(_with_nan),
    _arrays(lambda arrays: arrays[:-1]),
    _arrays(lambda arrays: [*arrays, arrays[0]]),
    _arrays(lambda arrays: [arrays[0].reshape(-1), *arrays[1:]]),
    _arrays(lambda arrays: [arrays[0].astype(np.float64), *arrays[1:]]),
    _arrays(lambda arrays: [_swapped(arrays[0]), *arrays[1:]]),
    _arrays(lambda arrays: [np.zeros(0, np.float32)]),
    lambda parcel: [*parcel.frames()[:-1], parcel.frames()[-1] + b"x"],
    lambda parcel: [*parcel.frames()[:-1], parcel.frames()[-1][:-1]],
    lambda parcel: [*parcel.frames(), b""],
    lambda parcel: parcel.frames()[:1],
    lambda parcel: parcel.frames()[1:],
    lambda parcel: [b"note", *parcel.frames()[1:2]],
    lambda parcel: [b"note", b'["lost", 0, 0]'],
    lambda parcel: [b"note", b'["close", 0, 0, 1, ""]'],
    lambda parcel: [b"note", b'["lost", 0, 0, 1, 5]'],
    lambda parcel: [b"letter", b"x" * 3_000_000],
]


# In this process: nothing but InputError comes out, and what is right goes in


@pytest.mark.parametrize("coded", [None, *CODECS])
def test_what_is_valid_is_taken(coded, valid, testbed):
    parcel = valid(coded=coded)
    letter, _ = letter_from(parcel.frames()[1])
    compiled, message = check(letter, parcel.arrays, HERE, testbed, Compiler(testbed))
    assert message in compiled.messages
    assert message.path[letter.hop] == HERE


@given(data=st.data())
@settings(max_examples=EXAMPLES)
def test_bytes_that_are_changed_are_refused_or_still_a_letter(data, valid, testbed):
    content = bytearray(valid(coded=data.draw(st.sampled_from([None, *CODECS]))).frames()[1])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "double", "other"])):
            case "flip":
                content[at] ^= 1 << data.draw(st.integers(0, 7))
            case "cut":
                del content[at : at + data.draw(st.integers(1, 40))]
            case "double":
                content[at:at] = content[at : at + 20]
            case "other":
                content[at : at + 1] = data.draw(
                    st.sampled_from([b"9" * 400, b"[" * 3000, b"null", b"NaN", b"-", b"{"])
                )
        if not content:
            return
    with suppress(InputError):
        letter, _ = letter_from(bytes(content))
        check(letter, valid().arrays, HERE, testbed, Compiler(testbed))


# On real actors


class Stranger:
    """Somebody with a socket. Who knows a node's password is a node that has gone mad."""

    def __init__(self, address: Any, *, knows: bool) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.PUSH)
        self.socket.linger, self.socket.sndtimeo = 0, 1000
        self.socket.plain_username = b"isthmus"
        self.socket.plain_password = address.key if knows else b"guessed"
        self.socket.connect(address.endpoint)

    def send(self, frames: list[bytes]) -> None:
        with suppress(zmq.Again):
            self.socket.send_multipart(frames)

    def close(self) -> None:
        self.socket.close()
        self.context.term()


@pytest.fixture(scope="module")
def fleet(ray: Any, testbed: Testbed) -> Iterator[Fleet]:
    with Fleet(ray, testbed) as started:
        started.prepare([], {"device": "chain"}, 1)
        yield started


def _addresses(fleet: Fleet) -> dict[str, Any]:
    return fleet.ask_all("address", dict.fromkeys(NODES, ()))


@pytest.fixture
def mad(fleet: Fleet) -> Iterator[Stranger]:
    """One whom all nodes let in."""
    stranger = Stranger(_addresses(fleet)[HERE], knows=True)
    yield stranger
    stranger.close()


def _open(fleet: Fleet) -> Cell:
    cell = Cell(fleet.next_cell(), time.monotonic(), 1, "policy")
    fleet.ask_all("open", dict.fromkeys(NODES, (cell, None)))
    return cell


def _refusals(fleet: Fleet, cell: Cell, count: int, patience_s: float = 10.0) -> list[str]:
    """What `HERE` has refused since the last call; waits until they are so many."""
    said: list[str] = []
    until = time.monotonic() + patience_s
    while len(said) < count and time.monotonic() < until:
        collected = fleet.ask_all("collect", {HERE: (cell.id,)})[HERE]
        assert collected is not None, "the actor has died"
        assert collected.failure is None
        said += collected.refusals
    return said


def test_every_malformed_message_is_refused_and_the_actors_live(fleet, mad, valid):
    cell, sent = _open(fleet), Counter[str]()

    def refused(frames: list[bytes]) -> None:
        mad.send(frames)
        [said] = _refusals(fleet, cell, 1)
        assert 5 < len(said) < 400
        assert "Traceback" not in said
        sent[said] += 1

    for coded in (None, *CODECS):
        for spoil in EVERY:
            refused(spoil(valid(coded=coded, cell=cell.id)))

    @given(junk=st.lists(st.binary(max_size=60), min_size=1, max_size=5))
    @settings(max_examples=100)
    def junk(junk: list[bytes]) -> None:
        refused(junk)

    junk()
    assert sent.total() >= 500
    assert len(sent) > 80  # reasons
    assert fleet.died() == []
    _all_is_well(fleet)


def test_an_answer_to_nothing_is_ignored(fleet, mad, valid):
    cell = _open(fleet)
    parcel = valid(number=12345, cell=cell.id)
    mad.send(parcel.frames())  # a stage of a request that nobody made: computed, and answered to a source without it
    time.sleep(0.5)
    for node in NODES:
        collected = fleet.ask_all("collect", {node: (cell.id,)})[node]
        assert (collected.failure, collected.refusals, collected.records) == (None, [], [])
    _all_is_well(fleet)


def test_a_stranger_is_not_let_in(fleet, valid):
    """It does not know the password: nothing that it sends arrives, neither good nor bad."""
    cell = _open(fleet)
    stranger = Stranger(_addresses(fleet)[HERE], knows=False)
    for frames in ([b"letter", b"junk"], valid(cell=cell.id).frames()):
        stranger.send(frames)
    assert _refusals(fleet, cell, 1, patience_s=1.0) == []
    stranger.close()
    _all_is_well(fleet)


def test_a_run_goes_on_while_nonsense_comes_in_and_says_so(fleet, mad):
    stop = threading.Event()

    def talk() -> None:
        while not stop.wait(0.01):
            mad.send([b"letter", b"nonsense"])

    talker = threading.Thread(target=talk)
    talker.start()
    records, felt = _run(fleet)
    stop.set()
    talker.join()
    assert Counter((r.outcome, r.attempts) for r in records) == {("completed", 1): 20}
    assert felt.refused > 20
    assert any("refused" in warning for warning in felt.warnings())


def _run(fleet: Fleet) -> tuple[list[Any], Any]:
    records: list[Any] = []
    requests = [Request(i, "device", "chain", 0.05 * i) for i in range(20)]
    fleet.prepare([], {"device": "chain"}, 1)
    driven: list[Driven] = []
    policies = {"device": spec("remote").make(1)}
    run_cell(fleet, {"device": requests}, policies, records.append, seed=1, ended=driven.append)
    return records, driven[0].pressure


def _all_is_well(fleet: Fleet) -> None:
    records, felt = _run(fleet)
    assert Counter((r.outcome, r.attempts) for r in records) == {("completed", 1): 20}
    assert all(r.correct for r in records)
    assert felt.refused == 0


# A node by itself, without Ray around it


@contextmanager
def _alone(name: str, testbed: Testbed) -> Iterator[NodeServer]:
    server = NodeServer(name, testbed, {model: {} for model in testbed.models}, "127.0.0.1")
    server.open(Cell(0, time.monotonic(), 1, "policy"), None)
    yield server
    server.close()
    server._wire.close()


def _letter(testbed: Testbed, plan: Plan, source: int, target: int) -> Letter:
    [model] = testbed.models
    messages = Compiler(testbed)(plan, model, "device").messages
    [(number, message)] = [(i, m) for i, m in enumerate(messages) if (m.source, m.target) == (source, target)]
    version = testbed.models[model].version
    return Letter(0, plan, Request(0, "device", model, 0.0), 1, version, number, len(message.links), 0.0, (), 0)


def test_a_message_that_comes_twice_is_taken_once(synthetic):
    """A stage that waits for two messages does not run on one of them."""
    testbed = synthetic(NODES, model="diamond")
    parts = [Part("diamond", 1 << i) for i in range(4)]
    plan = Plan(tuple(Stage(n, p) for n, p in zip(("device", "device", "edge", HERE), parts, strict=True)))
    left, right = (_letter(testbed, plan, i, 3) for i in (1, 2))
    values = np.zeros(testbed.models["diamond"].tensors["left"].shape, np.float32)
    with _alone(HERE, testbed) as server:
        for letter in (left, left, left, right):
            server._delivered(letter, [values])
        collected = server.collect(0)
        assert collected.failure is None
        assert collected.refusals == [f"message {left.message} has come twice"] * 2


@pytest.mark.parametrize("physical", [False, True])
def test_tensors_that_a_part_cannot_be_run_on_cost_their_request_only(physical, tmp_path):
    """Numbers may be wrong where type and shape are right: here, one that is an index. The slot is free again after."""
    gather = [
        helper.make_node("ArgMax", ["x"], ["i"], axis=1, keepdims=0),
        helper.make_node("Gather", ["w", "i"], ["y"]),
    ]
    graph = helper.make_graph(
        gather,
        "pick",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [numpy_helper.from_array(np.ones((8, 4), np.float32), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "pick.onnx")
    there = {"host": "there"} if physical else {"slowdown": 2}
    described = {
        "models": {"pick": str(tmp_path / "pick.onnx")},
        "nodes": {"device": {"slowdown": 2}, HERE: there},
        "links": [{"between": ["device", HERE], "rate": "20Mbit"}],
    }
    testbed = Testbed.build(TestbedSpec.model_validate(described), need_profiles=False)
    plan = split(testbed.models["pick"], (1,), ("device", HERE))
    letter = _letter(testbed, plan, 0, 1)
    with _alone(HERE, testbed) as server:
        told: list[Any] = []
        server.note = lambda node, what, letter, value: told.append((node, what, value))  # type: ignore[method-assign]
        sent: list[Any] = []
        server.send = lambda node, letter, arrays: sent.append(arrays)  # type: ignore[method-assign]
        for number, index in enumerate((99, -99, 3)):
            asked = replace(letter, request=letter.request._replace(number=number))
            server._delivered(asked, [np.array([index])])
        until = time.monotonic() + 10
        while not sent and time.monotonic() < until:
            time.sleep(0.01)
        assert [a.tolist() for a in sent[0]] == [[[1.0] * 4]]
        collected = server.collect(0)
        assert collected.failure is None
        assert len(collected.refusals) == 2
        assert all("cannot run" in said for said in collected.refusals)
        assert [t[:2] for t in told if t[1] == "lost"] == [("device", "lost")] * 2


def test_a_version_that_is_not_here_costs_its_request_only(synthetic):
    testbed = synthetic(NODES)
    model = testbed.models["chain"]
    letter = _letter(testbed, split(model, (2,), ("device", HERE)), 0, 1)
    [name] = model.cuts[2].crossing
    values = np.zeros(model.tensors[name].shape, np.float32)
    with _alone(HERE, testbed) as server:
        sent: list[Letter] = []
        server.send = lambda node, letter, arrays: sent.append(letter)  # type: ignore[method-assign]
        server._delivered(replace(letter, version="0" * 12), [values])
        server._delivered(replace(letter, request=letter.request._replace(number=1)), [values])
        until = time.monotonic() + 10
        while not sent and time.monotonic() < until:
            time.sleep(0.01)
        collected = server.collect(0)
        assert [(it.number, it.version) for it in sent] == [(1, model.version)]
        assert collected.failure is None
        assert collected.refusals == [f"{HERE} has no version {'0' * 12} of chain"]
        assert list(collected.spoilt) == [("chain", "0" * 12)]
