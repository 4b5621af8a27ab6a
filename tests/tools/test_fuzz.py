"""The differential fuzz on fixed seeds, and a test that it finds planted faults."""

import sys
from collections import Counter

import fuzz
import pytest
import torch
from fuzz_cases import TURNS
from fuzz_mutations import MUTATIONS

import fastbert
from fastbert import fusion
from fastbert.ops import eager

ROUNDS = 4

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compares on the CPU, kernels in the interpreter")


def seeds_of(mutation: str | None) -> list[int]:
    turns = [turn for turn, name in enumerate(TURNS) if name == mutation]
    return [turn + number * len(TURNS) for number in range(ROUNDS) for turn in turns]


@pytest.mark.parametrize("mutation", [None, *MUTATIONS])
def test_fixed_seeds(mutation):
    outcomes = Counter(fuzz.check(seed).partition(":")[0] for seed in seeds_of(mutation))
    print(outcomes)
    assert outcomes["compared"] + outcomes["unsupported"] >= ROUNDS / 2


def plant_activation(monkeypatch):
    monkeypatch.setitem(fusion.FUSED_ACTIVATIONS, torch.nn.ReLU, "gelu")


def plant_gradient(monkeypatch):
    linear = eager.F.linear
    monkeypatch.setattr(eager.F, "linear", lambda x, *parameters: linear(x.detach(), *parameters))


def plant_restore(monkeypatch):
    monkeypatch.setattr(fastbert, "restore", lambda model: model)


def plant_error(monkeypatch):
    def optimize(model, dtype=None):
        raise ValueError("not today")

    monkeypatch.setattr(fastbert, "optimize", optimize)


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (plant_activation, "output .* error .*allowed"),
        (plant_gradient, "gradient"),
        (plant_restore, "these differ after restore"),
        (plant_error, "ValueError: not today"),
    ],
)
def test_planted_faults_are_found(plant, message, monkeypatch):
    plant(monkeypatch)
    with pytest.raises(fuzz.Fault, match=message):
        for seed in seeds_of(None):
            fuzz.check(seed)


def test_a_fault_tells_how_to_repeat_it(monkeypatch, capsys):
    def run(case):
        raise fuzz.Fault("another number")

    monkeypatch.setattr(fuzz, "run", run)
    for arguments in (["--case", "7"], ["--seconds", "0", "--seed", "7"]):
        monkeypatch.setattr(sys, "argv", ["fuzz.py", *arguments])
        assert fuzz.main() == 1
        printed = capsys.readouterr().out
        assert "another number" in printed
        assert "again: python tests/tools/fuzz.py --case 7" in printed
        assert "seeds 7 to 7: 1 FAULT" in printed
