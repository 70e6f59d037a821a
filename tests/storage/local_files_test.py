"""JSON files on a local disk."""

import json

import pytest

from mcjepa_jax.storage import local_files


def test_a_json_file_is_replaced_whole(tmp_path):
  path = tmp_path / "results.json"
  local_files.write_json(path, {"a": 1})
  with pytest.raises(TypeError):
    local_files.write_json(path, {"a": object()})
  assert json.loads(path.read_text()) == {"a": 1}
