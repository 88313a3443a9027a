"""A node of a testbed, as one actor: resident parts, peers, and the cell that is being run on it.

A plain class that `cluster.py` makes an actor of. Knows sessions and its peers' handles; how a cell goes is in
`cell.py`.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from isthmus.real.backend import backend
from isthmus.real.cell import TOLERANCE, NodeCell
from isthmus.real.clocks import Reading, reading
from isthmus.real.cluster import own_address
from isthmus.real.letters import Cell, Collected, Letter, Tensors, Version, Work
from isthmus.real.model_files import Files, unpacked
from isthmus.real.power import Energy, PowerLog
from isthmus.real.pressure import Load, cores, stalled_share
from isthmus.real.profiler import this_machine
from isthmus.real.release import Probe, check, check_finite
from isthmus.real.residents import Residents, absent
from isthmus.real.session import Array, PartSession, random_input
from isthmus.real.wire import Address, Wire
from isthmus.workloads.errors import InputError, RunFailure
from isthmus.workloads.model import Model, Part
from isthmus.workloads.profile import Machine
from isthmus.workloads.requests import Request
from isthmus.workloads.testbed import Testbed

_NOTES = {"lost": str, "got": int, "refused": list}
"""What cells tell each other besides letters, and of what type."""
PAYLOADS = 4
"""Different inputs that the requests of a run take in turn; each has a reference answer."""
_SWITCH_S = 2e-4
"""After which Python lets another thread go on: a message wakes three of them, one after another."""


class NodeServer:
    def __init__(self, name: str, testbed: Testbed, files: Mapping[str, Files], address: str | None) -> None:
        """`files` are those of the models, for machines that do not have them.

        `address` is what its wire listens on; by default that of its machine in the cluster.
        """
        here = {n: unpacked(model, files[n]) for n, model in testbed.models.items()}
        self.name, self.testbed = name, replace(testbed, models=here)
        self.node = testbed.nodes[name]
        sizes = self.node.batch.sizes if self.node.physical and self.node.batch is not None else (1,)
        limited = self.node.physical and self.node.memory_bytes is not None
        self.residents = Residents(here, self.node.backend, sizes, filed=limited)
        self._references: dict[Version, list[tuple[Tensors, Tensors]]] = {}
        self._cell: NodeCell | None = None
        self._newest = -1
        self._opening = threading.Lock()
        sys.setswitchinterval(_SWITCH_S)
        self._power = PowerLog() if self.node.physical else None
        self._gone = threading.Event()
        self._wire = Wire(
            address or own_address(), self._delivered, self._told, self._refused, encrypted=testbed.spec.is_encrypted
        )

    # Called by the driver

    def address(self) -> Address:
        """Where other nodes reach it."""
        return self._wire.address

    def connect(self, peers: Mapping[str, Address]) -> None:
        """Where all nodes are."""
        self._wire.connect(peers)

    def load(self, parts: Sequence[Part]) -> None:
        """Have exactly these parts resident and warm, and of every model only the version that the testbed has.

        Where memory is limited they are ready to be loaded.
        """
        for name, version in list(self._references):
            if self.testbed.models[name].version != version:
                del self._references[name, version]
        self.residents.prepare(parts)

    def prepare_answers(self, model: str, seed: int) -> None:
        """Payloads for requests that arise here, and the whole model's answers to them."""
        of = self.testbed.models[model]
        self._references[model, of.version] = self._answers(of, seed)

    def stage(self, model: Model, files: Files, probes: Mapping[Part, Probe], seed: int | None) -> None:
        """Have another version of a model beside what there is: all parts that are resident, warm and checked.

        With a `seed` also its answers to the requests that arise here. RunFailure or InputError when it does not work.
        """
        here = unpacked(model, files)

        def passes(session: PartSession) -> None:
            if session.part in probes:
                check(session, probes[session.part], max(TOLERANCE, self.tolerance))

        staged = self.residents.stage(here, self.residents.parts(here.name) | probes.keys(), passes)
        answers = [] if seed is None else self._answers(here, seed)
        for _, expected in answers:
            check_finite(expected, f"{here.name} {here.version}")
        if answers:
            self._references[here.name, here.version] = answers
        self.residents.admit(staged)

    def forget(self, model: str, version: str) -> None:
        """Have a version no longer. Messages that want it are refused."""
        self._references.pop((model, version), None)
        self.residents.forget(model, version)

    def use(self, model: str, version: str) -> None:
        """Begin attempts at requests that arise here with this version from now on."""
        if self._cell is not None:
            self._cell.use(model, version)

    def open(self, cell: Cell, work: Work | None) -> None:
        """Begin a cell: a clean state, a clock, and, at a source, what arises there.

        Calls overlap and may overtake each other: that of an older cell does nothing.
        """
        with self._opening:
            if cell.id < self._newest:
                return
            self._newest = cell.id
            self._close()
            self.residents.begin()
            gc.collect()
            gc.freeze()  # a collection of what is here for good would take 13-20 ms in the middle of a run
            opened = NodeCell(self, cell)
            if work is not None:
                opened.start(work)
            if self._power is not None:
                self._power.start()
            self._cell = opened

    def collect(self, cell: int) -> Collected | None:
        """What was closed since the last call, and whether something went wrong; None when it is not in that cell."""
        current = self._cell
        return current.collect() if current is not None and current.cell.id == cell else None

    def node_is(self, node: str, up: bool) -> None:
        """Another node has gone, or is back."""
        if self._cell is not None:
            self._cell.node_is(node, up)

    def close(self) -> tuple[Load, Energy | None] | None:
        """End the cell; what it used of the host, and the energy of a physical node whose host measures it."""
        with self._opening:
            return self._close()

    def _close(self) -> tuple[Load, Energy | None] | None:
        if self._cell is None:
            return None
        energy, began, ends = None, self._cell.cell.epoch, time.monotonic()
        if self._power is not None:
            self._power.stop()
            with suppress(RunFailure):  # not logged from the beginning, as after a node came back: then it is modelled
                energy = self._power.energy(began, ends) if began < ends else None
        load = Load(self._cell.close(), reading()[0], cores(), stalled_share())
        self._cell = None
        return load, energy

    def watch(self) -> None:
        """Never returns: whoever waits for it learns when this actor is gone."""
        self._gone.wait()

    def ready(self) -> str:
        return self.name

    def machine(self, label: str) -> Machine:
        """What it runs on."""
        return this_machine(label)

    def reading(self) -> Reading:
        """Of its host's clock."""
        return reading()

    # From the wire

    def _delivered(self, letter: Letter, arrays: Sequence[Array]) -> None:
        cell = self._cell
        if cell is not None and cell.cell.id == letter.cell:
            try:
                cell.delivered(letter, arrays)
            except Exception as error:  # the sender does not wait for an answer, so the driver has to hear of it
                cell.failed(error)

    def _told(self, note: bytes) -> None:
        """InputError for what is no note."""
        try:
            what, cell_id, number, attempt, value = json.loads(note)
            known = type(number) is type(attempt) is int and type(value) is _NOTES[what]
        except (ValueError, TypeError, KeyError, RecursionError):
            known = False
        if not known:
            raise InputError(f"not a note: {note[:80]!r}")
        cell = self._cell
        if cell is not None and cell.cell.id == cell_id:
            getattr(cell, what)(number, attempt, value)

    def _refused(self, why: str) -> None:
        cell = self._cell  # the driver may close it meanwhile
        if cell is not None:
            cell.refusals.append(why)

    # For the cell

    @property
    def tolerance(self) -> float:
        """How far from ONNX Runtime's its answers may be: see `Backend`."""
        return backend(self.node.backend).tolerance

    def _answers(self, model: Model, seed: int) -> list[tuple[Tensors, Tensors]]:
        whole = PartSession(model, model.whole())  # in ONNX Runtime, whatever this node computes with
        inputs = [random_input(model, i, seed) for i in range(PAYLOADS)]
        return [(given, whole.run(given)) for given in inputs]

    def payload(self, request: Request, version: str) -> tuple[Tensors, Tensors]:
        """Inputs of a request, and the whole model's answer to them."""
        answers = self._references.get((request.model, version))
        if answers is None:
            raise absent(request.model, version)
        return answers[request.number % PAYLOADS]

    def send(self, node: str, letter: Letter, arrays: Sequence[Array]) -> None:
        """Pass a message on. One to a node that is gone is lost; its dispatcher learns of it from the driver."""
        self._wire.send(node, letter, arrays)

    def note(self, node: str, what: str, letter: Letter, value: Any) -> None:
        """Tell the cell of another node something about an attempt."""
        self._wire.tell(node, json.dumps([what, letter.cell, letter.number, letter.attempt, value]).encode())
