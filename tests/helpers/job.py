"""A run of several processes on this machine, as of hosts, and what they left."""

import os
import socket
import subprocess
import sys
import threading

from tests.helpers import workdirs
from tests.helpers.repository import ROOT


def free_port():
  """A port that nobody listens on."""
  with socket.socket() as listener:
    listener.bind(("", 0))
    return listener.getsockname()[1]


def written(tmp_path_factory, name, text):
  """The path of a config file of some text."""
  path = tmp_path_factory.mktemp(name) / "configs" / f"{name}_run.py"
  path.parent.mkdir()
  path.write_text(text)
  return path


def start(config_path, workdir, *overrides, index=0, count=1, port=0, **env):
  """The process of one host of `count`; variables are added to its own."""
  process_flags = []
  if count > 1:
    process_flags = [
        f"--coordinator=127.0.0.1:{port}",
        f"--processes={count}",
        f"--process={index}",
    ]
  return subprocess.Popen(
      [
          sys.executable, "-m", "mcjepa_jax.main", f"--config={config_path}",
          f"--workdir={workdir}", *process_flags, *overrides,
      ],
      env=os.environ
      | {
          "JAX_PLATFORMS": "cpu",
          "XLA_FLAGS": "",
          "PYTHONPATH": str(ROOT),
          # Compiling is what costs, in every process.
          "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
      }
      | env,
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
  )  # fmt: skip


def wait(started):
  """(exit code, stdout, stderr) of each, or all are ended."""
  threads, results = [], [None] * len(started)

  def one(i):
    out, err = started[i].communicate(timeout=500)
    results[i] = (started[i].returncode, out, err)

  try:
    for i in range(len(started)):
      threads.append(threading.Thread(target=one, args=(i,)))
      threads[-1].start()
    for thread in threads:
      thread.join()
  finally:
    for process in started:
      process.kill()
  return results


def run(config_path, workdir, *overrides, count=1, **env):
  """(exit code, stdout, stderr) of each host of a run; all went well."""
  port = free_port()
  started = [
      start(config_path, workdir, *overrides, index=i, count=count, port=port,
             **env)
      for i in range(count)
  ]  # fmt: skip
  results = wait(started)
  for code, _, err in results:
    assert code == 0, err[-3000:]
  return results


def records(workdir, count, readers=1, since=0):
  """Per task the ids of all hosts' rows, host after host; a line a step.

  Of `readers` neighbours that read the same, those of the first.
  """
  folders = [workdir] + [workdir / "hosts" / str(i) for i in range(1, count)]
  found = (
      [x for x in workdirs.lines(f / "records.jsonl") if x["step"] >= since]
      for f in folders[::readers]
  )
  return [
      {
          key: sum((line[key] for line in lines), [])
          for key in lines[0]
          if key != "step"
      }
      for lines in zip(*found, strict=True)
  ]
