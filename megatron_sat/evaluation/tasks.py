"""Benchmark tasks on either kind of model: a checkpoint is exported to a folder that passes."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sat.convert.conversion import export_model
from megatron_sat.evaluate.harness import run_harness
from megatron_sat.evaluation.models import Subject


def run_tasks(
    subject: Subject,
    *,
    tasks: Sequence[str],
    tasks_folder: Path | None,
    limit: int | None,
    batch_size: int,
    output: Path,
) -> None:
    """Run lm-eval's tasks, write ``output``/harness.json. Arguments as in `harness.run_harness`.

    The work of one process. Raises ValueError for whatever exporting or lm-eval lacks.
    """
    asked: dict[str, Any] = {
        "tasks": tasks,
        "tasks_folder": tasks_folder,
        "limit": limit,
        "batch_size": batch_size,
        "output": output,
    }
    if subject.kind == "hf":
        run_harness(subject.folder, **asked)
        return
    with tempfile.TemporaryDirectory() as folder:

        def exported() -> Path:
            """Asked for when tasks and data are known to be there: an export of a large model takes its time."""
            hf = Path(folder) / "hf"
            export_model(subject.folder, hf, step=subject.step or None)
            return hf

        run_harness(exported, **asked, about={"model": str(subject.folder), "step": subject.step})
