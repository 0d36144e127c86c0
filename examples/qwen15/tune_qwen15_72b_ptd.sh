#!/usr/bin/env bash
# The original's name of tune_qwen15_72b_lora_ptd.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/tune_qwen15_72b_lora_ptd.sh" "$@"
