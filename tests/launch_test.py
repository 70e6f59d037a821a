"""The launch scripts without what they launch on: lint, dry runs, stand-ins."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
import yaml

from mcjepa_jax import errors
from mcjepa_jax.runtime import command_line, config_files
from mcjepa_jax.training import validation
from tests.helpers.repository import ROOT

_LAUNCH = ROOT / "launch"
_RUN = ("--config=configs/quickstart.py", "--workdir=/mnt/mcjepa/runs/one")
# Quotes, spaces, a variable, a command, a glob, a line's end and nothing.
_ODD = (
    *_RUN,
    "--config.motion.sources=(('video', 1.0), (\"frames\", 2))",
    "--config.data_root=/data/it's $HOME `id` $(id) * \\ ;",
    "--config.name=two\nlines",
    "--config.checkpoint=",
)
_POD = ("--name=pod", "--zone=us-east5-b")
# Writes down its arguments.
_RECORDER = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["RECORD"], "a") as file:
  file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
"""


def _launch(script, *arguments, **env):
  return subprocess.run(
      [_LAUNCH / script, *arguments],
      env=os.environ | env,
      capture_output=True,
      text=True,
      check=False,
  )


def _dry(script, *arguments):
  """The words of each command that a dry run prints, as bash reads them."""
  run = (
      _launch(script, "--dry-run", *arguments)
      if script != "tpu_pod.sh"
      else (_launch(script, arguments[0], "--dry-run", *arguments[1:]))
  )
  assert run.returncode == 0, run.stderr
  lines = [
      f"printf '%s\\0' {line}; printf '\\1'"
      for line in run.stdout.splitlines()
      if line
  ]
  read = subprocess.run(
      ["bash", "-c", "\n".join(lines)],
      capture_output=True,
      text=True,
      check=True,
  )
  return [part.split("\0")[:-1] for part in read.stdout.split("\1")[:-1]]


def _value(words, name):
  (value,) = (w.split("=", 1)[1] for w in words if w.startswith(f"--{name}="))
  return value


def _executable(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)


@pytest.mark.parametrize(
    "path", sorted(_LAUNCH.glob("*.sh")), ids=lambda path: path.name
)
def test_shellcheck_finds_nothing(path):
  shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
  run = subprocess.run(
      [shellcheck, "--external-sources", path],
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=False,
  )
  assert run.returncode == 0, run.stdout


def test_hadolint_finds_nothing_in_the_dockerfile():
  hadolint = pathlib.Path(sys.executable).with_name("hadolint")
  run = subprocess.run(
      [hadolint, _LAUNCH / "Dockerfile"],
      capture_output=True,
      text=True,
      check=False,
  )
  assert run.returncode == 0, run.stdout


def test_the_dockerfile_copies_what_is_there():
  lines = (_LAUNCH / "Dockerfile").read_text().splitlines()
  copied = [line.split()[1:-1] for line in lines if line.startswith("COPY")]
  assert copied
  for path in sum(copied, []):
    assert (ROOT / path).exists(), path
  assert 'ENTRYPOINT ["python", "-m", "mcjepa_jax.main"]' in lines


