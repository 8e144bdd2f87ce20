"""The door to transformers: what is read is what transformers itself would compute with."""

import json

import pytest
import torch

from megatron_sat.checkpoint.hf_model import load_model, read_config, unpack_gguf
from tests.checkpoint.families import write_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_model("tinyllama", tmp_path_factory.mktemp("hf") / "llama")


def test_a_loaded_model_has_its_rotary_frequencies(llama):
    model = load_model(llama, dtype=torch.float32, device=CPU)
    wanted = 10000.0 ** (-torch.arange(0, 4, 2) / 4)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, wanted)


def test_a_configuration_of_old_spelling_is_read_with_its_defaults(tmp_path, llama):
    old = json.loads((llama / "config.json").read_text())
    del old["rope_parameters"], old["tie_word_embeddings"]
    scaling = {"type": "linear", "factor": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(old | {"rope_theta": 500000.0, "rope_scaling": scaling}))

    config = read_config(tmp_path)

    assert config["rope_parameters"]["rope_theta"] == 500000.0
    assert config["rope_parameters"]["rope_type"] == "linear"
    assert config["tie_word_embeddings"] is False


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be a local folder with config.json"):
        read_config(tmp_path)


def test_a_model_that_transformers_does_not_know_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nobody-knows-it"}')
    with pytest.raises(ValueError, match="must be a model that transformers knows"):
        read_config(tmp_path)


def test_a_model_that_brings_its_own_code_is_refused(tmp_path, llama):
    content = json.loads((llama / "config.json").read_text())
    content |= {"model_type": "x", "auto_map": {"AutoConfig": "evil.C"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    with pytest.raises(ValueError, match="must be a model that transformers knows"):
        read_config(tmp_path)


def test_a_model_without_safetensors_is_refused(tmp_path, llama):
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="must hold a model in safetensors"):
        load_model(tmp_path, dtype=torch.float32, device=CPU)


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="model.gguf must be a GGUF file that transformers reads"):
        unpack_gguf(tmp_path / "model.gguf", tmp_path / "out")
