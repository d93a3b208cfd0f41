#!/usr/bin/env bash
# The benchmark model cifar10-32 and its record, on one GPU: stages, each a call of under ten minutes
# that goes on where an earlier one stopped. docs/benchmark_model.md has the order and the costs.
#
#   DATA=cifar10.tar.xz scripts/gpu_record.sh train            one piece of training, repeat at will
#   DATA=cifar10.tar.xz scripts/gpu_record.sh finish           the last piece: the rate falls to zero
#   DATA=cifar10.tar.xz scripts/gpu_record.sh classifier
#   scripts/gpu_record.sh export                                into benchmarks/models/cifar10-32
#   scripts/gpu_record.sh compare [NFES]                        learners side by side; default 3-10
#   scripts/gpu_record.sh speed | ablation | interpolation | record
#   scripts/gpu_record.sh pack | pack-cache                     parts of 15 MB in PACK, for transport
#   scripts/gpu_record.sh unpack                                the way back
#   scripts/gpu_record.sh --rehearse [STAGE ...]                all of it, tiny, on the CPU
#
# Several stages in one call share its time. Environment: VENV or PYTHON, DATA (image folder or tar
# with train/CLASS and test/CLASS), DATA_NOTE (what provenance says of it), WORK (runs/cifar10-32,
# keep it between calls), MODELS (benchmarks/models), PACK ($WORK/pack), BUDGET (seconds, 570),
# MINUTES (of a piece of training, 9), SAMPLES (50000), CALLS (network calls a distillation, 100000),
# DLMS_COMMIT (what provenance names where there is no git history).
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
  DATA=${DATA:-$WORK/images.tar}
  DEVICE=cpu
  MINUTES=${MINUTES:-0.3}
  SAMPLES=16 FEW=16 EXACT=16 SCREEN=2 BATCH=8 CALLS=${CALLS:-6000} PROBE=2
  METHODS=dlms,gits NFES=3 FULL=3 ACCURATE_NFE=6 EXACT_NFE=8
  TRAIN=(--channels 8,8,16 --groups 4 --layers 1 --batch 8 --no-compile --images 10000
    --warmup 40 --cooldown 400 --grid-every 1e9)
  CLASSIFY=(--widths 4,6,8 --epochs 4 --batch 8 --no-compile)
  SPEED=(--device cpu --no-compile --batches "1,2" --repeats 1)
  STUDY_NFE=3
else
  WORK=${WORK:-runs/$NAME}
  MODELS=${MODELS:-benchmarks/models}
  DATA=${DATA:-}
  DEVICE=cuda
  MINUTES=${MINUTES:-9}
  SAMPLES=${SAMPLES:-50000} FEW=10000 EXACT=2000 SCREEN=64 BATCH=1000 CALLS=${CALLS:-100000}
  PROBE=300 METHODS=dlms,amed,amed-plugin,ld3,dode,gits,free_table NFES=3-10 FULL=5,10
  ACCURATE_NFE=32 EXACT_NFE=200 STUDY_NFE=5
  TRAIN=() CLASSIFY=() SPEED=(--device cuda --batches "1,64,1024")
  export DLMS_MODEL_COMPILE=${DLMS_MODEL_COMPILE:-1}
fi
PACK=${PACK:-$WORK/pack}
mkdir -p "$WORK" "$MODELS" || exit 2
WORK=$(cd "$WORK" && pwd)
MODELS=$(cd "$MODELS" && pwd)
RUN=$WORK/run
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

# minutes: of training, at most MINUTES and what the budget leaves with 30 s for imports and saving.
minutes() {
  "$PYTHON" -c 'import sys; print(max(0.0, min(float(sys.argv[1]), (float(sys.argv[2]) - 30) / 60)))' \
    "$MINUTES" "$((BUDGET - SECONDS))"
}

train() {
  need_data
  limited "$PYTHON" examples/train_embedded.py --preset "$NAME" --data "$DATA" --include /train/ \
    --out "$RUN" --device "$DEVICE" --minutes "$(minutes)" --probe "$PROBE" "${TRAIN[@]}" "$@"
}

stage_train() { train; }
stage_finish() { train --finish; }

stage_classifier() {
  need_data
  if [[ -f $WORK/features/facts.json ]]; then
    say "classifier: kept $WORK/features"
    return 0
  fi
  limited "$PYTHON" examples/train_features.py --preset "$NAME" --data "$DATA" \
    --out "$WORK/features" --device "$DEVICE" "${CLASSIFY[@]}"
}

stage_export() {
  [[ -f $RUN/checkpoint.safetensors && -f $WORK/features/facts.json ]] || missing \
    "nothing to export in $WORK" "run the stages train, finish and classifier first"
  limited "$PYTHON" examples/export_embedded.py --preset "$NAME" --run "$RUN" \
    --features "$WORK/features" --assets "$MODELS/$NAME" \
    --data-note "${DATA_NOTE:-no image is part of this project}" || return
  cp "$RUN/loss.png" "$MODELS/$NAME/loss.png"
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
  limited "$PYTHON" -m dlms_engine compare --model "$NAME" --nfes "$nfes" --samples "$samples" \
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
  limited "$PYTHON" -m dlms_engine evaluate --record --model "$NAME" --nfes "$NFES" \
    --samples "$SAMPLES" --compared-samples "$EXACT" --screen-samples "$SCREEN" \
    --full-nfes "$FULL" --exact-nfe "$EXACT_NFE" --accurate-nfe "$ACCURATE_NFE" --batch "$BATCH" \
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
    train | finish | classifier | export | ablation | interpolation | record | speed | pack | \
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
  stages=(train finish classifier export compare speed ablation interpolation record pack pack-cache)
fi
command -v "$PYTHON" >/dev/null || missing "no '$PYTHON'" "set PYTHON or VENV"
absent=$("$PYTHON" - <<'PY'
from importlib.util import find_spec

names = "torch diffusers PIL matplotlib tqdm torchmetrics scipy dlms_engine".split()
print(*(name for name in names if find_spec(name) is None))
PY
)
[[ -z $absent ]] || missing "$PYTHON has no $absent" \
  "pip install 'dlms-engine[demo]' pillow, or put it on PYTHONPATH"
if ((!REHEARSE)); then
  "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || missing \
    "torch sees no GPU" "run this on a machine with one, or try it: scripts/gpu_record.sh --rehearse"
elif [[ ! -e $DATA ]]; then
  "$PYTHON" - "$DATA" <<'PY' || exit 1
import io, sys, tarfile
import numpy as np
from PIL import Image

generator = np.random.default_rng(0)
with tarfile.open(sys.argv[1], "w") as archive:
    for index in range(96):
        kind, label = ("train" if index < 64 else "test"), "ab"[index % 2]
        pixels = generator.integers(0, 96, (32, 32, 3)) + (120 if label == "b" else 0)
        data = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(data, "png")
        member = tarfile.TarInfo(f"images/{kind}/{label}/{index}.png")
        member.size = data.tell()
        data.seek(0)
        archive.addfile(member, data)
PY
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
