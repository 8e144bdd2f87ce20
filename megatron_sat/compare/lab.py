"""The stages of an experiment: preparation, where every run begins, the runs themselves, and what is checked of them.

Folders under OUT:

    import/model        of a Hugging Face folder          text/data, sft/NAME    token ids
    start/seed-S        the model before any training     runs/GROUP/seed-S      its runs
    same/...            whether two runs are one          settings, index-cache  what commands read

Which runs there are, and in which order, is the part of `conduct`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_sat.compare.experiment import OF_TOKENIZER, PROGRAMS, Experiment, held_out_name, sparse
from megatron_sat.compare.runs import METRICS
from megatron_sat.compare.stages import MARKER, Resumption, Stage
from megatron_sat.compare.workshop import TRACKER, Workshop, tokenizer_files
from megatron_sat.data.side_file import CONVERSATIONS, read_side_file
from megatron_sat.training.settings import LoggingConfig

MODEL_FILE = "model.yaml"
"""Of an imported model: its settings."""
STILL = 1e-30
"""A learning rate that changes no weight: added to a weight above 1e-22 it is lost in rounding."""
_OF_LONGER_RUNS = ("lr", "min_lr", "save_", "eval_interval", "on_bad_step", "max_bad_steps")
"""How settings begin that a run of one still update has no use for."""
_WEIGHTS = ("*.safetensors", "*.distcp", "*.gguf")
_SMALL = ("*.json", "*.yaml", "*.model", "*.txt")


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One training run to be made."""

    group: str
    """Runs that differ in their seed alone."""
    seed: int
    steps: int
    settings: Mapping[str, Any]
    """Beside the common ones."""


