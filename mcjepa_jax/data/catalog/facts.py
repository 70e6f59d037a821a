"""What is said of one data set.

A fact stands beside the page that it was found on; what was found nowhere is
None, or absent from `counts`.
"""

import dataclasses

GITHUB = "https://github.com"
REAL = "real files"


@dataclasses.dataclass(frozen=True)
class Fact:
  """A value and the page that says it."""

  value: int | str
  source: str


@dataclasses.dataclass(frozen=True)
class Dataset:
  """One data set; paths are below `data_root`."""

  name: str
  title: str
  layout: tuple[str, ...]
  download: str  # the official page
  # What reads it, as motion/NAME, flow/NAME, content/NAME, knn/NAME, davis/NAME
  # or (upernet/ too) segmentation/NAME and segmentation_train/NAME, and the split
  # of `counts` that this should be; None if no count says.
  reads: dict[str, str | None]
  terms: Fact | None = None
  counts: dict[str, Fact] = dataclasses.field(default_factory=dict)
  unit: str = "pairs"
  # "real files", or the page by which a fixture of the tests is written.
  checked: str = REAL
