"""What must hold between the replicas of a sparse run: what each chooses, and what they send each other."""

from megatron_sat.flags.defaults import data_parallel_size
from megatron_sat.flags.flag import Settings


def check_replicas(s: Settings, *, world_size: int) -> None:
    """Raise ValueError where replicas would drift apart, lose a choice on a resume, or have nothing to send."""
    replicas = data_parallel_size(s, world_size=world_size)
    if s["sat_dp_selection"] == "local":
        _check_local(s, replicas=replicas)
    if s["sat_sparse_reduce"] and replicas * s["context_parallel_size"] == 1:
        raise ValueError(
            "--sat-sparse-reduce has no effect with one replica and --context-parallel-size 1, where no gradient is "
            "reduced; leave it out"
        )


def _check_local(s: Settings, *, replicas: int) -> None:
    """Replicas that choose for themselves."""
    if replicas == 1:
        raise ValueError("--sat-dp-selection local has no effect with one replica; leave it out")
    if s["sat_sparse_reduce"]:
        raise ValueError(
            "--sat-sparse-reduce needs --sat-dp-selection shared, got local: replicas would send each other different "
            "rows; leave one of them out"
        )
    if s["sat_omitted_neurons"] == "frozen":
        raise ValueError(
            "--sat-omitted-neurons frozen needs --sat-dp-selection shared, got local: each replica would hold "
            "other weights still, and the replicas would drift apart; leave one of them out"
        )
    if s["sat_selection_interval"] > 1 or s["sat_statistics"] == "lagged":
        raise ValueError(
            f"--sat-dp-selection local needs --sat-selection-interval 1 and --sat-statistics fresh, got "
            f"{s['sat_selection_interval']} and {s['sat_statistics']}: a checkpoint carries one replica's choice; "
            "use --sat-dp-selection shared"
        )
