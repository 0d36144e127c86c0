#!/usr/bin/env bash
# Generate text with Qwen1.5 1.8B on 1 device: TP1 PP1.
# Every value below can be set from outside; extra arguments go to inference.py and win.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

TP=${TP:-1}
PP=${PP:-1}
SEQ_LEN=${SEQ_LEN:-8192}

generate "$@"
