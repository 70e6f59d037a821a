"""Both tasks on real photographs and videos, at a size two cores can train.

  python -m mcjepa_jax.main --config=configs/real_samples.py --workdir=WORKDIR \
    --config.data_root=DATA

DATA holds imagenet/train, video, DAVIS, FlyingChairs_release and MPI-Sintel.
No label is read; Middlebury is for evaluation alone.
"""

from configs import default, quickstart


def get_config() -> default.ConfigDict:
  """The quickstart's model on real input, with census and larger motion."""
  config = quickstart.get_config()
  config.name = "real_samples"
  config.num_steps = 3_000

  motion = config.motion
  motion.size = (128, 192)
  motion.batch_size = 4
  motion.downscale = (0.4, 1.0)
  motion.sources = (
      ("video", 2.0),
      ("davis", 2.0),
      ("flying_chairs", 1.0),
      ("sintel_clean", 1.0),
      ("sintel_final", 1.0),
  )
  motion.jitter.p = 0.5
  motion.photometric.update(l1=0.0, ssim=0.0, census=1.0)

  config.content.source = "imagenet"
  config.content.scale = (0.2, 1.0)

  config.save_every = 250
  config.panel_every = 500
  config.evals = (
      "flow/middlebury",
      "flow/sintel_clean",
      "flow/flying_chairs",
      "knn/cifar10",
  )
  return config
