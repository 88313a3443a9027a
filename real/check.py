"""A conformance kit: `check_backend(make)` finds out whether a backend keeps the contract. For users' own tests.

It brings small models of its own, and takes more. The reference is ONNX Runtime on the CPU. Knows the interface of
backends and parts; must not know Ray.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import psutil
from onnx import numpy_helper, parser

from isthmus.real.backend import CLOCKS, Array, Backend, difference, same
from isthmus.real.session import PartSession, random_input
from isthmus.workloads.errors import InputError, RunFailure
from isthmus.workloads.model import Model, Part, load_model, model_proto

_CUTS = 8
_THREADS, _EACH = 4, 3
_LOADS, _WARM_LOADS = 12, 3
_OWN_SHARE = 0.7
_Tensors = dict[str, Array]


def check_backend(make: Callable[[], Backend], *, models: Sequence[str | Path | Model] = ()) -> None:
    """Check a backend against the contract (`real/backend.py`). AssertionError says which clause it breaks.

    `make` builds a fresh backend. `models`, by name, file or as loaded, are checked beside the kit's own. Checked:

    * a model, and its parts joined again at several cuts, give the answer of ONNX Runtime's CPU provider, within the
      tolerance that the backend declares; one that is `exact` gives its own answer bit for bit without `optimize`
    * what it does not take it refuses with an InputError when it is loaded: types of tensors, a model of tokens and
      masks, what is not ONNX; the kit's network of convolutions and `models` it has to take
    * the same inputs give the same answer; inputs may be read-only, and are left as they are; an answer stays as it is
      when other requests follow; threads may call at the same time
    * where its clock is the CPU time of the calling thread, that is where its work is done
    * what a part took of memory is given back when it is closed (if it can be) and dropped
    """
    backend = make()
    _check_attributes(backend)
    with tempfile.TemporaryDirectory() as folder:
        layers, tokens = (_saved(Path(folder), name, text) for name, text in _MODELS.items())
        given = [model if isinstance(model, Model) else load_model(str(model)) for model in models]
        for model in [layers, *([tokens] if _takes(backend, tokens) else []), *given]:
            _check_answers(backend, model)
            _check_manners(backend, model)
        _check_clock(backend, layers)
        for kind in _TYPES:
            _check_type(backend, _saved(Path(folder), f"type_{kind}", _TYPED.replace("TYPE", kind)))
        _check_refusals(backend)
        _check_memory(backend, _saved(Path(folder), "large", _LARGE))


def _check_attributes(backend: Backend) -> None:
    for attribute in ("name", "version", "device"):
        said = getattr(backend, attribute, None)
        assert isinstance(said, str), f"{attribute} is {said!r}, not a text"
        assert said, f"{attribute} is empty"
    assert 0 <= backend.tolerance <= 0.1, f"tolerance is {backend.tolerance!r}, not a share between 0 and 0.1"
    assert isinstance(backend.exact, bool), f"exact is {backend.exact!r}, not True or False"
    assert backend.clock(1) in CLOCKS, f"clock(1) is {backend.clock(1)!r}, not one of {', '.join(CLOCKS)}"


def _takes(backend: Backend, model: Model) -> bool:
    session = _load(backend, model, model.whole())
    if isinstance(session, InputError):
        return False
    session.close()
    return True


def _check_answers(backend: Backend, model: Model) -> None:
    proto = model_proto(model)
    given = random_input(model, 0, seed=1)
    expected = PartSession(model, model.whole(), proto=proto).run(given)
    whole = _run(backend, model, [model.whole()], proto, given)
    _compare(f"{model.name}, whole", whole, expected, backend.tolerance)
    plain = _run(backend, model, [model.whole()], proto, given, optimize=False) if backend.exact else {}
    for cut in _evenly(len(model.cuts)):
        parts = [model.span(0, cut), model.span(cut, len(model.blocks))]
        joined = _run(backend, model, parts, proto, given)
        _compare(f"{model.name}, joined at cut {cut}", joined, expected, backend.tolerance)
        if backend.exact:
            for name, value in _run(backend, model, parts, proto, given, optimize=False).items():
                assert np.array_equal(value, plain[name], equal_nan=value.dtype.kind == "f"), (
                    f"{model.name}, joined at cut {cut} without `optimize`: {name!r} is not bit for bit that of the "
                    f"whole, so it is not `exact`"
                )


def _check_manners(backend: Backend, model: Model) -> None:
    """What a session does to what it was given and to what it gave before, and from several threads."""
    with _loaded(backend, model, model.whole()) as session:
        inputs = [random_input(model, index, seed=2) for index in range(_THREADS)]
        before = [{name: value.copy() for name, value in given.items()} for given in inputs]
        answers = [session.run(given) for given in inputs]
        for given, then in zip(inputs, before, strict=True):
            _identical(given, then, f"{model.name}: inputs are changed")
            for value in given.values():
                value.flags.writeable = False  # as tensors are that come from another process
        kept = [{name: value.copy() for name, value in answer.items()} for answer in answers]
        for given, answer in zip(inputs, kept, strict=True):
            _identical(session.run(given), answer, f"{model.name}: the same inputs give another answer the second time")
        for answer, then in zip(answers, kept, strict=True):
            _identical(answer, then, f"{model.name}: an answer changes when other requests follow")
        with ThreadPoolExecutor(_THREADS) as pool:
            for given, answer in zip(inputs * _EACH, pool.map(session.run, inputs * _EACH), strict=True):
                index = next(i for i, other in enumerate(inputs) if other is given)
                _identical(answer, kept[index], f"{model.name}: threads that call at the same time get other answers")


def _check_clock(backend: Backend, model: Model) -> None:
    if backend.clock(1) != "cpu":
        return
    given = random_input(model, 0, seed=3)
    with _loaded(backend, model, model.whole()) as session:
        shares = []
        for _ in range(5):  # something else may be at work in this process now and then
            all_s, own_s = time.process_time(), time.thread_time()
            for _ in range(20):
                session.run(given)
            all_s, own_s = time.process_time() - all_s, time.thread_time() - own_s
            shares.append(own_s / all_s)
    assert max(shares) >= _OWN_SHARE, (
        f"its clock is the CPU time of the calling thread, but only {max(shares):.0%} of the work is done there: "
        "it is `wall`"
    )


def _check_type(backend: Backend, model: Model) -> None:
    given = random_input(model, 0, seed=4)
    expected = PartSession(model, model.whole()).run(given)
    if not _takes(backend, model):
        return
    answer = _run(backend, model, [model.whole()], model_proto(model), given)
    # Half precision has 11 bits.
    _compare(model.name, answer, expected, max(backend.tolerance, 2e-3 if "float16" in model.name else 0.0))


def _check_refusals(backend: Backend) -> None:
    unknown = parser.parse_model(_MODELS["layers"].replace("Relu", "NoSuchOperator")).SerializeToString()
    for what, graph in (("what is not ONNX", b"not a graph"), ("an unknown operator", unknown)):
        try:
            backend.load(graph, threads=1, optimize=True)
        except InputError as error:
            if "\n" in str(error):
                raise AssertionError(f"{what} is refused in more than one line") from error
        except Exception as error:
            raise AssertionError(f"{what} is refused with {type(error).__name__}, not InputError: {error}") from error
        else:
            raise AssertionError(f"{what} is not refused")


def _check_memory(backend: Backend, model: Model) -> None:
    given, process = random_input(model, 0, seed=5), psutil.Process()
    weights = model.weights_bytes(model.whole())
    before = 0
    for turn in range(_LOADS):
        if turn == _WARM_LOADS:
            gc.collect()
            before = process.memory_info().rss
        with _loaded(backend, model, model.whole()) as session:
            session.run(given)
        del session
    gc.collect()
    kept = (process.memory_info().rss - before) / weights / (_LOADS - _WARM_LOADS)
    assert kept < 0.5, f"of a part that is closed and dropped, memory of {kept:.1f} times its weights stays"


@contextmanager
def _loaded(
    backend: Backend, model: Model, part: Part, proto: onnx.ModelProto | None = None, *, optimize: bool = True
) -> Iterator[PartSession]:
    session = _load(backend, model, part, proto, optimize=optimize)
    if isinstance(session, InputError):
        raise AssertionError(f"{part} is refused: {session}") from session
    try:
        yield session
    except RunFailure as error:
        raise AssertionError(f"{part} is loaded, and then does not run: {error}") from error
    finally:
        session.close()


def _load(
    backend: Backend, model: Model, part: Part, proto: onnx.ModelProto | None = None, *, optimize: bool = True
) -> PartSession | InputError:
    """The part, or how the backend refused it."""
    try:
        return PartSession(model, part, proto=proto, optimize=optimize, backend=backend)
    except InputError as error:
        return error
    except Exception as error:
        raise AssertionError(f"{part} is refused with {type(error).__name__}, not InputError: {error}") from error


def _run(
    backend: Backend,
    model: Model,
    parts: Sequence[Part],
    proto: onnx.ModelProto,
    given: Mapping[str, Array],
    *,
    optimize: bool = True,
) -> _Tensors:
    """The model's outputs, when these parts run one after another and only tensors that cross pass."""
    tensors = dict(given)
    for part in parts:
        with _loaded(backend, model, part, proto, optimize=optimize) as session:
            tensors |= session.run({name: tensors[name].copy() for name in session.inputs})
    return {name: tensors[name] for name in model.outputs}


