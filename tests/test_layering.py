"""The house stands as tests/layering.toml says, and the checker that says so sees what it should see."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import layering
from tests.helpers.layering import House, read_house

ROOT = Path(__file__).resolve().parent.parent
DOCSTRING = '"""A room."""\n'


@pytest.fixture(scope="module")
def house() -> House:
    return read_house(ROOT)


@pytest.mark.parametrize("rule", layering.RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_the_rule(rule: Callable[[House], list[str]], house: House) -> None:
    breaches = rule(house)
    assert not breaches, "\n".join(["", *breaches])


def test_the_checker_reads_the_whole_house(house: House) -> None:
    """A checker that found no file, or no import, would be content with anything."""
    assert {"megatron_sat.cpu", "megatron_sat.sparsity.selection", "scripts.lock"} <= house.modules
    assert sum(found.name.startswith("torch") for file in house.source for found in file.imports) > 10
    assert "tests/test_layering.py" in {file.path for file in house.tests}


def test_the_walls_stand_in_the_table(house: House) -> None:
    """The rows that may not be loosened quietly."""
    assert house.may_import("sparsity") == set()
    assert not {"sparsity", "layers", "model"} & house.may_import("engines")
    assert house.table["max_lines"] == 350
    doors = house.table["doors"]
    assert not any("sparsity" in room for door in ("megatron.core", "numpy") for room in doors[door])
    own = "megatron_sat/"
    inside = {door: [room for room in rooms if room.startswith(own)] for door, rooms in doors.items()}
    training = ("sparsity", "layers", "model", "engines", "training")
    for door in ("transformers", "sentencepiece", "tokenizers", "safetensors"):
        assert not any(room.startswith(own + wing) for room in inside[door] for wing in training)
    assert (inside["rich"], inside["yaml"]) == (["megatron_sat/log.py"], ["megatron_sat/cli.py"])


def build(root: Path, files: dict[str, str]) -> House:
    """A house of ``files`` (path: text) under the real table; a docstring is put before each text."""
    (root / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "layering.toml", root / "tests")
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(DOCSTRING + text, encoding="utf-8")
    return read_house(root)


SOUND = {
    "pretrain_sat.py": "from megatron_sat import cpu\ncpu.install()\nfrom megatron_sat.cli import main\n",
    "megatron_sat/__init__.py": "__version__ = '1'\n",
    "megatron_sat/cpu.py": "import os\nimport torch\nHERE = os.environ\n",
    "megatron_sat/log.py": "from rich.console import Console\n",
    "megatron_sat/cli.py": "import yaml\nfrom megatron_sat.training import loop\n",
    "megatron_sat/sparsity/selection.py": "import torch\nfrom megatron_sat.sparsity.neurons import Kept\n",
    "megatron_sat/sparsity/neurons.py": "import math\n",
    "megatron_sat/layers/mlp.py": "import megatron.core.jit\nfrom megatron_sat.sparsity import neurons\n",
    "megatron_sat/engines/base.py": "from megatron_sat.log import say\n",
    "megatron_sat/training/loop.py": "import megatron_sat.layers.mlp\nimport megatron_sat.engines.base\n",
}


@pytest.mark.parametrize("rule", layering.RULES, ids=lambda rule: rule.__name__)
def test_a_sound_house_passes(rule: Callable[[House], list[str]], tmp_path: Path) -> None:
    assert rule(build(tmp_path, SOUND)) == []


UPWARD = "import megatron_sat.layers.mlp"
IN_A_FUNCTION = "def f():\n    from megatron_sat.cpu import install\n"
FOR_TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from megatron_sat.model import spec\n"
BY_NAME = "import importlib\nimportlib.import_module('megatron_sat.layers')\n"
CIRCLE = "from megatron_sat.sparsity import selection"
LATE_CIRCLE = "def f():\n    from megatron_sat.sparsity.selection import Kept\n"
LATE_PLOT = "def f():\n    import matplotlib.pyplot\n"
ENVIRON = "import os\nA = os.environ['A']\n"

BREACHES = [  # (rule, file under megatron_sat/ or ../, its text, what is said)
    ("direction", "sparsity/a.py", UPWARD, "sparsity may not import layers"),
    ("direction", "data/a.py", "from megatron_sat.engines import base", "data may not import engines"),
    ("direction", "engines/a.py", "from megatron_sat import sparsity", "engines may not import sparsity"),
    ("direction", "log.py", IN_A_FUNCTION, "log.py:3: log may not import cpu"),
    ("direction", "engines/a.py", FOR_TYPES, "a.py:4: engines may not import model"),
    ("direction", "engines/a.py", BY_NAME, "a.py:3: engines may not import layers"),
    ("direction", "layers/a.py", "from . import mlp", "relative import of mlp"),
    ("direction", "__init__.py", "from megatron_sat import cpu", "__init__ may not import cpu"),
    ("direction", "build.py", "import pretrain_sat", "may not import pretrain_sat from the roof"),
    ("direction", "build.py", "from tests.helpers import ranks", "tests.helpers.ranks from the roof"),
    ("direction", "attic/a.py", "", "room attic has no row"),
    ("circles", "sparsity/neurons.py", CIRCLE, "a circle of files: megatron_sat.sparsity."),
    ("circles", "sparsity/neurons.py", LATE_CIRCLE, "a circle of files: megatron_sat.sparsity."),
    ("doors", "data/blend.py", "import lm_eval", "through megatron_sat/evaluate/harness.py only"),
    ("doors", "sparsity/a.py", "from megatron import core", "a.py:2: megatron.core comes in"),
    ("doors", "sparsity/a.py", "import numpy as np", "a.py:2: numpy comes in"),
    ("doors", "training/a.py", LATE_PLOT, "a.py:3: matplotlib comes in"),
    ("doors", "../tools/a.py", "import pandas", "tools/a.py:2: pandas has no door"),
    ("doors", "layers/a.py", "import megatron", "megatron has no door"),
    ("environment", "data/a.py", ENVIRON, "a.py:3: os.environ"),
    ("environment", "build.py", "import os\nA = os.getenv('A')\n", "build.py:3: os.getenv"),
    ("sizes", "data/a.py", "A = 1\n" * 350, "351 lines, at most 350"),
    ("sizes", "../tests/data/test_a.py", "A = 1\n" * 350, "351 lines, at most 350"),
    ("names", "data/utils.py", "", "utils says nothing"),
    ("names", "common/a.py", "", "common says nothing"),
]


@pytest.mark.parametrize(("rule", "path", "text", "said"), BREACHES)
def test_a_breach_is_named(rule: str, path: str, text: str, said: str, tmp_path: Path) -> None:
    name = path.removeprefix("../") if path.startswith("../") else f"megatron_sat/{path}"
    breaches = getattr(layering, rule)(build(tmp_path, SOUND | {name: text}))
    assert len(breaches) == 1
    assert said in breaches[0]


def test_a_file_without_a_docstring_is_named(tmp_path: Path) -> None:
    build(tmp_path, SOUND)
    (tmp_path / "megatron_sat" / "plan.py").write_text("A = 1\n", encoding="utf-8")
    (tmp_path / "megatron_sat" / "data").mkdir()
    (tmp_path / "megatron_sat" / "data" / "__init__.py").touch()
    (said,) = layering.docstrings(read_house(tmp_path))
    assert said.startswith("megatron_sat/plan.py: no docstring")


def test_a_circle_in_the_table_is_named(tmp_path: Path) -> None:
    house = build(tmp_path, SOUND)
    house.table["may_import"]["log"] = ["training"]
    assert any("rows of may_import" in said for said in layering.circles(house))
