#!/usr/bin/env bash
#SBATCH -N 1 --mem=16000 -t 24:00:00
#SBATCH --ntasks-per-node=1 --gres=gpu:1
#SBATCH --open-mode=append --requeue
# Samples of SEDD trained on OpenWebText, and their generative perplexity.
set -euo pipefail
for ROOT in "${DUO_REPO:-}" "$(dirname "$0")"/{..,../../..} "${SLURM_SUBMIT_DIR:-}" ''; do
  [[ -f $ROOT/scripts/lib/launch.sh ]] && break
done
# shellcheck source=scripts/lib/launch.sh
source "${ROOT:?is not found: run sbatch in the repository, or set DUO_REPO}/scripts/lib/launch.sh" gen_ppl_owt_sedd

checkpoint_path=$(required checkpoint_path outputs/train_owt_sedd/checkpoints)
checkpoint_path=$(absolute "$checkpoint_path")
ckpt=${ckpt:-last}
RUN_DIR=${RUN_DIR:-$OUTPUTS/$NAME/$(values sampling.steps seed)-$ckpt}

run \
  experiment=gen_ppl_owt_sedd \
  ${seed:+seed="$seed"} \
  eval.checkpoint_path="$(quote "$checkpoint_path/$ckpt.ckpt")" \
  ${steps:+sampling.steps="$steps"} \
  eval.generated_samples_path="$(quote "$checkpoint_path/$(values seed sampling.steps)-ckpt-$ckpt.json")" \
  "$@"
