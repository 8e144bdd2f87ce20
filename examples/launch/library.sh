# shellcheck shell=bash
# What the launch scripts in examples/ share; it is sourced. `train CONFIG ARGUMENTS...` does everything.
#
#   MODEL   folder that tools/convert_checkpoint.py import wrote (or a run's, to go on from its weights)
#   DATA    training data, NAME=PREFIX ... as tools/preprocess_data.py wrote them; REPLAY, VALID: likewise, may be empty
#   SAVE    folder of the checkpoints, on a file system that all hosts share; a run in it goes on where it was
#   GPU     a100, a800, h100 ... (default a800), for DRY_RUN alone     GPUS  a host (default 8)
#   ENGINE  megatron (default) or deepspeed                            PYTHON, SSH  programs (python3, ssh)
#
# Where it runs:
#   under Slurm           sbatch SCRIPT: one task a GPU, and another start when the time is over
#   HOSTS or HOSTFILE     "a b c d", or a file with a name a line: torchrun on each through SSH
#   LAUNCHER=deepspeed    with a HOSTFILE of DeepSpeed's (name slots=8): DeepSpeed's launcher, which uses pdsh
#   otherwise             torchrun here; with NODES above 1 run it on every host, with NODE_RANK and MASTER_ADDR
#   DRY_RUN=1             says the configuration, plan, memory and commands, and ends; needs none of the above

launch_folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$(dirname "$launch_folder")")

fail() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 2
}

dry() { [ "${DRY_RUN:-0}" = 1 ]; }

# say COMMAND...: prints a command as one could type it
say() {
    printf '+'
    printf ' %q' "$@"
    printf '\n'
}

# require NAME MEANING: the variable is set; in a dry run a path that shows what is missing stands in for it
require() {
    [ -n "${!1:-}" ] && return
    dry || fail "$1 must be $2, it is not set; $1=... $0, or DRY_RUN=1 $0 to see the plan without it"
    printf -v "$1" '/path/of/%s' "$1"
}

check_number() {
    case ${!1} in
        '' | *[!0-9]* | 0) fail "$1 must be a whole number above 0, got '${!1}'" ;;
    esac
}