@dataclass(frozen=True, kw_only=True)
class Lab:
    """Makes the stages of one experiment."""

    shop: Workshop
    experiment: Experiment
    out: Path

    # -- before the runs

    @cached_property
    def imported(self) -> Stage | None:
        """The Hugging Face folder as a checkpoint, behind the parity gate; None where there is nothing to import."""
        hf, folder = self.experiment.model.hf, self.out / "import"
        if hf is None:
            return None
        tp = str(self.experiment.training.get("tensor_model_parallel_size", 1))
        stage = self.shop.stage(
            "import",
            folder,
            *("tools/convert_checkpoint.py", "import", "--hf", self._said(hf)),
            *("--tensor-model-parallel-size", tp, "--save", self._said(folder / "model")),
            reads=[path for pattern in _SMALL for path in sorted(hf.glob(pattern))],
        )
        return replace(stage, made_with=_with_states(stage.made_with, _weights_in(hf)))

    @cached_property
    def texts(self) -> tuple[Stage, ...]:
        """Token ids of all that is not prepared yet."""
        wanted = {name: paths for name, paths in self._data_sets.items() if not _is_prepared(paths)}
        if not wanted:
            return ()
        if self.experiment.program == PROGRAMS[0]:
            return (self.shop.prepare(self.out / "text", wanted, tokenizer=self.tokenizer),)
        return tuple(self._conversations(name, paths) for name, paths in wanted.items())

    def _conversations(self, name: str, paths: Sequence[Path]) -> Stage:
        folder, template = self.out / "sft" / name, self.experiment.template
        kind, tokenizer = _kind_of(self.tokenizer)
        return self.shop.stage(
            f"prepare {name}",
            folder,
            *("tools/prepare_sft.py", "--input", *map(self._said, paths)),
            *("--output-prefix", self._said(folder / name)),
            *("--template", self._said(template) if isinstance(template, Path) else template),
            *("--tokenizer-type", kind, "--tokenizer-model", self._said(tokenizer), "--workers", "1"),
            reads=[*paths, *tokenizer_files(tokenizer), *self._chat_templates],
        )

    @property
    def _chat_templates(self) -> list[Path]:
        """Files that say how conversations are written, beside the tokenizer's own."""
        template = self.experiment.template
        if isinstance(template, Path):
            return [template]
        return sorted(self.tokenizer.glob("*.jinja")) if template == OF_TOKENIZER else []

    @property
    def tokenizer(self) -> Path:
        """Of the model. Raises ValueError where text is to be prepared and none is named."""
        model = self.experiment.model
        found = model.tokenizer or model.hf
        if found is None:
            raise ValueError(
                "model: a checkpoint must come with a tokenizer where text is to be prepared, got none; name it, or "
                "give prefixes of prepared data"
            )
        return found

    @property
    def _data_sets(self) -> dict[str, tuple[Path, ...]]:
        """All of them; what is held out has a name of its own."""
        trained = {**self.experiment.train, **self.experiment.replay}
        return {**trained, **{held_out_name(name): paths for name, paths in self.experiment.valid.items()}}

    def prefix(self, name: str, *, held_out: bool = False) -> Path:
        """Where the data set of a domain is, or will be."""
        name = held_out_name(name) if held_out else name
        paths = self._data_sets[name]
        if _is_prepared(paths):
            return paths[0]
        return self.out / "text" / "data" / name if self.experiment.program == PROGRAMS[0] else (
            self.out / "sft" / name / name
        )

    def tokens_per_character(self, domain: str) -> float | None:
        """Of what is held out of a domain, once it is prepared; None: nobody counted, or it is conversations."""
        side = read_side_file(str(self.prefix(domain, held_out=True)))
        if side is None or not side.totals.characters or side.options.get("kind") == CONVERSATIONS:
            return None
        return side.totals.tokens / side.totals.characters

    # -- runs

    def start(self, seed: int) -> Stage:
        """The model before any training, evaluated; of a fresh model also the checkpoint that all runs go on from."""
        folder, common = self.out / "start" / f"seed-{seed}", self.experiment.training
        still = {key: value for key, value in common.items() if not key.startswith(_OF_LONGER_RUNS)}
        settings = {**still, "lr": STILL, "lr_decay_style": "constant"}
        keeps = ("--log-jsonl", self._said(folder / METRICS))
        if self._is_fresh:
            settings["save_optim"] = False
            keeps = ("--save", self._said(folder))
        stage = self.shop.training(
            f"start, seed {seed}",
            folder,
            *("--train-iters", "1", "--seed", str(seed), *self._data, *self._given, *keeps),
            ranks=self.experiment.ranks,
            configs=[*self._model_files, self._settings("start", settings)],
            after=self._before,
            program=self._program(folder),
        )
        return replace(stage, made_with=_with_states(stage.made_with, self._outside))

    def run(self, planned: Planned) -> Stage:
        """A training run from the start. It goes on where it was if it saves on its way."""
        folder = self.out / "runs" / planned.group / f"seed-{planned.seed}"
        files = [*self._model_files, self._settings("training", self.experiment.training)]
        if planned.settings:
            files.append(self._settings(planned.group, planned.settings))
        origin = self.start(planned.seed)
        begin = ("--load", self._said(origin.folder), "--finetune") if self._is_fresh else self._given

        def stage(*source: str) -> Stage:
            return self.shop.training(
                f"{planned.group}, seed {planned.seed}",
                folder,
                *("--train-iters", str(planned.steps), "--seed", str(planned.seed), *self._data),
                *(*source, "--save", self._said(folder)),
                ranks=self.experiment.ranks,
                configs=files,
                after=[*self._before, origin],
                program=self._program(folder),
            )

        if not _goes_on({**self.experiment.training, **planned.settings}):
            return stage(*begin)
        again = stage("--load", self._said(folder)).command
        return replace(stage(*begin), resumption=Resumption(command=again, needs=folder / TRACKER))

    def same(self, one: Stage, other: Stage) -> Stage:
        """Whether two runs of a seed are one, bit for bit; says so in ``same.json``. Both are done.

        Runs that were made again, perhaps by another commit, are compared again: keys know nothing of results.
        """
        names = [stage.folder.parent.name for stage in (one, other)]
        folder = self.out / "same" / "-".join([*names, one.folder.name])
        return self.shop.stage(
            f"{names[0]} beside {names[1]}, {one.folder.name}",
            folder,
            *("-m", "megatron_sat.compare.same", self._said(one.folder), self._said(other.folder)),
            *("--output", self._said(folder / "same.json")),
            after=[one, other],
            reads=[one.folder / MARKER, other.folder / MARKER],
        )

    @property
    def _outside(self) -> list[Path]:
        """Large files that no stage makes: an imported model's, and prepared data's."""
        named = self.experiment.model.checkpoint
        prepared = [paths[0] for paths in self._data_sets.values() if _is_prepared(paths)]
        return [
            *([] if named is None else _weights_in(named)),
            *(Path(f"{prefix}{ending}") for prefix in prepared for ending in (".bin", ".idx")),
        ]

    @property
    def _is_fresh(self) -> bool:
        return self.experiment.model.fresh is not None

    @property
    def _before(self) -> list[Stage]:
        return [*([] if self.imported is None else [self.imported]), *self.texts]

    @property
    def checkpoint(self) -> Path:
        """The imported model."""
        named = self.experiment.model.checkpoint
        return self.out / "import" / "model" if named is None else named

    @property
    def _given(self) -> tuple[str, ...]:
        """Flags that begin with an imported model; nothing for a fresh one."""
        return () if self._is_fresh else ("--load", self._said(self.checkpoint), "--finetune")

    @property
    def _model_files(self) -> list[Path]:
        fresh = self.experiment.model.fresh
        if fresh is None:
            return [self.checkpoint / MODEL_FILE]
        kind, tokenizer = _kind_of(self.tokenizer)
        own = {"tokenizer_type": kind, "tokenizer_model": self._said(tokenizer)}
        return [self._settings("model", {**fresh, **own})]

    @property
    def _data(self) -> tuple[str, ...]:
        def named(domains: Mapping[str, Any], *, held_out: bool = False) -> list[str]:
            return [f"{name}={self._said(self.prefix(name, held_out=held_out))}" for name in domains]

        replay = named(self.experiment.replay)
        return (
            *("--train-data-path", *named(self.experiment.train)),
            *(("--replay-data-path", *replay) if replay else ()),
            *("--valid-data-path", *named(self.experiment.valid, held_out=True)),
            *("--data-cache-path", self._said(self.out / "index-cache")),
        )

    def _program(self, folder: Path) -> tuple[str, ...]:
        return ("-m", "megatron_sat.compare.measured", "--into", self._said(folder), self.experiment.program)

    def _settings(self, name: str, settings: Mapping[str, Any]) -> Path:
        """A file of settings; JSON is YAML."""
        path = self.out / "settings" / f"{name}.yaml"
        text = json.dumps(dict(settings), indent=1, default=str) + "\n"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return path

    def _said(self, path: Path) -> str:
        return self.shop.named(path)


