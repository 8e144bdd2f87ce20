#!/usr/bin/env bash
# Every figure of benchmarks/README.md, measured again on this machine's GPUs, one part after the other.
#
#     benchmarks/measure_all.sh OUT [PART ...]
#
# Parts: layer step one tinyllama kernels cpt sft (one GPU); replicas tensor zero comm (two). Without PART all that the
# GPUs here suffice for; CUDA_VISIBLE_DEVICES keeps to some of them, so parts can run side by side. Results lie in OUT,
# a part that fails does not stop the others. DRY_RUN=1 prints the commands.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
fast="--layer-graphs --cross-entropy-loss-fusion"

if [ $# -lt 1 ]; then
    echo "measure_all.sh: OUT must name a folder for the results" >&2
    exit 2
fi
out=$1
shift

# measure NAME SCRIPT ARGUMENT...: one process
measure() {
    local name=$1 script=$2
    shift 2
    launch "$name" "$python" "$here/$script" "$@" --out "$out/$name.json"
}

# measure_pair NAME SCRIPT ARGUMENT...: two ranks
measure_pair() {
    local name=$1 script=$2
    shift 2
    launch "$name" "$python" -m torch.distributed.run --standalone --nproc-per-node 2 "$here/$script" "$@" \
        --out "$out/$name.json"
}

launch() {
    local name=$1
    shift
    if [ "${DRY_RUN:-0}" != 0 ]; then
        printf '%q ' "$@"
        echo
        return
    fi
    mkdir -p "$out"
    echo "== $name"
    "$@" 2>"$out/$name.err" | tee "$out/$name.txt"
    [ "${PIPESTATUS[0]}" = 0 ] || { failed+=("$name"); tail -5 "$out/$name.err" >&2; }
}

part() {
    case $1 in
        layer) measure layer bench_layer.py --flags=--cross-entropy-loss-fusion ;;
        step) measure step bench_step.py --layers 12 --weights compact --rates 0 1/4 1/2 3/4 24/25 --twin --flags="$fast" ;;
        one) measure one bench_step.py --layers 12 --micro-batches 1 --weights compact --flags="$fast" ;;
        tinyllama)
            measure tinyllama bench_step.py --model tinyllama-1.1b --layers 22 --micro-batch-size 2 \
                --weights compact --flags="$fast"
            ;;
        kernels) measure kernels profile_step.py --flags=--cross-entropy-loss-fusion ;;
        cpt) # the paper's share of a batch: 1024 sequences on 32 GPUs
            measure cpt bench_ladder.py --micro-batches 32 --ladders cpt=24 --flags="$fast" ;;
        sft) measure sft bench_ladder.py --micro-batches 16 --ladders sft=40 --flags="$fast" ;;
        replicas)
            measure_pair replicas bench_step.py --layers 12 --weights compact \
                --flags="--use-distributed-optimizer --overlap-grad-reduce $fast"
            ;;
        tensor)
            # four sequences a micro-batch: without graphs, half a layer of one is launched more slowly than computed
            measure_pair tensor bench_step.py --layers 12 --micro-batch-size 4 --micro-batches 4 --weights compact \
                --tensor-parallel 2 --flags="--sequence-parallel --cross-entropy-loss-fusion"
            ;;
        zero)
            measure_pair zero bench_step.py --layers 4 --micro-batches 4 --weights gather \
                --flags="--engine deepspeed --zero-stage 3"
            ;;
        comm) measure_pair comm bench_comm.py ;;
        *)
            echo "measure_all.sh: PART must be one of $single $pair, got $1" >&2
            exit 2
            ;;
    esac
}

single="layer step one tinyllama kernels cpt sft"
pair="replicas tensor zero comm"
failed=()
if [ $# = 0 ]; then
    gpus=$("$python" -c "import torch; print(torch.cuda.device_count())")
    [ "$gpus" -lt 2 ] && pair=
    # shellcheck disable=SC2086 # words, on purpose
    set -- $single $pair
fi
for name in "$@"; do
    part "$name"
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "measure_all.sh: failed: ${failed[*]}; see $out/NAME.err" >&2
    exit 1
fi
