"""What is compared: a model to begin with, text, a budget, common settings, seeds, and variants; read from one mapping.

`experiment_from` takes what a YAML file holds (docs/compare.md) and checks all that can be known without looking at
the model. Domains of text are named LANGUAGE or LANGUAGE.DOMAIN; figures of a language are means over its domains.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sat.data.sft_template import WRITTEN_HERE

PROGRAMS = ("pretrain_sat.py", "finetune_sat.py")
DENSE, EQUAL_TIME, RATE_ZERO = "dense", "dense_equal_time", "rate_0"
"""The controls: dense with all steps, dense for a variant's time, a variant at omission rate 0."""
CONTROLS = (DENSE, EQUAL_TIME, RATE_ZERO)
OF_TOKENIZER = "tokenizer"
"""The template that comes with the tokenizer."""
OF_ALL = ("model", "start", "training")
"""Names of the files of settings that stand beside the variants' own; no variant may have one of them."""
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_DOMAIN = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_PARTS = {
    "": ("name", "program", "model", "data", "budget", "training", "seeds", "variants"),
    "model": ("fresh", "checkpoint", "hf", "tokenizer"),
    "data": ("train", "replay", "valid", "new", "old", "template"),
    "budget": ("steps", "dense_steps", "ranks", "time"),
}
TIMES = ("all", "settled")
"""All of a run's time; or without what the first steps of each rate took longer."""
_HARNESS = (
    *("train_iters", "train_samples", "train_epochs", "seed", "load", "save", "finetune", "log_jsonl", "data_path"),
    *("train_data_path", "valid_data_path", "test_data_path", "replay_data_path", "data_cache_path", "exit_interval"),
    *("exit_duration_in_mins", "sft", "split", "lr_decay_iters", "lr_decay_samples"),
)
"""Settings that the harness gives, or by which a control would see other text, or not decay over its own steps."""
_BEGINNING = ("init_method_std", "init_method_xavier_uniform", "embedding_init_method_std")
"""Settings of random weights, which all runs of a seed share."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """Where every run begins; one of the three is given."""

    fresh: Mapping[str, Any] | None = None
    """Settings of a model with random weights, the seed's own."""
    checkpoint: Path | None = None
    """Folder of an imported model, with model.yaml."""
    hf: Path | None = None
    """A Hugging Face folder, to be imported."""
    tokenizer: Path | None = None
    """A SentencePiece model or a Hugging Face folder."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One comparison, as it was asked for."""

    name: str
    program: str
    """One of PROGRAMS."""
    model: Model
    train: Mapping[str, tuple[Path, ...]]
    """By domain, files of text or one prefix of a prepared data set."""
    replay: Mapping[str, tuple[Path, ...]]
    """Likewise, of the text that must not be forgotten; its share is the setting replay_share."""
    valid: Mapping[str, tuple[Path, ...]]
    """Likewise, held out."""
    new: str | None
    """The language that is learnt; its loss decides when dense's is reached. None: all of them."""
    old: str | None
    """The language that may be forgotten; None: nothing is said of forgetting."""
    template: str | Path
    """Of tools/prepare_sft.py, for finetune_sat.py: a name, or a file of one."""
    steps: int
    """Updates of every run but the equal-time controls."""
    dense_steps: tuple[int, ...]
    """Other lengths of dense training, for what it has after other operations."""
    ranks: int
    """Processes of a run."""
    time: str
    """One of TIMES."""
    training: Mapping[str, Any]
    """Settings of every run, by key."""
    seeds: tuple[int, ...]
    variants: Mapping[str, Mapping[str, Any]]
    """Settings of each beside the common ones."""

    @property
    def languages(self) -> dict[str, list[str]]:
        """Domains of validation by language."""
        found: dict[str, list[str]] = {}
        for domain in self.valid:
            found.setdefault(language_of(domain), []).append(domain)
        return found

    @property
    def target(self) -> list[str]:
        """The domains of validation that are learnt."""
        return list(self.valid) if self.new is None else self.languages[self.new]


def held_out_name(domain: str) -> str:
    """The data set of what is held out of a domain."""
    return f"{domain}.held-out"


def language_of(domain: str) -> str:
    """What stands before the first dot."""
    return domain.split(".", 1)[0]


def sparse(settings: Mapping[str, Any]) -> bool:
    """Whether a variant omits neurons at all."""
    return settings.get("sat_schedule", "none") != "none" or "sat_preset" in settings


def method_alone(settings: Mapping[str, Any]) -> bool:
    """Whether a variant sets nothing but the method: at rate 0 it must be the dense run."""
    return all(key.startswith("sat_") and key != "sat_preset" for key in settings)  # a preset sets batch and rate too


