"""The reference of all settings: ``python -m megatron_sat.flags.document > docs/flags.md``."""

import sys
from collections.abc import Iterator

from megatron_sat.flags.fields import GIVEN_ELSEWHERE
from megatron_sat.flags.flag import Flag
from megatron_sat.flags.refused import REASONS
from megatron_sat.flags.table import table

HEAD = """# Settings of `pretrain_sat.py`

Made by `python -m megatron_sat.flags.document` with megatron-core 0.19; a test compares. Names are those of
Megatron-LM where it has one, and so are types and defaults. Fields of megatron.core's `TransformerConfig`,
`DistributedDataParallelConfig` and `OptimizerConfig` to which it gives no name are settings of their own
names. With megatron-core 0.16.1 the fields that it lacks are refused by name.

In a YAML file (`--config FILE.yaml`) a setting is a key: as below, or any of its names without the leading
dashes; flat, or under the headlines below. Of several files a later one overrides an earlier one, and the command
line all of them. `--print-config` prints the resolved configuration, which can be given back as a file; the same text
is saved with the run.

`--dry-run --world-size 32 --gpu a800 --gpus-per-host 8` beside the settings says what the run would be on that cluster,
its memory included, and ends ([launching.md](launching.md)).

An empty default is decided by the machine, the layout or other settings, or there is none.
"""


def markdown() -> str:
    """The whole page."""
    sections: dict[str, list[Flag]] = {}
    for flag in table().working:
        sections.setdefault(flag.section, []).append(flag)
    parts = [HEAD]
    for title, flags in sections.items():
        parts.append(f"\n## {title}\n\n| key | names | value | default | meaning |\n|---|---|---|---|---|\n")
        parts += [_row(flag) for flag in flags]
    return "".join([*parts, *_elsewhere(), *_idle(), *_refused()])


def _row(flag: Flag) -> str:
    names = " ".join(f"`{name}`" for name in flag.all_names)
    one = " ".join(f"`{choice}`" for choice in flag.choices) if flag.choices else flag.kind
    value = f"{one}, several" if flag.many else one
    default = "" if flag.default in (None, "") else f"`{flag.default}`"
    return f"| `{flag.key}` | {names} | {value} | {default} | {flag.help} |\n"


def _elsewhere() -> Iterator[str]:
    yield "\n## Fields that follow from other settings\n\n"
    for name, source in GIVEN_ELSEWHERE.items():
        yield f"- `{name}`: {source}\n"


def _idle() -> Iterator[str]:
    yield "\n## Taken, and without effect\n\nEach is remarked upon once when it is given.\n\n"
    reasons: dict[str, list[str]] = {}
    for flag in table().flags.values():
        if flag.idle:
            reasons.setdefault(flag.idle, []).extend(f"`{name}`" for name in flag.all_names)
    for reason, names in reasons.items():
        yield f"- {reason}: {' '.join(names)}\n"


def _refused() -> Iterator[str]:
    yield "\n## Refused\n\nA `*` stands for any characters.\n\n"
    reasons: dict[str, list[str]] = {}
    for reason, patterns in REASONS:
        reasons.setdefault(reason, []).extend(f"`--{pattern}`" for pattern in patterns.split())
    for reason, names in reasons.items():
        yield f"- {reason}: {' '.join(names)}\n"


if __name__ == "__main__":
    sys.stdout.write(markdown())
