# shellcheck shell=bash
# Samples in several numbers of steps, and a table of them beside the published numbers.

# shellcheck source=scripts/lib/each.sh
source "$ROOT/scripts/lib/each.sh"

# One run for each of $steps.
over_steps() {
  each sampling.steps "${steps:-8 16 32 64 128 1024}" \
    eval.generated_samples_path=samples.json distillation "$@"
}
