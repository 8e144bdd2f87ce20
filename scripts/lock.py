"""Write the constraints of one tested pair: each package of an install with all CPU extras, with its version.

``make lock`` runs it with the Python it is for. The resolver is pip's own, in an environment that is thrown
away; the hand-written ``.in`` file names the pair, everything else is free. The user's pip settings are left
out, so that wheels which lie on one machine do not decide for the others; local versions (``2.13.0+cpu``)
lose their suffix.
"""

import json
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("deepspeed", "dev", "eval", "gguf", "peft")
"""What is locked together. `gpu` is not: its packages compile against their machine's CUDA."""


def main() -> None:
    """Resolve and write ``constraints/pyXY.txt`` for the running Python."""
    name = "py{}{}".format(*sys.version_info[:2])
    pair = ROOT / "constraints" / f"{name}.in"
    if not pair.is_file():
        tested = ", ".join(sorted(path.stem for path in pair.parent.glob("*.in")))
        sys.exit(f"no constraints/{name}.in: the pairs are {tested}; name one: make lock PYTHON=python3.12")
    versions = resolve(pair)
    lines = [f"# Made by `make lock` from {name}.in and pyproject.toml: edit those.", *versions]
    target = pair.with_suffix(".txt")
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{target.relative_to(ROOT)}: {len(versions)} packages")


def resolve(pair: Path) -> list[str]:
    """``name==version`` of everything that pip would install here under the constraints ``pair``, sorted."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        pip = [str(Path(folder, "bin", "python")), "-m", "pip", "--isolated", "--quiet"]
        run([*pip, "install", "--upgrade", "pip"])
        report = Path(folder, "report.json")
        asked = ["--dry-run", "--ignore-installed", "--report", str(report), "--constraint", str(pair)]
        run([*pip, "install", *asked, f"{ROOT}[{','.join(EXTRAS)}]"])
        return closure(json.loads(report.read_text(encoding="utf-8")))


def run(command: list[str]) -> None:
    """Run ``command``; when it fails, it has said why, and nothing is written."""
    if subprocess.run(command, check=False).returncode:
        sys.exit("pip could not resolve the pair: its message stands above; the constraints are as they were")


def closure(report: dict) -> list[str]:
    """The packages of pip's installation report as constraints, sorted by name; not the project itself."""
    found = {}
    for entry in report["install"]:
        name = re.sub(r"[-_.]+", "-", entry["metadata"]["name"]).lower()
        found[name] = entry["metadata"]["version"].partition("+")[0]
    found.pop("megatron-sat", None)
    return [f"{name}=={version}" for name, version in sorted(found.items())]


if __name__ == "__main__":
    main()
