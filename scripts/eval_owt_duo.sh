#!/usr/bin/env bash
#SBATCH -N 1 --mem=100000 -t 960:00:00
#SBATCH --ntasks-per-node=1 --gres=gpu:1
#SBATCH --open-mode=append --requeue
# Perplexity of DUO on OpenWebText.
set -euo pipefail
for ROOT in "${DUO_REPO:-}" "$(dirname "$0")"/{..,../../..} "${SLURM_SUBMIT_DIR:-}" ''; do
  [[ -f $ROOT/scripts/lib/launch.sh ]] && break
done
# shellcheck source=scripts/lib/launch.sh
source "${ROOT:?is not found: run sbatch in the repository, or set DUO_REPO}/scripts/lib/launch.sh" eval_owt_duo

checkpoint_path=$(required checkpoint_path outputs/train_owt_duo/checkpoints/last.ckpt)

run \
  experiment=eval_owt_duo \
  eval.checkpoint_path="$(quote "$checkpoint_path")" \
  "$@"
