"""The run that a prediction is asked for: a Hugging Face model, a run's YAML files, flags, or some of each.

Whatever a run needs and its time does not depend on (text, learning rate, a tokenizer) is filled in where nobody said
it. The model of a Hugging Face folder is what its config.json says.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from megatron_sat import cli
from megatron_sat.checkpoint.hf_config import padded, settings_of
from megatron_sat.checkpoint.hf_model import read_config
from megatron_sat.config import Config
from megatron_sat.flags.defaults import Machine
from megatron_sat.rehearsal.rehearse import PRETENDED

UNSAID = {
    "lr": "--lr 1e-5",
    "data_path": "--train-data-path unsaid",
    "tokenizer_type": "--tokenizer-type NullTokenizer",
}
"""By key, the flags for a run that says nothing of it."""
DIVISIBLE_BY = 128
"""Megatron's default: rows of the vocabulary come in multiples of it."""


def ask(argv: Sequence[str], *, hf: Path | None, world_size: int, cuda: bool, folder: Path) -> Config:
    """The run that ``argv`` describes on so many ranks. hf: a model's folder. folder: for a file in between.

    Raises ValueError for a model that cannot be read or computed, and ParsedExit, after a line on stderr, as
    `cli.parse` does.
    """
    line = [*([] if hf is None else _model(hf, folder=folder)), *argv]
    said = _mentioned(line)
    for key, flags in UNSAID.items():
        if not re.search(rf"(?<![a-z]){key}\b", said):
            line += flags.split()
    machine = PRETENDED if cuda else Machine(cuda=False)
    return cli.parse(line, world_size=world_size, cuda=cuda, machine=machine)


def _model(hf: Path, *, folder: Path) -> list[str]:
    """Flags that give the model of a Hugging Face folder, through a YAML file in ``folder``."""
    config = read_config(hf)
    rows = padded(config["vocab_size"], divisible_by=DIVISIBLE_BY, tp=1)
    settings = settings_of(config, padded_vocab_size=rows)
    settings["vocab_size"] = config["vocab_size"]
    path = folder / "model.yaml"
    path.write_text(cli.as_yaml(settings))
    return ["--config", str(path)]


def _mentioned(line: Sequence[str]) -> str:
    """The command line and the files that it names, as one text with underscores."""
    files = [Path(word) for word in line if word.endswith((".yaml", ".yml"))]
    texts = [file.read_text(errors="replace") for file in files if file.is_file()]
    return " ".join([*line, *texts]).replace("-", "_")
