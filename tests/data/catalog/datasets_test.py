"""The catalog of data sets: the README's table, and its facts' sources."""

import pytest

from mcjepa_jax.data.catalog import datasets
from tests.helpers.repository import ROOT


def test_the_readme_holds_the_table():
  text = (ROOT / "README.md").read_text()
  assert "## Data sets\n" in text
  assert (
      f"\n\n{datasets.markdown()}\n" in text
  ), "put mcjepa_jax.data.catalog.published.markdown() into README.md, under Data sets"


@pytest.mark.parametrize("dataset", datasets.DATASETS, ids=lambda d: d.name)
def test_every_fact_has_a_page(dataset):
  facts = [
      *dataset.counts.values(),
      *([dataset.terms] if dataset.terms else []),
  ]
  pages = [dataset.download, *(fact.source for fact in facts)]
  if dataset.checked != "real files":
    pages.append(dataset.checked)
  for page in pages:
    assert page.startswith(("https://", "http://")) and " " not in page
  assert all(fact.value > 0 for fact in dataset.counts.values())
  assert {s for s in dataset.reads.values() if s} <= set(dataset.counts)


def test_no_name_is_read_from_two_sets():
  uses = [use for dataset in datasets.DATASETS for use in dataset.reads]
  assert len(set(uses)) == len(uses)


def test_published_counts_are_of_the_split_that_a_name_reads():
  assert datasets.published("flow/flying_chairs").value == 640
  assert datasets.published("motion/flying_chairs").value == 22_232
  assert datasets.published("motion/sintel_test_final").value == 552
  assert datasets.published("motion/spring") is None
  assert datasets.published("flow/nowhere") is None


def test_a_cell_of_the_table_cannot_end_its_row():
  lines = datasets.markdown().splitlines()
  assert len(lines) == 2 + len(datasets.DATASETS)
  assert len({line.count("|") for line in lines}) == 1
