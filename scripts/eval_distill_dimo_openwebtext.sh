#!/usr/bin/env bash
#SBATCH -N 1 --mem=16000 -t 24:00:00
#SBATCH --ntasks-per-node=1 --gres=gpu:1
#SBATCH --open-mode=append --requeue
# Samples of an MDLM distilled to one step, and refined in several numbers of further steps.
set -euo pipefail
for ROOT in "${DUO_REPO:-}" "$(dirname "$0")"/{..,../../..} "${SLURM_SUBMIT_DIR:-}" ''; do
  [[ -f $ROOT/scripts/lib/launch.sh ]] && break
done
# shellcheck source=scripts/lib/launch.sh
source "${ROOT:?is not found: run sbatch in the repository, or set DUO_REPO}/scripts/lib/launch.sh" eval_distill_dimo_openwebtext
# shellcheck source=scripts/lib/each.sh
source "$ROOT/scripts/lib/each.sh"

checkpoint_path=$(required checkpoint_path outputs/distill_dimo_openwebtext/checkpoints/last.ckpt)

each sampling.refine_steps "${refine_steps:-0 1 3 7}" \
  eval.generated_samples_path=samples.json distillation \
  experiment=eval_distill_dimo_openwebtext \
  eval.checkpoint_path="$(quote "$checkpoint_path")" \
  "$@"