def at_rate_zero(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A variant's settings with nothing omitted. The variant omits something."""
    assert sparse(settings)
    return {**settings, "sat_omission_rate": 0}


def _goes_on(settings: Mapping[str, Any]) -> bool:
    """Whether a run that was interrupted ends with the records of one that was not.

    A checkpoint has nothing of the window of updates that it was saved in, so it must lie where a window ends.
    """
    given = settings.get("save_interval", 0), settings.get("log_interval", LoggingConfig.log_interval)
    if not all(str(value).isdecimal() for value in given):  # the flag's own check says what is wrong with it
        return False
    save, window = (int(value) for value in given)
    return bool(save and save % max(window, 1) == 0 and settings.get("save_optim", True))


def _kind_of(tokenizer: Path) -> tuple[str, Path]:
    """--tokenizer-type and --tokenizer-model of a file or a folder, read as `data.tokenizer` reads them."""
    if tokenizer.is_file():
        return "SentencePieceTokenizer", tokenizer
    if (tokenizer / "tokenizer.model").is_file() and not (tokenizer / "tokenizer.json").is_file():
        return "SentencePieceTokenizer", tokenizer / "tokenizer.model"
    return "HuggingFaceTokenizer", tokenizer


def _weights_in(folder: Path) -> list[Path]:
    return sorted(path for pattern in _WEIGHTS for path in folder.rglob(pattern))


def _with_states(made_with: str, files: Sequence[Path]) -> str:
    """So that other content of large files is noticed without reading them: by size and time."""
    states = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files if path.is_file()]
    return "; ".join([made_with, *states])


def _is_prepared(paths: Sequence[Path]) -> bool:
    return len(paths) == 1 and Path(f"{paths[0]}.idx").is_file()
