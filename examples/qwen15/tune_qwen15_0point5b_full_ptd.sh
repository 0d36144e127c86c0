#!/usr/bin/env bash
# Tune all weights of Qwen1.5 0.5B on 1 node of 8 devices: TP1 PP1 DP8.
# Every value below can be set from outside; extra arguments go to pretrain_gpt.py and win.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

NPUS_PER_NODE=${NPUS_PER_NODE:-8}
NNODES=${NNODES:-1}
TP=${TP:-1}
PP=${PP:-1}
VPP=${VPP-} # layers in a model chunk; empty = not interleaved
MBS=${MBS:-1}
GBS=${GBS:-64}
SEQ_LEN=${SEQ_LEN:-8192}
TRAIN_ITERS=${TRAIN_ITERS:-5000}
SAVE_INTERVAL=${SAVE_INTERVAL:-10000}
LR=${LR:-1.25e-6}
EXTRA=(--use-distributed-optimizer --seed 42)

tune qwen15-0.5b full "$@"
