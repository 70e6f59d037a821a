"""Peak resident memory of this process and its children."""

import pathlib
import resource
import sys

import psutil


def peak_rss_gb() -> float:
  """Peak resident memory of this process and its live children, in GB.

  A sum of each one's own peak: no less than the tree ever held at once. Where
  there is no /proc it is of this process alone.
  """
  this = psutil.Process()
  total = 0
  for process in (this, *this.children(recursive=True)):
    try:
      status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
      continue  # it ended meanwhile, or there is no /proc
    for line in status.splitlines():
      if line.startswith("VmHWM:"):
        total += 1024 * int(line.split()[1])
  return total / 1e9 or own_peak_rss_gb()


def own_peak_rss_gb() -> float:
  """Peak resident memory of this process, in GB."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # Linux counts in KiB, macOS in bytes.
  return peak * (1024 if sys.platform == "linux" else 1) / 1e9