@pytest.mark.parametrize(
    ("script", "arguments", "missing"),
    [
        ("tpu_pod.sh", (), "launch/tpu_pod.sh ACTION"),
        ("tpu_pod.sh", ("fly", *_POD), "no such action: fly"),
        ("tpu_pod.sh", ("create", "--zone=z"), "--name=NAME is missing"),
        ("tpu_pod.sh", ("create", "--name=n"), "--zone=ZONE is missing"),
        ("tpu_pod.sh", ("create", *_POD), "--type=TYPE is missing"),
        ("tpu_pod.sh", ("create", *_POD, "--type=v9-8"), "add --runtime="),
        ("tpu_pod.sh", ("create", *_POD, "--slices=x"), "expected a number"),
        ("tpu_pod.sh", ("create", *_POD, "--typ=x"), "unknown argument --typ"),
        ("tpu_pod.sh", ("mount", *_POD), "--nfs=ADDRESS:/SHARE is missing"),
        ("tpu_pod.sh", ("run", *_POD), "--config=FILE.py is missing"),
        ("tpu_pod.sh", ("up", *_POD, "--type=v4-8", "--", _RUN[0]),
         "--workdir=FOLDER is missing"),
        ("slurm.sh", ("--gpus=8", "--", *_RUN), "--nodes=N is missing"),
        ("slurm.sh", ("--nodes=2", "--gpus=0", "--", *_RUN), "a number, got 0"),
        ("slurm.sh", ("--nodes=2", "--gpus=8"), "--config=FILE.py is missing"),
        ("multi_gpu.sh", (), "--config=FILE.py is missing"),
        ("multi_gpu.sh", ("--gpus=a", "--", *_RUN), "expected 0,1,..."),
        ("install.sh", ("gpu",), "expected base, cuda or tpu"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named_and_the_code_is_2(
    script, arguments, missing, tmp_path
):
  # Not as dry runs: nothing is begun before all is there.
  for name in ("gcloud", "sbatch", "python3"):
    _executable(tmp_path / name, "#!/bin/sh\necho called\n")
  path = f"{tmp_path}:{os.environ['PATH']}"
  run = _launch(script, *arguments, PATH=path)
  assert run.returncode == 2, run.stdout
  assert missing in run.stderr
  assert not run.stdout


def test_a_pod_is_asked_for_and_started_in_order():
  lines = _dry(
      "tpu_pod.sh", "up", *_POD, "--type=v6e-16", "--slices=2", "--spot",
      "--project=mine", "--nfs=10.0.0.2:/share", "--", *_RUN,
  )  # fmt: skip
  verbs = [words[4] if words[0] == "gcloud" else words[0] for words in lines]
  assert verbs == [
      "create", "describe", "tar", "scp", "ssh", "ssh", "ssh"
  ]  # fmt: skip
  create = lines[0]
  assert create[:6] == "gcloud compute tpus queued-resources create pod".split()
  assert set(create[6:]) == {
      "--zone=us-east5-b", "--project=mine", "--accelerator-type=v6e-16",
      "--runtime-version=v2-alpha-tpuv6e", "--node-count=2",
      "--node-prefix=pod", "--spot",
  }  # fmt: skip
  for words in lines:
    if words[0] == "gcloud":
      assert {"--zone=us-east5-b", "--project=mine"} <= set(words)
  for words in lines[3:]:
    assert {"--node=all", "--worker=all"} <= set(words)
  assert "launch/install.sh tpu" in _value(lines[4], "command")
  assert "sudo mount 10.0.0.2:/share /mnt/mcjepa" in _value(lines[5], "command")


@pytest.mark.parametrize(
    ("kind", "software"),
    [
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v4-32", "tpu-ubuntu2204-base"),
    ],
)
def test_one_slice_gets_the_software_of_its_type(kind, software):
  ((*_, kind_flag, runtime, node),) = _dry(
      "tpu_pod.sh", "create", *_POD, f"--type={kind}"
  )
  assert kind_flag == f"--accelerator-type={kind}"
  assert runtime == f"--runtime-version={software}"
  assert node == "--node-id=pod"


def test_a_pod_is_followed_stopped_and_given_back():
  (words,) = _dry("tpu_pod.sh", "logs", *_POD, "--slice=1", "--host=3")
  assert {"--node=1", "--worker=3"} <= set(words)
  (words,) = _dry("tpu_pod.sh", "stop", *_POD)
  assert "kill -TERM" in _value(words, "command")
  (words,) = _dry("tpu_pod.sh", "delete", *_POD)
  assert words[4:6] == ["delete", "pod"]
  assert {"--force", "--quiet"} <= set(words)


def test_odd_arguments_reach_main_on_a_pod(tmp_path):
  _executable(tmp_path / "mcjepa_jax/.venv/bin/python", _RECORDER)
  (tmp_path / "mcjepa_jax/launch").symlink_to(_LAUNCH)
  # A host, whose shell reads what --command says.
  _executable(
      tmp_path / "bin/gcloud",
      f'#!/bin/bash\ncd {tmp_path}\nfor a in "$@"; do case "$a" in'
      ' --command=*) bash -c "${a#*=}" ;; esac; done\n',
  )
  record = tmp_path / "record"

  def launched():
    return _launch(
        "tpu_pod.sh", "run", *_POD, "--", *_ODD,
        PATH=f"{tmp_path}/bin:{os.environ['PATH']}", RECORD=str(record),
    )  # fmt: skip

  run = launched()
  assert run.returncode == 0, run.stderr
  deadline = time.monotonic() + 20  # it was started in the background
  while not (record.exists() and record.read_text().endswith("\n")):
    assert time.monotonic() < deadline
    time.sleep(0.02)
  words = json.loads(record.read_text())
  assert words == ["python", "-m", "mcjepa_jax.main", *_ODD]
  assert int((tmp_path / "mcjepa.pid").read_text()) > 1
  # A second one beside it would be the one that `stop` ends.
  (tmp_path / "mcjepa.pid").write_text(f"{os.getpid()}\n")
  record.unlink()
  assert "main.py runs here already" in launched().stderr
  assert (tmp_path / "mcjepa.pid").read_text() == f"{os.getpid()}\n"
  assert not record.exists()


@pytest.mark.parametrize(
    ("state", "code"), [("ACTIVE", 0), ("FAILED", 1), ("SUSPENDED", 1)]
)
def test_waiting_ends_with_the_state(tmp_path, state, code):
  _executable(tmp_path / "gcloud", f"#!/bin/sh\necho {state}\n")
  path = f"{tmp_path}:{os.environ['PATH']}"
  run = _launch("tpu_pod.sh", "wait", *_POD, PATH=path)
  assert run.returncode == code
  assert f"pod: {state}" in run.stderr


@pytest.mark.parametrize(("failures", "code"), [(3, 0), (10, 1)])
def test_waiting_outlives_questions_that_are_not_answered(
    tmp_path, failures, code
):
  count = tmp_path / "count"
  _executable(
      tmp_path / "gcloud",
      f"#!/bin/sh\necho >> {count}\n"
      f"[ $(wc -l < {count}) -gt {failures} ] && echo ACTIVE\n",
  )
  _executable(tmp_path / "sleep", "#!/bin/sh\n")
  path = f"{tmp_path}:{os.environ['PATH']}"
  run = _launch("tpu_pod.sh", "wait", *_POD, PATH=path)
  assert run.returncode == code, run.stderr
  assert ("no answer from gcloud" in run.stderr) == bool(code)


@pytest.mark.parametrize(
    ("codes", "state", "before", "again"),
    [
        ((0, 0), "RUNNING", 0, False),
        ((3, 0), "RUNNING", 0, False),
        ((75, 75), "RUNNING", 20, True),
        ((77, 77), "RUNNING", 19, True),
        # One was killed, and the other saw it.
        ((137, 77), "RUNNING", 0, True),
        ((77, 137), "RUNNING", 20, False),
        # What it needs is away after a loss; else it is a fault of the input.
        ((2, 2), "RUNNING", 1, True),
        ((2, 2), "RUNNING", 0, False),
        # By scancel.
        ((75, 75), "COMPLETING", 0, False),
        # squeue did not answer.
        ((77, 77), "", 0, True),
    ],
)
def test_a_slurm_job_runs_main_and_is_queued_again(
    tmp_path, codes, state, before, again
):
  record = tmp_path / "record"
  lost = tmp_path / "mcjepa-17.lost"
  lost.write_text("77\n" * before)
  _executable(
      tmp_path / "venv/bin/python",
      f"{_RECORDER}sys.exit(int(os.environ['CODE']))\n",
  )
  for name in ("scontrol", "squeue"):
    _executable(tmp_path / "bin" / name, f"{_RECORDER}print('{state}')\n")
  # The highest code of its tasks.
  _executable(
      tmp_path / "bin/srun",
      "#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nmost=0\n"
      f"for code in {' '.join(map(str, codes))}; do\n"
      '  CODE=$code "$@"; (( $? > most )) && most=$code\ndone\nexit $most\n',
  )
  _executable(tmp_path / "bin/sbatch", _RECORDER + (
      "import subprocess\n"
      "run = subprocess.run(['bash', '-s'], stdin=sys.stdin,\n"
      f"                     cwd={str(tmp_path)!r})\n"
      "sys.exit(run.returncode)\n"
  ))  # fmt: skip
  run = _launch(
      "slurm.sh", "--nodes=2", "--gpus=4", "--partition=p", "--time=1:00:00",
      "--", *_ODD,
      PATH=f"{tmp_path}/bin:{os.environ['PATH']}", RECORD=str(record),
      MCJEPA_VENV=str(tmp_path / "venv"), SLURM_JOB_ID="17",
  )  # fmt: skip
  assert run.returncode == max(codes), run.stderr
  submitted, *started = (
      json.loads(line) for line in record.read_text().splitlines()
  )
  assert submitted[0] == "sbatch"
  assert {
      "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4",
      "--time=1:00:00", "--partition=p", "--requeue", "--signal=TERM@120",
  } <= set(submitted)  # fmt: skip
  assert started[:2] == 2 * [["python", "-m", "mcjepa_jax.main", *_ODD]]
  assert started[2][:2] == ["squeue", "--noheader"]
  assert started[3:] == ([["scontrol", "requeue", "17"]] if again else [])
  assert not lost.exists() or max(codes) > 0


def _again(*script, seconds="0", **kwargs):
  return subprocess.Popen(
      [_LAUNCH / "again.sh", "bash", "-c", *script],
      env=os.environ | {"MCJEPA_AGAIN_SECONDS": seconds},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      **kwargs,
  )


@pytest.mark.parametrize(
    ("body", "code", "runs"),
    [
        ("exit 0", 0, 1),
        ("exit 2", 2, 1),
        ("exit 75", 75, 1),
        ("exit 77", 77, 21),
        ("exit 130", 130, 1),
        # A bucket that is still silent at the next start.
        (
            "case $(wc -l < ran) in 1) exit 77 ;; 2) exit 2 ;; *) exit 0 ;; esac",
            0,
            3,
        ),
        ("[ $(wc -l < ran) -gt 3 ] || kill -9 $$", 0, 4),
    ],
)
def test_what_is_lost_is_started_again(tmp_path, body, code, runs):
  process = _again(f"echo >> ran; {body}", cwd=tmp_path)
  _, err = process.communicate(timeout=60)
  assert process.returncode == code
  assert (tmp_path / "ran").read_text().count("\n") == runs
  assert err.count("started again") == runs - 1


def test_sigterm_reaches_what_runs_and_nothing_follows_it(tmp_path):
  process = _again(
      "trap 'sleep 0.3; echo saved; exit 77' TERM; echo ready;"
      " while true; do sleep 0.05; done",
      cwd=tmp_path,
  )
  assert process.stdout.readline() == "ready\n"
  process.terminate()
  out, _ = process.communicate(timeout=60)
  assert out == "saved\n" and process.returncode == 77


def test_sigterm_between_two_starts_ends_it(tmp_path):
  process = _again("echo >> ran; exit 77", seconds="60", cwd=tmp_path)
  assert "started again, 1 of 20" in process.stderr.readline()
  start = time.monotonic()
  process.terminate()
  assert process.wait(timeout=50) == 77 and time.monotonic() - start < 50
  assert (tmp_path / "ran").read_text() == "\n"


def test_a_slurm_job_is_printed_and_not_submitted(tmp_path):
  _executable(tmp_path / "sbatch", "#!/bin/sh\necho submitted\n")
  run = _launch(
      "slurm.sh", "--dry-run", "--nodes=2", "--gpus=4", "--", *_RUN,
      PATH=f"{tmp_path}:{os.environ['PATH']}",
  )  # fmt: skip
  assert run.returncode == 0 and "submitted" not in run.stdout
  assert run.stdout.startswith("sbatch ") and "srun " in run.stdout
  # srun does not take sbatch's, and is not to kill what still saves.
  assert "srun --kill-on-bad-exit=0 --cpus-per-task=8 " in run.stdout


def test_gpus_are_chosen_and_odd_arguments_kept():
  ((env, *words),) = _dry("multi_gpu.sh", "--gpus=0,2", "--", *_ODD)
  assert env == "env" and "CUDA_VISIBLE_DEVICES=0,2" in words
  assert words[-len(_ODD) - 2 :] == ["-m", "mcjepa_jax.main", *_ODD]


def test_the_jobset_has_what_main_reads():
  jobset = yaml.safe_load((_LAUNCH / "jobset.yaml").read_text())
  assert (jobset["apiVersion"], jobset["kind"]) == (
      "jobset.x-k8s.io/v1alpha2",
      "JobSet",
  )
  (job,) = jobset["spec"]["replicatedJobs"]
  spec = job["template"]["spec"]
  # One pod a host, each once: JAX counts on as many as the slice has.
  assert spec["parallelism"] == spec["completions"] and not spec["backoffLimit"]
  pod = spec["template"]["spec"]
  # What would fail again ends all; what is preempted is started again.
  (rule,) = jobset["spec"]["failurePolicy"]["rules"]
  assert rule["action"] == "FailJobSet"
  assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
  (final,) = spec["podFailurePolicy"]["rules"]
  assert final["action"] == "FailJob"
  assert final["onExitCodes"] == {
      "containerName": pod["containers"][0]["name"],
      "operator": "In",
      "values": [errors.EXIT_USER_ERROR, errors.EXIT_ALARM],
  }
  assert pod["restartPolicy"] == "Never"
  rows, columns = map(
      int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
  )
  (container,) = pod["containers"]
  chips = container["resources"]["limits"]["google.com/tpu"]
  assert rows * columns == chips * spec["parallelism"]
  arguments = command_line.split(
      container["args"], ("config", "workdir", "coordinator")
  )
  file, workdir = command_line.single(
      arguments.flags, config="FILE.py", workdir="FOLDER"
  )
  config = config_files.load_config(str(ROOT / file), arguments.overrides)
  devices = rows * columns * job["replicas"]
  assert not validation.faults(config, devices=devices)
  mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
  assert workdir.startswith(f"{mounts['shared']}/")
  assert {v["name"] for v in pod["volumes"]} == set(mounts)
