"""Every key of a run, with its unit or its consequence.

Variants import `get_config`, override keys and add none: the config is locked,
so that a misspelt key is an error.
"""

import ml_collections

ConfigDict = ml_collections.ConfigDict


def strides(**weights: float) -> ConfigDict:
  """A weight per stride: `strides(stride_4=1.0)`; what is absent is 0."""
  names = ("stride_1", "stride_2", "stride_4", "stride_8", "stride_16",
           "stride_32")  # fmt: skip
  unknown = set(weights) - set(names)
  if unknown:
    raise ValueError(f"no such stride: {sorted(unknown)}; known: {names}")
  return ConfigDict({name: float(weights.get(name, 0.0)) for name in names})


def get_config() -> ConfigDict:
  """The defaults: the paper's recipe where it is published."""
  config = ConfigDict()

  config.name = "default"
  config.task = "train"  # "train" or "evaluate"
  config.seed = 0  # initial parameters, order of the data, augmentation
  config.eval_seed = 2_000_003  # held-out procedural examples; never trained on
  # Folder that holds the data sets, gs:// and s3:// too; unused by synthetic.
  config.data_root = ""
  config.data_cache = ""  # local folder that keeps what of these was read
  config.checkpoint = ""  # evaluate: a workdir, or one step inside it
  # evaluate: the JSON written; "" means WORKDIR/evaluation.json
  config.results = ""
  config.compilation_cache = "~/.cache/mcjepa_jax"  # "" turns it off

  # Which task each step trains, and which parameters move:
  # combined: both tasks in each step; alternate: even steps content, odd motion;
  # frozen_encoder: motion, estimator only; content; motion.
  config.mode = "combined"
  config.num_steps = 333_600  # 100 epochs of ImageNet-1k at 384 images
  config.init_checkpoint = ""  # encoder parameters to start from, if any
  config.accumulate = 1  # micro-batches a step
  # What VICReg's statistics, L_vc's and the masks' counts are of: "plain", each
  # micro-batch; "exact", the whole batch, for one more forward pass.
  config.accumulation = "plain"

  config.model = _model()
  config.motion = _motion()
  config.content = _content()
  config.optimizer = ConfigDict(
      dict(
          encoder=dict(  # encoder and expander
              learning_rate=3e-4,  # peak
              weight_decay=1e-6,  # none on 1-D parameters
              warmup_steps=33_360,
          ),
          estimator=dict(  # its schedule counts from motion.start_step
              learning_rate=1e-4,
              weight_decay=1e-6,
              warmup_steps=33_360,
          ),
          final_fraction=0.0,  # of the peak, at the last step
          clip_norm=1.0,  # per group of parameters; 0 is off
      )
  )

  config.mesh = ConfigDict(
      dict(
          devices=-1,  # how many; -1 is all
          # The axes, whose product is the devices; -1 is what is left, of both
          # the slices and the devices of a slice: of a TPU's, or of a host's
          # GPUs. A batch is split over both, a parameter over `shard`.
          data=-1,
          shard=-1,
          shard_min_mib=16.0,  # larger parameters are sharded
      )
  )

  # What of the encoder backward computes again, to save memory: "none", "stage"
  # or "block".
  config.remat = "none"

  config.workers = 4  # Grain processes for each stream; 0 is in this process
  config.prefetch = 2  # batches placed on the devices ahead of their step
  # Records that cannot be read are replaced by others and named in
  # quarantine.jsonl; more than this share of those drawn ends the run.
  config.bad_records = 0.01

  config.alarms = _alarms()

  config.log_every = 50  # steps between lines of the logs
  config.log_records = False  # also each step's record ids, records.jsonl
  config.panel_every = 5_000  # steps between pictures; 0 is never
  config.save_every = 1_000  # steps
  # A step, with what lies before it, that takes longer has every host print the
  # stacks of its threads; 0 never does.
  config.hang_seconds = 1_800.0
  config.keep_last = 2  # checkpoints
  config.keep_hours = 0.0  # besides, the first and one each so many; 0 is none
  config.keep_best = 0  # more checkpoints, the best by best_metric
  config.best_metric = ""  # a key of the results, as flow/sintel_clean/epe
  config.best_is_larger = False

  # flow/, knn/, linear/, finetune/, rankme/, segmentation/, upernet/, davis/ or
  # submit/SET; kinds and names are listed by a wrong one.
  config.evals = ()
  config.eval_every = 0  # steps; 0 evaluates at the end only
  # Examples of an eval between steps, spread over its set; 0 is all. There run
  # flow, knn and rankme alone.
  config.eval_limit = 0
  config.eval_batch_size = 8  # pairs, of one shape
  # Larger pairs are cut into tiles; a larger image is an error.
  config.eval_max_pixels = 2_097_152
  config.knn_size = 64  # pixels a side, for sets of images of other sizes
  config.linear = _linear()
  config.finetune = _finetune()
  config.segmentation = _segmentation()
  config.upernet = _upernet()
  config.davis = _davis()

  return config.lock()


