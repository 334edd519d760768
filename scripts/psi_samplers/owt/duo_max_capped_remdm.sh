#!/usr/bin/env bash
#SBATCH -N 1
#SBATCH --ntasks-per-node=1 --gres=gpu:1
#SBATCH --open-mode=append --requeue
# Psi sampler of DUO on OpenWebText: kappa capped at ETA.
set -euo pipefail
for ROOT in "${DUO_REPO:-}" "$(dirname "$0")"/{..,../../..} "${SLURM_SUBMIT_DIR:-}" ''; do
  [[ -f $ROOT/scripts/lib/launch.sh ]] && break
done
# shellcheck source=scripts/lib/launch.sh
source "${ROOT:?is not found: run sbatch in the repository, or set DUO_REPO}/scripts/lib/launch.sh" psi_samplers/owt/duo_max_capped_remdm

CHECKPOINT_PATH=$(required CHECKPOINT_PATH outputs/train_owt_duo/checkpoints/last.ckpt)
DATA_CACHE_DIR=$(required DATA_CACHE_DIR /path/to/cache)
NUM_STEPS=${NUM_STEPS:-256}
ETA=${ETA:-0.01}
NUCLEUS_P=${NUCLEUS_P:-0.9}
NOISE=${NOISE:-log-linear}
EVAL_BATCH_SIZE=${EVAL_BATCH_SIZE:-16}
NUM_SAMPLE_BATCHES=${NUM_SAMPLE_BATCHES:-32}
RUN_DIR=${RUN_DIR:-$OUTPUTS/$NAME/$NUM_STEPS-$ETA-$NUCLEUS_P}

run \
  mode=sample_eval \
  data=openwebtext-split \
  data.cache_dir="$(quote "$DATA_CACHE_DIR")" \
  model=small \
  algo=duo_base \
  noise="$NOISE" \
  sampling.predictor=psi \
  sampling.steps="$NUM_STEPS" \
  sampling.p_nucleus="$NUCLEUS_P" \
  sampling.num_sample_batches="$NUM_SAMPLE_BATCHES" \
  eval.checkpoint_path="$(quote "$CHECKPOINT_PATH")" \
  loader.eval_batch_size="$EVAL_BATCH_SIZE" \
  sampling.psi.time_profile=linear \
  sampling.psi.high_mode="max-capped-$ETA" \
  sampling.psi.middle_mode="max-capped-$ETA" \
  sampling.psi.low_mode="max-capped-$ETA" \
  sampling.psi.high_frac=0.0 \
  sampling.psi.middle_frac=0.0 \
  "$@"
