#!/usr/bin/env bash
# The benchmark model cifar10-32 and its record, on one GPU: stages, each a call of under ten minutes
# that goes on where an earlier one stopped. docs/benchmark_model.md has the order and the costs.
#
#   DATA=cifar10.tar.xz scripts/gpu_record.sh train            network and classifier, in TRAIN_SECONDS
#   scripts/gpu_record.sh export                                into benchmarks/models/cifar10-32
#   scripts/gpu_record.sh compare [NFES]                        learners side by side; default 3-10
#   scripts/gpu_record.sh speed | ablation | interpolation | record
#   scripts/gpu_record.sh pack | pack-cache                     parts of 15 MB in PACK, for transport
#   scripts/gpu_record.sh unpack                                the way back
#   scripts/gpu_record.sh --rehearse [STAGE ...]                all of it, tiny, on the CPU
#
# Several stages in one call share its time. Environment: VENV or PYTHON, DATA (image folder or tar
# with train/CLASS and test/CLASS), EMOJI and TABLE (the emoji archive and its CSV: trains those models,
# too), WORK (runs/cifar10-32, keep it between calls), MODELS (benchmarks/models), PACK ($WORK/pack),
# BUDGET (seconds, 570), TRAIN_SECONDS (430), SAMPLES (50000), CALLS (network calls a distillation,
# 100000), DLMS_COMMIT (what provenance names where there is no git history).
# Status 0: done. 75: out of time, call again. 1: failed. 2: something that is needed is not there.
set -uo pipefail

cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python3}
if [[ -n ${VENV:-} && -x $VENV/bin/python ]]; then
  PYTHON=$VENV/bin/python
fi
BUDGET=${BUDGET:-570}
NAME=cifar10-32
REHEARSE=0
if [[ ${1:-} == --rehearse ]]; then
  REHEARSE=1
  shift
fi

say() { printf '%s\n' "$*"; }
missing() { say "gpu_record: $1" >&2; say "  what to do: $2" >&2; exit 2; }

if ((REHEARSE)); then
  export DLMS_MODEL_DEVICE=cpu
  WORK=${WORK:-build/gpu_record-rehearsal}
  MODELS=${MODELS:-$WORK/models}
  TRAIN_SECONDS=${TRAIN_SECONDS:-90}
  SAMPLES=16 FEW=16 EXACT=16 SCREEN=2 BATCH=8 CALLS=${CALLS:-20000}
  DRAWN=2 METHODS=dlms,gits NFES=3 FULL=3 ACCURATE_NFE=6 EXACT_NFE=8
  SPEED=(--device cpu --no-compile --batches "1,2" --repeats 1)
  STUDY_NFE=3
else
  WORK=${WORK:-runs/$NAME}
  MODELS=${MODELS:-benchmarks/models}
  DATA=${DATA:-}
  TRAIN_SECONDS=${TRAIN_SECONDS:-430}
  SAMPLES=${SAMPLES:-50000} FEW=10000 EXACT=2000 SCREEN=64 BATCH=1000 CALLS=${CALLS:-100000}
  DRAWN=10 METHODS=auto,dlms,amed,amed-plugin,ld3,dode,gits,free_table NFES=3-10 FULL=5,10
  ACCURATE_NFE=32 EXACT_NFE=200 STUDY_NFE=5
  SPEED=(--device cuda --batches "1,64,1024")
  export DLMS_MODEL_COMPILE=${DLMS_MODEL_COMPILE:-1}
fi
PACK=${PACK:-$WORK/pack}
mkdir -p "$WORK" "$MODELS" || exit 2
WORK=$(cd "$WORK" && pwd)
MODELS=$(cd "$MODELS" && pwd)
DELIVERED=$WORK/delivered
export DLMS_MODELS=$MODELS PYTHONUNBUFFERED=1
# Compiled kernels are kept, so that the next call does not wait for them.
export TORCHINDUCTOR_CACHE_DIR=$WORK/inductor TORCHINDUCTOR_FX_GRAPH_CACHE=1

