#!/usr/bin/env bash
#SBATCH -N 1
#SBATCH --ntasks-per-node=8 --gres=gpu:8
#SBATCH --open-mode=append --requeue --signal=USR1@120
# Fine-tunes MDLM to write in blocks of 8 tokens on OpenWebText.
set -euo pipefail
for ROOT in "${DUO_REPO:-}" "$(dirname "$0")"/{..,../../..} "${SLURM_SUBMIT_DIR:-}" ''; do
  [[ -f $ROOT/scripts/lib/launch.sh ]] && break
done
# shellcheck source=scripts/lib/launch.sh
source "${ROOT:?is not found: run sbatch in the repository, or set DUO_REPO}/scripts/lib/launch.sh" train_owt_mdlm_block8

finetune_path=$(required finetune_path outputs/train_owt_mdlm/checkpoints/last.ckpt)

run \
  experiment=train_owt_mdlm_block8 \
  training.finetune_path="$(quote "$finetune_path")" \
  "$@"
