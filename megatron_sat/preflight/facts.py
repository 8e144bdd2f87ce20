"""What must be the same on all ranks of a run, and the sentence that names those on which it is not.

Versions, GPU, the package's own source, every setting, and the files that a run reads as each host sees them.
"""

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

import megatron_sat
from megatron_sat.checkpoint.folder import TRACKER
from megatron_sat.checkpoint.header import plain
from megatron_sat.config import Config
from megatron_sat.data.domains import parse_domains
from megatron_sat.data.index_file import bin_path, idx_path
from megatron_sat.data.side_file import side_path

CLOCK_TOLERANCE_SECONDS = 30.0
"""Clocks further apart than this are refused: logs of several hosts could not be laid beside each other."""
_OF_RANK_0 = ("tensorboard_dir", "log_jsonl", "config_logger_dir")
"""Settings that may differ, since one rank alone obeys them."""
_ENDS = 1 << 16
"""Bytes at each end of a large file that are compared."""

Facts = Mapping[str, str]
"""What must be the same everywhere, by name."""


def facts_of(config: Config, *, cuda: bool) -> dict[str, str]:
    """What this rank runs with: versions, GPU, settings, data."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron-core": version("megatron-core"),
        "megatron_sat": f"{megatron_sat.__version__} ({_source()})",
    }
    if cuda:
        found |= {"GPU": torch.cuda.get_device_name(), "CUDA": str(torch.version.cuda)}
    for key, value in plain(config.settings).items():
        if key not in _OF_RANK_0:
            found[f"--{key.replace('_', '-')}"] = json.dumps(value)
    return found | fingerprints(config)


def _source() -> str:
    """Digest of the package's source: an installed version number says little of a working copy."""
    digest = hashlib.sha256()
    root = Path(megatron_sat.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def fingerprints(config: Config) -> dict[str, str]:
    """Of the files that a run reads, as this host sees them: data sets, tokenizer, which checkpoint is the newest."""
    found = {}
    for key in ("data_path", "train_data_path", "valid_data_path", "test_data_path", "replay_data_path"):
        values = getattr(config.data, key)
        for domain in parse_domains(values, flag=key) if values else ():
            files = [side_path(domain.prefix), idx_path(domain.prefix), bin_path(domain.prefix)]
            found[f"data {domain.prefix}"] = _of_files(files)
    if config.tokenizer.model is not None:
        model = Path(config.tokenizer.model)
        files = sorted(model.glob("*token*")) if model.is_dir() else [model]
        found[f"tokenizer {model}"] = _of_files(files)
    if config.checkpoint.load is not None:
        tracker = Path(config.checkpoint.load) / TRACKER
        found[f"checkpoint {tracker}"] = tracker.read_text().strip() if tracker.is_file() else "missing"
    return found


def _of_files(paths: Sequence[Path]) -> str:
    """A digest of names, sizes and both ends of files; "missing" where none is there."""
    digest, there = hashlib.sha256(), False
    for path in paths:
        if not path.is_file():
            continue
        there = True
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            digest.update(file.read(_ENDS))
    return digest.hexdigest()[:12] if there else "missing"


def differences(facts: Sequence[Facts], *, hosts: Sequence[str]) -> list[str]:
    """A sentence for each fact that is not the same on all ranks; of equal camps that of rank 0 is right."""
    found = []
    for name in dict.fromkeys(name for each in facts for name in each):
        values = [each.get(name, "nothing") for each in facts]
        counts = Counter(values)
        if len(counts) == 1:
            continue
        usual = max(counts, key=lambda value: (counts[value], value == values[0]))
        odd = [
            f"{value} on {where([rank for rank, has in enumerate(values) if has == value], hosts=hosts)}"
            for value in counts
            if value != usual
        ]
        rule = f"{name} must be the same on all ranks, it is {usual} on most and {', '.join(odd)}"
        found.append(f"{rule}; {_way_out(name)}")
    return found


def _way_out(name: str) -> str:
    if name.startswith("--"):
        return "give every host the same command line and files of settings"
    if name.split()[0] in ("data", "tokenizer", "checkpoint"):
        return "let all hosts see the same files"
    return "use one installation on all hosts, of one kind"


def where(ranks: Sequence[int], *, hosts: Sequence[str]) -> str:
    """ranks 3 and 8-15 as "rank(s) 3, 8-15 (host a, b)"."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    said = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    names = ", ".join(dict.fromkeys(hosts[rank] for rank in ranks))
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {said} ({names})"


def clocks_apart(clocks: Sequence[float], *, hosts: Sequence[str]) -> list[str]:
    """A sentence where clocks, all read at about the same time, are too far from their median."""
    middle = median(clocks)
    odd = [rank for rank, each in enumerate(clocks) if abs(each - middle) > CLOCK_TOLERANCE_SECONDS]
    if not odd:
        return []
    worst = max((clocks[rank] - middle for rank in odd), key=abs)
    rule = f"clocks must agree within {CLOCK_TOLERANCE_SECONDS:g} s"
    return [f"{rule}, {where(odd, hosts=hosts)} is off by up to {worst:+.0f} s; set them by NTP"]