# -- stages ---------------------------------------------------------------------------------------------

need_data() {
  [[ -n $DATA && -e $DATA ]] || missing "no images at '$DATA'" \
    "set DATA to CIFAR-10 as a folder or tar archive with train/CLASS/*.png and test/CLASS/*.png"
}

# limited COMMAND...: under what is left of the budget; interrupted, not killed, so that it can save.
limited() {
  local left=$((BUDGET - SECONDS)) status
  ((left > 5)) || return 75
  timeout --signal=INT --kill-after=15 "$left" "$@"
  status=$?
  ((status == 124 || status == 137)) && return 75
  return "$status"
}

stage_train() {
  local words=() seconds=$((BUDGET - SECONDS - 10))
  ((seconds > TRAIN_SECONDS)) && seconds=$TRAIN_SECONDS
  if ((REHEARSE)); then
    words=(--rehearse --only cifar10-32 cifar10-32-features)
  else
    need_data
    words=(--cifar10 "$DATA")
    [[ -n ${EMOJI:-} ]] && words+=(--emoji "$EMOJI" --table "${TABLE:-}")
  fi
  limited "$PYTHON" examples/train_models.py "${words[@]}" --work "$WORK/training" \
    --deliver "$DELIVERED" --seconds "$seconds" --emoji-until "$((seconds * 2 / 5))"
}

stage_export() {
  compgen -G "$DELIVERED/$NAME*.safetensors" >/dev/null || missing \
    "nothing to export in $DELIVERED" "run the stage train first"
  limited "$PYTHON" examples/export_models.py --delivered "$DELIVERED" --only "$NAME" \
    --models "$MODELS" --draw "$DRAWN" || return
  rm -f "$WORK/precision"
  du -sh "$MODELS/$NAME"
}

# The dtype of every measurement: chosen once, on this model.
precision() {
  [[ -f $MODELS/$NAME/provenance.json ]] || missing "no model in $MODELS/$NAME" \
    "run the stage export first, or unpack"
  if [[ -z ${DLMS_MODEL_DTYPE:-} ]]; then
    [[ -s $WORK/precision ]] || "$PYTHON" examples/choose_precision.py "$NAME" \
      >"$WORK/precision" || return
    DLMS_MODEL_DTYPE=$(<"$WORK/precision")
  fi
  export DLMS_MODEL_DTYPE
  say "networks compute in $DLMS_MODEL_DTYPE"
}

compared() { # compared FOLDER SAMPLES NFES OPTIONS...
  local folder=$1 samples=$2 nfes=$3
  shift 3
  precision || return
  limited "$PYTHON" -m dlms_engine compare --model "$NAME" --nfe "$nfes" --samples "$samples" \
    --exact-samples "$EXACT" --exact-nfe "$EXACT_NFE" --accurate-nfe "$ACCURATE_NFE" \
    --screen-samples "$SCREEN" --batch "$BATCH" --budget "$CALLS" --folder "$WORK/$folder" "$@"
}

stage_compare() { compared compare "$SAMPLES" "${COMPARED:-$NFES}" --methods "$METHODS"; }
stage_ablation() { compared ablation "$FEW" "$STUDY_NFE" --study ablation; }
stage_interpolation() { compared interpolation "$FEW" "$STUDY_NFE" --study interpolation; }

