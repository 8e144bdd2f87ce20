"""The stages of a trip, each a command of this project; which of them run when is `travel`'s part.

Folders under OUT:

    original, extended, sat, dense, control, exported   evaluations, in evaluate/NAME/result
    vocabulary/model    the Hugging Face folder with its new pieces     import/model   the same as a checkpoint
    text/data           token ids    train/{sat,dense,control}          runs    export/model   what comes out
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from megatron_sat.compare.stages import Resumption, Stage
from megatron_sat.compare.workshop import TRACKER, Workshop
from megatron_sat.trip.settings import Settings
from megatron_sat.trip.text import LANGUAGES, NEW, OLD, Text

WEIGHTS = ("*.safetensors", "*.gguf")
BESIDE = ("*.json", "*.model", "*.txt", "*.jinja")
"""What belongs to a model's folder besides weights."""
ORIGINAL, EXTENDED, SAT, DENSE, EXPORTED = ("original", "extended", "SAT", "dense", "exported")
CONTROL = "dense for SAT's time"
"""What tables call the models."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """All stages of one trip."""

    shop: Workshop
    settings: Settings
    training: Path
    """pretrain_sat.py's file of settings, without the model's and the tokenizer's."""
    text: Text
    model: Path
    """The Hugging Face folder to begin with."""
    before: tuple[Stage, ...]
    """The stages that make it; none where it was there."""
    out: Path

    @cached_property
    def original(self) -> Stage:
        """Evaluate what was there."""
        return self._evaluation(ORIGINAL, "--hf", self.model, after=self.before)

    @cached_property
    def vocabulary(self) -> Stage:
        """More pieces, proven, and a row for each."""
        folder, settings = self.out / "vocabulary", self.settings
        train, dev = self.text.files[NEW, "train"].values(), self.text.every("dev").values()
        stage = self.shop.stage(
            "vocabulary",
            folder,
            *("tools/extend_vocab.py", "--tokenizer", self._said(self.model), "--model", self._said(self.model)),
            *("--text", *map(self._said, train), "--held-out", *map(self._said, dev)),
            *("--add", str(settings.add), "--character-coverage", str(settings.character_coverage)),
            *("--tensor-model-parallel-size", str(settings.tensor_parallel)),
            *("--loss-characters", str(settings.loss_characters)),
            *("--max-loss-increase", str(settings.max_loss_increase), "--output", self._said(folder / "model")),
            after=self.before,
            reads=[*train, *dev],
        )
        return self._reading_model(stage)

    @cached_property
    def extended(self) -> Stage:
        """Evaluate the model with its new rows, untrained."""
        return self._evaluation(EXTENDED, "--hf", self.vocabulary.folder / "model", after=[self.vocabulary])

    @cached_property
    def imported(self) -> Stage:
        """As a checkpoint, behind the parity gate."""
        folder, tp = self.out / "import", str(self.settings.tensor_parallel)
        return self.shop.stage(
            "import",
            folder,
            *("tools/convert_checkpoint.py", "import", "--hf", self._said(self.vocabulary.folder / "model")),
            *("--tensor-model-parallel-size", tp, "--save", self._said(folder / "model")),
            after=[self.vocabulary],
        )

    @cached_property
    def tokens(self) -> Stage:
        """Text for training, a data set a domain, and for validation, one a language."""
        files: dict[str, list[Path]] = {}
        for name, path in self.text.every("train").items():
            files[name.replace("/", ".")] = [path]
        for language in LANGUAGES:
            files[f"{language}-dev"] = list(self.text.files[language, "dev"].values())
        return self.shop.prepare(
            self.out / "text", files, tokenizer=self.vocabulary.folder / "model", after=[self.vocabulary]
        )

    def run(self, name: str, *flags: str, steps: int) -> Stage:
        """A training run from the imported model."""
        folder, model = self.out / "train" / folder_name(name), self.imported.folder / "model"
        dev = [f"{language}={self._data(f'{language}-dev')}" for language in LANGUAGES]
        start = ("--load", self._said(model), "--finetune")
        data = (
            *("--train-iters", str(steps), "--train-data-path", *self._blend(NEW)),
            *("--replay-data-path", *self._blend(OLD), "--replay-share", str(self.settings.replay_share)),
            *("--valid-data-path", *dev, "--data-cache-path", self._said(self.out / "index-cache"), *flags),
            *("--save", self._said(folder)),
        )
        configs = [model / "model.yaml", self.training]
        after = [self.imported, self.tokens]
        ranks = self.settings.ranks
        stage = self.shop.training(name, folder, *data, *start, ranks=ranks, configs=configs, after=after)
        if not self.settings.resumable:
            return stage
        again = ("--load", self._said(folder))
        going_on = self.shop.training(name, folder, *data, *again, ranks=ranks, configs=configs, after=after)
        return replace(stage, resumption=Resumption(command=going_on.command, needs=folder / TRACKER))

    @cached_property
    def dense(self) -> Stage:
        """The reference: as many steps as SAT."""
        return self.run(DENSE, steps=self.settings.steps)

    @cached_property
    def sat(self) -> Stage:
        """The method."""
        return self.run(SAT, *self.settings.schedule, steps=self.settings.steps)

    def control(self, *, steps: int) -> Stage:
        """Dense for SAT's time: its learning rate decays over just these steps."""
        return self.run(CONTROL, steps=steps)

    @cached_property
    def export(self) -> Stage:
        """SAT's model as a Hugging Face folder, behind the parity gate."""
        folder = self.out / "export"
        return self.shop.stage(
            "export",
            folder,
            *("tools/convert_checkpoint.py", "export", "--load", self._said(self.sat.folder)),
            *("--hf", self._said(folder / "model")),
            after=[self.sat],
        )

    @cached_property
    def exported(self) -> Stage:
        """Evaluate what came out."""
        return self._evaluation(EXPORTED, "--hf", self.export.folder / "model", after=[self.export])

    def trained(self, run: Stage) -> Stage:
        """Evaluate the checkpoint of a run."""
        return self._evaluation(run.name, "--load", run.folder, after=[run])

    def _evaluation(self, name: str, flag: str, model: Path, *, after: Sequence[Stage]) -> Stage:
        folder, settings, dev = self.out / "evaluate" / folder_name(name), self.settings, self.text.every("dev")
        stride = () if settings.evaluation_stride is None else ("--stride", str(settings.evaluation_stride))
        stage = self.shop.stage(
            f"evaluate {name}",
            folder,
            *("tools/evaluate.py", flag, self._said(model), "--name", name),
            *("--data", *(f"{domain}={self._said(path)}" for domain, path in dev.items())),
            *("--seq-length", str(settings.seq_length), *stride, "--max-characters", str(settings.max_characters)),
            *("--dtype", settings.evaluation_dtype, "--micro-batch-size", str(settings.evaluation_batch)),
            *("--output", self._said(folder / "result")),
            after=after,
            reads=list(dev.values()),
        )
        return self._reading_model(stage) if model == self.model and not self.before else stage

    def _reading_model(self, stage: Stage) -> Stage:
        """The stage depends on the model that was there: small files by content, weights by size and time."""
        if self.before:
            return stage
        weights = {path for pattern in WEIGHTS for path in self.model.glob(pattern)}
        small = sorted({path for pattern in BESIDE for path in self.model.glob(pattern)})
        states = [f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in sorted(weights)]
        made_with = "; ".join([stage.made_with, *states])
        return replace(stage, reads=(*stage.reads, *small), made_with=made_with)

    def _blend(self, language: str) -> list[str]:
        names = [f"{language}.{domain}" for domain in self.text.files[language, "train"]]
        return [f"{name}={self._data(name)}" for name in names]

    def _data(self, name: str) -> str:
        return self._said(self.tokens.folder / "data" / name)

    def _said(self, path: Path) -> str:
        return self.shop.named(path)


def folder_name(model: str) -> str:
    """What the folders of a model are called, of its run and of its evaluation."""
    return "control" if model == CONTROL else model.lower()
