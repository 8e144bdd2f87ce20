"""Whether two runs are the same bit for bit: every loss and norm on the way, and every weight at the end.

    python -m megatron_sat.compare.same ONE OTHER --output FILE

Figures of time are left out, and so is what a controller of neurons keeps for itself. Tensors are read one at a time.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_sat.checkpoint import folder as folders
from megatron_sat.checkpoint.hf_stream import read_tensor
from megatron_sat.checkpoint.trust import read_index
from megatron_sat.compare.runs import METRICS

_TIMED = ("step_seconds", "tokens_per_second", "executed_tflops", "dense_equivalent_tflops", "elapsed_seconds")
_OF_THE_METHOD = ("nominal_omission_rate", "omission_rate")
_OWN = "sat"
"""How the keys of tensors begin that are the controller's."""


def difference(one: Path, other: Path) -> str | None:
    """What differs first between two runs' folders; None: nothing.

    Raises ValueError where one of them has no records or no checkpoint.
    """
    return _records_differ(one, other) or _weights_differ(one, other)


def _records_differ(one: Path, other: Path) -> str | None:
    mine, theirs = _records(one), _records(other)
    if len(mine) != len(theirs):
        return f"{len(mine)} records against {len(theirs)}"
    for left, right in zip(mine, theirs, strict=True):
        for key in left.keys() | right.keys():
            if str(left.get(key)) != str(right.get(key)):  # as text: a NaN is as good as itself
                return f"{key} of step {left.get('step')}: {left.get(key)} against {right.get(key)}"
    return None


def _records(folder: Path) -> list[dict[str, Any]]:
    path = folder / METRICS
    if not path.is_file():
        raise ValueError(f"{folder} must hold the {METRICS} of a run, it does not; train with --save")
    left_out = {*_TIMED, *_OF_THE_METHOD}
    entries: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    pairs = zip(entries, [*entries[1:], {}], strict=True)
    return [{key: entry[key] for key in entry.keys() - left_out} for entry, after in pairs if not _again(entry, after)]


def _again(entry: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether a record is an evaluation that the next one repeats: a finished run that is started again does so.

    The last one counts, as in `runs.read_run`.
    """
    return all(each.get("kind") == "validation" for each in (entry, after)) and entry["step"] == after["step"]


def _weights_differ(one: Path, other: Path) -> str | None:
    mine, theirs = _newest(one), _newest(other)
    indices = [read_index(folder) for folder in (mine, theirs)]
    left, right = (_tensors(index) for index in indices)
    if alone := left ^ right:
        return f"the tensor {min(alone)} is in one checkpoint alone"
    for key in sorted(left):
        a, b = (
            read_tensor(folder, index=index, key=key, layer=None)
            for folder, index in zip((mine, theirs), indices, strict=True)
        )
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{key} is {tuple(a.shape)} {a.dtype} against {tuple(b.shape)} {b.dtype}"
        if not torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)):
            return f"{key}, by {(a.double() - b.double()).abs().max().item():.3g} at most"
    return None


def _newest(root: Path) -> Path:
    return folders.find(root, step=None)[0]


def _tensors(index: Metadata) -> set[str]:
    """Keys of what the model and its optimizer hold."""
    stored = index.state_dict_metadata.items()
    return {key for key, of in stored if isinstance(of, TensorStorageMetadata) and not key.startswith(_OWN)}


def main(argv: Sequence[str]) -> None:
    """Compare, and write what differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("one", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="a JSON file")
    args = parser.parse_args(argv)
    found = difference(args.one, args.other)
    args.output.write_text(json.dumps({"one": str(args.one), "other": str(args.other), "difference": found}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
