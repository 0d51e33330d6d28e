"""The arithmetic of a step by formula against torch's own count of the products that a forward pass makes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cpfold_train.model import flops
from cpfold_train.model.cofolding import CoFolding
from cpfold_train.model.config import MemoryConfig, MSAConfig, PairformerConfig
from cpfold_train.training.reporting.stopwatch import Stopwatch
from tests.test_parity import draws, features
from tests.test_precision import SMALL

CONFIG = replace(SMALL, msa=MSAConfig(8, 2, 0.15, 0.25, 8, 2), pairformer=PairformerConfig(3, 4, 0.25, 4, 3))
MULTIPLICITY, RECYCLING, SAMPLING_STEPS, SAMPLES = 3, 2, 2, 2


def counted(cp) -> tuple[flops.SampleSizes, float, tuple[float, float]]:
    """Operations of the structure's forward pass, and of sampled structures and their confidence, of one complex."""
    model = CoFolding(CONFIG, MemoryConfig()).double().eval()
    feats = {name: x.double() if x.dtype == torch.float32 else x for name, x in features(cp.grid).items()}
    representative = torch.from_numpy(feats["token_atom_start"][:, :-1].clip(max=100))
    feats |= {"coords": feats["ref_pos"], "token_to_rep_atom": representative}
    b, s, n = feats["msa"].shape
    sizes = flops.SampleSizes(b, n, s, feats["ref_pos"].shape[1], feats["template_mask"].shape[1])
    with torch.no_grad():
        with FlopCounterMode(display=False) as forward:
            out = model(feats, cp, recycling_steps=RECYCLING, multiplicity=MULTIPLICITY, draws=draws())
        with FlopCounterMode(display=False) as sampling:
            sampled = {"sampling_steps": SAMPLING_STEPS, "samples": SAMPLES}
            coords = model.sample(out, feats, cp, draws=draws(), **sampled)
        with FlopCounterMode(display=False) as confidence:
            model.predict_confidence(out, coords, feats, cp, None)
    return sizes, forward.get_total_flops(), (sampling.get_total_flops(), confidence.get_total_flops())


def test_formula_counts_what_the_model_multiplies(ranks):
    ((sizes, forward, (sampling, confidence)),) = ranks.run(counted, 1, 1)
    cycle = sizes.batch * flops.trunk_flops(CONFIG, sizes)
    without = flops.Passes(RECYCLING, MULTIPLICITY, SAMPLING_STEPS, SAMPLES, confidence=False)
    # The last cycle is trained, forward and backward; the others run forward only.
    expected = 3 * (forward - RECYCLING * cycle) + RECYCLING * cycle
    assert flops.step_flops(CONFIG, sizes, without) == pytest.approx(expected, rel=1e-3)
    both = flops.step_flops(CONFIG, sizes, without._replace(confidence=True))
    more = both - flops.step_flops(CONFIG, sizes, without)
    assert more == pytest.approx(sampling + 3 * confidence, rel=2e-3)


class Event:
    """A CUDA event whose device passes it when :attr:`passed` says so; a second between each two."""

    clock, passed = 0.0, False

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.clock += 1000
        self.at = Event.clock

    def query(self) -> bool:
        return Event.passed

    def synchronize(self) -> None:
        Event.passed = True

    def elapsed_time(self, other: Event) -> float:
        return other.at - self.at


def test_stopwatch_on_a_gpu_waits_only_when_it_is_read(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = Stopwatch(torch.device("cuda", 0))
    for _ in range(3):
        watch.start()
        watch.stop()
    assert not Event.passed and len(watch._pairs) == 3
    assert watch.seconds() == 3
    # What the device has passed is let go of at the next start.
    watch.start()
    watch.stop()
    watch.start()
    assert watch._pairs == []
    watch.stop()
    assert watch.seconds() == 5
