#!/usr/bin/env bash
#SBATCH -N 1 --mem=32000 -t 960:00:00
#SBATCH --ntasks-per-node=1 --gres=gpu:1
#SBATCH --open-mode=append --requeue
# Zero-shot perplexity of SEDD, trained on OpenWebText.
set -euo pipefail
for ROOT in "${DUO_REPO:-}" "$(dirname "$0")"/{..,../../..} "${SLURM_SUBMIT_DIR:-}" ''; do
  [[ -f $ROOT/scripts/lib/launch.sh ]] && break
done
# shellcheck source=scripts/lib/launch.sh
source "${ROOT:?is not found: run sbatch in the repository, or set DUO_REPO}/scripts/lib/launch.sh" zero_shot_sedd
# shellcheck source=scripts/lib/zero_shot.sh
source "$ROOT/scripts/lib/zero_shot.sh"

checkpoint_path=$(required checkpoint_path outputs/train_owt_sedd/checkpoints/last.ckpt)

zero_shot \
  experiment=zero_shot_sedd \
  eval.checkpoint_path="$(quote "$checkpoint_path")" \
  "$@"
