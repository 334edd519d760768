# shellcheck shell=bash
# Likelihood on data sets that a model has not seen, and a table of them.

# One run for each of $datasets, with the same overrides; one that fails does not stop
# the others. The status at the end is that of the last failure.
zero_shot() {
  local folder data code status=0
  folder=$(absolute "${RUN_DIR:-$OUTPUTS/$NAME}")
  trap 'exit 130' INT
  trap 'exit 143' TERM
  for data in ${datasets:-ag_news scientific_papers_pubmed scientific_papers_arxiv \
    lambada wikitext2 wikitext103 ptb lm1b-gpt2}; do
    code=0
    RUN_DIR=$folder/$data run data="$data" \
      eval.results_path="$(quote "$folder/$data/likelihood.json")" "$@" || code=$?
    if ((code)); then
      echo "error: $data failed with status $code" >&2
      status=$code
    fi
  done
  "$PYTHON" -u "$ROOT/main.py" mode=report report.table=zero_shot \
    report.runs="[$(quote "$folder")]" report.path="$(quote "$folder/report")" \
    hydra.run.dir="$(quote "$folder")" || status=$?
  return "$status"
}
