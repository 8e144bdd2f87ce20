"""Benchmark tasks on a Hugging Face folder, through lm-eval: the only door to it, to datasets and to the hub's client.

lm-eval is optional, imported when it is asked for. What is asked is settled before any of it is computed: names, data,
the model's files. Without a network nothing is tried in vain: what lies in the cache is used, what does not is named.
Tasks keep the number of examples in the prompt that their authors gave them. One process, one device.
"""

import difflib
import importlib
import importlib.metadata
import json
import logging
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_sat.distributed import read_launch
from megatron_sat.evaluate.needs import Need, needs_of
from megatron_sat.log import say, table

GROUPS: dict[str, tuple[str, ...]] = {
    "cmmlu": ("cmmlu",),
    "agieval": ("agieval",),
    "ceval": ("ceval-valid",),  # the answers of its test part are not public
    "mmlu": ("mmlu",),
    "gpt4all": ("hellaswag", "openbookqa", "winogrande", "arc_easy", "arc_challenge", "boolq", "piqa"),
}
"""Names for what lm-eval calls otherwise, or has no name for."""
RESULT = "harness.json"
_KEPT = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better")
"""Of what lm-eval reports. The rest describes the machine, or repeats the tasks' files."""
_BOOTSTRAP = 1000
"""Draws for the standard error of a metric that has no formula for it; lm-eval's 100,000 take minutes a task."""
_PROBE_SECONDS = 5.0
"""How long the hub may take to answer at all before it counts as out of reach."""


