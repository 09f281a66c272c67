#!/bin/sh
# Record the profile smol stage by stage, until the minutes are used or all is done:
#
#   sh scripts/gpu_smol.sh MODEL MINUTES [PROFILE]
#
# MODEL is the folder that `rlreason models import` made, MINUTES a whole number. No
# network is needed; RLREASON_DATA names the folder of GSM8K and SVAMP. A stage takes at
# most 8 minutes and goes on from the last, in this call or in another on the same
# machine. results.tgz holds the rows, and what was said: on the reader's machine
#
#   rlreason record --profile smol --from results.tgz
#
# puts them into book/results/smol/, and refuses those of other settings, data or models.
set -eu
model=$1 minutes=$2 profile=${3:-smol}
RLREASON_MODELS=$(cd "$(dirname "$model")" && pwd)
export RLREASON_MODELS
end=$(($(date +%s) + 60 * minutes))
out=${RLREASON_RUNS:-runs}/smol-results
mkdir -p "$out"

# A stage: the given part of the work. Code 3: its time is over; others: see its log.
stage() {
    left=$((end - $(date +%s)))
    if [ "$left" -lt 20 ]; then return 3; fi
    if [ "$left" -gt 465 ]; then left=465; fi  # with 15 s to start in
    code=0
    ${PYTHON:-python3} -m rlreason.cli record "$@" --profile "$profile" --out "$out" \
        --here --minutes "$(awk "BEGIN {print $left / 60}")" \
        >>"$out/log.txt" 2>&1 || code=$?
    tar -czf results.tgz -C "$out" rows.jsonl log.txt 2>/dev/null || true
    tail -n 1 "$out/log.txt"
    return "$code"
}

# First what tells most in little time, then everything: see `rlreason record --help`
for part in \
    "sft expert-iteration ppo --measure greedy --measure curve" \
    "base sft expert-iteration ppo rcrl orm expert-iteration-base ppo-base
     base-shifted expert-iteration-shifted ppo-shifted"; do
    code=3
    while [ "$code" -eq 3 ] && [ "$(date +%s)" -lt "$((end - 20))" ]; do
        code=0
        stage $part || code=$?
    done
done
rows=$(cat "$out/rows.jsonl" 2>/dev/null | wc -l)
echo "results.tgz holds $rows rows; all that was said is in $out/log.txt"
if [ "$code" -eq 3 ]; then echo "The minutes are used; the same command goes on"; code=0; fi
exit "$code"
