"""ArrayRecord shards of images, as convert_images and tfds write them."""

import io
import json

from array_record.python import array_record_module
from PIL import Image

from mcjepa_jax.data.readers import array_records


def encoded(value, kind="PNG"):
  file = io.BytesIO()
  Image.new("RGB", (6, 4), (value, 0, 255)).save(file, kind)
  return file.getvalue()


def write_records(path, records, options=array_records.WRITE_OPTIONS):
  writer = array_record_module.ArrayRecordWriter(str(path), options)
  for record in records:
    writer.write(record)
  writer.close()


def shards(folder, counts=(2, 0, 3), classes=("cat", "dog"), changes=()):
  """A converted folder: image i has red 10 i and label i % 2."""
  folder.mkdir(parents=True, exist_ok=True)
  shards, number = [], 0
  for k, count in enumerate(counts):
    path = folder / array_records.shard_name(k, len(counts))
    numbers = range(number, number + count)
    write_records(
        path,
        [
            array_records.pack(i % 2, f"é/{i}.png", encoded(10 * i))
            for i in numbers
        ],
    )
    number += count
    size = path.stat().st_size
    shards.append({"name": path.name, "records": count, "bytes": size})
  manifest = {"count": number, "classes": list(classes), "shards": shards}
  array_records.write_manifest(folder, manifest | dict(changes))
  return folder


IMAGE = "tensorflow_datasets.core.features.image_feature"


def tfds_folder(folder, counts=(4, 3), template=None):
  """A set as tfds writes it, by its own writers of features and examples."""
  import tensorflow_datasets as tfds

  folder.mkdir(parents=True)
  features = tfds.features.FeaturesDict(
      {
          "image": tfds.features.Image(encoding_format="jpeg"),
          "label": tfds.features.ClassLabel(names=["cat", "dog"]),
          "file_name": tfds.features.Text(),
      }
  )
  features.save_config(folder)
  number = 0
  for k, count in enumerate(counts):
    examples = [
        {"image": encoded(10 * i, "JPEG"), "label": i % 2, "file_name": f"{i}"}
        for i in range(number, number + count)
    ]
    number += count
    name = f"imagenet2012-train.array_record-{k:05d}-of-{len(counts):05d}"
    # As tfds writes them: compressed.
    records = map(features.serialize_example, examples)
    write_records(folder / name, records, "group_size:1")
  info = {
      "name": "imagenet2012",
      "version": "5.1.0",
      "fileFormat": "array_record",
      "splits": [
          {
              "name": "train",
              "shardLengths": [str(count) for count in counts],
              "filepathTemplate": template
              or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
          }
      ],
  }
  (folder / "dataset_info.json").write_text(json.dumps(info))
  return folder