def _compare(what: str, answer: _Tensors, expected: _Tensors, tolerance: float) -> None:
    for name, right in expected.items():
        value = answer[name]
        assert isinstance(value, np.ndarray), f"{what}: {name!r} is a {type(value).__name__}, not an array"
        shapes = f"{value.dtype} {list(value.shape)}", f"{right.dtype} {list(right.shape)}"
        assert shapes[0] == shapes[1], f"{what}: {name!r} is {shapes[0]}, not {shapes[1]}"
        if not same(value, right, tolerance):
            raise AssertionError(
                f"{what}: {name!r} is {difference(value, right):.1e} away from ONNX Runtime's answer, and the declared "
                f"tolerance is {tolerance:.1e}"
            )


def _identical(one: _Tensors, other: _Tensors, otherwise: str) -> None:
    for name, value in one.items():
        assert np.array_equal(value, other[name], equal_nan=value.dtype.kind == "f"), f"{otherwise} ({name!r})"


def _evenly(cuts: int) -> list[int]:
    inner = np.linspace(1, cuts - 2, min(_CUTS, max(cuts - 2, 0)))
    return list(dict.fromkeys(round(float(cut)) for cut in inner))


def _saved(folder: Path, name: str, text: str) -> Model:
    """A model from its text. Its weights, tensors that are named `w…` with a shape, are drawn."""
    proto = parser.parse_model(text)
    rng = np.random.default_rng(0)
    drawn = []
    for value in [v for v in proto.graph.input if v.name.startswith("w")]:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        scale = np.sqrt(2 / np.prod(shape[1:]))
        drawn.append(numpy_helper.from_array(rng.normal(0, scale, shape).astype(np.float32), value.name))
        proto.graph.input.remove(value)
    proto.graph.initializer.extend(drawn)
    path = folder / f"{name}.onnx"
    onnx.save(proto, path)
    return load_model(str(path))


