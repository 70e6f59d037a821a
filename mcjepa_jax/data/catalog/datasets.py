"""What each data set is: layout, origin, terms and published counts.

`published` is for a check of what lies on a disk, `markdown` is the table in
README.md.
"""

import re

from mcjepa_jax.data.catalog import facts
from mcjepa_jax.data.catalog.flow_facts import FLOW_SETS
from mcjepa_jax.data.catalog.image_facts import IMAGE_SETS

DATASETS = FLOW_SETS + IMAGE_SETS


def published(use: str) -> facts.Fact | None:
  """Returns how many examples `use`, as flow/spring, should have, if it is known."""
  for dataset in DATASETS:
    split = dataset.reads.get(use)
    if split is not None:
      return dataset.counts[split]
  return None


def miscount(use: str, came: int) -> str | None:
  """Returns that `use` has not as many examples as are published, if so."""
  fact = published(use)
  if fact is None or came == fact.value:
    return None
  return f"expected {fact.value} examples, as {fact.source} says, came {came}"


def markdown() -> str:
  """Returns the table of README.md, a line a data set."""
  rows = [
      "| data set | train as | evaluate as | layout below `data_root` |"
      " published | terms | read in tests |",
      "|---|---|---|---|---|---|---|",
  ]
  for dataset in DATASETS:
    counts = ", ".join(
        f"{split} [{fact.value:,}]({fact.source})"
        for split, fact in dataset.counts.items()
    )
    terms = dataset.terms
    cells = (
        f"[{dataset.title}]({dataset.download})",
        _names(dataset, "motion", "content"),
        _names(dataset, "flow", "knn", "segmentation", "davis"),
        "<br>".join(f"`{path}`" for path in dataset.layout),
        f"{counts} {dataset.unit}" if counts else "not found",
        f"[{terms.value}]({terms.source})" if terms else "not found",
        facts.REAL
        if dataset.checked == facts.REAL
        else f"[fixture]({dataset.checked})",
    )
    rows.append(f"| {' | '.join(cells)} |")
  return "\n".join(rows) + "\n"


def _names(dataset: facts.Dataset, *kinds: str) -> str:
  """Returns the names for one purpose, without other cameras, ways and parts."""
  names = []
  for use in dataset.reads:
    kind, name = use.split("/")
    if kind == "knn":  # a set with labels, not its parts
      name = re.sub("_(train|val|test)(?=_|$)", "", name)
    if kind == "davis":  # of the other kinds the README's text says which
      name = use
    if kind in kinds and not re.search("_(right|past)", name):
      names.append(f"`{name}`")
  return ", ".join(dict.fromkeys(names))
