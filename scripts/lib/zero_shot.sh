# shellcheck shell=bash
# Likelihood on data sets that a model has not seen, and a table of them.

# shellcheck source=scripts/lib/each.sh
source "$ROOT/scripts/lib/each.sh"

# One run for each of $datasets.
zero_shot() {
  each data "${datasets:-ag_news scientific_papers_pubmed scientific_papers_arxiv \
    lambada wikitext2 wikitext103 ptb lm1b-gpt2}" \
    eval.results_path=likelihood.json zero_shot "$@"
}
