"""Both tasks on procedural data, in minutes on two CPU cores.

./launch/quickstart.sh
"""

from configs import default


def get_config() -> default.ConfigDict:
  """The quickstart: every loss of the method, on 64x64 images."""
  config = default.get_config()
  config.name = "quickstart"
  config.num_steps = 700

  model = config.model
  model.encoder.update(
      depths=(1, 1, 1, 1),
      dims=(32, 64, 128, 256),
      drop_path=0.0,
      layer_scale=0.1,
      kernel_init="fan_in",
  )
  model.expander.widths = (256, 32)
  model.estimator.update(factor=0.25, projection=16)
  model.dtype = "float32"

  motion = config.motion
  motion.batch_size = 8
  motion.size = (64, 64)
  motion.sources = (("synthetic", 1.0),)
  motion.start_step = 0
  motion.ramp_steps = 0
  motion.weight = 12.0
  motion.jitter.p = 0.0
  motion.occlusion = "range_map"
  motion.occlusion_start = 500
  motion.smoothness.order = 1
  motion.terms.reconstruction.update(stride_1=1.0, stride_4=1.0, stride_8=0.5)
  motion.terms.smoothness.stride_1 = 2.0
  motion.terms.regression.update(
      stride_4=0.1, stride_8=0.1, stride_16=0.05, stride_32=0.05
  )

  content = config.content
  content.batch_size = 40
  content.size = 64
  content.sources = (("synthetic", 1.0),)
  content.scale = (0.3, 0.8)
  content.ratio = (0.8, 1.25)
  content.jitter.update(brightness=0.5, contrast=0.5, hue=0.3, p=1.0)
  content.gray = 0.5
  content.blur = (0.0, 0.0)
  content.solarize = (0.0, 0.0)

  config.optimizer.encoder.update(learning_rate=2e-3, warmup_steps=20)
  config.optimizer.estimator.update(learning_rate=3e-3, warmup_steps=20)

  config.alarms.update(warm_up=150, window=50)
  config.alarms.diagnose_every = 0  # another program: 30 s to compile

  config.workers = 1
  config.log_every = 20
  config.panel_every = 0
  config.save_every = 250
  config.evals = ("flow/synthetic", "knn/synthetic")
  return config
