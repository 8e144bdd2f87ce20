"""The whole table of settings: the method's, Megatron-LM's, megatron.core's fields and what is idle."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.metadata import version

from megatron_sat.flags import megatron_lm, sat
from megatron_sat.flags.fields import SECTIONS, setting_of
from megatron_sat.flags.flag import Flag, underscored
from megatron_sat.flags.idle import FIELDS as IDLE_FIELDS
from megatron_sat.flags.idle import idle_flags
from megatron_sat.flags.known import NAMES
from megatron_sat.flags.refused import refusal

_ELSEWHERE: dict[str, str] = {
    "model": """num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels
    normalization layernorm_epsilon qk_layernorm add_bias_linear add_qkv_bias hidden_dropout attention_dropout
    init_method_std embedding_init_method_std""",
    "parallel": """tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size
    sequence_parallel num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
    pipeline_model_parallel_layout account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
    pipeline_model_parallel_comm_backend""",
}
"""Fields of TransformerConfig that a reader looks for under another headline."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Every setting, by key and by name."""

    flags: dict[str, Flag]
    """By key, in the order in which they are printed."""
    by_name: dict[str, Flag]
    """By name on the command line."""

    def find(self, key: str) -> Flag | None:
        """The setting that a file's key means: a key, or a name without its dashes."""
        plain = underscored(key)
        return self.flags.get(plain) or self._by_plain_name.get(plain)

    @property
    def _by_plain_name(self) -> dict[str, Flag]:
        return {underscored(name): flag for name, flag in self.by_name.items()}

    @property
    def working(self) -> list[Flag]:
        """The settings that do something."""
        return [flag for flag in self.flags.values() if not flag.idle]


@cache
def table() -> Table:
    """The table for the installed megatron.core."""
    flags: dict[str, Flag] = {}
    for section, own in (*megatron_lm.SECTIONS.items(), *sat.SECTIONS.items()):
        flags |= {flag.key: replace(flag, section=section) for flag in own}
    for flag in (*_field_flags(), *idle_flags()):
        flags.setdefault(flag.key, flag)
    by_name: dict[str, Flag] = {}
    for flag in flags.values():
        for name in flag.all_names:
            assert name not in by_name, f"{name} names both {by_name[name].key} and {flag.key}"
            by_name[name] = flag
    return Table(flags=flags, by_name=by_name)


def _field_flags() -> Iterable[Flag]:
    """Settings out of megatron.core's classes, without those whose name is refused."""
    for cls, section in SECTIONS.items():
        for field in fields(cls):
            flag = setting_of(field)
            if flag is not None and not any(refusal(name) for name in flag.all_names):
                where = next(
                    (name for name, keys in _ELSEWHERE.items() if field.name in keys.split()), section
                )
                yield replace(
                    flag,
                    section=where,
                    help=f"{cls.__name__}.{field.name}",
                    idle=IDLE_FIELDS.get(field.name, ""),
                )


def complaint(name: str) -> str:
    """What to say of a name that is no setting: refused, of another release, or unknown."""
    if (reason := refusal(name)) is not None:
        return f"{name} is not supported: {reason}"
    if name in NAMES:
        return (
            f"{name} must be a setting of the installed megatron.core, {version('megatron-core')} has none "
            "of that name; install 0.19 or leave it out"
        )
    near = difflib.get_close_matches(name, list(table().by_name), n=1, cutoff=0.0)
    return f"{name} is unknown; the nearest known is {near[0]}, --help lists all"
