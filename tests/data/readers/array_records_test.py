"""Records and manifests: what is read and refused."""

import pytest

from mcjepa_jax.data.readers import array_records
from mcjepa_jax.data.sets import record_sets
from mcjepa_jax.errors import UserError
from tests.helpers import image_records


def test_a_record_gives_back_what_was_packed():
  record = array_records.pack(7, "a/\udcff.png", b"image")
  assert array_records.unpack(record, "x") == (7, "a/\udcff.png", b"image")
  assert array_records.unpack(array_records.pack(-1, "", b""), "x")[0] == -1


def test_a_record_with_any_byte_changed_or_cut_is_refused():
  record = array_records.pack(7, "a.png", b"image")
  for at in range(len(record)):
    damaged = bytearray(record)
    damaged[at] ^= 0x40
    for data in (bytes(damaged), record[:at]):
      with pytest.raises(UserError, match="^x: "):
        array_records.unpack(data, "x")


def test_a_path_that_runs_past_its_record_is_refused():
  whole = array_records.pack(0, "p" * 300, b"")
  head = whole[: array_records._HEADER.size + 9]
  crc = array_records.zlib.crc32(head[8:])
  with pytest.raises(UserError, match="a path of 300 bytes"):
    array_records.unpack(head[:4] + crc.to_bytes(4, "little") + head[8:], "x")


@pytest.mark.parametrize(
    "changes",
    [
        {"count": 4},
        {"classes": "cd"},
        {"classes": [1]},
        {"shards": []},
        {"shards": {}},
        {"shards": [{"name": "../../x", "records": 5, "bytes": 1}]},
        {"shards": [{"records": 5, "bytes": 1}]},
        {"shards": [None]},
        {"count": -1, "shards": [{"name": None, "records": -1, "bytes": 1}]},
        *(
            {
                "count": records,
                "shards": [
                    {
                        "name": array_records.shard_name(0, 1),
                        "records": records,
                        "bytes": 1,
                    }
                ],
            }
            for records in (-1, 0, True, 2**63, 5.0)
        ),
    ],
)
def test_manifests_that_do_not_fit_are_refused(tmp_path, changes):
  folder = image_records.shards(tmp_path, changes=changes)
  with pytest.raises(UserError, match="manifest.json: expected classes, and"):
    record_sets.ConvertedImages(folder)


@pytest.mark.parametrize(
    "text, fault",
    [
        ("", "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        ('{"format": ' + "9" * 5000 + "}", "expected JSON"),
        ("\xff", "expected JSON"),
        ("[]", "came 'no object'"),
        ('{"format": "other"}', "came 'other'"),
        ('{"format": "mcjepa_jax images 1"}', "fails its checksum"),
    ],
)
def test_manifests_that_are_none_are_refused(tmp_path, text, fault):
  (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
  with pytest.raises(UserError, match=f"manifest.json: .*{fault}"):
    record_sets.ConvertedImages(tmp_path)


def test_a_manifest_with_a_figure_changed_is_refused(tmp_path):
  path = image_records.shards(tmp_path) / "manifest.json"
  path.write_text(path.read_text().replace('"count": 5', '"count": 6'))
  with pytest.raises(UserError, match="the manifest fails its checksum"):
    record_sets.ConvertedImages(tmp_path)
