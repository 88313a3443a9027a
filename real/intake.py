"""What a node takes from others, checked before anything is made of it: letters and tensors that fit its testbed.

Knows the testbed, plans and codecs. That a letter is one at all, made of numbers and names, `letters.py` has seen to;
here it has to make sense: the plan is possible, this node is on its way, and its tensors are what the plan says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from isthmus.policies.dispatch import RETRIES, Compiler
from isthmus.policies.plan import Compiled, Message
from isthmus.policies.records import Kind, Span
from isthmus.real.letters import Letter
from isthmus.real.session import Array
from isthmus.workloads.codecs import Wire, codec
from isthmus.workloads.errors import InputError, unknown
from isthmus.workloads.model import Tensor
from isthmus.workloads.testbed import Testbed

_TOLERANCE = 0.1  # as `check_backend` allows at most
_TIMES_S = -1.0, 1e9  # clocks of hosts differ a little
_TIMES = "{:g} to {:g} s, in order".format(*_TIMES_S)
_LINK_KINDS = (Kind.WAIT, Kind.SEND)

_wire = lru_cache(maxsize=4096)(lambda name, tensor: codec(name).wire(tensor))


def check(
    letter: Letter, arrays: Sequence[Array], node: str, testbed: Testbed, compiler: Compiler
) -> tuple[Compiled, Message]:
    """The plan of a letter that has come to `node`, and which of its messages this is.

    InputError for a letter that has no business here or does not fit its plan, and for tensors of other number, type or
    shape than the model and the codec say, or that hold what is not a number where this node is to use them.
    """
    request = letter.request
    if request.source not in testbed.nodes:
        raise unknown("source", request.source[:40], testbed.nodes)
    if request.model not in testbed.models:
        raise unknown("model", request.model[:40], testbed.models)
    if request.number < 0:
        raise InputError(f"request {request.number}", allowed="0 or more")
    if not 1 <= letter.attempt <= RETRIES + 2:
        raise InputError(f"attempt {letter.attempt}", allowed=f"1 to {RETRIES + 2}")
    if letter.down and (unheard := letter.down - testbed.links.keys()):
        raise InputError(f"a letter around a link {min(unheard)}"[:80], allowed="links of the testbed")
    compiled = compiler(letter.plan, request.model, request.source, letter.down)
    if not 0 <= letter.message < len(compiled.messages):
        raise InputError(f"message {letter.message}", allowed=f"0 to {len(compiled.messages) - 1}, as its plan has")
    message = compiled.messages[letter.message]
    if not 1 <= letter.hop < len(message.path) or message.path[letter.hop] != node:
        way = " → ".join(message.path)
        raise InputError(f"a letter on hop {letter.hop} of {way}, at {node}")
    if not _TIMES_S[0] <= letter.at_s <= _TIMES_S[1]:
        raise InputError(f"a letter of time {letter.at_s:g} s", allowed=_TIMES)
    if letter.overruns < 0:
        raise InputError(f"{letter.overruns} overruns", allowed="0 or more")
    if not 0 <= letter.tolerance <= _TOLERANCE:
        raise InputError(f"a tolerance of {letter.tolerance:g}", allowed=f"0 to {_TOLERANCE:g}")
    for span in letter.spans:
        check_span(span, testbed)
    _check_arrays(arrays, message, compiled.model.tensors, used=letter.hop == len(message.links))
    return compiled, message


def check_span(span: Span, testbed: Testbed) -> None:
    """InputError for a span that nothing in this testbed can have taken."""
    a, link, b = span.place.partition(">")
    known = (a, b) in testbed.links if link else a in testbed.nodes
    if not known or (link and span.kind not in _LINK_KINDS) or (span.kind is Kind.SEND and not link):
        raise InputError(f"a span of {span.kind} at {span.place[:40]!r}", allowed="nodes and links of the testbed")
    if not _TIMES_S[0] <= span.start_s <= span.end_s <= _TIMES_S[1]:
        raise InputError(f"a span from {span.start_s:g} to {span.end_s:g} s", allowed=_TIMES)


def _check_arrays(arrays: Sequence[Array], message: Message, tensors: Mapping[str, Tensor], *, used: bool) -> None:
    """`used`: this node is to decode them."""
    expected: list[tuple[str, Wire, bool]] = [
        (name, wire, header)
        for name, coded in zip(message.tensors, message.codecs, strict=True)
        for wire, header in zip(_wire(coded, tensors[name]), (False, True), strict=False)
    ]
    if len(arrays) != len(expected):
        raise InputError(f"{len(arrays)} tensors", allowed=f"{len(expected)}: {', '.join(message.tensors)}")
    for array, (name, (dtype, shape), header) in zip(arrays, expected, strict=True):
        if type(array) is not np.ndarray or array.dtype != dtype or array.shape != shape:
            said = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
            raise InputError(f"tensor {name!r} as {said}"[:200], allowed=f"{dtype} {list(shape)}")
        if not used or dtype.kind != "f" or not array.size:
            continue
        if np.isnan(np.min(array)) or (header and not np.isfinite(array).all()):  # the minimum of any NaN is NaN
            raise InputError(f"tensor {name!r} holds what is not a number", allowed="numbers")
