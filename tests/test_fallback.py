"""Raising layers until a limit holds: the search on made-up trials, then whole compilations of a real model."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.accuracy import Accuracy
from qcompile.context import Settings
from qcompile.errors import DataError, InputError
from qcompile.fallback import LEAST_SAMPLES, Found, Raised, Trial, rank, search
from qcompile.limits import Limits
from qcompile.plan import LayerRecord
from qcompile.report_file import report_json


def layer(name: str, own_db: float | None, weights: int = 8, bits: int = 4) -> LayerRecord:
    return LayerRecord(name, "Conv", bits, weights, 30.0, 20.0, own_db, "nearest", None, 0.0, 1.0, 0.0)


def accuracy(agreement: float | None = None, drop: float | None = None, samples: int = 100) -> Accuracy:
    return Accuracy(samples, 20.0, 0.99, agreement, "top1" if drop is not None else None, 0.9, 0.9, drop, 1, 0, False)


class Model:
    """Agreement falls by each layer's own error: a model whose layers are independent."""

    def __init__(self, harm: dict[str, int], bits: int = 4, samples: int = 10**13) -> None:
        self.harm, self.bits, self.samples = harm, bits, samples
        self.calls: list[Raised] = []

    def lost(self, name: str, bits: int) -> int:
        return {4: 16 * self.harm[name], 8: self.harm[name], 32: 0}[bits]

    def compile_with(self, raised: Raised) -> Trial[int]:
        self.calls.append(raised)
        given = {name: dict(raised).get(name, self.bits) for name in self.harm}
        lost = sum(self.lost(name, bits) for name, bits in given.items())
        # Weights shrink with the harm, so that the order by gain a byte is that of the harm.
        records = [
            layer(name, -10 * math.log10(self.lost(name, bits) + 1e-6), 64, bits) for name, bits in given.items() if bits < 32
        ]
        return Trial(raised, accuracy(1 - lost / 10_000, samples=self.samples), records, len(self.calls))


def run(model: Model, least: float) -> Found[int]:
    return search(model.compile_with, Limits(min_agreement=least), model.bits)


@pytest.mark.parametrize(
    ("to_bits", "order"),
    [
        # noise / signal: a .1, b .01, c .001, d none; bytes of 8 bits: 100, 5, 1; of float: 700, 35, 7
        pytest.param(8, ["b", "a", "c"], id="to-8-bits"),
        pytest.param(32, ["b", "a", "c"], id="to-float"),
    ],
)
def test_layers_are_ordered_by_noise_for_each_byte(to_bits: int, order: list[str]) -> None:
    layers = [layer("a", 10.0, 200), layer("b", 20.0, 10), layer("c", 30.0, 4), layer("d", None, 2)]
    moves = rank(layers, to_bits)
    assert [m.node for m in moves] == order
    assert [m.bytes_added for m in moves] == ([5, 100, 2] if to_bits == 8 else [35, 700, 14])
    assert rank([layer("a", 10.0, bits=8)], 8) == []


def test_nothing_is_raised_where_the_limit_holds() -> None:
    model = Model({"a": 10, "b": 5})
    found = run(model, 0.9)
    assert (found.held, found.moves, model.calls) == (True, [], [()])


@given(harm=st.lists(st.integers(1, 40), min_size=1, max_size=20, unique=True), share=st.floats(0, 1))
def test_the_fewest_layers_in_order_are_raised_with_a_bounded_number_of_compilations(harm: list[int], share: float) -> None:
    names = {f"n{i}": h for i, h in enumerate(harm)}
    model = Model(names)
    worst, best = sum(16 * h for h in harm), sum(harm)
    allowed = best + share * (worst - best)
    found = run(model, 1 - (allowed + 1e-2) / 10_000)  # the standard error of so many samples is below 2e-7
    assert found.held
    ordered = sorted(names, key=lambda n: -names[n])
    lost, count = worst, 0
    while lost > allowed + 1e-2:
        lost -= 15 * names[ordered[count]]
        count += 1
    assert {m.node for m in found.moves} == set(ordered[:count])
    assert dict(found.best.raised) == dict.fromkeys(ordered[:count], 8)
    assert len(model.calls) <= 2 + math.ceil(math.log2(len(harm)))
    assert len(found.tried) == len(model.calls)


def test_then_to_float_on_top_of_8_bits() -> None:
    model = Model({"a": 40, "b": 20, "c": 10, "d": 1})
    found = run(model, 1 - 12 / 10_000)
    assert found.held
    assert dict(found.best.raised) == {"a": 32, "b": 32, "c": 8, "d": 8}
    moves = {m.node: m for m in found.moves}
    assert (moves["a"].from_bits, moves["a"].to_bits) == (4, 32)
    assert moves["a"].bytes_added == 64 // 2 + 64 * 3
    assert moves["a"].own_db == pytest.approx(-10 * math.log10(16 * 40 + 1e-6))  # as it was before anything was raised
    assert (moves["c"].from_bits, moves["c"].to_bits) == (4, 8)


def test_8_bits_go_to_float_at_once_and_one_layer_stays() -> None:
    model = Model({"a": 40, "b": 20}, bits=8)
    found = run(model, 1.0)
    assert not found.held
    assert found.best.raised == (("a", 32),)
    assert model.calls == [(), (("a", 32),)]
    assert found.best.built == 2


def test_the_report_of_a_search() -> None:
    found = run(Model({"a": 40, "b": 20}), 1 - 101 / 10_000)
    made = found.as_json(77)
    assert made["held"] is True
    assert made["samples"] == {"search": 10**13, "verdict": 77}
    assert [sorted(move) for move in made["raised"]] == [
        ["bytes_added", "from_activation_bits", "from_bits", "node", "op", "own_db", "sqnr_out_db", "to_bits"]
    ] * 2
    assert made["tried"][0] == {
        "raised_to_8": 0, "raised_to_float": 0, "top1_agreement": 1 - 960 / 10_000, "drop_points": None, "held": False,
    }  # fmt: skip
    json.loads(report_json(made))


