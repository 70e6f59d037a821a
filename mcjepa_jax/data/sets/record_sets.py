"""Image sets in ArrayRecord shards: those of convert_images, and those of tfds."""

import os

import numpy as np

from mcjepa_jax.data.readers import array_records, image_files
from mcjepa_jax.errors import UserError
from mcjepa_jax.storage import paths

_TFDS_FEATURES = "tensorflow_datasets.core.features."
_MAX_CLASSES = 2**20


class ConvertedImages:
  """The images of a folder that convert_images wrote, shard after shard."""

  def __init__(self, folder: image_files.Path):
    self.folder = paths.path(folder)
    manifest = array_records.read_manifest(self.folder)
    self.classes = manifest["classes"]
    self._records = array_records.Records(
        [self.folder / shard["name"] for shard in manifest["shards"]],
        [shard["records"] for shard in manifest["shards"]],
        uncompressed=True,
    )

  def __len__(self) -> int:
    return len(self._records)

  def record_id(self, index: int) -> str:
    """Returns the record's number: its path would have to be read."""
    return f"{range(len(self))[index]:07d}"

  def path(self, index: int) -> str:
    """Returns the path under the folder that was converted."""
    return self._read(index)[1]

  def __getitem__(self, index: int) -> dict[str, np.ndarray | np.int32]:
    label, path, encoded = self._read(index)
    example = {
        "image": image_files.decode_image(encoded, f"{self.folder}/{path}")
    }
    if self.classes:
      if not 0 <= label < len(self.classes):
        raise UserError(
            f"{self._records.name(index)}: expected a label below "
            f"{len(self.classes)}, came {label}"
        )
      example["label"] = np.int32(label)
    return example

  def _read(self, index: int) -> tuple[int, str, bytes]:
    return array_records.unpack(self._records[index], self._records.name(index))


class TfdsImages:
  """The images of a split that tfds prepared as ArrayRecord.

  `folder` is the one that holds dataset_info.json, such as
  imagenet2012/5.1.0. TensorFlow is not needed, and an image is decoded by
  image_files: of tfds' own decoders none is called.
  """

  def __init__(self, folder: image_files.Path, split: str):
    self.folder = paths.path(folder)
    self._split = split
    array_records.read_json(self.folder / "dataset_info.json")
    _check_features(self.folder / "features.json")
    # Here, as no other set pays the second that this import takes.
    import tensorflow_datasets as tfds

    # What it answers to a hostile file is whatever it ran into.
    try:
      builder = tfds.builder_from_directory(os.fspath(self.folder))
      builder.as_data_source(  # sees that the files have the format
          split,
          deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
          file_format="array_record",
      )
      shards = builder.info.splits[split].file_instructions
      features = builder.info.features
      label = features["label"] if "label" in features else None
    except Exception as error:
      raise UserError(
          f"{self.folder}: expected a split {split!r} prepared by tfds with "
          f"file_format=array_record, came: {error}"
      ) from error
    num_classes = getattr(label, "num_classes", None) or 0
    counts = [shard.examples_in_shard for shard in shards]
    if not 0 <= num_classes <= _MAX_CLASSES or not array_records.fit_counts(
        counts
    ):
      raise UserError(
          f"{self.folder}: expected at most {_MAX_CLASSES} classes, and shards "
          f"with records, came {num_classes} and {counts[:9]}"
      )
    self.classes = list(label.names) if num_classes else []
    locations = [os.path.split(os.path.normpath(s.filename)) for s in shards]
    for location, name in locations:
      if location != os.path.normpath(self.folder):
        raise UserError(
            f"{self.folder}: expected shards in it, came {location}/{name}"
        )
    self._records = array_records.Records(
        [self.folder / name for _, name in locations], counts
    )

  def __len__(self) -> int:
    return len(self._records)

  def record_id(self, index: int) -> str:
    """Returns the split and the record's number."""
    return f"{self._split}/{range(len(self))[index]:07d}"

  def __getitem__(self, index: int) -> dict[str, np.ndarray | np.int32]:
    from google.protobuf import message
    from tensorflow_datasets.proto import tf_example_pb2

    name = self._records.name(index)
    try:
      parsed = tf_example_pb2.Example.FromString(self._records[index])
      (encoded,) = parsed.features.feature["image"].bytes_list.value
      labels = list(parsed.features.feature["label"].int64_list.value)
    except (message.DecodeError, ValueError) as error:
      if isinstance(error, UserError):
        raise
      raise UserError(
          f"{name}: expected a tf.train.Example with one image, came: {error}"
      ) from error
    example = {"image": image_files.decode_image(encoded, name)}
    if self.classes:
      if len(labels) != 1 or not 0 <= labels[0] < len(self.classes):
        raise UserError(
            f"{name}: expected a label below {len(self.classes)}, came "
            f"{labels[:9]}"
        )
      example["label"] = np.int32(labels[0])
    return example


def _check_features(path: paths.Location) -> None:
  """Raises UserError unless all features of features.json are tfds' own.

  tfds imports the module of any class that is named there.
  """
  waiting = [array_records.read_json(path)]
  while waiting:
    value = waiting.pop()
    if isinstance(value, list):
      waiting += value
    elif isinstance(value, dict):
      waiting += value.values()
      # An older form has JSON within JSON.
      if isinstance(value.get("content"), str):
        waiting.append(array_records.parse_json(path, value["content"]))
      for key in ("pythonClassName", "python_class_name", "type"):
        name = value.get(key)
        if isinstance(name, str) and not name.startswith(_TFDS_FEATURES):
          raise UserError(
              f"{path}: expected features of tensorflow_datasets, came {name!r}"
          )