stage_record() {
  local solvers=() file
  precision || return
  for file in "$WORK"/compare/solvers/*.safetensors; do
    [[ -f $file ]] && solvers+=(--solver "$file")
  done
  limited "$PYTHON" -m dlms_engine evaluate --record --model "$NAME" --nfe "$NFES" \
    --samples "$SAMPLES" --exact-samples "$EXACT" --screen-samples "$SCREEN" \
    --full-nfe "$FULL" --exact-nfe "$EXACT_NFE" --accurate-nfe "$ACCURATE_NFE" --batch "$BATCH" \
    --folder "$WORK/record" "${solvers[@]}"
}

stage_speed() {
  local solver=$WORK/compare/solvers/dlms-$STUDY_NFE.safetensors
  precision || return
  [[ -f $solver ]] || missing "no solver $solver" "run the stage compare first"
  limited "$PYTHON" -m dlms_engine bench pipeline --model "$NAME" --solver "$solver" \
    --output "$WORK/speed.json" "${SPEED[@]}"
}

packed() { # packed NAME PATHS...: relative to WORK or MODELS, in parts
  local name=$1
  shift
  mkdir -p "$PACK" || return
  rm -f "$PACK/$name".tar.part-*
  tar -cf - "$@" | split -b 15000000 -d - "$PACK/$name.tar.part-" || return
  ls -l "$PACK"
}

stage_pack() {
  local paths=() path
  for path in speed.json precision {compare,ablation,interpolation,record}/{solvers,*.json,*.md,*.png,*.html}; do
    for path in "$WORK"/$path; do
      [[ -e $path ]] && paths+=("${path#"$WORK"/}")
    done
  done
  packed model -C "$MODELS" "$NAME" && { ((${#paths[@]} == 0)) || packed results -C "$WORK" "${paths[@]}"; }
}

stage_pack-cache() { # goes on elsewhere without measuring again
  local paths=() path
  for path in "$WORK"/{compare,ablation,interpolation,record}/cache; do
    [[ -d $path ]] && paths+=("${path#"$WORK"/}")
  done
  ((${#paths[@]})) || missing "no cache in $WORK" "run a measuring stage first"
  packed cache -C "$WORK" "${paths[@]}"
}

stage_unpack() {
  local name target
  for name in model results cache; do
    target=$WORK
    [[ $name == model ]] && target=$MODELS
    compgen -G "$PACK/$name.tar.part-*" >/dev/null || continue
    cat "$PACK/$name".tar.part-* | tar -xf - -C "$target" || return
    say "unpacked $name into $target"
  done
}

# -- run --------------------------------------------------------------------------------------------------

stages=() COMPARED=""
while (($#)); do
  case $1 in
    train | export | ablation | interpolation | record | speed | pack | \
      pack-cache | unpack) stages+=("$1") ;;
    compare)
      stages+=("$1")
      if [[ ${2:-} =~ ^[0-9][0-9,-]*$ ]]; then
        COMPARED=$2
        shift
      fi
      ;;
    *) missing "no stage '$1'" "see the head of scripts/gpu_record.sh" ;;
  esac
  shift
done
if ((${#stages[@]} == 0)); then
  ((REHEARSE)) || missing "no stage is named" "see the head of scripts/gpu_record.sh"
  stages=(train export compare speed ablation interpolation record pack pack-cache)
fi
command -v "$PYTHON" >/dev/null || missing "no '$PYTHON'" "set PYTHON or VENV"
absent=$("$PYTHON" - <<'PY'
from importlib.util import find_spec

names = "torch PIL matplotlib tqdm torchmetrics scipy dlms_engine".split()
print(*(name for name in names if find_spec(name) is None))
PY
)
[[ -z $absent ]] || missing "$PYTHON has no $absent" \
  "pip install 'dlms-engine[demo]' pillow, or put it on PYTHONPATH"
if ((!REHEARSE)); then
  "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || missing \
    "torch sees no GPU" "run this on a machine with one, or try it: scripts/gpu_record.sh --rehearse"
fi

for stage in "${stages[@]}"; do
  say "== $stage ($((BUDGET - SECONDS)) s left)"
  start=$SECONDS
  "stage_$stage"
  status=$?
  if ((status == 75 || status == 130)); then
    say "== $stage: out of time after $((SECONDS - start)) s, call it again"
    exit 75
  elif ((status)); then
    say "== $stage: failed ($status)" >&2
    exit 1
  fi
  say "== $stage: done after $((SECONDS - start)) s"
done
