"""The peak memory of a process."""

from mcjepa_jax.runtime import process_memory


def test_without_proc_the_peak_of_memory_is_this_process_s(monkeypatch):
  def none(*_, **__):
    raise FileNotFoundError

  whole = process_memory.peak_rss_gb()
  monkeypatch.setattr(process_memory.pathlib.Path, "read_text", none)
  assert 0.5 * whole <= process_memory.peak_rss_gb() <= 1.1 * whole
