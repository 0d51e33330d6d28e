"""``cpfold-train completion``: a script for bash, and for zsh, that completes subcommands, options and keys."""

from __future__ import annotations

import argparse
import importlib

from omegaconf import OmegaConf

from cpfold_train.__main__ import SUBCOMMANDS, TRAIN
from cpfold_train.config.compose import OWN_KEYS
from cpfold_train.config.composition import all_keys
from cpfold_train.config.schema import TrainConfig

_OF_TRAIN = ("--help", "--version", "--cfg", "--multirun", "--hydra-help", "recipe=", "hydra.run.dir=")
_SCRIPT = """\
_cpfold_train() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} words=
    if [ "$COMP_CWORD" = 1 ]; then
        words="{subcommands}"
    else
        case ${{COMP_WORDS[1]}} in
{cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    # A value follows.
    [[ ${{COMPREPLY[0]}} == *= ]] && compopt -o nospace 2>/dev/null
    return 0
}}
complete -o default -F _cpfold_train cpfold-train"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand: it has none."""
    parser.epilog = 'In bash: eval "$(cpfold-train completion)"; in zsh after: autoload -U bashcompinit; bashcompinit'


def run(args: argparse.Namespace) -> None:
    """Print the script."""
    keys = [f"{key}=" for key in all_keys(OmegaConf.structured(TrainConfig))]
    words = {name: _options(module) for name, (module, _) in SUBCOMMANDS.items() if name != TRAIN}
    words[TRAIN] = [*_OF_TRAIN, *keys]
    words["plan"] += [*(f"{key}=" for key in OWN_KEYS), *keys]
    cases = "\n".join(f'            {name}) words="{" ".join(own)}" ;;' for name, own in words.items())
    print(_SCRIPT.format(subcommands=" ".join(SUBCOMMANDS), cases=cases))


def _options(module: str) -> list[str]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--version")
    importlib.import_module(module).add_arguments(parser)
    return [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
