"""A deep model from two shallow ones.

The blocks of a stack are alike. So of everything counted in a step, bytes held at the peak of each phase as
well as work, each block adds the same to what its part of the model has: two steps, with three and with four blocks in
each stack, give the step with any number of them. That this is the step that runs in full is a test.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from cpfold_train.config.schema import TrainConfig
from cpfold_train.plan.step import Trace
from cpfold_train.simulate.trace import STEP, Moment, Phase
from cpfold_train.simulate.work_counter import WorkCounter, WorkCounters, combined

FEWEST = 3
"""Groups of blocks in the shallower of the two models: with two, none comes back from the host ahead of the block at
work (``memory.offload``), so the third would add a tile that the others do not."""
FEWEST_TEMPLATES = 2
"""With one template there is no sum of several."""
STACKS = ("trunk", "structure_module", "confidence_module")
"""The parts of the model that a stack is in; the trunk's MSA module stays complete."""
TEMPLATES = "trunk.template_module"
"""The part that is the same for each template."""


def shallow(config: TrainConfig, groups: int) -> TrainConfig:
    """The same run with no more than so many groups of blocks in the Pairformers, and layers in the transformer of
    tokens; and with two templates at most, or three in the deeper model."""
    blocks, model = groups * config.memory.blocks_at_once, config.model
    pairformer, of_confidence = replace(model.pairformer, num_blocks=blocks), model.confidence.pairformer
    of_confidence = replace(of_confidence, num_blocks=min(blocks, of_confidence.num_blocks))
    confidence = replace(model.confidence, pairformer=of_confidence)
    depth = min(groups, model.diffusion.token_transformer_depth)
    diffusion = replace(model.diffusion, token_transformer_depth=depth)
    model = replace(model, pairformer=pairformer, confidence=confidence, diffusion=diffusion)
    templates = min(config.data.max_templates, groups - FEWEST + FEWEST_TEMPLATES)
    return replace(config, model=model, data=replace(config.data, max_templates=templates))


def smallest(config: TrainConfig) -> TrainConfig:
    """The same run with one group of blocks in each stack, one template, two steps of sampling and no recycling. Its
    step holds no more than that of the whole model, but for weights."""
    least, model = shallow(config, 1), config.model
    msa = replace(model.msa, msa_blocks=min(1, model.msa.msa_blocks))
    return replace(
        least,
        model=replace(least.model, msa=msa, recycling_steps=0),
        data=replace(config.data, max_templates=min(1, config.data.max_templates)),
        diffusion=replace(config.diffusion, sampling_steps=min(2, config.diffusion.sampling_steps)),
    )


def groups_of(config: TrainConfig) -> dict[str, int] | None:
    """Groups of blocks of each stack, or None where the model has to run in full: it is shallow, blocks do not divide
    into groups, or not all of them are trained alike."""
    model, at_once, finetune = config.model, config.memory.blocks_at_once, config.finetune
    if finetune.freeze or finetune.train or finetune.lora.patterns:
        return None
    blocks = (model.pairformer.num_blocks, model.confidence.pairformer.num_blocks)
    if any(n % at_once for n in blocks) or blocks[0] // at_once <= 2 * FEWEST + 1:
        return None
    counts = blocks[0] // at_once, model.diffusion.token_transformer_depth, blocks[1] // at_once
    return dict(zip(STACKS, counts))


def extrapolated(
    shallower: Trace, deeper: Trace, groups: dict[str, int], templates: int, known: dict[str, float]
) -> Trace:
    """The step with ``groups`` groups of blocks and so many templates, from those with ``FEWEST`` and one more.

    Args:
        known: bytes that weights and features of the whole model take, by category, where no block makes them.
    """

    def steps(module: str) -> int:
        if module.startswith(TEMPLATES):
            return max(FEWEST_TEMPLATES, templates) - FEWEST_TEMPLATES
        # What FSDP gathers for the whole of a step has a part for each layer of the transformer of tokens.
        stack = "structure_module" if module == STEP else module.partition(".")[0]
        # A stack that is no deeper than the shallow ones is the same in both.
        return max(0, groups[stack] - FEWEST) if stack in groups else 1

    def moment(a: Moment, b: Moment) -> Moment:
        held = {key: a.get(key, 0) + steps(key[1]) * (b.get(key, 0) - a.get(key, 0)) for key in a | b}
        return {key: size for key, size in with_known(held, known).items() if size}

    def counters(a: WorkCounters, b: WorkCounters) -> WorkCounters:
        added = combined(b, a, -1)
        return combined(a, {part: WorkCounter().plus(work, steps(part.module)) for part, work in added.items()}, 1)

    moments: dict[Phase, Moment] = {
        phase: moment(shallower.moments[phase], deeper.moments[phase])
        for phase in shallower.moments
        if phase in deeper.moments
    }
    return replace(
        shallower,
        moments=moments,
        counters=counters(shallower.counters, deeper.counters),
        cycle=counters(shallower.cycle, deeper.cycle),
        sampling_step=counters(shallower.sampling_step, deeper.sampling_step),
    )


def with_known(held: Moment, known: dict[str, float]) -> Moment:
    """A moment with what weights and features of the whole model take instead of those of a shallow one."""
    return held | {(name, STEP): size for name, size in known.items() if (name, STEP) in held}


def by_category(moment: Moment) -> Counter[str]:
    """Bytes by what they are for."""
    return _summed(moment, 0)


def by_module(moment: Moment) -> Counter[str]:
    """Bytes by the module that made them."""
    return _summed(moment, 1)


def _summed(moment: Moment, which: int) -> Counter[str]:
    found: Counter[str] = Counter()
    for key, size in moment.items():
        found[key[which]] += size
    return found
