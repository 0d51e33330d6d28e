"""The diffusion process around the diffusion module: noise levels, preconditioning, training and sampling.

Karras et al., "Elucidating the design space of diffusion-based generative models", NeurIPS 2022; AlphaFold 3,
Algorithms 18 and 19; Boltz-2's names and arithmetic (AtomDiffusion in ``boltz/model/modules/diffusionv2.py``).

Every rank has its shard of the atoms. What is drawn is drawn by the global index of the atom, for each sample from a
stream of its own.

The process knows no mixed precision: a product under autocast would round coordinates of 100 Angstrom to half an
Angstrom. So :meth:`AtomDiffusion.forward` and :meth:`AtomDiffusion.sample` are regions without it from end to end.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from cpfold_train.model.config import AtomConfig, DiffusionConfig, MemoryConfig
from cpfold_train.model.diffusion import DiffusionModule
from cpfold_train.model.diffusion_conditioning import Conditioning
from cpfold_train.model.layers import without_autocast
from cpfold_train.ops.points import turned
from cpfold_train.ops.quaternions import rotations
from cpfold_train.ops.recompute import recompute
from cpfold_train.ops.rigid_align import weighted_rigid_align
from cpfold_train.parallel.context import ContextParallel
from cpfold_train.parallel.grid import split
from cpfold_train.parallel.random import RandomStreams
from cpfold_train.parallel.redistribute import all_reduce

OP = "diffusion"


class AtomDiffusion(nn.Module):
    """Structures from noise.

    Args:
        token_s: width of the single representation.
        atoms: sizes.
        config: sizes, and the process.
        memory: what is kept for the backward pass.
    """

    def __init__(self, token_s: int, atoms: AtomConfig, config: DiffusionConfig, memory: MemoryConfig) -> None:
        super().__init__()
        self.config, self.memory = config, memory
        self.score_model = DiffusionModule(token_s, atoms, config, memory)

    def forward(
        self,
        s_inputs: Tensor,
        s_trunk: Tensor,
        feats: dict[str, Tensor],
        conditioning: Conditioning,
        multiplicity: int,
        draws: RandomStreams,
        cp: ContextParallel,
    ) -> dict[str, Tensor]:
        """Add noise to the true structure and take it away again, in M = ``multiplicity`` samples of each complex.

        Args:
            s_inputs, s_trunk: (B, N, token_s), the same on all ranks.
            feats: those of :class:`~cpfold_train.model.diffusion.DiffusionModule`, and ``coords`` (B, A/P, 3) in
                Angstrom.
            conditioning: see there.
            multiplicity: M.
            draws: noise levels, noise and positions in space.
            cp: the running grid.

        Returns:
            ``denoised_atom_coords`` (B*M, A/P, 3), in Angstrom; ``aligned_true_atom_coords`` (B*M, A/P, 3), the true
            ones as each sample was turned and shifted; ``sigmas`` (B*M,), the noise levels, the same on all ranks.
        """
        with without_autocast(feats["coords"]):
            samples, config = draws.copies(multiplicity), self.config
            coords = feats["coords"].repeat_interleave(multiplicity, 0)
            mask = feats["atom_pad_mask"].repeat_interleave(multiplicity, 0)
            level = samples.at("sigma").normal(0, 1)[:, 0].to(coords.dtype)
            sigmas = config.sigma_data * (config.P_mean + config.P_std * level).exp()
            coords = randomly_placed(coords, mask, *placements(samples, coords.dtype), cp)
            noisy = coords + sigmas[:, None, None] * noise(coords, samples.at("noise"), cp)
            denoised = self.denoise(noisy, sigmas, s_inputs, s_trunk, feats, conditioning, cp)
            return {"denoised_atom_coords": denoised, "aligned_true_atom_coords": coords, "sigmas": sigmas}

    def denoise(
        self,
        noisy: Tensor,
        sigmas: Tensor,
        s_inputs: Tensor,
        s_trunk: Tensor,
        feats: dict[str, Tensor],
        conditioning: Conditioning,
        cp: ContextParallel,
    ) -> Tensor:
        """Coordinates (B*M, A/P, 3) at noise levels (B*M,) to the prediction of the true ones.

        Where not all samples go through the module together, each group of them is computed again in the backward pass,
        so that only what one group needs is kept at a time.
        """
        noisy, sigmas = (x.unflatten(0, (len(s_trunk), -1)) for x in (noisy, sigmas))
        at_once = self.memory.samples_at_once or noisy.shape[1]

        def group(noisy: Tensor, sigmas: Tensor) -> Tensor:
            noisy, sigmas, samples = noisy.flatten(0, 1), sigmas.flatten(), noisy.shape[:2]
            sigma, data = sigmas[:, None, None], self.config.sigma_data
            total = (sigma**2 + data**2).sqrt()
            times = (sigmas / data).log() / 4
            update = self.score_model(s_inputs, s_trunk, noisy / total, times, feats, conditioning, cp)
            denoised = (data / total) ** 2 * noisy + sigma * data / total * update
            return denoised.unflatten(0, samples)

        run = group if at_once >= noisy.shape[1] else partial(recompute, group)
        parts = [run(*some) for some in zip(noisy.split(at_once, 1), sigmas.split(at_once, 1))]
        return torch.cat(parts, 1).flatten(0, 1)

    @torch.no_grad()
    def sample(
        self,
        s_inputs: Tensor,
        s_trunk: Tensor,
        feats: dict[str, Tensor],
        conditioning: Conditioning,
        num_sampling_steps: int,
        multiplicity: int,
        draws: RandomStreams,
        cp: ContextParallel,
    ) -> Tensor:
        """Structures from noise, (B*M, A/P, 3) in Angstrom, each somewhere in space.

        Before each step the structure is turned, shifted and made a little noisier, and then laid onto the prediction.

        Args:
            num_sampling_steps: noise levels, at least two; one step leads from each to the next, the last one to zero.
            draws: noise and positions in space.
            s_inputs, s_trunk, feats, conditioning, multiplicity, cp: as for :meth:`forward`; ``coords`` is not read.
        """
        with without_autocast(feats["atom_pad_mask"]):
            config, samples = self.config, draws.copies(multiplicity)
            mask = feats["atom_pad_mask"].repeat_interleave(multiplicity, 0)
            # Without gradients there is room for the biases of all layers, which each step would project again.
            biases = [conditioning.token_trans_bias(i) for i in range(config.token_transformer_depth)]
            conditioning = conditioning._replace(token_trans_bias=biases.__getitem__)

            levels = noise_levels(config, num_sampling_steps)
            # Of all steps at once, but for the noise itself, which is as large as the structures.
            steps = samples.each("step", last=range(num_sampling_steps))
            # As exact as the structures become, which start like the mask and go on like the model.
            turns, shifts = placements(steps, torch.promote_types(mask.dtype, s_trunk.dtype))
            noises = steps.at("noise").keys
            coords = levels[0] * noise(mask.new_empty(*mask.shape, 3), samples.at("start").at("noise"), cp)
            for step, (before, after) in enumerate(pairwise(levels)):
                raised = before * (1 + (config.gamma_0 if after > config.gamma_min else 0))
                coords = randomly_placed(coords, mask, turns[step], shifts[step], cp)
                amplitude = config.noise_scale * (raised**2 - before**2) ** 0.5
                noisy = coords + amplitude * noise(coords, RandomStreams(noises[step]), cp)
                sigmas = coords.new_full(coords.shape[:1], raised)
                denoised = self.denoise(noisy, sigmas, s_inputs, s_trunk, feats, conditioning, cp)
                noisy = weighted_rigid_align(noisy, denoised, mask, mask, cp)
                coords = noisy + config.step_scale * (after - raised) / raised * (noisy - denoised)
            return coords


def noise_levels(config: DiffusionConfig, num_sampling_steps: int) -> list[float]:
    """Noise levels of a sampling in Angstrom, from the highest to zero: one more than there are steps."""
    first, last = config.sigma_max ** (1 / config.rho), config.sigma_min ** (1 / config.rho)
    parts = (step / (num_sampling_steps - 1) for step in range(num_sampling_steps))
    return [config.sigma_data * (first + part * (last - first)) ** config.rho for part in parts] + [0.0]


def noise(coords: Tensor, draws: RandomStreams, cp: ContextParallel) -> Tensor:
    """Standard normal deviates like the shard ``coords`` (B, A/P, 3), one stream of ``draws`` a sample."""
    first, stop = split(coords.shape[1] * cp.all.size, cp.all.size)[cp.all.index]
    return draws.normal(3 * first, 3 * stop).unflatten(1, (-1, 3)).to(coords.dtype)


def placements(draws: RandomStreams, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random rotations (..., B, 3, 3) and shifts (..., B, 3), for streams (..., B)."""
    turns = rotations(draws.at("rotation").normal(0, 4).to(dtype))
    return turns, draws.at("translation").normal(0, 3).to(dtype)


def randomly_placed(coords: Tensor, mask: Tensor, turn: Tensor, shift: Tensor, cp: ContextParallel) -> Tensor:
    """Coordinates, their centre moved to the origin, turned and shifted (AlphaFold 3, Algorithm 19).

    Args:
        coords: (B, A/P, 3) this rank's shard, in Angstrom.
        mask: (B, A/P), 1 for the atoms of which the centre is taken.
        turn, shift: of :func:`placements`.
        cp: the running grid.
    """
    sums = torch.cat([(coords * mask[..., None]).sum(1), mask.sum(1, keepdim=True)], 1)
    middle, count = all_reduce(sums, cp, cp.all, OP).split([3, 1], 1)
    turn, shift = turn.to(coords.dtype), shift.to(coords.dtype)
    return turned(coords - (middle / count)[:, None], turn) + shift[:, None]
