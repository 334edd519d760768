#!/usr/bin/env bash
#SBATCH -N 1 --mem=16000 -t 24:00:00
#SBATCH --ntasks-per-node=1 --gres=gpu:1
#SBATCH --open-mode=append --requeue
# Samples of DUO trained on OpenWebText, and their generative perplexity.
set -euo pipefail
for ROOT in "${DUO_REPO:-}" "$(dirname "$0")"/{..,../../..} "${SLURM_SUBMIT_DIR:-}" ''; do
  [[ -f $ROOT/scripts/lib/launch.sh ]] && break
done
# shellcheck source=scripts/lib/launch.sh
source "${ROOT:?is not found: run sbatch in the repository, or set DUO_REPO}/scripts/lib/launch.sh" gen_ppl_owt_duo

checkpoint_path=$(required checkpoint_path outputs/train_owt_duo/checkpoints)
checkpoint_path=$(absolute "$checkpoint_path")
steps=${steps:-32}
seed=${seed:-1}
ckpt=${ckpt:-last}
RUN_DIR=${RUN_DIR:-$OUTPUTS/$NAME/$steps-$seed-$ckpt}

run \
  mode=sample_eval \
  seed="$seed" \
  loader.batch_size=2 \
  loader.eval_batch_size=8 \
  data=openwebtext-split \
  algo=duo_base \
  model=small \
  eval.checkpoint_path="$(quote "$checkpoint_path/$ckpt.ckpt")" \
  sampling.num_sample_batches=100 \
  sampling.steps="$steps" \
  +wandb.offline=true \
  eval.generated_samples_path="$(quote "$checkpoint_path/samples_ancestral/$seed-$steps-ckpt-$ckpt.json")" \
  "$@"
