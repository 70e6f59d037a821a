"""Both tasks on real photographs and videos, at a size two cores can train.

  python -m mcjepa_jax.main --config=configs/real_samples.py --workdir=WORKDIR \
    --config.data_root=DATA

DATA holds imagenet/train, video, DAVIS, FlyingChairs_release and MPI-Sintel.
No label is read; Middlebury, CIFAR-10 and CamVid are for evaluation alone.
"""

from configs import default, quickstart


def get_config() -> default.ConfigDict:
  """The quickstart's model on real input, with census and larger motion."""
  config = quickstart.get_config()
  config.name = "real_samples"
  config.num_steps = 3_000

  motion = config.motion
  motion.size = (96, 128)
  motion.batch_size = 4
  motion.downscale = (0.25, 1.0)
  motion.gaps = (1, 3)
  motion.sources = (
      ("video", 1.0),
      ("davis", 1.0),
      ("flying_chairs", 2.0),
      ("sintel_clean", 1.5),
      ("sintel_final", 0.5),
  )
  motion.weight = 2.0
  motion.jitter.p = 0.5
  motion.photometric.update(l1=0.0, ssim=0.0, census=1.0)
  motion.occlusion = "range_map"
  motion.occlusion_start = 1_500
  motion.smoothness.update(form="uflow", order=1, edge_weight=150.0)
  motion.terms.reconstruction.update(stride_1=1.0, stride_4=1.0, stride_8=0.5)
  motion.terms.smoothness.update(stride_1=0.0, stride_4=1.0)

  content = config.content
  content.sources = (("imagenet", 1.0),)
  content.batch_size = 48
  content.scale = (0.2, 1.0)
  content.ratio = (3 / 4, 4 / 3)
  content.jitter.update(brightness=0.4, contrast=0.4, hue=0.1, p=0.8)
  content.gray = 0.2

  config.optimizer.encoder.update(learning_rate=1.5e-3, warmup_steps=100)
  config.optimizer.estimator.update(learning_rate=3e-3, warmup_steps=100)

  # Flow that beats no flow on videos takes its time.
  config.alarms.update(warm_up=1_000, diagnose_every=500)

  # CamVid's frames are 240x180: 26 epochs of its 367.
  config.segmentation.update(
      crop=160, stride=107, learning_rate=1e-3, warmup_steps=60
  )
  config.segmentation.sets.camvid_val.update(num_steps=600, short_side=180)

  config.save_every = 250
  config.panel_every = 500
  config.evals = (
      "flow/middlebury",
      "flow/sintel_clean",
      "flow/flying_chairs",
      "knn/cifar10",
      "linear/cifar10",
      "segmentation/camvid_val",
      "davis/2016",
  )
  return config
