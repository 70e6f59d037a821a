"""Sets with optical flow; see `facts`."""

from mcjepa_jax.data.catalog.facts import GITHUB, Dataset, Fact

_FREIBURG = "https://lmb.informatik.uni-freiburg.de/resources/datasets"
_FLOW_LIBRARY = (
    f"{GITHUB}/cv-stuttgart/flow_library/blob/"
    "281d616a4c4de9d31817d3a6849f3d578d92d9b8/flow_datasets.py"
)
_SPRING_UTILS = (
    f"{GITHUB}/cv-stuttgart/spring_utils/blob/"
    "9c4212a60a53175b3395533b2ba7c2a0f09916c3/dataloader.py"
)
_PTLFLOW = (
    f"{GITHUB}/hmorimitsu/ptlflow/blob/"
    "14900e9dbe0455f58f1983a134cb8abf8ca8684a/ptlflow/data"
)
_MMFLOW = (
    f"{GITHUB}/open-mmlab/mmflow/blob/"
    "0143f624c6db9ecab1b5e1864f7f2811e24dd3ef/docs/en/data_prepare"
)
_KITTI_TERMS = "https://huggingface.co/datasets/heesang1/KITTI-QA"

FLOW_SETS = (
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
                f"{GITHUB}/Trentonom0r3/Stylizing-Video-by-Example/blob/"
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
            "FlyingThings3D/frames_{clean,final}pass{,_webp}/{TRAIN,TEST}/S/"
            "NNNN/{left,right}/NNNN.{png,webp}",
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
        # Of _webp: github.com/aharley/pips, README.md.
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
            f"{GITHUB}/mshaikh786/aimcr-scripts/blob/HEAD/65614-Viola/"
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
            f"{GITHUB}/castacks/tartanair_tools/blob/"
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
            f"{GITHUB}/ozendelait/rvc_devkit/blob/"
            "3e3574ba76846b36f783e5134e7890a761d3a405/flow/benchmark_viper.py"
        ),
    ),
)
