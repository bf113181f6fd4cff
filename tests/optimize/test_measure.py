"""optimize with example_inputs: only what is faster and right is replaced."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import pybigmodel as pbm
from pybigmodel import _measure
from pybigmodel._console import OtherLoad
from pybigmodel.testing import interleave, timers

NOTHING = "nothing finite and non-zero to compare on example_inputs"


def left(model: nn.Module, *args, **kwargs) -> dict[str, str | None]:
    """The reasons by path."""
    rows = pbm.report(pbm.optimize(model, *args, **kwargs)).rows
    return {row.path: row.left for row in rows}


def test_only_what_is_faster_and_right_is_replaced(model, x, monkeypatch) -> None:
    model.unused = nn.Linear(3, 3)
    slow, wrong = model.head, model.body[0]

    def time_pair(original, candidate, input):
        return (1.0, 1.25) if original is slow else (3.0, 1.0)

    def compared(got, expected):
        return (0.5, 0.8) if expected.shape == (7, 64) and wrong_next.pop(0) else (1e-7, 1.0)

    wrong_next = [False, True, False]  # first, body.0, body.2
    monkeypatch.setattr(_measure, "time_pair", time_pair)
    monkeypatch.setattr(_measure, "difference", compared)
    pbm.optimize(model, example_inputs=x, inplace=True)
    rows = {row.path: row for row in pbm.report(model).rows}
    assert type(slow) is type(wrong) is type(model.unused) is nn.Linear
    assert type(model.first) is type(model.body[2]) is pbm.nn.Linear
    assert rows["head"].left == "not faster on example_inputs: 0.80×"
    assert rows["head"].speedup == 0.8
    assert rows["body.0"].left == "its error on example_inputs is 5.0e-01, above 1e-04"
    assert rows["unused"].left == "not called on example_inputs"
    assert rows["first"].speedup == 3.0 and rows["first"].kernel.startswith("gem")


def test_real_timing(model) -> None:
    layer = nn.Sequential(nn.Linear(256, 256))
    fast = pbm.optimize(layer, example_inputs=torch.randn(128, 256))
    (row,) = pbm.report(fast).rows
    assert row.speedup > 0 and row.error < 1e-6 and row.cosine > 1 - 1e-6
    assert (row.replaced_by is None) == (row.speedup <= 1)


@pytest.mark.parametrize("form", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"x": x}])
def test_forms_of_example_inputs(model, x, twice_as_fast, form) -> None:
    assert set(left(model, example_inputs=form(x)).values()) == {None}
    assert len(twice_as_fast) == 4  # every layer is of another kind


def test_alike_layers_are_timed_once(x, twice_as_fast) -> None:
    model = nn.Sequential(*(nn.Linear(40, 40) for _ in range(5)))
    pbm.optimize(model, "int8", example_inputs=x)
    assert len(twice_as_fast) == 1


def test_the_run_leaves_no_trace(x, twice_as_fast) -> None:
    model = nn.Sequential(nn.Linear(40, 40), nn.BatchNorm1d(40), nn.Dropout(0.5), nn.Linear(40, 4))
    model.train()
    model[2].eval()
    before = copy.deepcopy(model.state_dict())
    pbm.optimize(model, example_inputs=x, inplace=True)
    assert [m.training for m in model] == [True, True, False, True]
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not model[0]._forward_hooks
    with pytest.raises(RuntimeError):
        pbm.optimize(pbm.restore(model), example_inputs=x[:, :3], inplace=True)
    assert not model[0]._forward_hooks and type(model[0]) is nn.Linear
    assert [m.training for m in model] == [True, True, False, True]


def test_inputs_as_keywords_and_hooks_that_change_them(x, twice_as_fast) -> None:
    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(40, 8)

        def forward(self, x):
            return self.layer(input=x)

    model = Caller()
    model.layer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {"input": kwargs["input"][:, :40]}), with_kwargs=True
    )
    wide = torch.cat([x, x], 1)
    assert left(model, example_inputs=wide) == {"layer": None}


def test_not_finite_activations(x, twice_as_fast) -> None:
    x[2, 3] = torch.inf
    assert left(nn.Sequential(nn.Linear(40, 8)), example_inputs=x) == {"0": None}


@pytest.fixture
def rounds(monkeypatch):
    """What `time_pair` is given in turn, on a quiet machine; the lengths that it asked for."""
    asked, given = [], []

    def rounds(original, candidate, x, count):
        asked.append(count)
        return given.pop(0)

    monkeypatch.setattr(_measure, "_rounds", rounds)
    monkeypatch.setattr(OtherLoad, "cores", lambda self: 0.0)
    return asked, given


def ratio() -> float:
    original, candidate = _measure.time_pair(
        nn.Linear(1, 1), nn.Linear(1, 1), ((torch.ones(1, 1),), {})
    )
    return original / candidate


def test_a_bad_round_does_not_decide(rounds) -> None:
    asked, given = rounds
    given.append(([3.0, 3.1, 3.0, 2.9, 3.0], [1.0, 1.0, 30.0, 1.0, 1.0]))
    assert ratio() == 3.0 and asked == [_measure.ROUNDS]


def test_a_machine_that_slows_down_does_not_decide(rounds) -> None:
    _, given = rounds
    given.append(([2.0, 2.0, 2.0, 20.0, 20.0], [1.0, 1.0, 1.0, 10.0, 10.0]))
    assert ratio() == 2.0


@pytest.mark.parametrize(
    "first",
    [([1.0, 1.0, 1.1, 1.0, 1.0], [1.0] * 5), ([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)],
    ids=["near 1", "wide"],
)
def test_doubt_is_measured_longer(rounds, first) -> None:
    asked, given = rounds
    given += [first, ([2.0] * 12, [1.0] * 12)]
    assert ratio() == 2.0 and asked == [_measure.ROUNDS, _measure.MORE_ROUNDS]


def test_other_load_is_measured_longer_and_kept(rounds, monkeypatch) -> None:
    asked, given = rounds
    given += [([2.0] * 5, [1.0] * 5), ([2.0] * 12, [1.0] * 12)]
    monkeypatch.setattr(OtherLoad, "cores", lambda self: 1.3)
    layer = nn.Linear(3, 3)
    trial = _measure.Trial(layer, pbm.nn.Linear.from_linear(layer))
    _measure.run_trials(layer, torch.ones(2, 3), [trial])
    assert asked == [_measure.ROUNDS, _measure.MORE_ROUNDS]
    assert (trial.speedup, trial.other_load) == (2.0, 1.3)


def test_turns_have_medians() -> None:
    timings = interleave({"a": [int], "b": [int]}, rounds=3, seconds=1e-4, require_idle=False)
    assert [len(timing.turn_medians) for timing in timings.values()] == [3, 3]


def test_a_process_that_never_rests_is_measured_all_the_same(monkeypatch) -> None:
    def never(**_):
        raise TimeoutError

    monkeypatch.setattr(timers, "wait_until_idle", never)
    layer = nn.Linear(8, 8)
    seconds = _measure.time_pair(layer, pbm.nn.Linear.from_linear(layer), ((torch.ones(2, 8),), {}))
    assert min(seconds) > 0


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf], ids=str)
def test_nothing_to_compare(value, twice_as_fast) -> None:
    layer = nn.Linear(8, 8, bias=False)
    fast = pbm.optimize(layer, example_inputs=torch.full((4, 8), value))
    (row,) = pbm.report(fast)
    assert type(fast) is nn.Linear and row.left == NOTHING
    assert row.error is row.speedup is None
    assert not twice_as_fast


def test_empty_inputs_say_nothing(twice_as_fast) -> None:
    layer = nn.Linear(8, 8)
    trial = _measure.Trial(layer, pbm.nn.Linear.from_linear(layer))
    pbm.ops.linear(torch.ones(1, 8), torch.ones(8, 8))  # a kernel that ran before
    _measure.run_trials(layer, torch.ones(0, 8), [trial])
    assert trial.kernel is None and trial.failure == NOTHING


def test_one_call_that_says_something_is_enough(twice_as_fast) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8, bias=False)

        def forward(self, x):
            return self.layer(x * 0) + self.layer(x)

    assert left(Twice(), example_inputs=torch.ones(2, 8)) == {"layer": None}