# In ONNX's own notation. A convolutional network with a skip and two branches; one with tokens and a mask, two inputs
# and two outputs of different types; and a layer that is all weights.
_HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
_MODELS = {
    "layers": f"""{_HEAD} layers (float[1,3,64,64] x, float[16,3,3,3] w0, float[16,16,3,3] w1, float[16,16,1,1] w2,
        float[16,16,3,3] w3, float[10,512] w4, float[10] w5,
        float[16] w6) => (float[1,10] y) {{
        var = Abs (w6)
        a = Conv <strides: ints = [2, 2], pads: ints = [1, 1, 1, 1]> (x, w0)
        n = BatchNormalization (a, var, w6, w6, var)
        b = Relu (n)
        c = Conv <pads: ints = [1, 1, 1, 1]> (b, w1)
        d = Add (b, c)
        e = MaxPool <kernel_shape: ints = [2, 2], strides: ints = [2, 2]> (d)
        f = Conv (e, w2)
        g = Conv <pads: ints = [1, 1, 1, 1]> (e, w3)
        h = Concat <axis: int = 1> (f, g)
        i = AveragePool <kernel_shape: ints = [4, 4], strides: ints = [4, 4]> (h)
        j = Flatten (i)
        y = Gemm <transB: int = 1> (j, w4, w5)
    }}""",
    "tokens": f"""{_HEAD} tokens (int64[1,16] ids, bool[1,16] mask, float[8,32] w0, float[32,32] w1)
        => (float[1,16,32] y, int64[1,16] best) {{
        low = Constant <value_float: float = -4.0> ()
        where = Constant <value_ints: ints = [2]> ()
        a = Gather (w0, ids)
        b = MatMul (a, w1)
        c = LayerNormalization (b, scale)
        d = Unsqueeze (mask, where)
        e = Where (d, c, low)
        f = Softmax <axis: int = -1> (e)
        y = Mul (f, c)
        best = ArgMax <axis: int = -1, keepdims: int = 0> (e)
    }}""".replace("c = Layer", "scale = ReduceMax <axes: ints = [0], keepdims: int = 0> (w1)\n        c = Layer"),
}
_LARGE = f"""{_HEAD} large (float[1,2048] x, float[2048,2048] w0) => (float[1,2048] y) {{ y = MatMul (x, w0) }}"""
_TYPED = f"""{_HEAD} typed (TYPE[1,3,4] x) => (TYPE[4,6,1] y) {{
    a = Concat <axis: int = 1> (x, x)
    y = Transpose (a)
}}"""
_TYPES = ("float16", "float", "double", "int8", "uint8", "int32", "int64", "bool")