def experiment_from(given: Mapping[str, Any], *, folder: Path, name: str) -> Experiment:
    """What a file in ``folder`` holds. name: of the experiment, where the file gives none.

    Raises ValueError for what is missing, unknown, or cannot be compared.
    """
    _require_keys(given, part="")
    model, data, budget = (_part(given, part) for part in ("model", "data", "budget"))
    seeds = given.get("seeds", [1])
    variants = _part(given, "variants", known=False)
    experiment = Experiment(
        name=str(given.get("name") or name),
        program=given.get("program", PROGRAMS[0]),
        model=_model(model, folder=folder),
        train=_domains(data, "train", folder=folder),
        replay=_domains(data, "replay", folder=folder),
        valid=_domains(data, "valid", folder=folder),
        new=data.get("new"),
        old=data.get("old"),
        template=_template(data, folder=folder),
        steps=_count(budget, "steps"),
        dense_steps=_other_steps(budget),
        ranks=_count({"ranks": 1, **budget}, "ranks"),
        time=budget.get("time", TIMES[0]),
        training=_settings(_part(given, "training", known=False), where="training"),
        seeds=tuple(seeds) if isinstance(seeds, list) else (seeds,),
        variants={str(variant): _variant(variant, settings) for variant, settings in variants.items()},
    )
    _check(experiment, fine_tuning_only=[key for key in ("template",) if key in data])
    return experiment


def with_seeds(experiment: Experiment, seeds: Sequence[int]) -> Experiment:
    """The same with other seeds. Raises ValueError for seeds that are none."""
    changed = Experiment(**vars(experiment) | {"seeds": tuple(seeds)})
    _check_seeds(changed.seeds)
    return changed


def _part(given: Mapping[str, Any], part: str, *, known: bool = True) -> Mapping[str, Any]:
    value = given.get(part)
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{part} must be given, as keys with values, got {value!r}; see examples/compare/small.yaml")
    if known:
        _require_keys(value, part=part)
    return value


