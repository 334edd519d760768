#!/usr/bin/env bash
#SBATCH -N 1 --mem=16000 -t 24:00:00
#SBATCH --ntasks-per-node=1 --gres=gpu:1
#SBATCH --open-mode=append --requeue
# Samples of the autoregressive baseline trained on OpenWebText, and their generative perplexity.
set -euo pipefail
for ROOT in "${DUO_REPO:-}" "$(dirname "$0")"/{..,../../..} "${SLURM_SUBMIT_DIR:-}" ''; do
  [[ -f $ROOT/scripts/lib/launch.sh ]] && break
done
# shellcheck source=scripts/lib/launch.sh
source "${ROOT:?is not found: run sbatch in the repository, or set DUO_REPO}/scripts/lib/launch.sh" gen_ppl_owt_ar

checkpoint_path=$(required checkpoint_path outputs/train_owt_ar/checkpoints)
checkpoint_path=$(absolute "$checkpoint_path")
RUN_DIR=${RUN_DIR:-$OUTPUTS/$NAME/$(values seed)}

run \
  experiment=gen_ppl_owt_ar \
  ${seed:+seed="$seed"} \
  eval.checkpoint_path="$(quote "$checkpoint_path/last.ckpt")" \
  eval.generated_samples_path="$(quote "$checkpoint_path/$(values seed)-ckpt-last.json")" \
  "$@"
