#!/usr/bin/env bash
#SBATCH -N 1 --mem=100000 -t 960:00:00
#SBATCH --ntasks-per-node=4 --gres=gpu:4
#SBATCH --open-mode=append --requeue
# Perplexity of SEDD on OpenWebText.
set -euo pipefail
for ROOT in "${DUO_REPO:-}" "$(dirname "$0")"/{..,../../..} "${SLURM_SUBMIT_DIR:-}" ''; do
  [[ -f $ROOT/scripts/lib/launch.sh ]] && break
done
# shellcheck source=scripts/lib/launch.sh
source "${ROOT:?is not found: run sbatch in the repository, or set DUO_REPO}/scripts/lib/launch.sh" eval_owt_sedd

checkpoint_path=$(required checkpoint_path outputs/train_owt_sedd/checkpoints/last.ckpt)

run \
  experiment=eval_owt_sedd \
  eval.checkpoint_path="$(quote "$checkpoint_path")" \
  "$@"
