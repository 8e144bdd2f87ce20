"""Stands where a comparison's interpreter stands: leaves what each command would leave, at once, and counts its calls.

It runs by itself in a bare interpreter and imports nothing of the project. FAIL names a piece of a call that fails.
Dense steps take a second, sparse ones PACE, and BEGINS once before them. A run's loss follows from its settings and its
seed alone. In the folder DEVICES a training run holds its device for a moment, and fails where another one has it; it
leaves there how it ran. It waits for its turn where it was given one.
"""

import fcntl
import json
import os
import sys
import time
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


def prepare() -> str:
    totals = {"documents": 1, "tokens": 5, "characters": 10, "bytes": 10}
    fixed = {"tokenizer": "t", "fingerprint": "f", "vocab_size": 9, "eod": 0, "options": {}, "sources": []}
    side = {**fixed, "totals": totals, "dtype": "uint16", "bin_bytes": 1, "format": 1}
    if "--output-prefix" in ARGV:
        write(Path(value("--output-prefix") + ".json"), json.dumps({**side, "options": {"kind": "conversations"}}))
        return "prepare " + Path(value("--output-prefix")).name
    for pair in ARGV[ARGV.index("--output") + 2 :]:
        write(Path(value("--output")) / f"{pair.split('=')[0]}.json", json.dumps(side))
    return "text"


def occupy(folder: Path) -> None:
    """Raises FileExistsError where another run is on the device."""
    if (devices := os.environ.get("DEVICES")) is None:
        return
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "any")
    held = Path(devices, f"{device}.held")
    turn = Path(os.environ.get("MEGATRON_SAT_TURN", os.devnull))
    turn.parent.mkdir(exist_ok=True)
    with turn.open("w") as file:
        if "MEGATRON_SAT_TURN" in os.environ:
            fcntl.flock(file, fcntl.LOCK_EX)
        with held.open("x"):
            time.sleep(0.1)
        held.unlink()
    Path(devices, f"{folder.parent.name}-{folder.name[-1]}").write_text(f"{device} {os.environ['OMP_NUM_THREADS']}")


def train() -> str:
    occupy(Path(value("--into")))
    settings: dict[str, object] = {}
    for path in values("--config"):
        settings |= json.loads(Path(path).read_text())
    steps, seed = int(value("--train-iters")), int(value("--seed"))
    sparse = settings.get("sat_omission_rate", 0) != 0
    pace = float(os.environ.get("PACE", "0.5")) if sparse else 1.0
    folder = Path(value("--into"))
    loss = {pair.split("=")[0]: 9 - steps / 100 + seed / 10 + sparse for pair in values("--valid-data-path")}
    begun = float(os.environ.get("BEGINS", "0")) if sparse else 0.0
    shared = {"step": steps, "elapsed_seconds": begun + steps * pace, "loss": 2.0}
    flops = {"executed_flops": 1e9 * pace * steps, "consumed_tokens": 100 * steps}
    rates = {"nominal_omission_rate": 0.0, "omission_rate": {}}
    half = {"step": steps // 2, "elapsed_seconds": begun + steps // 2 * pace}
    lines = [{"kind": "train", **shared, **flops, **rates, **half}] if steps > 1 else []
    lines += [{"kind": "train", **shared, **flops, **rates}, {"kind": "validation", **shared, "loss": loss}]
    write(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write(folder / "latest_checkpointed_iteration.txt", str(steps))
    write(folder / "plan.json", json.dumps({"epochs": {"zh": 0.25}}))
    measured = {"peak_memory_bytes": 2**30, "device": "cpu", "commits": ["abc"]}
    write(folder / "measured-here-1.json", json.dumps(measured))
    going_on = "--load" in ARGV and value("--load") == value("--into")
    return f"{folder.parent.name}/{folder.name[-1]} {steps}{' going on' if going_on else ''}"


def same() -> str:
    one, other = (json.loads((Path(p) / "metrics.jsonl").read_text().splitlines()[-1]) for p in ARGV[2:4])
    equal = one["loss"] == other["loss"] and not os.environ.get("BROKEN")
    write(Path(value("--output")), json.dumps({"difference": None if equal else "loss of step 1"}))
    return f"same {Path(value('--output')).parent.name}"


def imported() -> str:
    write(Path(value("--save")) / "model.yaml", "{}")
    return "import"


tools = {
    "megatron_sat.compare.measured": train,
    "megatron_sat.compare.same": same,
    "megatron_sat.compare.prepare": prepare,
    "tools/prepare_sft.py": prepare,
    "tools/convert_checkpoint.py": imported,
}
called = next(tool for word, tool in tools.items() if word in ARGV)()
failing = os.environ.get("FAIL")
with Path(os.environ["CALLS"]).open("a") as calls:
    calls.write(called + "\n")
if failing and failing in called:
    print(f"{called} fails as it was told to")
    sys.exit(1)
