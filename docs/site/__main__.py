"""Writes the pages of docs/ that are made from the source: `python -m docs.site`."""

from docs.site import errors, reference
from docs.site.messages import ROOT

PAGES = (errors, reference)

if __name__ == "__main__":
    for made in PAGES:
        (ROOT / made.PAGE).write_text(made.page(), encoding="utf-8")
