"""Stands where a trip's interpreter stands: leaves what each tool would leave, in no time, and counts its calls.

It runs by itself in a bare interpreter and imports nothing of the project. FAIL names a piece of a command that fails.
"""

import json
import os
import sys
from pathlib import Path

ARGV = sys.argv[1:]


def value(flag: str) -> str:
    return ARGV[ARGV.index(flag) + 1]


def values(flag: str) -> list[str]:
    rest = ARGV[ARGV.index(flag) + 1 :]
    return rest[: next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def evaluate() -> str:
    bits = 3.0 if "--load" in ARGV or "export" in value("--hf") else 4.0
    domain = {"documents": 1, "tokens": 10, "characters": 20, "bytes": 60, "nats": bits * 10}
    names = [pair.split("=")[0] for pair in values("--data")]
    sizes = {"seq_length": int(value("--seq-length")), "stride": 1}
    model = {"name": value("--name"), "model": "m", "kind": "hf", "step": None, "tokenizer": "t", **sizes}
    result = {**model, "dtype": value("--dtype"), "average": {}, "domains": dict.fromkeys(names, domain)}
    write(Path(value("--output")) / "result.json", json.dumps(result))
    return "evaluate " + value("--name")


def extend() -> str:
    entry = {"characters": 10, "before": 2.0, "after": 1.0}
    report = {
        "old_tokens": 300,
        "new_tokens": int(value("--add")),
        "proofs": [{"statement": "s", "tried_on": "t", "offenders": []}],
        "tokens_per_character": [{"domain": name, **entry} for name in ("zh/a", "en/a")],
        "loss_per_character": {"characters": 10, "before": 4.0, "after": 4.5},
    }
    write(Path(value("--output")) / "vocabulary_extension.json", json.dumps(report))
    return "vocabulary"


def prepare() -> str:
    totals = {"documents": 1, "tokens": 5, "characters": 10, "bytes": 10}
    fixed = {"tokenizer": "t", "fingerprint": "f", "vocab_size": 9, "eod": 0, "options": {}, "sources": []}
    side = {**fixed, "totals": totals, "dtype": "uint16", "bin_bytes": 1, "format": 1}
    for pair in ARGV[ARGV.index("--output") + 2 :]:
        write(Path(value("--output")) / f"{pair.split('=')[0]}.json", json.dumps(side))
    return "text"


def train() -> str:
    steps, pace = int(value("--train-iters")), 0.5 if "--sat-schedule" in ARGV else 1.0
    folder = Path(value("--save"))
    shared = {"step": steps, "elapsed_seconds": steps * pace, "loss": 2.0}
    flops = {"executed_flops": 1e9 * pace * steps, "consumed_tokens": 100 * steps}
    rates = {"nominal_omission_rate": 0.0, "omission_rate": {}}
    lines = [
        {"kind": "train", **shared, **flops, **rates},
        {"kind": "validation", **shared, "loss": {"zh": 2, "en": 2}},
    ]
    write(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write(folder / "latest_checkpointed_iteration.txt", str(steps))
    return f"train {folder.name} {steps}{'' if '--finetune' in ARGV else ' going on'}"


def convert() -> str:
    target = "--save" if ARGV[1] == "import" else "--hf"
    write(Path(value(target)) / "model.yaml", "")
    return ARGV[1]


tools = {
    "tools/evaluate.py": evaluate,
    "tools/extend_vocab.py": extend,
    "tools/convert_checkpoint.py": convert,
    "pretrain_sat.py": train,
    "-m": prepare,
}
called = tools[ARGV[0]]()
failing = os.environ.get("FAIL")
with Path(os.environ["CALLS"]).open("a") as calls:
    calls.write(called + "\n")
if failing and failing in called:
    print(f"{called} fails as it was told to")
    sys.exit(1)
