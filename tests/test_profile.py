"""Profiles: the file, the fit that makes them, the answers they give, and a real one in quick mode."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from isthmus.real.profiler import fit_profile, profile_model, profile_spans
from isthmus.workloads.errors import InputError, RunFailure
from isthmus.workloads.fit import fit_blocks, fit_line, fit_rhythm, session_means, typical
from isthmus.workloads.model import Model, Part, load_model
from isthmus.workloads.profile import Profile, Rhythm, SessionCost


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("squeezenet")


@pytest.fixture(scope="module")
def quick(model: Model) -> Profile:
    return profile_model(model, rounds=4, pace_s=0.0, quick=True, label="test")


def synthetic(model: Model, seed: int = 0, noise: float = 0.0) -> tuple[Profile, np.ndarray]:
    """A profile fitted to made-up sessions, and the true table [i, j] they came from."""
    rng = np.random.default_rng(seed)
    blocks = len(model.blocks)
    before = np.concatenate([[0], np.cumsum(rng.uniform(1e-4, 1e-3, blocks))])
    enter, leave = rng.uniform(0, 1e-4, (2, blocks + 1))
    truth = np.triu(2e-4 + (enter - before)[:, None] + (leave + before)[None, :], k=1)
    sessions = [
        SessionCost(
            first=first,
            last=last,
            kind="block" if last == first + 1 else "part",
            load_s=0.01 + 1e-9 * model.weights_bytes(model.span(first, last)),
            weights_bytes=model.weights_bytes(model.span(first, last)),
            mean_s=truth[first, last] * (1 + noise * rng.standard_normal()),
            samples_s=tuple(truth[first, last] * rng.uniform(0.9, 1.1, 30)),
        )
        for first, last in profile_spans(model)
    ]
    return fit_profile(model, sessions, pace_s=0.0), truth


def test_the_fit_recovers_costs_that_follow_its_model(model):
    profile, truth = synthetic(model)
    inner = np.triu(np.ones_like(truth, dtype=bool), k=1)
    assert np.abs(profile.span_s()[inner] / truth[inner] - 1).mean() < 0.005
    noisy, _ = synthetic(model, noise=0.02)
    errors = np.abs(noisy.span_s()[inner] / truth[inner] - 1)
    assert errors.mean() < 0.02  # less than the noise of what it was fitted to


def test_constants_and_edges_of_the_fit():
    spans = [(0, 3), (0, 2), (1, 3), (0, 1), (1, 2), (2, 3)]
    true = np.array([3.0, 1.0, 2.0])
    fit = fit_blocks(spans, [1.0 + true[a:b].sum() for a, b in spans], 3)
    for first, last in [(0, 3), (0, 2), (1, 3)]:
        predicted = fit.session_s + fit.enter_s[first] + fit.block_s[first:last].sum() + fit.leave_s[last]
        assert predicted == pytest.approx(1 + true[first:last].sum(), rel=0.05)
    assert fit_blocks([(0, 1)], [2.0], 1).block_s.shape == (1,)  # a model without an inner cut
    assert fit_line([0.0, 1e6], [0.5, 2.5]) == pytest.approx((0.5, 2e-6))
    assert fit_line([], []) == (0.0, 0.0)
    assert fit_line([3e8], [0.5])[0] >= 0


def test_means_survive_drift_and_hiccups():
    rng = np.random.default_rng(0)
    true = np.linspace(1e-4, 5e-3, 40)
    owner = np.concatenate([rng.permutation(40) for _ in range(16)])
    drift = 1 + 0.2 * np.sin(np.arange(owner.size) / 60)
    samples = true[owner] * drift * rng.uniform(0.95, 1.05, owner.size)
    samples[rng.choice(owner.size, 6)] *= 50
    means = session_means(owner.tolist(), samples.tolist())
    scale = np.median(means / true)
    assert scale == pytest.approx(1, abs=0.03)
    assert np.abs(means / true / scale - 1).max() < 0.03
    np.testing.assert_array_equal(typical([1, 1.2, 40, 0.9]), [1, 1.2, 0.9])
    assert typical([]).size == 0


def test_parts_cost_what_the_blocks_say(model):
    profile, truth = synthetic(model)
    last = len(model.blocks)
    assert profile.part_s(model, Part(model.name, 0)) == 0
    for span in itertools.combinations(range(0, last + 1, 4), 2):
        assert profile.part_s(model, model.span(*span)) == profile.span_s()[span]
    assert profile.part_s(model, model.span(7, 8)) == pytest.approx(truth[7, 8])  # measured, not fitted

    block = next(block for block in model.blocks if block.bit_count() > 2)
    inside = [Part(model.name, block & ~(1 << index)) for index in range(len(model.layers)) if block >> index & 1]
    whole_s = profile.blocks[model.blocks.index(block)].seconds
    parts_s = [profile.part_s(model, part) - profile.session_s for part in inside]
    assert all(0 < part_s <= whole_s for part_s in parts_s)
    assert sum(parts_s) == pytest.approx(whole_s * (len(inside) - 1))
    assert profile.load_s(model, model.whole()) == pytest.approx(0.01 + 1e-9 * model.parameter_bytes)
    assert profile.load_s(model, Part(model.name, 0)) == 0


def test_residuals_are_of_a_session_as_long(model):
    profile, _ = synthetic(model)
    residuals = profile.residuals(1.0)
    expected: list[float] = []  # of the longest ones, until there are enough
    for session in sorted(profile.sessions, key=lambda session: -sum(session.samples_s)):
        if len(expected) < 50:
            samples = np.array(session.samples_s)
            expected += (samples / samples.mean() - 1).tolist()
    np.testing.assert_allclose(sorted(residuals), sorted(expected))
    assert abs(residuals.mean()) < 1e-12
    with pytest.raises(ValueError, match="read-only"):
        residuals[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        profile.span_s()[0, 1] = 1


def test_a_rhythm_scales_and_shifts_every_part_and_replaces_the_one_before(model):
    profile = profile_model(model, quick=True, rounds=1, runs=1, pace_s=0)
    before = profile.span_s()
    paced = profile.at_rhythm(Rhythm(scale=3.0, shift_s=1.0)).at_rhythm(Rhythm(scale=0.5, shift_s=1e-4))
    inner = np.triu(before, k=1) > 0
    np.testing.assert_allclose(paced.span_s()[inner], 0.5 * before[inner] + 1e-4)
    assert not paced.span_s()[~inner].any()
    assert paced.part_s(model, model.whole()) == paced.span_s()[0, -1]
    assert paced.sessions == profile.sessions


def test_the_rhythm_is_found_from_times_in_a_run():
    loop = [1.0, 2.0, 4.0, 8.0]
    scale, shift = fit_rhythm(loop, [0.9 * t + 0.2 for t in loop], [10, 20, 10, 5])
    assert (scale, shift) == (pytest.approx(0.9), pytest.approx(0.2))
    assert fit_rhythm([1.0, 1.1], [2.0, 2.2], [1, 1]) == (pytest.approx(2.0), 0.0)
    assert fit_rhythm([], [], []) == (1.0, 0.0)


def test_the_file_is_the_profile(model, quick, tmp_path):
    path = tmp_path / "squeezenet.json"
    quick.save(path)
    again = Profile.load(path)
    assert again.model_dump() == quick.model_dump()
    np.testing.assert_array_equal(again.span_s(), quick.span_s())
    assert [p.name for p in tmp_path.iterdir()] == ["squeezenet.json"]

    other = load_model("squeezenet", seed=1)
    with pytest.raises(InputError, match=r"squeezenet\.json: is of model squeezenet \(.*not of squeezenet"):
        again.part_s(other, other.whole())
    with pytest.raises(RunFailure, match="cannot be written"):
        quick.save(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data | {"schema_version": 2}, "schema_version"),
        (lambda data: data | {"nonsense": 1}, "nonsense"),
        (lambda data: data | {"session_s": -1.0}, "session_s"),
        (lambda data: data | {"blocks": data["blocks"][:-1]}, "blocks lie between"),
        (lambda data: {k: v for k, v in data.items() if k != "sessions"}, "sessions"),
        (lambda data: [data], "is not a Profile"),
    ],
)
def test_other_files_are_refused_by_field(quick, tmp_path, change, message):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(change(json.loads(quick.model_dump_json()))))
    with pytest.raises(InputError, match=rf"bad\.json: .*{message}"):
        Profile.load(path)


def test_what_is_not_json_is_refused(tmp_path: Path):
    path = tmp_path / "bad.json"
    path.write_text('{"model": ')
    with pytest.raises(InputError, match=r"bad\.json:1: is not JSON"):
        Profile.load(path)
    with pytest.raises(InputError, match="no such file"):
        Profile.load(tmp_path / "missing.json")


def test_a_quick_profile_is_whole_and_says_what_it_is(model, quick):
    assert quick.machine.label == "test"
    assert {block.source for block in quick.blocks} == {"scaled"}
    assert "profiler" in quick.provenance
    whole = next(session for session in quick.sessions if session.kind == "whole")
    assert len(whole.samples_s) == 4
    assert whole.weights_bytes == model.parameter_bytes
    table = quick.span_s()
    assert table.shape == (len(model.cuts), len(model.cuts))
    assert (table[np.triu_indices(len(model.cuts), k=1)] >= 0).all()
    assert not np.tril(table).any()
    sum_s = quick.session_s + sum(block.seconds for block in quick.blocks)
    assert quick.part_s(model, model.whole()) == pytest.approx(sum_s) != 0


def test_a_full_profile_times_every_block_and_reports_progress(model):
    steps = []
    profile = profile_model(model, rounds=1, pace_s=0.0, progress=lambda done, total, _: steps.append((done, total)))
    spans = [(session.first, session.last) for session in profile.sessions]
    assert len(set(spans)) == len(spans) == len(steps)
    assert steps[-1] == (len(steps), len(steps))
    assert {(i, i + 1) for i in range(len(model.blocks))} <= set(spans)
    assert {session.kind for session in profile.sessions} == {"whole", "block", "head", "tail", "part"}
    assert {block.source for block in profile.blocks} == {"fitted"}
    assert profile.part_s(model, model.whole()) > 0
    with pytest.raises(InputError, match="cannot time 0 rounds"):
        profile_model(model, rounds=0)
