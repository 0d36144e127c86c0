#!/usr/bin/env bash
# Generate text with Qwen1.5 4B on 2 devices: TP1 PP2.
# Every value below can be set from outside; extra arguments go to inference.py and win.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

TP=${TP:-1}
PP=${PP:-2}
SEQ_LEN=${SEQ_LEN:-8192}

generate "$@"
