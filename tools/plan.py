#!/usr/bin/env python3
"""What a run will take before it is started: seconds a step of every rung, time saved, memory, operations.

    tools/plan.py --hf DIR --world-size 32 --tensor-model-parallel-size 2 --sat-schedule ladder ... --network 25
    tools/plan.py --config RUN.yaml --world-size 8 --gpu h100 --hardware h100
    tools/plan.py --compare benchmarks/results/step.json

The model is that of a Hugging Face folder, of a run's YAML files, or of flags; the rest are pretrain_sat.py's own
flags, and nothing need be said of what time does not depend on (text, learning rate). Times come from what one device
was measured to do (benchmarks/results/gemm-*.json); --compare sets predictions beside a benchmark's result, with the
flags that it ran with, and those of this line after them. docs/performance.md says what is added up.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sat import cpu, log

log.quiet_libraries()
cpu.install()

from benchmarks.program import CONSTANT, ROOT, Size, flags
from megatron_sat import cli, plan
from megatron_sat.build import kept_of
from megatron_sat.config import Config
from megatron_sat.estimate.accuracy import (
    CHANGE,
    ENOUGH,
    Compared,
    compare_layers,
    compare_runs,
    compare_steps,
    kind_of,
)
from megatron_sat.estimate.asked import ask
from megatron_sat.estimate.benched import Benched, read_benched
from megatron_sat.estimate.forecast import communication, forecast, layer_of, spread_of, step_of
from megatron_sat.estimate.hardware import Hardware, find, load
from megatron_sat.estimate.links import links_of
from megatron_sat.model.flops import ModelShape
from megatron_sat.rehearsal.cluster import Cluster
from megatron_sat.rehearsal.rehearse import model_shape, take, vocabulary_rows

USAGE_ERROR = 2
RESULTS = ROOT / "benchmarks" / "results"


def main(argv: Sequence[str]) -> int:
    """Do what the command line asks for. Returns the exit code; 2 for what cannot be done, said on stderr."""
    args, rest = _parser().parse_known_args(argv)
    try:
        hardware = load(_table(args.hardware))
        if args.compare is None:
            _predict(args, rest, hardware=hardware)
        else:
            _compare(args, rest, hardware=hardware)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"plan.py: {error}\n")
        return USAGE_ERROR
    except cli.ParsedExit as asked:
        return int(asked.code or 0)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, help="folder of a Hugging Face model; its config.json is enough")
    parser.add_argument("--hardware", help="a measured table, or part of a device's name; left out: the only one there")
    parser.add_argument("--network", type=float, help="GB/s that each GPU sends to other hosts")
    parser.add_argument("--json", type=Path, help="file for the prediction, or the comparison")
    parser.add_argument("--compare", type=Path, help="what bench_step, bench_ladder or bench_layer wrote")
    parser.allow_abbrev = False
    return parser


def _table(named: str | None) -> Path:
    return Path(named) if named is not None and named.endswith(".json") else find(RESULTS, name=named)


def _predict(args: argparse.Namespace, rest: Sequence[str], *, hardware: Hardware) -> None:
    cluster, line = take(["--dry-run", *rest], world_size=1)
    assert cluster is not None, "--dry-run asks for one"
    with tempfile.TemporaryDirectory() as folder:
        cuda = _is_gpu(hardware)
        config = ask(line, hf=args.hf, world_size=cluster.world_size, cuda=cuda, folder=Path(folder))
    links = links_of(hardware, cluster=cluster, network=None if args.network is None else 1e9 * args.network)
    found = forecast(config, shape=_shape(config), hardware=hardware, cluster=cluster, links=links)
    plan.show(found.plan)
    log.table("predicted", found.columns(), found.rows())
    log.table("what a step goes to, ms", ("part", "dense", "first rung"), found.parts())
    for sentence in found.lines():
        log.say(sentence)
    if args.json is not None:
        args.json.write_text(json.dumps(found.as_dict(), indent=1) + "\n")


def _compare(args: argparse.Namespace, rest: Sequence[str], *, hardware: Hardware) -> None:
    measured = json.loads(args.compare.read_text())
    kind, benched = kind_of(measured), read_benched(measured)
    if benched.device != hardware.name:
        raise ValueError(
            f"--compare ({benched.device}) must come from the device of the table ({hardware.name}), it does not; "
            "choose another with --hardware"
        )
    more = [*benched.flags, *rest]
    if kind == "layer":
        rows = compare_layers(measured["rows"], predict=_layers(measured["sequence"], more, hardware=hardware))
    else:
        predict = _steps(Size(**measured["size"]), more, benched=benched, hardware=hardware)
        rows = (
            compare_steps(measured["rows"], predict=predict)
            if kind == "step"
            else compare_runs(measured["runs"], predict=predict)
        )
    if not rows:
        raise ValueError(
            f"--compare must hold steps that the program's default takes (packed weights; of a rung at least "
            f"{CHANGE + ENOUGH}), {args.compare} has none; measure longer"
        )
    _show(rows, out=args.json)


def _show(rows: Sequence[Compared], *, out: Path | None) -> None:
    cells = [(r.what, f"{1e3 * r.predicted:.2f}", f"{1e3 * r.measured:.2f}", f"{r.error:+.1%}") for r in rows]
    log.table("predicted and measured, ms", ("what", "predicted", "measured", "error"), cells)
    for row in rows:
        if row.beyond is not None:
            log.say(f"{row.what}: first ones and changes of rung took {row.beyond:.2f} s more, which is not predicted")
    log.say(f"largest error {max(abs(row.error) for row in rows):.1%}")
    if out is not None:
        out.write_text(json.dumps([{**vars(row), "error": row.error} for row in rows], indent=1) + "\n")


def _ran(size: Size, more: Sequence[str], *, ranks: int, hardware: Hardware) -> Config:
    """The configuration that a benchmark of this size ran."""
    cuda = _is_gpu(hardware)
    line = flags(size, data="unsaid", cuda=cuda, steps=10**3, method=CONSTANT, more=" ".join(more))
    return ask(line, hf=None, world_size=ranks, cuda=cuda, folder=Path())


def _steps(size: Size, more: Sequence[str], *, benched: Benched, hardware: Hardware) -> Any:
    ranks = size.replicas * benched.tensor
    cluster = Cluster(gpu=benched.gpu(ranks=ranks), world_size=ranks, per_host=ranks)  # torchrun's, on one host
    more = ["--tensor-model-parallel-size", str(benched.tensor), *more]
    config = _ran(size, more, ranks=ranks, hardware=hardware)
    shape = _shape(config)
    spread = spread_of(config, cluster=cluster, links=links_of(hardware, cluster=cluster, network=None))
    for sentence in communication(spread):
        log.say(f"note: {sentence}")

    def predict(rate: Fraction) -> float:
        kept = kept_of(config, shape=shape, rate=rate)
        graphs = config.layer_graphs
        return step_of(config, shape=shape, kept=kept, hardware=hardware, spread=spread, graphs=graphs).seconds

    return predict


def _layers(length: int, more: Sequence[str], *, hardware: Hardware) -> Any:
    def predict(model: str, tokens: int, rate: Fraction) -> float:
        size = Size(model=model, layers=1, seq_length=length, micro_batch_size=tokens // length, micro_batches=1)
        config = _ran(size, more, ranks=1, hardware=hardware)
        return layer_of(config, shape=_shape(config), rate=rate, hardware=hardware)

    return predict


def _shape(config: Config) -> ModelShape:
    return model_shape(config, rows=vocabulary_rows(config)[0])


def _is_gpu(hardware: Hardware) -> bool:
    return hardware.name != "CPU"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