def _alarms() -> ConfigDict:
  """When a run says that something is wrong, and what it does then."""
  alarms = ConfigDict()
  # An update whose loss or gradient is not finite is skipped, its batch kept
  # in WORKDIR/dumps.
  alarms.skips_in_a_row = 3  # then back to the last checkpoint, past the batch
  alarms.skips = 30  # in all; then the run ends with 76
  alarms.rollbacks = 3  # one more, of whatever cause, ends the run with 76
  alarms.dumps = 4  # at most; each as large as the parameters
  # The quiet ones: "log", "stop" (76) or "rollback".
  alarms.action = "log"
  alarms.warm_up = 2_000  # steps of a task before it is judged
  alarms.window = 100  # steps; the median over them is judged
  alarms.diagnose_every = 1_000  # steps; of the rank, correlation and gradients
  alarms.diagnoses = 3  # values; the median of them is judged
  alarms.least_embedding_std = 0.05  # 1 is VICReg's aim, 0 a collapse
  alarms.least_rank_me = 1.5  # of the embeddings; 1 is a collapse
  alarms.most_correlation = 0.9  # of the embeddings' dimensions, off-diagonal
  alarms.least_feature_std = 0.1  # at each stride; about 1, 0 is a collapse
  alarms.least_flow = 0.05  # pixels, mean magnitude
  alarms.least_flow_std = 0.02  # pixels, over an image
  alarms.occluded = (1e-4, 0.95)  # share of what is inside: least, most
  alarms.most_zero_ratio = 0.995  # photometric error by that of zero flow
  # Of each task's gradient on the encoder: least, most.
  alarms.gradient_norm = (1e-4, 1e4)
  alarms.least_gradient_share = 1e-4  # of the smaller task's, on the encoder
  # Between the tasks', on the encoder: healthy above -0.2, where one undoes what
  # the other does below -0.6.
  alarms.least_gradient_cosine = -0.5
  return alarms


def _linear() -> ConfigDict:
  """The linear classifier on frozen features."""
  return ConfigDict(
      dict(
          epochs=100,
          batch_size=256,
          # All are trained side by side; a tenth of the training part chooses.
          learning_rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0),
          weight_decay=0.0,
      )
  )


def _finetune() -> ConfigDict:
  """Training the encoder on, with a linear head."""
  return ConfigDict(
      dict(
          epochs=30,
          batch_size=64,
          learning_rate=5e-4,  # peak, after a tenth of the steps
          weight_decay=0.05,
      )
  )


def _davis() -> ConfigDict:
  """Following masks by features, as DINO's evaluation does."""
  return ConfigDict(
      dict(
          size=480,  # pixels of a frame's short side, rounded up to the strides
          stride=8,  # the encoder's level whose cells are matched
          context=7,  # frames before each, beside those where masks are given
          radius=12,  # cells; what lies further off is not matched
          top=5,  # cells that a cell takes its labels from
          temperature=0.1,  # weights are exp(cosine / temperature)
          # Frames a forward pass, rounded up to a multiple of the devices:
          # changes speed and memory, not results.
          batch=4,
      )
  )


def _model() -> ConfigDict:
  """Encoder, expander and estimator: ConvNeXt-T and the paper's sizes."""
  model = ConfigDict()
  model.encoder = ConfigDict(
      dict(
          depths=(3, 3, 9, 3),
          dims=(96, 192, 384, 768),
          stem="split",  # "split": a level of stride 2 exists; "patch": timm's
          drop_path=0.1,  # content branch only
          layer_scale=0.0,  # initial gamma; 0 is off
          kernel_init="normal",  # std 0.02; "fan_in" for narrow encoders
      )
  )
  model.expander = ConfigDict(dict(widths=(8192, 8192, 8192)))
  model.estimator = ConfigDict(
      dict(
          finest_stride=4,  # 2 is 2.2 times a step's FLOPs
          channels=(128, 128, 96, 64, 32),  # times factor
          factor=2.0,  # the paper's C
          radius=4,  # of the correlation, in the level's pixels
          context=True,  # dilated convolutions refine the finest flow
          projection=32,  # channels of frame 1 that enter the estimator
          max_flow=128.0,  # pixels at full resolution
      )
  )
  model.dtype = "bfloat16"  # of the convolutions; parameters are float32
  return model


