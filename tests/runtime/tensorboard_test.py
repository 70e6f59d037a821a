"""TensorBoard's event files, read by TensorBoard."""

import numpy as np
from PIL import Image
import pytest
from tensorboardX.proto import event_pb2

from mcjepa_jax import errors
from mcjepa_jax.runtime import log_files
from mcjepa_jax.storage import local_files


def test_tensorboard_has_the_numbers_and_the_pictures(tmp_path):
  log = log_files.Journal(tmp_path, step=0, records=False)
  log.scalars(7, {"loss/motion": 0.25})
  log.picture(7, "flow", np.full((8, 12, 3), 200, np.uint8))
  log.close()
  (path,) = (tmp_path / "tensorboard").iterdir()
  values = {}
  for data in _records(path.read_bytes()):
    event = event_pb2.Event.FromString(data)
    for value in event.summary.value:
      values[value.tag] = event.step, value
  step, scalar = values["loss/motion"]
  assert (step, scalar.simple_value) == (7, 0.25)
  assert (values["flow"][1].image.height, values["flow"][1].image.width) == (
      8,
      12,
  )
  assert Image.open(tmp_path / "pictures" / "flow.png").size == (12, 8)


def test_events_of_a_full_disk_are_told_where_they_are_written(tmp_path):
  log = log_files.Journal(tmp_path, step=0, records=False)
  log._board._file.close()
  log._board._file = open("/dev/full", "wb")
  with pytest.raises(errors.UserError, match="workdir: .*No space left on dev"):
    with local_files.refusal_told(tmp_path):
      for step in range(2_000):
        log.scalars(step, {f"loss/{i}": 1.0 for i in range(100)})


def test_a_run_that_goes_on_hides_later_events_and_keeps_the_file(tmp_path):
  for step in (0, 4):
    log = log_files.Journal(tmp_path, step=step, records=False)
    log.scalars(step + 3, {"loss": 1.0})
    log.close()
  first, second = sorted((tmp_path / "tensorboard").iterdir())
  events = [
      [event_pb2.Event.FromString(data) for data in _records(path.read_bytes())]
      for path in (first, second)
  ]
  assert [event.step for event in events[0]] == [0, 3]
  assert [event.step for event in events[1]] == [4, 4, 7]
  assert events[1][1].session_log.status == event_pb2.SessionLog.START


def _records(data):
  """The payloads of a TFRecord file: u64 length, u32, payload, u32."""
  while data:
    length = int.from_bytes(data[:8], "little")
    yield data[12 : 12 + length]
    data = data[16 + length :]