def run_harness(
    hf_folder: Path | Callable[[], Path],
    *,
    tasks: Sequence[str],
    tasks_folder: Path | None,
    limit: int | None,
    batch_size: int,
    output: Path,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run tasks on the model of a folder, print the table, write ``output``/harness.json, return what it holds.

    hf_folder: or what makes one, called when everything else is known to be there. tasks: names of `GROUPS`, of
    lm-eval, or of the YAML files below ``tasks_folder``. limit: documents a task (None: all). about: further entries
    of the report. The model computes in the precision of its files, on the GPU where there is one.
    Raises ValueError where lm-eval, a task, a data set or the model is missing, before anything is computed.
    """
    library = _library()
    if isinstance(hf_folder, Path):
        _check_folder(hf_folder)
    _check(tasks, tasks_folder=tasks_folder, limit=limit, batch_size=batch_size)
    names = list(dict.fromkeys(member for task in tasks for member in GROUPS.get(task, (task,))))
    manager = _manager(names, library=library, folder=tasks_folder)
    needs = [need for name in names for need in needs_of(name, index=manager.task_index)]
    _refuse(needs)
    with _quiet(), _hub(needs, library=library) as absent:
        _require_data(needs, library=library, absent=absent, folder=tasks_folder)
        loaded = [part for name in names for part in _load(name, manager=manager)]
        folder = hf_folder if isinstance(hf_folder, Path) else hf_folder()
        model, tokenizer = _open_model(folder)
        say(f"lm-eval {_version()}: {len(needs)} tasks on {model.device}")
        lm = library.model(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found = library.evaluate(
            model=lm, tasks=loaded, task_manager=manager, limit=limit, bootstrap_iters=_BOOTSTRAP, log_samples=False
        )
    report: dict[str, Any] = {
        "model": str(folder),
        "tasks": list(tasks),
        "limit": limit,
        "batch_size": batch_size,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "packages": {name: importlib.metadata.version(name) for name in ("lm-eval", "transformers", "torch")},
        "averages": {"gpt4all": gpt4all_average(found["results"])} if "gpt4all" in tasks else {},
        **{key: found[key] for key in _KEPT if key in found},
        **(about or {}),
    }
    _write(output, report=report)
    _show(report)
    return report


def gpt4all_average(results: Mapping[str, Mapping[str, Any]]) -> float:
    """The mean over the seven tasks of the length-normalised accuracy, or of the plain one where there is no other.

    results: of lm-eval, a task's metrics by ``name,filter``.
    """
    scores = [results[task].get("acc_norm,none", results[task].get("acc,none")) for task in GROUPS["gpt4all"]]
    return sum(scores) / len(scores)


@dataclass(frozen=True, kw_only=True)
class _Library:
    """What is used of lm-eval and of the two packages that come with it."""

    manager: Any
    evaluate: Any
    model: Any
    datasets: Any
    hub: Any
    """huggingface_hub's constants: they have read the environment."""


def _library() -> _Library:
    try:
        return _Library(
            manager=importlib.import_module("lm_eval.tasks").TaskManager,
            evaluate=importlib.import_module("lm_eval.evaluator").simple_evaluate,
            model=importlib.import_module("lm_eval.models.huggingface").HFLM,
            datasets=importlib.import_module("datasets"),
            hub=importlib.import_module("huggingface_hub.constants"),
        )
    except ImportError as error:
        raise ValueError(
            f"--harness needs lm-eval, which cannot be imported ({error}); pip install 'megatron-sat[eval]'"
        ) from error


def _version() -> str:
    return importlib.metadata.version("lm-eval")


def _check_folder(hf_folder: Path) -> None:
    if not (hf_folder / "config.json").is_file():
        raise ValueError(f"--harness needs a Hugging Face folder, {hf_folder} has no config.json; export a model first")


def _check(tasks: Sequence[str], *, tasks_folder: Path | None, limit: int | None, batch_size: int) -> None:
    """Refuse what can be seen to be wrong without lm-eval."""
    if not tasks:
        raise ValueError(f"--harness needs a task, got none; name some of {', '.join(GROUPS)}, or of lm-eval's")
    if tasks_folder is not None and not tasks_folder.is_dir():
        raise ValueError(f"--harness-tasks-folder must be a folder with YAML files, got {tasks_folder}; mend the path")
    if limit is not None and limit < 1:
        raise ValueError(f"--harness-limit must be at least 1 document a task, got {limit}; leave it out for all")
    if batch_size < 1:
        raise ValueError(f"--harness-batch-size must be at least 1, got {batch_size}; try 1")
    ranks = read_launch().world_size
    if ranks > 1:
        raise ValueError(f"--harness runs in one process, got {ranks} ranks; start it again without torchrun")


def _manager(names: Sequence[str], *, library: _Library, folder: Path | None) -> Any:
    """An index that knows all ``names``: of the folder where that is enough, of lm-eval's own tasks too where not."""
    if folder is not None:
        own = library.manager(include_path=str(folder), include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return own
    manager = library.manager(include_path=None if folder is None else str(folder))
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *GROUPS], n=3, cutoff=0.5)
            hint = f"try {', '.join(near)}" if near else f"there are {', '.join(GROUPS)} and lm-eval's own"
            raise ValueError(f"--harness must name tasks that lm-eval {_version()} knows, got {name}; {hint}")
    return manager


