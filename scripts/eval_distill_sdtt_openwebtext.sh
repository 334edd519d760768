#!/usr/bin/env bash
#SBATCH -N 1 --mem=16000 -t 24:00:00
#SBATCH --ntasks-per-node=1 --gres=gpu:1
#SBATCH --open-mode=append --requeue
# Samples of an MDLM distilled by SDTT, in several numbers of steps.
set -euo pipefail
for ROOT in "${DUO_REPO:-}" "$(dirname "$0")"/{..,../../..} "${SLURM_SUBMIT_DIR:-}" ''; do
  [[ -f $ROOT/scripts/lib/launch.sh ]] && break
done
# shellcheck source=scripts/lib/launch.sh
source "${ROOT:?is not found: run sbatch in the repository, or set DUO_REPO}/scripts/lib/launch.sh" eval_distill_sdtt_openwebtext
# shellcheck source=scripts/lib/steps.sh
source "$ROOT/scripts/lib/steps.sh"

checkpoint_path=$(required checkpoint_path outputs/distill_sdtt_openwebtext/checkpoints/last.ckpt)

over_steps \
  experiment=eval_distill_sdtt_openwebtext \
  eval.checkpoint_path="$(quote "$checkpoint_path")" \
  "$@"