def _settings(given: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Keys as the program has them, however they were written."""
    found: dict[str, Any] = {}
    for written, value in given.items():
        key = str(written).lstrip("-").replace("-", "_")
        if key in found:
            raise ValueError(
                f"{where}: {key} must be set once, got {found[key]!r} and, as {written}, {value!r}; leave one out"
            )
        found[key] = value
    return found


def _variant(name: Any, given: Any) -> dict[str, Any]:
    if given is not None and not isinstance(given, dict):
        raise ValueError(
            f"variants: {name} must hold settings, as keys with values, got {given!r}; see examples/compare/small.yaml"
        )
    return _settings(given or {}, where=f"variants: {name}")


def _path(given: Any, *, what: str, folder: Path) -> Path:
    """As YAML reads them, a number, a date or an empty value are none."""
    if not isinstance(given, str) or not given:
        raise ValueError(f"{what} must be a path, got {given!r}; name one, in quotes where YAML reads something else")
    return (folder / given).resolve()


def _require_keys(given: Mapping[str, Any], *, part: str) -> None:
    if unknown := [str(key) for key in given if key not in _PARTS[part]]:
        where = f"{part}: " if part else ""
        raise ValueError(f"{where}{', '.join(unknown)} must be a known key; there are {', '.join(_PARTS[part])}")


def _count(given: Mapping[str, Any], key: str) -> int:
    value = given.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"budget: {key} must be a whole number of at least 1, got {value!r}; write for instance 1000")
    return value


def _other_steps(budget: Mapping[str, Any]) -> tuple[int, ...]:
    given = budget.get("dense_steps", [])
    whole = isinstance(given, list) and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in given)
    if not whole or len({*given, budget["steps"]}) <= len(given):
        raise ValueError(
            f"budget: dense_steps must be different numbers of steps, none of them that of all runs "
            f"({budget['steps']}), got {given!r}; write for instance [500, 750]"
        )
    return tuple(given)


def _model(given: Mapping[str, Any], *, folder: Path) -> Model:
    kinds = [kind for kind in ("fresh", "checkpoint", "hf") if kind in given]
    if len(kinds) != 1:
        raise ValueError(
            f"model: one of fresh, checkpoint and hf must be given, got {' and '.join(kinds) or 'none'}; name where "
            "every run begins"
        )
    paths = {
        key: _path(given[key], what=f"model: {key}", folder=folder)
        for key in ("checkpoint", "hf", "tokenizer")
        if key in given
    }
    fresh = given.get("fresh")
    if "fresh" in given and not isinstance(fresh, dict):
        raise ValueError(f"model: fresh must hold the model's settings, got {fresh!r}; see examples/compare/small.yaml")
    if "fresh" in given and "tokenizer" not in given:
        raise ValueError(
            "model: a fresh model must have a tokenizer, got none; name a SentencePiece model, or a Hugging Face folder"
        )
    return Model(fresh=fresh, **paths)


def _domains(data: Mapping[str, Any], key: str, *, folder: Path) -> dict[str, tuple[Path, ...]]:
    given = data.get(key, {})
    if not isinstance(given, dict) or (not given and key != "replay"):
        raise ValueError(f"data: {key} must name domains with files, got {given!r}; write zh.poetry: poetry.jsonl")
    found = {}
    for domain, files in given.items():
        if not _DOMAIN.fullmatch(str(domain)):
            raise ValueError(f"data: {key}: a domain must be LANGUAGE or LANGUAGE.DOMAIN, got {domain!r}; rename it")
        paths = files if isinstance(files, list) else [] if files is None else [files]
        if not paths:
            raise ValueError(f"data: {key}: {domain} must have a file, got none; name one, or leave the domain out")
        found[str(domain)] = tuple(_path(path, what=f"data: {key}: {domain}", folder=folder) for path in paths)
    return found


def _template(data: Mapping[str, Any], *, folder: Path) -> str | Path:
    given = data.get("template", OF_TOKENIZER)
    names = (OF_TOKENIZER, *WRITTEN_HERE)
    if not isinstance(given, str) or not given:
        raise ValueError(f"data: template must be {', '.join(names)} or a file of one, got {given!r}; name one")
    return given if given in names else (folder / given).resolve()


def _check(experiment: Experiment, *, fine_tuning_only: Sequence[str]) -> None:
    if experiment.program not in PROGRAMS:
        raise ValueError(f"program must be {' or '.join(PROGRAMS)}, got {experiment.program!r}; choose one")
    if experiment.time not in TIMES:
        raise ValueError(f"budget: time must be {' or '.join(TIMES)}, got {experiment.time!r}; choose one")
    if fine_tuning_only and experiment.program != PROGRAMS[1]:
        raise ValueError(f"data: {fine_tuning_only[0]} has no effect with {experiment.program}; leave it out")
    _check_seeds(experiment.seeds)
    places = [re.sub("[.-]", "_", name) for name in {*experiment.languages, *experiment.valid}]
    if clashing := sorted({place for place in places if places.count(place) > 1}):
        raise ValueError(
            f"data: valid: names must differ by more than dots and dashes, {clashing[0]} is there twice; rename one"
        )
    sets = [*experiment.train, *experiment.replay, *map(held_out_name, experiment.valid)]
    if clashing := sorted({name for name in sets if sets.count(name) > 1}):
        raise ValueError(
            f"data: every data set must have a name of its own, {clashing[0]} is there twice (what is held out of a "
            f"domain is called {held_out_name('DOMAIN')}); rename one"
        )
    for what, language in (("new", experiment.new), ("old", experiment.old)):
        if language is not None and language not in list(experiment.languages):  # what cannot be hashed is in no dict
            raise ValueError(
                f"data: {what} must be a language of data: valid, got {language!r}; there are "
                f"{', '.join(experiment.languages)}"
            )
    _check_settings(experiment)


def _check_seeds(seeds: Sequence[Any]) -> None:
    whole = all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in seeds)
    if not seeds or not whole or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different whole numbers, at least one, got {list(seeds)}; write [1, 2, 3]")


def _check_settings(experiment: Experiment) -> None:
    for name, settings in experiment.variants.items():
        if not _NAME.fullmatch(name) or name.startswith(DENSE) or name.endswith(RATE_ZERO):
            raise ValueError(
                f"variants: a name must be of a-z, 0-9 and _, not begin with {DENSE} and not end with {RATE_ZERO}, "
                f"which are the controls', got {name!r}; rename it"
            )
        if name in OF_ALL:
            raise ValueError(
                f"variants: a name must not be {', '.join(OF_ALL)}, under which the settings of all runs are kept, got "
                f"{name!r}; rename it"
            )
        if drawn := [key for key in settings if key in _BEGINNING]:
            raise ValueError(
                f"variants: {name}: {drawn[0]} has no effect, got {settings[drawn[0]]!r}: every run begins with the "
                "same weights; set it in training, in a file of its own"
            )
        if not settings:
            raise ValueError(f"variants: {name} must set something, it sets nothing and would be dense; leave it out")
    if method := sorted(key for key in experiment.training if key.startswith("sat_")):
        raise ValueError(
            f"training: {method[0]} must stand in a variant, it would hold for the dense controls too; move it there"
        )
    for where, settings in {"training": experiment.training, **experiment.variants}.items():
        for key in settings:
            if key in _HARNESS:
                raise ValueError(
                    f"{where}: {key} is the harness's to set, got {settings[key]!r}; use budget, seeds, model and data"
                )
