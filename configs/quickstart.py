"""Both tasks on procedural data, in minutes on two CPU cores.

./launch/quickstart.sh
"""

from configs import default


def get_config() -> default.ConfigDict:
  """The quickstart: every loss of the method, on 64x64 images."""
  config = default.get_config()
  config.name = "quickstart"
  config.num_steps = 400

  model = config.model
  model.encoder.update(
      depths=(1, 1, 3, 1),
      dims=(32, 64, 128, 256),
      drop_path=0.0,
      kernel_init="fan_in",
  )
  model.expander.widths = (512, 512, 512)
  model.estimator.update(factor=0.25, projection=16)
  model.dtype = "float32"

  motion = config.motion
  motion.batch_size = 16
  motion.size = (64, 64)
  motion.sources = (("synthetic", 1.0),)
  motion.start_step = 0
  motion.ramp_steps = 0
  motion.weight = 1.0
  motion.jitter.p = 0.0
  motion.occlusion_start = 200
  motion.smoothness.order = 1
  motion.terms.reconstruction.update(stride_1=1.0, stride_4=1.0, stride_8=0.5)
  motion.terms.smoothness.stride_1 = 2.0
  motion.terms.regression.update(
      stride_4=0.1, stride_8=0.1, stride_16=0.05, stride_32=0.05
  )

  content = config.content
  content.batch_size = 64
  content.size = 64
  content.source = "synthetic"
  content.scale = (0.3, 1.0)
  content.blur = (0.1, 0.1)

  config.optimizer.encoder.update(learning_rate=1e-3, warmup_steps=50)
  config.optimizer.estimator.update(learning_rate=3e-3, warmup_steps=50)

  config.workers = 1
  config.log_every = 20
  config.panel_every = 0
  config.save_every = 200
  config.evals = ("flow/synthetic", "knn/synthetic")
  return config
