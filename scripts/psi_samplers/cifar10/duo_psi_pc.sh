#!/usr/bin/env bash
#SBATCH -N 1
#SBATCH --ntasks-per-node=1 --gres=gpu:1
#SBATCH --open-mode=append --requeue
# Psi sampler of DUO on CIFAR-10: KAPPA between predictor and corrector.
set -euo pipefail
for ROOT in "${DUO_REPO:-}" "$(dirname "$0")"/{..,../../..} "${SLURM_SUBMIT_DIR:-}" ''; do
  [[ -f $ROOT/scripts/lib/launch.sh ]] && break
done
# shellcheck source=scripts/lib/launch.sh
source "${ROOT:?is not found: run sbatch in the repository, or set DUO_REPO}/scripts/lib/launch.sh" psi_samplers/cifar10/duo_psi_pc

CHECKPOINT_PATH=$(required CHECKPOINT_PATH outputs/train_cifar10_duo_cosine/checkpoints/last.ckpt)
DATA_CACHE_DIR=$(required DATA_CACHE_DIR /path/to/cache)
NUM_STEPS=${NUM_STEPS:-256}
KAPPA=${KAPPA:-0.95}
NOISE=${NOISE:-cosine}
HIGH_FRAC=${HIGH_FRAC:-0.5}
MIDDLE_FRAC=${MIDDLE_FRAC:-0.4}
EVAL_BATCH_SIZE=${EVAL_BATCH_SIZE:-500}
RUN_DIR=${RUN_DIR:-$OUTPUTS/$NAME/$NUM_STEPS-$KAPPA-$HIGH_FRAC-$MIDDLE_FRAC}

run \
  mode=fid_eval \
  data=cifar10 \
  data.cache_dir="$(quote "$DATA_CACHE_DIR")" \
  model=unet \
  algo=duo_base \
  algo.backbone=unet \
  noise="$NOISE" \
  sampling.predictor=psi \
  sampling.steps="$NUM_STEPS" \
  sampling.guid_weight=1.0 \
  eval.checkpoint_path="$(quote "$CHECKPOINT_PATH")" \
  loader.eval_batch_size="$EVAL_BATCH_SIZE" \
  sampling.psi.time_profile=linear \
  sampling.psi.high_mode=pure-posterior \
  sampling.psi.middle_mode="constant-$KAPPA" \
  sampling.psi.low_mode=pure-posterior \
  sampling.psi.high_frac="$HIGH_FRAC" \
  sampling.psi.middle_frac="$MIDDLE_FRAC" \
  "$@"