# check_paths: what a run reads is there, before any host is bothered; a dry run says itself what is missing
check_paths() {
    local entry prefix
    dry && return
    [ -f "$MODEL/latest_checkpointed_iteration.txt" ] ||
        fail "MODEL must be a folder with a checkpoint, $MODEL has no latest_checkpointed_iteration.txt;" \
            "tools/convert_checkpoint.py import --hf ... --save $MODEL"
    for entry in $DATA ${REPLAY:-} ${VALID:-}; do
        prefix=${entry#*=}
        [ -f "$prefix.bin" ] && [ -f "$prefix.idx" ] && continue
        fail "DATA, REPLAY and VALID must name data sets, $prefix.bin or .idx is not there;" \
            "tools/preprocess_data.py --output-prefix $prefix ..."
    done
    mkdir -p "$SAVE" || fail "SAVE must be a folder that can be written, got $SAVE"
}

# find_hosts: fills the array `hosts`, and NODES
find_hosts() {
    hosts=()
    if [ -n "${HOSTFILE:-}" ]; then
        [ -f "$HOSTFILE" ] || fail "HOSTFILE must be a file with a host a line, $HOSTFILE is not there"
        # DeepSpeed's form, `name slots=8`, is understood too
        mapfile -t hosts < <(sed 's/#.*//' "$HOSTFILE" | awk 'NF { print $1 }')
        [ ${#hosts[@]} -gt 0 ] || fail "HOSTFILE must name a host, $HOSTFILE names none"
    elif [ -n "${HOSTS:-}" ]; then
        read -r -a hosts <<<"$HOSTS"
    fi
    if [ -n "${SLURM_JOB_ID:-}" ]; then
        NODES=${SLURM_JOB_NUM_NODES:-${SLURM_NNODES:-1}}
    elif [ ${#hosts[@]} -gt 0 ]; then
        NODES=${#hosts[@]}
    elif dry; then
        NODES=${NODES:-4} # the paper's
    else
        NODES=${NODES:-1}
    fi
}

# arguments CONFIG MORE...: fills the array `arguments` for pretrain_sat.py
collect_arguments() {
    local config=$1
    shift
    arguments=(--config "$config" "$root/examples/configs/continual.yaml" "$root/examples/configs/$ENGINE.yaml")
    if [ -f "$MODEL/model.yaml" ]; then
        arguments+=("$MODEL/model.yaml")
    else
        arguments+=(--tokenizer-model "${TOKENIZER:-$MODEL/hf}")
    fi
    if [ -f "$SAVE/latest_checkpointed_iteration.txt" ]; then
        arguments+=(--load "$SAVE") # another start of the same run
    else
        arguments+=(--load "$MODEL" --finetune)
    fi
    # shellcheck disable=SC2206  # several data sets in one variable
    arguments+=(--save "$SAVE" --train-data-path $DATA)
    # shellcheck disable=SC2206
    [ -z "${REPLAY:-}" ] || arguments+=(--replay-data-path $REPLAY --replay-share "${REPLAY_SHARE:-0.2}")
    # shellcheck disable=SC2206
    [ -z "${VALID:-}" ] || arguments+=(--valid-data-path $VALID)
    # Slurm's signal reaches the ranks: save, and ask for another start
    [ -z "${SLURM_JOB_ID:-}" ] ||
        arguments+=(--exit-signal-handler --exit-signal SIGUSR1 --requeue-exit-code "$REQUEUE_CODE")
    arguments+=(--engine "$ENGINE" "$@")
}

# export_settings: what the ranks need in their environment
export_settings() {
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # megatron.core: sums start in the order asked for
    export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
}

# torchrun_command RANK ADDRESS: fills the array `command` for one host of several, or the only one
torchrun_command() {
    command=("$PYTHON" -m torch.distributed.run --nproc-per-node "$GPUS")
    if [ "$NODES" = 1 ]; then
        command+=(--standalone)
    else
        command+=(--nnodes "$NODES" --node-rank "$1" --master-addr "$2" --master-port "${MASTER_PORT:-29500}")
    fi
    command+=("$root/pretrain_sat.py" "${arguments[@]}")
}

# remote_line: prints `command` as a shell on another host runs it
remote_line() {
    local name
    printf 'cd %q && exec env' "$root"
    for name in OMP_NUM_THREADS CUDA_DEVICE_MAX_CONNECTIONS PYTHONPATH $(compgen -e NCCL_) $(compgen -e GLOO_); do
        printf ' %s=%q' "$name" "${!name}"
    done
    printf ' %q' "${command[@]}"
}

run_over_hosts() {
    local rank pids=() code=0
    for rank in "${!hosts[@]}"; do
        torchrun_command "$rank" "${MASTER_ADDR:-${hosts[0]}}"
        if dry; then
            say "$SSH" "${hosts[$rank]}" "$(remote_line)"
            continue
        fi
        # a terminal, so that torchrun there is told when the connection ends
        "$SSH" -tt -o BatchMode=yes "${hosts[$rank]}" "$(remote_line)" </dev/null &
        pids+=($!)
    done
    dry && return
    trap 'kill "${pids[@]}" 2>/dev/null' INT TERM
    for _ in "${pids[@]}"; do
        wait -n || { code=$?; break; }
    done
    [ "$code" = 0 ] || kill "${pids[@]}" 2>/dev/null || true
    wait
    return "$code"
}

# run_by_deepspeed: its launcher starts the ranks of all hosts through pdsh, with what its environment file says
run_by_deepspeed() {
    local name environment=$SAVE/deepspeed.env
    [ -n "${HOSTFILE:-}" ] || fail "LAUNCHER=deepspeed needs HOSTFILE, a file with lines such as: name slots=$GPUS"
    grep -q 'slots=' "$HOSTFILE" || fail "HOSTFILE must say slots for LAUNCHER=deepspeed, $HOSTFILE does not; name slots=$GPUS"
    command=("$PYTHON" -m deepspeed.launcher.runner --hostfile "$HOSTFILE" --launcher pdsh --force_multi
        --master_addr "${MASTER_ADDR:-${hosts[0]}}" --master_port "${MASTER_PORT:-29500}" --no_local_rank
        "$root/pretrain_sat.py" "${arguments[@]}")
    if dry; then
        say "${command[@]}"
        return
    fi
    for name in OMP_NUM_THREADS CUDA_DEVICE_MAX_CONNECTIONS PYTHONPATH $(compgen -e NCCL_) $(compgen -e GLOO_); do
        printf '%s=%s\n' "$name" "${!name}"
    done >"$environment"
    export DS_ENV_FILE=$environment
    exec "${command[@]}"
}

run_under_slurm() {
    local code=0 first
    command=(srun --wait 120 bash "$launch_folder/slurm_rank.sh" "$PYTHON" "$root/pretrain_sat.py" "${arguments[@]}")
    if dry; then
        say "${command[@]}"
        return
    fi
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export MASTER_ADDR=${first%%$'\n'*} MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
    "${command[@]}" || code=$?
    if [ "$code" = "$REQUEUE_CODE" ]; then
        echo "$(basename "$0"): the run saved itself and asks for another start"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$code"
}

run_here() {
    if [ "$NODES" != 1 ] && ! dry; then
        [ -n "${NODE_RANK:-}" ] && [ -n "${MASTER_ADDR:-}" ] ||
            fail "NODES=$NODES needs NODE_RANK (0 to $((NODES - 1))) and MASTER_ADDR on every host;" \
                "or set HOSTS or HOSTFILE on one, or use sbatch"
    fi
    torchrun_command "${NODE_RANK:-NODE_RANK}" "${MASTER_ADDR:-MASTER_ADDR}"
    if dry; then
        say "${command[@]}"
        return
    fi
    exec "${command[@]}"
}

# train CONFIG ARGUMENTS...: a run of the model in CONFIG, with further settings of pretrain_sat.py
train() {
    PYTHON=${PYTHON:-python3} SSH=${SSH:-ssh} GPU=${GPU:-a800} GPUS=${GPUS:-8} ENGINE=${ENGINE:-megatron}
    REQUEUE_CODE=${REQUEUE_CODE:-75}
    case $ENGINE in
        megatron | deepspeed) ;;
        *) fail "ENGINE must be megatron or deepspeed, got $ENGINE" ;;
    esac
    require MODEL "a folder that tools/convert_checkpoint.py import wrote"
    require DATA "the training data, NAME=PREFIX ..."
    require SAVE "a folder for the checkpoints"
    find_hosts
    check_number GPUS
    check_number NODES
    check_paths
    collect_arguments "$@"
    export_settings
    if dry; then
        "$PYTHON" "$root/pretrain_sat.py" --dry-run --world-size $((NODES * GPUS)) --gpu "$GPU" \
            --gpus-per-host "$GPUS" "${arguments[@]}"
    fi
    if [ -n "${SLURM_JOB_ID:-}" ]; then
        run_under_slurm
    elif [ "${LAUNCHER:-}" = deepspeed ]; then
        run_by_deepspeed
    elif [ ${#hosts[@]} -gt 0 ]; then
        run_over_hosts
    else
        run_here
    fi
}
