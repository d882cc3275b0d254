#!/usr/bin/env bash
# One short lease of a GPU machine, in parts of under nine minutes each:
#
#     bench/gpu_session.sh tests|bench|run FOLDER
#
# tests: what is marked gpu, then tiny benches under compute-sanitizer. bench: every suite, and the
# report of them. run: the main job at the papers' size on simulated records. Python, torch and
# triton are the machine's own (PYTHON=python3) and nothing is installed: the network and its
# benches need jaxtyping and tyro, tests also beartype, `run` also wfdb; without DeepSpeed training
# takes bench/plain_engine.py. Results, a log and pictures go to FOLDER.
set -uo pipefail
part=${1:?tests, bench or run} out=$(mkdir -p "${2:?a folder}" && cd "$2" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
has() { "$python" -c "import $1" 2>/dev/null || { echo "session: no $1 here"; false; }; }
within() { local begin=$SECONDS; timeout "$@"; local rc=$?
  echo "session: $((SECONDS - begin)) s, exit code $rc: ${*:2}"; return $rc; }

tests() {
  local options=()
  # The shape checker is part of the project's options for pytest.
  has beartype || options=(-o addopts=--import-mode=importlib)
  within 360 "$python" -m pytest -m gpu -q "${options[@]}"
  if command -v compute-sanitizer >/dev/null; then
    within 150 compute-sanitizer --error-exitcode 9 "$python" -m bench kernels convolution block \
      --device cuda --quick
  else
    echo "session: no compute-sanitizer here"
  fi
}

bench() {
  local results
  results=$out/$("$python" -c "from bench.timing import device_slug as s; print(s('cuda'))").json
  # What matters most comes first: suites that were finished are kept.
  within 520 "$python" -m bench --device cuda --out "$results" \
    training_step denoising_step convolution kernels block
  "$python" -m bench.report --results "$out" --docs "$out"
}

run() {
  has wfdb && has tyro || return 1
  local work train=sssd_hpc
  work=$(mktemp -d)
  trap 'rm -rf "$work"' RETURN
  has deepspeed || train=bench.plain_engine
  within 60 "$python" -m sssd_hpc simulate --out "$work/root" --records 512 --seed 0 &&
  within 60 "$python" -m sssd_hpc prepare --source "$work/root" --out "$work/store" --labels super &&
  within 210 "$python" -m "$train" train --preset sssd_ecg --data "$work/store" --run "$work/run" \
    --train.samples "${SAMPLES:-48000}" --train.batch-size 64 --train.precision bf16 \
    --train.checkpoint-every 24000 &&
  within 120 "$python" -m sssd_hpc sample --run "$work/run" --like "$work/store" \
    --out "$work/synthetic" --batch-size 256 &&
  within 80 "$python" -m sssd_hpc evaluate --real "$work/store" --synthetic "$work/synthetic" \
    --out "$work/report" --label NORM
  cp "$work"/run/metrics.jsonl "$work"/report/report.json "$work"/report/figures/records.png "$out"/
}

case $part in tests | bench | run) "$part" 2>&1 | tee "$out/$part.log" ;;
*) echo "session: $part is no part; use tests, bench or run" >&2; exit 2 ;; esac
