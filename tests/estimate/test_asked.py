"""The run that a prediction is for: from a Hugging Face folder, from YAML, from flags; nothing more than time needs."""

from pathlib import Path

import pytest

from megatron_sat import cli
from megatron_sat.estimate.asked import ask
from megatron_sat.rehearsal.rehearse import model_shape, vocabulary_rows
from tests.checkpoint.families import write_model
from tests.helpers.command_line import llama

RUN = "--seq-length 32 --micro-batch-size 1 --global-batch-size 4 --train-iters 10".split()
UNSAID = "--lr --min-lr --lr-warmup-iters --data-path --tokenizer-type --split"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    write_model("tinyllama", folder)
    return folder


def test_a_hugging_face_model_needs_a_batch_and_a_length_alone(model, tmp_path):
    config = ask(RUN, hf=model, world_size=2, cuda=True, folder=tmp_path)
    shape = model_shape(config, rows=vocabulary_rows(config)[0])
    said = (model / "config.json").read_text()
    assert f'"hidden_size": {shape.hidden_size},' in said
    assert f'"num_key_value_heads": {shape.num_query_groups},' in said
    assert f'"intermediate_size": {shape.ffn_hidden_size},' in said
    assert f'"num_hidden_layers": {shape.num_layers},' in said
    assert shape.padded_vocab_size % 128 == 0
    assert (config.parallel.data, config.training.num_micro_batches) == (2, 2)


def test_the_machine_has_a_gpu_or_not_as_it_is_told(model, tmp_path):
    multiples = [
        ask(llama(), hf=None, world_size=1, cuda=cuda, folder=tmp_path).selection.channel_multiple
        for cuda in (False, True)
    ]
    assert multiples == [1, 128]


def test_what_time_does_not_depend_on_need_not_be_said(tmp_path):
    config = ask(llama(without=UNSAID), hf=None, world_size=1, cuda=False, folder=tmp_path)
    assert (config.learning_rate.lr, config.tokenizer.kind) == (1e-5, "NullTokenizer")
    assert config.data.train_data_path == ("unsaid",)


def test_what_is_said_stays(tmp_path):
    config = ask(llama(), hf=None, world_size=1, cuda=False, folder=tmp_path)
    assert (config.learning_rate.lr, config.data.train_data_path) == (3e-4, ())
    file = tmp_path / "run.yaml"
    file.write_text("lr: 2.0e-3\ntokenizer-type: NullTokenizer\ntrain_data_path: [mine]\n")
    config = ask([*llama(without=UNSAID), "--config", str(file)], hf=None, world_size=1, cuda=False, folder=tmp_path)
    assert (config.learning_rate.lr, config.data.train_data_path) == (2e-3, ("mine",))


def test_what_time_depends_on_must_be_said(tmp_path, capsys):
    with pytest.raises(cli.ParsedExit):
        ask(llama(without="--num-layers"), hf=None, world_size=1, cuda=False, folder=tmp_path)
    assert "--num-layers is required and not given; add it" in capsys.readouterr().err


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be a local folder with config\.json"):
        ask(RUN, hf=tmp_path, world_size=1, cuda=False, folder=tmp_path)
