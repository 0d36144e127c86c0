#!/usr/bin/env bash
# Tune Qwen1.5 14B with LoRA on 1 node of 8 devices: TP4 PP2 DP1 (MindFormers' LoRA layout and rate).
# Every value below can be set from outside; extra arguments go to pretrain_gpt.py and win.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

NPUS_PER_NODE=${NPUS_PER_NODE:-8}
NNODES=${NNODES:-1}
TP=${TP:-4}
PP=${PP:-2}
VPP=${VPP-} # layers in a model chunk; empty = not interleaved
MBS=${MBS:-1}
GBS=${GBS:-256}
SEQ_LEN=${SEQ_LEN:-8192}
TRAIN_ITERS=${TRAIN_ITERS:-5000}
SAVE_INTERVAL=${SAVE_INTERVAL:-5000}
LR=${LR:-8e-4}
EXTRA=(--use-mc2 --seed 42)

tune qwen15-14b lora "$@"