def _refuse(needs: Sequence[Need]) -> None:
    """Refuse tasks that run what a model writes, and tasks that are asked for under two names."""
    under: dict[str, str] = {}
    for need in needs:
        if need.runs_answers:
            raise ValueError(
                f"--harness must not run a model's answers as code, as {need.task} does; use lm_eval in a sandbox"
            )
        if under.setdefault(need.task, need.asked) != need.asked:
            raise ValueError(
                f"--harness must name a task once, {need.task} is in {under[need.task]} and {need.asked}; drop one"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what lm-eval and datasets tell each other; errors stay."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _hub(needs: Sequence[Need], *, library: _Library) -> Iterator[str]:
    """Whether the hub can be asked: yields why not, or nothing. Where not, nobody asks it within the block."""
    switches = (library.hub, library.datasets.config)
    before = [switch.HF_HUB_OFFLINE for switch in switches]
    absent = ""
    if any(before):
        absent = "HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set"
    elif not all(need.is_local for need in needs) and not _answers(library.hub.ENDPOINT):
        absent = f"{library.hub.ENDPOINT} cannot be reached"
    try:
        for switch in switches:
            switch.HF_HUB_OFFLINE = bool(absent) or switch.HF_HUB_OFFLINE
        yield absent
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.HF_HUB_OFFLINE = value


def _answers(endpoint: str) -> bool:
    """Whether anything answers there, directly or through a proxy; a refusal is an answer."""
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=_PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _require_data(needs: Sequence[Need], *, library: _Library, absent: str, folder: Path | None) -> None:
    """Raise ValueError that lists every data set which is not at hand and cannot be fetched."""
    missing: dict[str, list[Need]] = {}
    for need in needs:
        if need.dataset is None or not (need.is_local or absent):
            continue  # made by the task's code, or fetched when it is loaded
        why = _not_at_hand(need, library=library)
        if why and need.is_local:
            raise ValueError(
                f"task {need.task} reads files that are not there ({why}); relative paths count from {Path.cwd()}"
            )
        if why:
            missing.setdefault(need.dataset, []).append(need)
    if not missing:
        return
    lines = [f"  {dataset}, for {_several([need.task for need in of])}" for dataset, of in missing.items()]
    asked = list(dict.fromkeys(need.asked for of in missing.values() for need in of))
    own = "" if folder is None else f"include_path='{folder}'"
    raise ValueError(
        f"--harness needs data sets that are not on this machine, and {absent}:\n"
        + "\n".join(lines)
        + "\nFetch them on a machine with a network,\n"
        f'  python -c "from lm_eval.tasks import TaskManager; TaskManager({own}).load({asked})"\n'
        "copy its folder ~/.cache/huggingface/datasets here, and set HF_DATASETS_CACHE to the copy "
        f"(now {library.datasets.config.HF_DATASETS_CACHE})"
    )


def _not_at_hand(need: Need, *, library: _Library) -> str:
    """Why the data of a task cannot be opened without the hub; empty where they can."""
    try:
        library.datasets.load_dataset_builder(need.dataset, need.configuration, **need.arguments)
    except (OSError, ValueError) as error:  # not found, no such configuration; ConnectionError is an OSError
        return str(error).partition("\n")[0] or type(error).__name__
    return ""


def _several(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _load(name: str, *, manager: Any) -> list[Any]:
    """The task or group of a name, or the tasks of a tag, with their data."""
    try:
        loaded = manager.load([name])
    except Exception as error:  # whatever a task's own code and its data bring forth
        raise ValueError(f"task {name} cannot be loaded: {error}; see that its file and its data are whole") from error
    group = loaded["groups"].get(name)
    return list(loaded["tasks"].values()) if group is None else [group]


def _open_model(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a folder: local files, safetensors, no code of the model's own."""
    path = str(folder.resolve())
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto", use_safetensors=True, **local)
        tokenizer = AutoTokenizer.from_pretrained(path, **local)
    except Exception as error:
        raise ValueError(f"{folder} must hold a model and its tokenizer, it cannot be loaded: {error}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def _write(output: Path, *, report: Mapping[str, Any]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    draft = output / f".{RESULT}.unfinished"
    draft.write_text(json.dumps(report, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    draft.replace(output / RESULT)


def _show(report: Mapping[str, Any]) -> None:
    rows: list[Sequence[object]] = []
    for task, metrics in report["results"].items():
        documents = report["n-samples"].get(task, {}).get("effective", "")
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{filtered}")
            name = metric if filtered == "none" else f"{metric} ({filtered})"
            spread = f"{error:.4f}" if isinstance(error, float) else ""
            rows.append((task, report["n-shot"].get(task, ""), documents, name, _number(value), spread))
    rows += [(name, "", "", "average", _number(value), "") for name, value in report["averages"].items()]
    limit = "" if report["limit"] is None else f", the first {report['limit']} documents of each"
    table(f"{report['model']}{limit}", ("task", "shots", "documents", "metric", "value", "±"), rows)


def _number(value: object) -> str:
    """Four decimals; four digits for what is too large to be read with decimals."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3e}"