def _motion() -> ConfigDict:
  """The flow task: its pairs, losses and weights."""
  motion = ConfigDict()
  motion.batch_size = 8  # pairs a step
  motion.size = (384, 832)  # h, w; multiples of 32
  # (name, number) or (name, number, (h, w)) for a size of its own; a batch is of
  # one source. Numbers are "weights": shares of the batches, or "repetitions":
  # how often each record is seen where another set's are seen once.
  motion.sources = (("sintel_clean", 1.0),)
  motion.mixing = "weights"
  motion.geometry = "crop"  # "crop", or "resize" for whole frames
  motion.downscale = (1.0, 1.0)  # range of the factor applied before the crop
  motion.rotation = (0.0, 0.0)  # degrees by which a crop is turned, a range
  # Motion added between the frames: up to so many degrees, this factor of size
  # (1 is none) and so many pixels of the crop, either way.
  motion.relative_rotation = 0.0
  motion.relative_scale = 1.0
  motion.relative_shift = 0.0
  motion.gaps = (1, 1)  # range of frames between the two of a pair, in videos
  motion.start_step = 33_360  # content only before it: epoch 10
  motion.weight = 0.1  # alpha_flow, on the sum of all terms below
  motion.ramp_steps = 3_336  # all but variance and covariance rise over these
  motion.jitter = ConfigDict(
      dict(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8)
  )
  # Share of pairs whose frame 2 loses a rectangle, as jitter.
  motion.erase = 0.0
  motion.occlusion = "forward_backward"  # or "range_map", "none"
  motion.occlusion_start = 0  # steps after start_step; before: all visible
  motion.out_of_frame = True  # mask what is sampled outside the image
  motion.photometric = ConfigDict(dict(l1=0.15, l2=0.0, ssim=0.85, census=0.0))
  motion.smoothness = ConfigDict(
      dict(
          form="arflow",  # flow / min(h, w); "uflow": flow in pixels, robust
          order=2,  # 1 or 2
          edge_weight=10.0,  # lambda on |dI|, images in [0, 1]
      )
  )
  # Weight of each unweighted term at each stride, before motion.weight.
  motion.terms = ConfigDict(
      dict(
          reconstruction=strides(stride_1=1.0),
          smoothness=strides(stride_1=75.0),
          regression=strides(
              stride_4=1.0, stride_8=0.5, stride_16=0.25, stride_32=0.125
          ),
          cycle=strides(stride_4=0.2, stride_8=0.1),
          variance=strides(
              stride_4=1.0, stride_8=1.0, stride_16=0.5, stride_32=0.5
          ),
          covariance=strides(
              stride_4=0.04, stride_8=0.04, stride_16=0.02, stride_32=0.02
          ),
      )
  )
  return motion


def _content() -> ConfigDict:
  """The content task: VICReg's views and weights."""
  content = ConfigDict()
  content.batch_size = 384  # images a step; two views of each
  content.size = 224  # pixels a side of a view
  content.sources = (("imagenet", 1.0),)  # (name, number), as motion's
  content.mixing = "weights"
  content.scale = (0.08, 1.0)  # area of the crop
  content.ratio = (3 / 4, 4 / 3)
  content.flip = True  # left-right, half of the views
  content.jitter = ConfigDict(
      dict(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8)
  )
  content.gray = 0.2
  content.blur = (1.0, 0.1)  # probability for view 1, view 2
  content.solarize = (0.0, 0.2)
  content.terms = ConfigDict(
      dict(invariance=25.0, variance=25.0, covariance=1.0)
  )
  return content


def _segmentation() -> ConfigDict:
  """A linear head on the frozen encoder: VICRegL's recipe."""
  names = ("ade20k", "ade20k_sample", "camvid", "camvid_val", "cityscapes",
           "voc2012", "voc2012_aug")  # fmt: skip
  part = ConfigDict(
      dict(
          crop=512,  # pixels a side, of crops and windows; multiple of 32
          stride=341,  # pixels between the windows of the test
          batch_size=16,  # crops a step, and windows of the test
          learning_rate=1e-4,  # peak; falls linearly to 0
          weight_decay=0.05,  # upernet: none on 1-D parameters
          warmup_steps=1_500,
          scale=(0.5, 2.0),  # of the image in training, times its short side
          max_share=0.75,  # of one class in a crop; 1 takes any
          sets={
              # num_steps: of the head's training. short_side: pixels to which
              # images are resized for it and for the test; 0 is as they are.
              name: dict(num_steps=40_000, short_side=512)
              for name in names
          },
      )
  )
  part.sets.ade20k.num_steps = 160_000
  part.sets.cityscapes.short_side = 1_024
  return part


def _upernet() -> ConfigDict:
  """The encoder fine-tuned with UperNet: ConvNeXt's recipe, on ADE20k."""
  part = _segmentation()
  part.update(
      channels=512,
      pool_scales=(1, 2, 3, 6),
      auxiliary_channels=256,  # of a second head, on the last stage but one
      auxiliary_weight=0.4,  # of its loss
      dropout=0.1,
      drop_path=0.4,
      layer_decay=0.9,  # of the learning rate, by stage, from the head down
  )
  for values in part.sets.values():
    values.num_steps = 160_000
  return part