@pytest.mark.parametrize(
    ("samples", "raised"),
    [
        # Of 10,000: a raised leaves 360 wrong, both 60; 365 are allowed.
        pytest.param(10**13, 1, id="many-samples"),
        pytest.param(10_000, 2, id="none-to-spare-with-one"),  # the standard error is 19
        pytest.param(100, 2, id="with-both"),  # 188
        pytest.param(30, 2, id="not-to-be-had"),  # 342
    ],
)
def test_the_choice_keeps_a_standard_error_to_spare(samples: int, raised: int) -> None:
    found = run(Model({"a": 40, "b": 20}, samples=samples), 1 - 365 / 10_000)
    assert found.held
    assert len(found.moves) == raised


@pytest.mark.parametrize("why", ["few", "single"])
def test_too_few_samples_raise_nothing(why: str) -> None:
    model = Model({"a": 40}, samples=LEAST_SAMPLES - 1 if why == "few" else 100)
    found = search(model.compile_with, Limits(min_agreement=1.0), 4, may_raise=why == "few")
    assert (found.enough, found.held, found.moves, model.calls) == (False, False, [], [()])
    assert found.as_json(9)["samples"] == {"search": 0, "verdict": 9}


def test_no_layer_becomes_float_in_a_file_without_floats() -> None:
    model = Model({"a": 40, "b": 20})
    found = search(model.compile_with, Limits(min_agreement=1.0), 4, to_float=False)
    assert not found.held and {move.to_bits for move in found.moves} == {8}
    assert all(bits == 8 for call in model.calls for _, bits in call)


def test_a_model_without_integer_layers_has_nothing_to_raise() -> None:
    found = search(lambda raised: Trial(raised, accuracy(0.5), None, 0), Limits(min_agreement=0.9), 8)
    assert (found.held, found.moves, len(found.tried)) == (False, [], 1)


# ---- limits ----


@pytest.mark.parametrize(
    ("limits", "agreement", "drop", "holds"),
    [
        pytest.param(Limits(max_drop=1.0), None, 1.0, True, id="drop"),
        pytest.param(Limits(max_drop=1.0), None, 1.1, False, id="drop-broken"),
        pytest.param(Limits(min_agreement=0.9), 0.9, None, True, id="agreement"),
        pytest.param(Limits(min_agreement=0.9), 0.89, None, False, id="agreement-broken"),
        pytest.param(Limits(1.0, 0.9), 0.95, 2.0, False, id="both-needed"),
        pytest.param(Limits(1.0, 0.9), 0.95, 0.5, True, id="both"),
    ],
)
def test_limits_hold(limits: Limits, agreement: float | None, drop: float | None, holds: bool) -> None:
    assert limits.given
    assert limits.holds(accuracy(agreement, drop)) is holds


def test_standard_errors_to_spare() -> None:
    share = accuracy(0.92, samples=400)  # the standard error at .9 is .015
    assert [Limits(min_agreement=0.9).holds(share, spare) for spare in (0, 1.33, 1.34)] == [True, True, False]
    drop = Accuracy(400, 20.0, 0.9, 0.9, "top1", 0.9, 0.9, 1.0, 10, 6, False)  # sqrt(16 - 16 / 400) / 4 = .99875 points
    assert [Limits(max_drop=2.0).holds(drop, spare) for spare in (0, 1.001, 1.002)] == [True, True, False]


def test_limits_that_the_samples_do_not_tell() -> None:
    with pytest.raises(DataError, match="labels"):
        Limits(max_drop=1.0).holds(accuracy(0.9))
    with pytest.raises(DataError, match="no output of this model looks like classes"):
        Limits(min_agreement=0.9).holds(accuracy(None, 0.0))
    assert not Limits().given
    assert str(Limits(1.5, 0.99)) == "--max-drop 1.5 --min-agreement 0.99"


def test_samples_that_cannot_decide_break_a_limit_unless_told_otherwise() -> None:
    few = accuracy(1.0, 0.0, samples=5)
    for limits in (Limits(max_drop=1.0), Limits(min_agreement=0.99)):
        found, broken = limits.verdicts(few)
        assert next(iter(found.values()))["outcome"] == "inconclusive"
        assert broken is not None and broken.startswith(str(limits)) and "too few" in broken
        assert replace(limits, on_inconclusive="pass").verdicts(few)[1] is None
    assert replace(Limits(min_agreement=0.99), on_inconclusive="pass").verdicts(accuracy(0.5, samples=1000))[1] is not None
    with pytest.raises(InputError, match="--on-inconclusive maybe: choose one of fail, pass"):
        Limits(on_inconclusive="maybe")


def test_both_verdicts() -> None:
    found, broken = Limits(1.0, 0.99).verdicts(accuracy(0.5, 0.0, samples=1000))
    assert found["verdict"]["outcome"] == "pass"
    assert found["agreement_verdict"]["outcome"] == "fail"
    assert broken is not None and broken.startswith("--min-agreement 0.99: agreement 0.5000")


# ---- settings ----


def test_widths_of_raised_layers() -> None:
    settings = Settings(bits=4, raised=(("a", 8), ("b", 32)), exclude=("c*",))
    assert [settings.bits_for(n) for n in "abd"] == [8, 32, 4]
    assert [settings.top_for(n) for n in "ad"] == [127, 7]
    assert [settings.excluded(n) for n in ("a", "b", "cc", "d")] == [False, True, True, False]
