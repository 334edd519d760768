#!/usr/bin/env bash
#SBATCH -N 1 --mem=64000 -t 960:00:00
#SBATCH --ntasks-per-node=1 --gres=gpu:1
#SBATCH --open-mode=append --requeue --signal=USR1@120
# Distils an MDLM on OpenWebText to one step.
set -euo pipefail
for ROOT in "${DUO_REPO:-}" "$(dirname "$0")"/{..,../../..} "${SLURM_SUBMIT_DIR:-}" ''; do
  [[ -f $ROOT/scripts/lib/launch.sh ]] && break
done
# shellcheck source=scripts/lib/launch.sh
source "${ROOT:?is not found: run sbatch in the repository, or set DUO_REPO}/scripts/lib/launch.sh" distill_dimo_openwebtext

finetune_path=$(required finetune_path outputs/train_owt_mdlm/checkpoints/last.ckpt)

run \
  experiment=distill_dimo_openwebtext \
  training.finetune_path="$(quote "$finetune_path")" \
  "$@"
