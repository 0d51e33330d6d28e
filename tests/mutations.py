"""Changes of the model, the losses, training and the configuration, each of which a test of the default suite catches.

    python tests/mutations.py [--only NAME ...] [--list] [--why]

Every change is made in a copy of the working tree, and the test that is named beside it is run there: it has to fail.
Before that, all these tests are run in the copy as it is: they have to pass. Run it after a test has been moved or made
slow, or where the code that a change replaces has been rewritten. All of them take about three minutes of one core.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

# Before torch and Triton are imported, which read it.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TRITON_INTERPRET"] = "1"

import hydra  # noqa: F401
import lightning.pytorch  # noqa: F401
import pytest

ROOT = Path(__file__).parents[1]
GOLDEN = "tests/test_golden.py::test_training_step_equals_the_golden_values[1x1]"
MASKS = "tests/test_dropout.py::test_every_update_of_a_training_step_has_a_mask_of_its_own"
SHIPPED = "tests/test_config.py::test_shipped_values"


class Mutation(NamedTuple):
    """A change: in ``file``, which is below cpfold_train or conf, ``old`` becomes ``new``; ``test`` fails then."""

    name: str
    file: str
    old: str
    new: str
    test: str


TABLE = [
    # What a training step draws.
    Mutation(
        "no dropout in training",
        "model/cofolding.py",
        "draws if self.training else None",
        "None",
        MASKS,
    ),
    Mutation(
        "dropout in validation",
        "model/cofolding.py",
        "draws if self.training else None",
        "draws",
        MASKS,
    ),
    Mutation(
        "no dropout in the confidence module",
        "training/module.py",
        "predict_confidence(out, coords, batch, self.cp, draws)",
        "predict_confidence(out, coords, batch, self.cp, None)",
        MASKS,
    ),
    Mutation(
        "dropout equal for all structures of the confidence module",
        "model/confidence.py",
        'draws.at("confidence_module").copies(multiplicity)',
        'type(draws)(draws.at("confidence_module").keys.repeat_interleave(multiplicity))',
        MASKS,
    ),
    Mutation(
        "dropout of rows for columns",
        "model/pair_stack.py",
        "attend = staticmethod(attention.triangle_attention_ending)",
        "attend = staticmethod(lambda z, mask, w, cp, residual, f: z + "
        "attention.triangle_attention_ending(z, mask, w, cp) * (1 if f is None else f[:, :, None, None]))",
        "tests/test_dropout.py::test_whole_rows_are_dropped_and_columns_around_the_ending_node",
    ),
    Mutation(
        "dropout of columns for rows",
        "model/pair_stack.py",
        "attend = staticmethod(attention.triangle_attention_starting)",
        "attend = staticmethod(lambda z, mask, w, cp, residual, f: z + "
        "attention.triangle_attention_starting(z, mask, w, cp) * (1 if f is None else f[:, None, :, None]))",
        "tests/test_dropout.py::test_whole_rows_are_dropped_and_columns_around_the_ending_node",
    ),
    Mutation(
        "dropout without its scale",
        "ops/dropout.py",
        ".float() / (1 - p)",
        ".float()",
        "tests/test_dropout.py::test_a_share_p_is_dropped_and_the_mean_stays",
    ),
    Mutation(
        "dropout keeps with probability p",
        "ops/dropout.py",
        ">= p)",
        "< p)",
        "tests/test_dropout.py::test_a_share_p_is_dropped_and_the_mean_stays",
    ),
    Mutation(
        "dropout equal in all blocks of the Pairformer",
        "model/pairformer.py",
        'draws.each("pairformer", last=range(len(self.layers)))',
        'draws.each("pairformer", last=[0] * len(self.layers))',
        MASKS,
    ),
    Mutation(
        "dropout equal in all blocks of the MSA module",
        "model/msa.py",
        'draws.each("msa_module", last=range(len(self.layers)))',
        'draws.each("msa_module", last=[0] * len(self.layers))',
        MASKS,
    ),
    Mutation(
        "dropout equal at all updates of a block",
        "model/pair_stack.py",
        "draws.each(last=SITES)",
        "draws.each(last=SITES[:1] * 4)",
        MASKS,
    ),
    Mutation(
        "dropout equal in all cycles",
        "model/trunk.py",
        'draws.at("recycling", cycle)',
        'draws.at("recycling", 0)',
        MASKS,
    ),
    Mutation(
        "dropout equal in all templates",
        "model/templates.py",
        'draws.each("template_module", last=range(count))',
        'draws.each("template_module", last=[0] * count)',
        MASKS,
    ),
    Mutation(
        "dropout of the MSA by token",
        "model/msa.py",
        "return m + drop_rows(update, msa_dropout)",
        "return m + update * (1 if dropout is None else dropout[0, :, None, :, None])",
        "tests/test_dropout.py::test_whole_sequences_of_the_alignment_are_dropped",
    ),
    Mutation(
        "recycling never draws the most",
        "training/module.py",
        "integers(0, self._recycling + 1)",
        "integers(0, self._recycling)",
        "tests/test_training.py::test_recycling_is_drawn_evenly_from_none_to_the_most",
    ),
    Mutation(
        "recycling equal in each step",
        "training/module.py",
        "[self._seed, self.global_step]",
        "[self._seed, 0]",
        "tests/test_training.py::test_recycling_is_drawn_evenly_from_none_to_the_most",
    ),
    Mutation(
        "depth of the alignment never full",
        "data/stream/batch.py",
        "integers(1, max_msa_rows + 1)",
        "integers(1, max_msa_rows)",
        "tests/test_data_features.py::test_depth_of_the_alignment_is_drawn_evenly_from_the_query_alone_to_the_most",
    ),
    Mutation(
        "all replicas read the same samples",
        "data/stream/loader.py",
        " * dp + dp_index",
        " * dp",
        "tests/test_data_loader.py::test_replicas_share_out_the_samples",
    ),
    # The moving average.
    Mutation(
        "moving average updated each micro-batch",
        "training/ema.py",
        "if trainer.global_step == self._latest_step:",
        "if False:",
        "tests/test_training.py::test_average_takes_a_step_in_once_however_many_micro_batches_it_has",
    ),
    Mutation(
        "moving average left in place after validation",
        "training/ema.py",
        "own_part(parameter).copy_(self._under_training[name])",
        "pass",
        "tests/test_training.py::test_validation_has_the_average_and_training_goes_on_from_its_own_weights",
    ),
    Mutation(
        "validation without the moving average",
        "training/ema.py",
        "own_part(parameter).copy_(own_part(self._average[name]))",
        "pass",
        "tests/test_training.py::test_validation_has_the_average_and_training_goes_on_from_its_own_weights",
    ),
    # The truth that structures are compared with.
    Mutation(
        "one round of symmetry",
        "losses/symmetry.py",
        "ROUNDS = 3",
        "ROUNDS = 1",
        "tests/test_symmetry.py::test_symmetries_of_a_residue_are_combined",
    ),
    # Shipped values.
    Mutation(
        "gradient clipping", "conf/trainer/default.yaml", "gradient_clip_val: 10.0", "gradient_clip_val: 1.0", SHIPPED
    ),
    Mutation("moving average of a fine-tuning", "conf/optim/af3.yaml", "ema_decay: 0.999", "ema_decay: 0.99", SHIPPED),
    Mutation(
        "moving average of the quickstart", "conf/optim/quickstart.yaml", "ema_decay: 0.99", "ema_decay: 0.999", SHIPPED
    ),
    Mutation("P_std", "conf/model/boltz2.yaml", "P_std: 1.5", "P_std: 1.2", SHIPPED),
    Mutation("P_std of the quickstart", "conf/model/quickstart.yaml", "P_std: 1.5", "P_std: 1.2", SHIPPED),
    Mutation("weight of the diffusion loss", "conf/train.yaml", "  diffusion: 4.0", "  diffusion: 1.0", SHIPPED),
    Mutation("weight of the distogram loss", "conf/train.yaml", "  distogram: 0.03", "  distogram: 0.3", SHIPPED),
    Mutation(
        "weight of the aligned errors",
        "conf/recipe/finetune_boltz2_large_crop.yaml",
        "pae: 1.0e-4",
        "pae: 1.0e-3",
        SHIPPED,
    ),
    # Losses.
    Mutation("sigma weighting", "losses/diffusion.py", "(sigmas * sigma_data)", "(sigmas + sigma_data)", GOLDEN),
    Mutation(
        "sigma shared by the samples",
        "model/edm.py",
        'samples.at("sigma").normal(0, 1)[:, 0]',
        'draws.at("sigma").normal(0, 1)[:, 0].repeat_interleave(multiplicity)',
        GOLDEN,
    ),
    Mutation("ligand weight", "losses/diffusion.py", "ligand_loss_weight * (", "nucleotide_loss_weight * (", GOLDEN),
    Mutation("nucleotide weight", "losses/diffusion.py", "nucleotide_loss_weight * nucleic", "0 * nucleic", GOLDEN),
    Mutation(
        "alignment without the resolved mask",
        "losses/diffusion.py",
        "pred.detach(), weights, resolved, cp)",
        "pred.detach(), weights, resolved * 0 + 1, cp)",
        GOLDEN,
    ),
    Mutation(
        "distogram loss with the diagonal",
        "losses/distogram.py",
        " * (position[slice(*rows), None] != position[slice(*cols)])",
        "",
        GOLDEN,
    ),
    Mutation(
        "distogram not symmetric",
        "model/trunk.py",
        "self.distogram(z + transpose(z, cp))",
        "self.distogram(z + z)",
        GOLDEN,
    ),
    Mutation("pLDDT cut-off of nucleic acids", "losses/confidence.py", "30.0, 15.0)", "15.0, 15.0)", GOLDEN),
    Mutation("pLDDT cut-off of all others", "losses/confidence.py", "30.0, 15.0)", "30.0, 30.0)", GOLDEN),
    Mutation(
        "losses of structures summed over samples",
        "losses/total.py",
        "sigma_data).view(samples).mean(1)",
        "sigma_data).view(samples).sum(1)",
        GOLDEN,
    ),
    Mutation(
        "losses of confidences summed over samples",
        "losses/total.py",
        "loss.view(samples).mean(1) for",
        "loss.view(samples).sum(1) for",
        GOLDEN,
    ),
    Mutation(
        "weights of the losses mixed",
        "training/module.py",
        "= asdict(loss)\n",
        "= dict(zip(asdict(loss), reversed(asdict(loss).values())))\n",
        GOLDEN,
    ),
    # The model.
    Mutation(
        "gradient through all cycles", "model/trunk.py", "with_grad and cycle == recycling_steps)", "with_grad)", GOLDEN
    ),
    Mutation("z not doubled", "model/trunk.py", "z = z + self.msa_module(", "z = self.msa_module(", GOLDEN),
    Mutation(
        "confidence not detached",
        "model/cofolding.py",
        "(trunk[name].detach() for name",
        "(trunk[name] for name",
        GOLDEN,
    ),
    Mutation(
        "templates summed",
        "model/templates.py",
        "given / given.sum(1, keepdim=True).clamp(min=1)",
        "given",
        GOLDEN,
    ),
    # The diffusion process.
    Mutation("sign of the noise's mean", "model/edm.py", "config.P_mean + ", "-config.P_mean + ", GOLDEN),
    Mutation(
        "gamma of the level before",
        "model/edm.py",
        "if after > config.gamma_min",
        "if before > config.gamma_min",
        GOLDEN,
    ),
    Mutation(
        "sampling without alignment",
        "model/edm.py",
        "weighted_rigid_align(noisy, denoised, mask, mask, cp)",
        "noisy",
        GOLDEN,
    ),
]


def main() -> int:
    """Run the table; 0 where every test catches its change."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of changes, or parts of them")
    parser.add_argument("--list", action="store_true", help="print the table and run nothing")
    parser.add_argument("--why", action="store_true", help="print what each test says")
    args = parser.parse_args()
    chosen = [row for row in TABLE if not args.only or any(part in row.name for part in args.only)]
    if not chosen:
        parser.error("no change has such a name: type --list to see all")
    if args.list:
        for row in chosen:
            print(f"{row.name:55}  {row.test}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        copy_tree(copy)
        if told := run(copy, sorted({row.test for row in chosen})):
            print(f"error: tests fail without any change:\n{told}")
            return 1
        answers = []
        for number, row in enumerate(chosen, start=1):
            began = time.perf_counter()
            answer, told = tried(copy, row)
            answers.append(answer)
            seconds = time.perf_counter() - began
            print(f"{number:3}/{len(chosen)}  {answer:9}  {row.name:55}  {row.test}  {seconds:.0f} s", flush=True)
            if args.why:
                print(*(f"        {line}" for line in told.splitlines() if line.startswith("E ")), sep="\n")
    print(f"{answers.count('caught')} of {len(chosen)} changes were caught")
    return int(answers.count("caught") != len(chosen))


def copy_tree(target: Path) -> None:
    """What the tests need of the project; the data is read where it is."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("cpfold_train", "conf", "tests"):
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=ignore)
    for name in ("data", "docs", "recipes", "README.md", "train.py", "pyproject.toml"):
        if (ROOT / name).exists():
            (target / name).symlink_to(ROOT / name)


def tried(copy: Path, row: Mutation) -> tuple[str, str]:
    """``caught`` or ``SURVIVED``; ``ABSENT`` or ``REPEATED`` where the text to replace is not there exactly once; and
    what the test says."""
    path = copy / ("" if row.file.startswith("conf/") else "cpfold_train") / row.file
    text = path.read_text() if path.exists() else ""
    if (found := text.count(row.old)) != 1:
        return "REPEATED" if found else "ABSENT", ""
    path.write_text(text.replace(row.old, row.new))
    try:
        told = run(copy, [row.test])
        return "caught" if told else "SURVIVED", told
    finally:
        path.write_text(text)


def run(copy: Path, tests: list[str]) -> str:
    """What pytest says where a test fails, else nothing; in a process that has imported all but the project.

    Raises:
        SystemExit: where pytest does not come to running the tests.
    """
    with tempfile.TemporaryFile("w+") as output:
        process = os.fork()
        if process == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            os.chdir(copy)
            os.environ["PYTHONPATH"] = sys.path[0] = str(copy)
            # A file that is changed back within a second would be taken for what was compiled.
            sys.dont_write_bytecode = True
            os._exit(pytest.main(["-n0", "-q", "-p", "no:cacheprovider", *tests]))
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        output.seek(0)
        told = output.read()
    if code not in (0, 1):
        raise SystemExit(f"error: pytest could not run {' '.join(tests)}:\n{told[-3000:]}")
    return told if code else ""


if __name__ == "__main__":
    sys.exit(main())
