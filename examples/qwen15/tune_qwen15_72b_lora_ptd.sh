#!/usr/bin/env bash
# Tune Qwen1.5 72B with LoRA on 2 nodes of 8 devices: TP8 PP2 DP1 (the original's LoRA layout).
# Every value below can be set from outside; extra arguments go to pretrain_gpt.py and win.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

NPUS_PER_NODE=${NPUS_PER_NODE:-8}
NNODES=${NNODES:-2}
TP=${TP:-8}
PP=${PP:-2}
VPP=${VPP-} # layers in a model chunk; empty = not interleaved
MBS=${MBS:-1}
GBS=${GBS:-64}
SEQ_LEN=${SEQ_LEN:-8192}
TRAIN_ITERS=${TRAIN_ITERS:-5000}
SAVE_INTERVAL=${SAVE_INTERVAL:-5000}
LR=${LR:-1.25e-6}
EXTRA=(--use-mc2)

tune qwen15-72b lora "$@"
