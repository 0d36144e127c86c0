# shellcheck shell=bash
# What the scripts of this folder share; each sources it, sets the defaults of its model and calls `pretrain`,
# `tune`, `generate`, `lora_chat` or `evaluate`.
set -euo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python
    if [[ -z ${VIRTUAL_ENV:-} && -x $REPO/.venv/bin/python ]]; then
        PYTHON=$REPO/.venv/bin/python
    fi
fi

# Ascend: the toolkit's own environment, where there is one
ASCEND_SET_ENV=${ASCEND_SET_ENV:-/usr/local/Ascend/ascend-toolkit/set_env.sh}
if [[ -f $ASCEND_SET_ENV ]]; then
    set +u # the toolkit's file reads variables that may be unset
    # shellcheck disable=SC1090
    source "$ASCEND_SET_ENV"
    set -u
fi
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
if [[ -z ${PYTORCH_ALLOC_CONF:-} ]]; then # torch_npu refuses to start with both
    export PYTORCH_NPU_ALLOC_CONF=${PYTORCH_NPU_ALLOC_CONF:-expandable_segments:True}
fi
export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-1800}

MISSING=()

# has_flag NAME ARGUMENTS...: whether NAME is among the arguments
has_flag() {
    local name=$1 word
    shift
    for word in "$@"; do
        [[ $word == "$name" || $word == "$name="* ]] && return 0
    done
    return 1
}

# need NAME EXAMPLE MEANING: remember the variable when it is unset
need() {
    if [[ -z ${!1+set} ]]; then
        MISSING+=("  export $1=$2  # $3")
    fi
}

