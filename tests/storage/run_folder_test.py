"""A run in a bucket: its logs come back, its checkpoints are found, it goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

from gcp_storage_emulator import server as emulator, storage
import pytest

from mcjepa_jax import compare, errors, replay, train
from mcjepa_jax.storage import paths, run_folder
from mcjepa_jax.training import bad_steps
from tests.helpers import buckets, dumps, job, poison, tiny, workdirs
from tests.helpers.repository import ROOT

_STEPS = 6
_CONFIG = f"""
from configs import quickstart
from tests.helpers import tiny

def get_config():
  config = tiny.config(quickstart, mode="content", num_steps={_STEPS},
                       mesh__devices=1, save_every=2, keep_last=9, log_every=1,
                       log_records=True, evals=("rankme/synthetic",))
  return config.lock()
"""


def _with_generations(patch):
  """Has the emulator name an object's generation where GCS does, on reading.

  Tensorstore writes on the condition that what it read is still there. The
  emulator does not look at conditions: here one process writes.
  """
  seen = threading.local()
  find, close = storage.Storage.get_file_obj, emulator.Response.close

  def found(self, bucket_name, file_name, *args):
    obj = find(self, bucket_name, file_name, *args)
    seen.generation = obj.get("generation")
    return obj

  def answered(response):
    if generation := seen.__dict__.pop("generation", None):
      response["x-goog-generation"] = generation
    close(response)

  patch.setattr(storage.Storage, "get_file_obj", found)
  patch.setattr(emulator.Response, "close", answered)


@pytest.fixture(scope="module")
def bucket():
  """The address of a bucket of an emulator, for this and later processes."""
  with buckets.emulated("runs", "TENSORSTORE_GCS_HTTP_URL") as patch:
    _with_generations(patch)
    paths._store.cache_clear()
    yield "gs://runs"
  paths._store.cache_clear()


def test_a_local_folder_is_itself(tmp_path):
  with run_folder.opened(tmp_path / "run") as folder:
    assert folder.local == folder.address == tmp_path / "run"
    folder.push()
  assert not list(tmp_path.iterdir())


def test_what_a_run_wrote_is_there_for_the_next_on_any_machine(bucket):
  address = f"{bucket}/logs"
  with run_folder.opened(address) as folder:
    assert folder.address == address
    (folder.local / "metrics.jsonl").write_text("1\n")
    (folder.local / "hosts" / "1").mkdir(parents=True)
    (folder.local / "hosts" / "1" / "records.jsonl").write_text("a\n")
    (folder.local / ".partial").write_text("x")
    folder.push()
    with (folder.local / "metrics.jsonl").open("a") as file:
      file.write("2\n")
  assert not folder.local.exists()
  paths.write(paths.path(f"{address}/checkpoints/4/state"), b"large")
  with run_folder.opened(address) as again:
    found = {
        str(path.relative_to(again.local)): path.read_text()
        for path in again.local.rglob("*")
        if path.is_file()
    }
  del found["opened.txt"]
  # Half-written files stay here, checkpoints there.
  assert found == {"metrics.jsonl": "1\n2\n", "hosts/1/records.jsonl": "a\n"}


def test_only_what_changed_is_copied(bucket, monkeypatch):
  put, sent = paths.put, []
  monkeypatch.setattr(
      paths, "put", lambda part, path: sent.append(path.name) or put(part, path)
  )
  with run_folder.opened(f"{bucket}/changes") as folder:
    (folder.local / "a.txt").write_text("a")
    (folder.local / "b.txt").write_text("b")
    folder.push()
    (folder.local / "b.txt").write_text("bb")
  with run_folder.opened(f"{bucket}/changes"):
    pass
  assert sent == ["opened.txt", "a.txt", "b.txt", "b.txt", "opened.txt"]


def test_dumps_are_written_and_counted_and_read_where_they_are(bucket):
  address = f"{bucket}/dumped"
  with run_folder.opened(address) as folder:
    found = dumps.save(folder.address, step=3, limit=1)
    assert str(found) == f"{address}/dumps/step_3"
    assert not (folder.local / "dumps").exists()
  with run_folder.opened(address) as again:
    assert not (again.local / "dumps").exists()
    assert dumps.save(again.address, step=4, limit=1) is None
  with run_folder.fetched(found) as folder:
    assert bad_steps.read_meta(folder)[0]["step"] == 3
    assert bad_steps.read_arrays(folder, "both").keys() == {"frames", "views"}
  assert not folder.exists()


def test_what_was_written_to_by_no_run_is_refused_before_it_is_copied(
    bucket, monkeypatch
):
  paths.write(paths.path(f"{bucket}/parent/run/checkpoints/4/state"), b"large")
  monkeypatch.setattr(run_folder, "_fetch", None)
  with pytest.raises(errors.UserError, match="one of a run.* are run$"):
    with run_folder.opened(f"{bucket}/parent"):
      pytest.fail("it was opened")


def test_what_another_host_is_writing_is_not_read(bucket, monkeypatch):
  with run_folder.opened(f"{bucket}/many") as folder:
    (folder.local / "metrics.jsonl").write_text("1\n")
  fetched = []
  monkeypatch.setattr(
      run_folder, "_fetch", lambda file, to: fetched.append(to.name)
  )
  monkeypatch.setattr(run_folder, "_version", lambda path: (0, 0))
  with run_folder.opened(f"{bucket}/many"):
    assert fetched == ["metrics.jsonl"]


def test_what_ends_a_run_is_not_hidden_by_its_bucket(
    bucket, monkeypatch, capsys
):
  def refused(part, path):
    raise paths.Unreachable(f"{path}: cannot be written")

  with pytest.raises(errors.Stop, match="preempted") as stop:
    with run_folder.opened(f"{bucket}/ended") as folder:
      (folder.local / "metrics.jsonl").write_text("1\n")
      monkeypatch.setattr(paths, "put", refused)
      raise errors.Stop(75, "preempted")
  assert stop.value.code == 75
  assert "warning: gs://runs/ended/metrics.jsonl" in capsys.readouterr().err


def test_a_bucket_that_is_not_there_is_told_before_anything_runs(bucket):
  with pytest.raises((errors.UserError, FileNotFoundError), match="nowhere"):
    with run_folder.opened("gs://nowhere/run"):
      pytest.fail("it was opened")


def test_a_bucket_that_is_silent_at_the_start_is_started_again(
    bucket, monkeypatch
):
  def silent(self):
    raise paths.Silent(f"{bucket}/late: does not answer")

  monkeypatch.setattr(run_folder._Mirrored, "_pull", silent)
  with pytest.raises(errors.Stop, match="does not answer") as stop:
    train.train(tiny.config(), f"{bucket}/late")
  assert stop.value.code == errors.EXIT_LOST


def _start(config_path, workdir, *overrides):
  return subprocess.Popen(
      [
          sys.executable, "-m", "mcjepa_jax.main", f"--config={config_path}",
          f"--workdir={workdir}", *overrides,
      ],
      env=os.environ
      | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)},
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
  )  # fmt: skip


def _ended(process):
  out, err = process.communicate(timeout=500)
  assert process.returncode == 0, err[-4000:]
  return out


@pytest.mark.proof
@pytest.mark.slow
def test_a_run_in_a_bucket_is_killed_goes_on_and_is_evaluated(bucket, tmp_path):
  config = tmp_path / "configs" / "tiny_run.py"
  config.parent.mkdir()
  config.write_text(_CONFIG)
  _ended(_start(config, tmp_path / "whole"))
  address = f"{bucket}/run"
  process = _start(config, address, "--config.num_steps=100000")
  deadline = time.monotonic() + 400
  location = paths.path(address)
  while not {"2", "4"} <= set(location.joinpath("checkpoints").names()):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.2)
    paths.forget_below(location)
  os.killpg(process.pid, signal.SIGKILL)
  process.communicate()
  # A run of so many steps is another one: what it left is of use to neither.
  refused = _start(config, address)
  _, err = refused.communicate(timeout=500)
  assert refused.returncode == 2 and "num_steps: the run in gs://runs" in err

  # Killed while it writes the first one, then when that is complete.
  address = f"{bucket}/again"
  location = paths.path(address)
  for sign in ("state", "commit_success.txt"):
    process = _start(config, address)
    while sign not in location.joinpath("checkpoints", "2").names():
      assert process.poll() is None and time.monotonic() < deadline
      time.sleep(0.02)
      paths.forget_below(location)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
  assert "Resumed at step" in _ended(_start(config, address))
  with run_folder.opened(address) as folder:
    for name in ("metrics.jsonl", "records.jsonl"):
      steps = [line["step"] for line in workdirs.lines(folder.local / name)]
      assert sorted(set(steps)) == steps[: _STEPS + 1]
    whole, cut = (
        [
            {k: v for k, v in line.items() if k.startswith(("loss", "content"))}
            for line in workdirs.lines(path / "metrics.jsonl")
        ]
        for path in (tmp_path / "whole", folder.local)
    )
    assert whole == cut
    assert compare.read(folder.local / "results.json")
  last = f"checkpoints/{_STEPS}"
  with run_folder.fetched(f"{address}/{last}") as folder:
    shutil.copytree(folder, tmp_path / "cut" / last)
  one, other = (workdirs.saved(tmp_path / x, _STEPS) for x in ("whole", "cut"))
  assert not workdirs.differences(one[0], other[0]) and one[1] == other[1]
  out = tmp_path / "out.json"
  _ended(
      _start(
          config, address, "--config.task=evaluate", f"--config.results={out}"
      )
  )
  results = json.loads(out.read_text())
  assert results["meta/checkpoint"] == address
  assert results["meta/step"] == _STEPS
  assert results["rankme/synthetic/rank"] > 1


@pytest.mark.proof
@pytest.mark.slow
def test_two_hosts_share_a_bucket_roll_back_are_killed_and_go_on(
    bucket, tmp_path, monkeypatch, capsys
):
  config, option = poison.run(tmp_path, images=24)
  job.run(config, tmp_path / "whole", option)

  address = f"{bucket}/two"
  location = paths.path(address)
  port = job.free_port()
  processes = [
      job.start(config, address, option, index=i, count=2, port=port)
      for i in range(2)
  ]
  deadline = time.monotonic() + 400
  committed = "checkpoints", "2"
  while "commit_success.txt" not in location.joinpath(*committed).names():
    assert not any(map(subprocess.Popen.poll, processes)), job.wait(processes)
    assert time.monotonic() < deadline
    time.sleep(0.02)
    paths.forget_below(location)
  for process in processes:
    process.kill()
  job.wait(processes)

  out, *_ = job.run(config, address, option, count=2)[0][1:]
  assert "Resumed at step " in out
  with run_folder.opened(address) as folder:
    assert job.records(folder.local, 2) == job.records(tmp_path / "whole", 1)
    told = workdirs.lines(folder.local / "alarms.jsonl")
  whole = workdirs.lines(tmp_path / "whole" / "alarms.jsonl")
  assert [(x["step"], x["alarm"]) for x in told] == [
      (x["step"], x["alarm"]) for x in whole
  ]
  assert {x["alarm"] for x in told} == {"not_finite", "rollback"}
  # Of both hosts' rows, in the bucket; one process runs the step again.
  poison.stretch(monkeypatch)
  dump = f"{address}/dumps/step_{told[0]['step']}"
  assert replay.main([f"--dump={dump}"]) == 0
  report = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert report["step"] == told[0]["step"]
  assert poison.RECORD in report["records"]["content"]
  with run_folder.fetched(dump) as folder:
    assert bad_steps.read_meta(folder)[0]["hosts"] == 2


def test_a_store_that_no_run_was_written_to_is_refused():
  with pytest.raises(errors.UserError, match="got s3://bucket/run"):
    with run_folder.opened("s3://bucket/run"):
      pytest.fail("it was opened")
