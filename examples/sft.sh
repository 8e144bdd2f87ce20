#!/usr/bin/env bash
# Fine-tune a Hugging Face model on instructions with the paper's settings: import, prepare, train, export (docs/sft.md).
#
#     examples/sft.sh MODEL OUT [settings of finetune_sat.py]
#
# MODEL is a Hugging Face folder. DATA and VALID name jsonl files of records (default: the shipped ones), TEMPLATE how
# they are written (tools/prepare_sft.py; default: the model's chat template), SEQ_LENGTH the tokens of a sample, GPUS the
# ranks. A stage that is done is left alone: the same command goes on where it was. PYTHON names the interpreter.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
model=$1 out=$2
shift 2
python=${PYTHON:-python3}
data=${DATA:-$root/examples/data/sft/law.train.jsonl}
valid=${VALID:-$root/examples/data/sft/law.dev.jsonl}
length=${SEQ_LENGTH:-1024}
gpus=${GPUS:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

if [ -f "$model/tokenizer.json" ]; then
    tokenizer=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model "$model")
else
    tokenizer=(--tokenizer-type Llama2Tokenizer --tokenizer-model "$model/tokenizer.model")
fi
[ -f "$out/imported/latest_checkpointed_iteration.txt" ] ||
    "$python" "$root/tools/convert_checkpoint.py" import --hf "$model" --save "$out/imported"
for split in train valid; do
    input=$data
    [ "$split" = train ] || input=$valid
    "$python" "$root/tools/prepare_sft.py" --input "$input" --output-prefix "$out/$split" \
        "${tokenizer[@]}" --template "${TEMPLATE:-tokenizer}"
done

if [ -f "$out/tuned/latest_checkpointed_iteration.txt" ]; then
    from=(--load "$out/tuned")
else
    from=(--load "$out/imported" --finetune)
fi
"$python" -m torch.distributed.run --standalone --nproc-per-node "$gpus" "$root/finetune_sat.py" \
    --config "$out/imported/model.yaml" --sat-preset paper-sft --seq-length "$length" --micro-batch-size 1 \
    --train-data-path "$out/train" --valid-data-path "valid=$out/valid" --eval-iters 1 \
    --attention-dropout 0 --hidden-dropout 0 --clip-grad 1.0 --log-interval 10 \
    "${from[@]}" --save "$out/tuned" "$@"
# which update OUT/hf is of: a run that was asked to stop is exported as it is, and again when it has gone on
if ! { [ -e "$out/hf" ] && cmp -s "$out/tuned/latest_checkpointed_iteration.txt" "$out/exported_iteration.txt"; }; then
    rm -rf "$out/hf"
    "$python" "$root/tools/convert_checkpoint.py" export --load "$out/tuned" --hf "$out/hf"
    cp "$out/tuned/latest_checkpointed_iteration.txt" "$out/exported_iteration.txt"
fi