stop_if_missing() {
    if ((${#MISSING[@]})); then
        {
            echo "error: variables are missing; set them and run again:"
            printf '%s\n' "${MISSING[@]}"
        } >&2
        exit 2
    fi
}

# launch_ranks PROCESSES PROGRAM ARGUMENTS...
launch_ranks() {
    local processes=$1 program=$2
    shift 2
    local node=(--nproc-per-node "$processes" --nnodes "$NNODES" --node-rank "${NODE_RANK:-0}" --log-dir "${LOG_DIR:-logs}")
    [[ -n ${MASTER_ADDR:-} ]] && node+=(--master-addr "$MASTER_ADDR")
    if [[ -n ${MASTER_PORT:-} ]]; then
        node+=(--master-port "$MASTER_PORT")
    elif ((NNODES > 1)); then
        node+=(--master-port 6000)
    fi
    exec "$PYTHON" -m modellink.cli launch "${node[@]}" "$REPO/$program" "$@"
}

# pretrain MODEL ARGUMENTS...: NNODES TP PP VPP MBS GBS TRAIN_ITERS and the array EXTRA are set by the script
pretrain() {
    local model=$1
    shift
    local check=false
    has_flag --check "$@" && check=true
    if ! has_flag --mock-data "$@"; then
        has_flag --tokenizer-name-or-path "$@" || need TOKENIZER_PATH /path/to/hf/folder "folder of the tokenizer"
        has_flag --data-path "$@" || has_flag --train-data-path "$@" ||
            need DATA_PATH /path/to/prefix_text_document "prefix of the .bin and .idx files"
    fi
    if $check; then
        CKPT_SAVE_DIR=${CKPT_SAVE_DIR-}
        CKPT_LOAD_DIR=${CKPT_LOAD_DIR-}
    else
        has_flag --save "$@" || need CKPT_SAVE_DIR /path/to/save "checkpoints are written here; empty = none"
        has_flag --load "$@" || { ! has_flag --lora-target-modules "${EXTRA[@]}" "$@" &&
            [[ -f ${CKPT_SAVE_DIR:-}/latest_checkpointed_iteration.txt ]]; } ||
            need CKPT_LOAD_DIR /path/to/megatron/weights "weights to start from; empty = random weights"
        if ((NNODES > 1)); then
            need NODE_RANK 0 "number of this node, 0 to $((NNODES - 1))"
            need MASTER_ADDR 10.0.0.1 "address of node 0"
        fi
    fi
    stop_if_missing

    local start=() data=()
    if [[ -n ${CKPT_SAVE_DIR:-} ]]; then
        start+=(--save "$CKPT_SAVE_DIR")
    fi
    if [[ -n ${CKPT_SAVE_DIR:-} && -f $CKPT_SAVE_DIR/latest_checkpointed_iteration.txt ]]; then
        echo "$CKPT_SAVE_DIR holds a checkpoint: continuing from it"
        start+=(--load "$CKPT_SAVE_DIR")
    elif [[ -n ${CKPT_LOAD_DIR:-} ]]; then
        start+=(--load "$CKPT_LOAD_DIR" --finetune --no-load-optim --no-load-rng)
    fi
    # adapters lie in the save folder and never replace the weights they belong to
    if has_flag --lora-target-modules "${EXTRA[@]}" "$@" && [[ -n ${CKPT_LOAD_DIR:-} ]]; then
        start=(--load "$CKPT_LOAD_DIR")
        [[ -n ${CKPT_SAVE_DIR:-} ]] && start+=(--save "$CKPT_SAVE_DIR")
    fi
    # a save folder is needed for regular saves only
    [[ -n ${CKPT_SAVE_DIR:-} ]] && start+=(--save-interval "$SAVE_INTERVAL")
    if ! has_flag --mock-data "$@"; then
        [[ -n ${TOKENIZER_PATH:-} ]] &&
            data+=(--tokenizer-type PretrainedFromHF --tokenizer-name-or-path "$TOKENIZER_PATH")
        if [[ -n ${DATA_PATH:-} ]] && ! has_flag --train-data-path "$@"; then
            local prefixes=("$DATA_PATH")
            # a blend: WEIGHT PREFIX WEIGHT PREFIX ...
            [[ -f $DATA_PATH.idx || -f ${DATA_PATH}_packed_input_ids_document.idx ]] || read -r -a prefixes <<<"$DATA_PATH"
            data+=(--data-path "${prefixes[@]}" --split "100,0,0")
        fi
    fi
    local layout=(--tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP")
    [[ -n $VPP ]] && layout+=(--num-layers-per-virtual-pipeline-stage "$VPP")

    launch_ranks "$NPUS_PER_NODE" pretrain_gpt.py \
        --model "$model" "${layout[@]}" --sequence-parallel \
        --micro-batch-size "$MBS" --global-batch-size "$GBS" --seq-length "$SEQ_LEN" --train-iters "$TRAIN_ITERS" \
        --lr "$LR" --min-lr 1.25e-7 --lr-decay-style cosine --lr-warmup-fraction 0.01 \
        --weight-decay 1e-1 --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95 \
        --init-method-std 0.01 --initial-loss-scale 4096 --bf16 \
        --use-flash-attn --use-fused-rmsnorm --use-fused-rotary-pos-emb --use-fused-swiglu \
        --log-interval 1 --eval-iters 0 --eval-interval "$SAVE_INTERVAL" \
        "${EXTRA[@]}" "${start[@]}" "${data[@]}" "$@"
}

# tune MODEL KIND ARGUMENTS...: as pretrain, on instruction data; KIND is full or lora
tune() {
    local model=$1 kind=$2
    shift 2
    if [[ -n ${CKPT_PATH+set} ]]; then # another name of CKPT_LOAD_DIR
        CKPT_LOAD_DIR=${CKPT_LOAD_DIR-$CKPT_PATH}
    fi
    EXTRA+=(--is-instruction-dataset --tokenizer-not-use-fast)
    if [[ $kind == lora ]]; then
        EXTRA+=(--lora-r "${LORA_R:-16}" --lora-alpha "${LORA_ALPHA:-32}"
            --lora-target-modules query_key_value dense dense_h_to_4h dense_4h_to_h)
    fi
    pretrain "$model" "$@"
}

# generate ARGUMENTS...: TP and PP are set by the script; without --task it answers PROMPT, and chats at a terminal
generate() {
    has_flag --task "$@" || has_flag --prompt "$@" || has_flag --prompts-file "$@" || has_flag --predict-data "$@" ||
        set -- --prompt "${PROMPT:-How are you?}" "$@"
    run_inference "$@"
}

# lora_chat ARGUMENTS...: a chat with the adapters of CHECKPOINT_LORA
lora_chat() {
    has_flag --lora-load "$@" || need CHECKPOINT_LORA /path/to/adapters "LoRA adapters to lay over the weights"
    [[ -n ${CHECKPOINT_LORA:-} ]] && set -- --lora-load "$CHECKPOINT_LORA" "$@"
    has_flag --task "$@" || set -- --task chat "$@"
    run_inference --lora-r "${LORA_R:-16}" --lora-alpha "${LORA_ALPHA:-32}" \
        --lora-target-modules query_key_value dense dense_h_to_4h dense_4h_to_h \
        --inference-prompt-type alpaca "$@"
}

# run_inference ARGUMENTS...
run_inference() {
    has_flag --load "$@" || need CHECKPOINT /path/to/megatron/weights "weights to generate with"
    has_flag --tokenizer-name-or-path "$@" || need TOKENIZER_PATH /path/to/hf/folder "folder of the tokenizer"
    local ranks=$((TP * PP))
    NPUS_PER_NODE=${NPUS_PER_NODE:-$((ranks < 8 ? ranks : 8))}
    NNODES=${NNODES:-$(((ranks + NPUS_PER_NODE - 1) / NPUS_PER_NODE))}
    if ((NNODES > 1)); then
        need NODE_RANK 0 "number of this node, 0 to $((NNODES - 1))"
        need MASTER_ADDR 10.0.0.1 "address of node 0, which reads the terminal"
    fi
    stop_if_missing
    local input=()
    [[ -n ${CHECKPOINT:-} ]] && input+=(--load "$CHECKPOINT")
    [[ -n ${TOKENIZER_PATH:-} ]] &&
        input+=(--tokenizer-type PretrainedFromHF --tokenizer-name-or-path "$TOKENIZER_PATH")
    launch_ranks "$NPUS_PER_NODE" inference.py \
        --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" \
        --seq-length "$SEQ_LEN" --max-position-embeddings "$SEQ_LEN" --max-new-tokens 256 --micro-batch-size 1 \
        --seed 42 --bf16 "${input[@]}" "$@"
}

# evaluate ARGUMENTS...: TP, PP, DP and the array EXTRA are set by the script; TASK and DATA_PATH may be several words
evaluate() {
    has_flag --load "$@" || need CHECKPOINT /path/to/megatron/weights "weights to evaluate"
    has_flag --tokenizer-name-or-path "$@" || need TOKENIZER_PATH /path/to/hf/folder "folder of the tokenizer"
    has_flag --task-data-path "$@" || need DATA_PATH /path/to/mmlu/test "folder or file of the questions"
    has_flag --task "$@" || need TASK mmlu "what to ask: mmlu, cmmlu, ceval, gsm8k, boolq, bbh, agieval, human_eval, ..."
    stop_if_missing
    local input=() tasks paths
    [[ -n ${CHECKPOINT:-} ]] && input+=(--load "$CHECKPOINT")
    [[ -n ${TOKENIZER_PATH:-} ]] &&
        input+=(--tokenizer-type PretrainedFromHF --tokenizer-name-or-path "$TOKENIZER_PATH" --tokenizer-not-use-fast)
    read -r -a tasks <<<"${TASK:-}"
    ((${#tasks[@]})) && input+=(--task "${tasks[@]}")
    [[ ${TASK:-} == mmlu ]] && input+=(--max-new-tokens 1)
    paths=("${DATA_PATH:-}")
    ((${#tasks[@]} > 1)) && read -r -a paths <<<"${DATA_PATH:-}"
    [[ -n ${DATA_PATH:-} ]] && input+=(--task-data-path "${paths[@]}")
    NNODES=1
    launch_ranks $((TP * PP * DP)) evaluation.py \
        --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" \
        --seq-length "$SEQ_LEN" --max-position-embeddings "$SEQ_LEN" --no-chat-template --micro-batch-size 1 \
        --seed 42 "${EXTRA[@]}" "${input[@]}" "$@"
}
