"""All config keys of the project, with their meaning."""

from detectron2.config import CfgNode as CN
from fvcore.common.registry import Registry

CONFIG_KEYS = Registry("CONFIG_KEYS")
"""Functions of others that add keys to a config. They are called after :func:`add_balanced_config`
wherever a config is loaded."""


def add_balanced_config(cfg: CN) -> None:
    """Add the keys of balanced_d2 to a Detectron2 config, with all balances off. Existing keys do
    not change; ``configs/Balanced.yaml`` turns the balances on."""
    # Balanced feature pyramid, for the builders `build_balanced_*fpn_backbone`.
    cfg.MODEL.BALANCED_FPN = CN()
    # The backbone that `build_balanced_fpn_backbone` and `build_balanced_retinanet_fpn_backbone`
    # build the pyramid on: any name in Detectron2's BACKBONE_REGISTRY.
    cfg.MODEL.BALANCED_FPN.BOTTOM_UP = "build_resnet_backbone"
    # Whether the pyramid is balanced; if not, the same builders build Detectron2's plain FPN.
    cfg.MODEL.BALANCED_FPN.ENABLED = False
    # The level, counted from the finest, at whose resolution the levels are averaged and refined:
    # 2 for P2-P6, 1 for P3-P7 (stride 16 in both).
    cfg.MODEL.BALANCED_FPN.REFINE_LEVEL = 2
    # How the averaged features are refined: "none", "conv" (3x3), "non_local" (as in the paper) or
    # "non_local_pooled", the same with keys pooled by 2, which is cheaper.
    cfg.MODEL.BALANCED_FPN.REFINE_TYPE = "non_local"
    # Whether what is added to the levels is multiplied by a learnt factor for each channel that
    # starts at 0. A detector that starts from plain weights then starts as the plain one.
    cfg.MODEL.BALANCED_FPN.ZERO_INIT = False
    # For P3-P7: whether there is a ReLU between P6 and P7 (MMDetection has none).
    cfg.MODEL.BALANCED_FPN.P7_RELU = True
    # Of P3-P7: whether P6 is computed from P5, as in torchvision's RetinaNet, and not from the last
    # features of the backbone.
    cfg.MODEL.BALANCED_FPN.P6_FROM_P5 = False

    # Whether the model has its channels last in memory, which is faster on CPUs and, in mixed
    # precision, on GPUs: in training, evaluation and detection.
    cfg.MODEL.CHANNELS_LAST = False
    # Whether RoIAlign is computed by sparse products on CPUs, which is several times faster.
    cfg.MODEL.SPARSE_ROI_ALIGN = False
    # Whether convolutions compute the batch norms after them, where these are frozen and in
    # evaluation.
    cfg.MODEL.FOLD_NORM = False

    # Networks of timm and torchvision, for BOTTOM_UP "build_timm_backbone" and
    # "build_torchvision_backbone". How they expect an image (PIXEL_MEAN, PIXEL_STD, INPUT.FORMAT)
    # is set when a config is loaded.
    for node, name in (("TIMM", "tf_efficientnet_lite0"), ("TORCHVISION", "resnet50")):
        cfg.MODEL[node] = CN()
        # The network; timm's EfficientNet-Lite0 is fast on CPUs.
        cfg.MODEL[node].NAME = name
        # Whether it begins with its ImageNet weights, where MODEL.WEIGHTS is not set.
        cfg.MODEL[node].PRETRAINED = True
        # A local file with its weights, instead of those.
        cfg.MODEL[node].WEIGHTS = ""
        # Batch norm of the stages that are trained: "FrozenBN" or "BN".
        cfg.MODEL[node].NORM = "FrozenBN"

    # Sampling of proposals, for BalancedROIHeads.
    # Negatives: "random" (as in Detectron2), "iou_balanced" (evenly over bins of IoU), "ohem" (the
    # hardest proposals, positives among them) or any other entry of NEGATIVE_SAMPLERS.
    cfg.MODEL.ROI_HEADS.NEGATIVE_SAMPLER = "random"
    # Positives: "random" (as in Detectron2), "instance_balanced" (evenly over the ground truth) or
    # any other entry of POSITIVE_SAMPLERS.
    cfg.MODEL.ROI_HEADS.POSITIVE_SAMPLER = "random"
    # Number of bins for the IoU of negatives.
    cfg.MODEL.ROI_HEADS.NUM_BINS = 3
    # For NEGATIVE_SAMPLER "ohem", which takes positives and negatives by their losses: the IoU
    # above which a proposal is left out for a harder one; 1 for none.
    cfg.MODEL.ROI_HEADS.OHEM_NMS_THRESH = 0.7

    # The number of training objects of each class, in order: for class weights, balanced softmax
    # and the figures of rare, common and frequent classes. Found in the data when training starts.
    cfg.MODEL.CLASS_COUNTS = []
    # The loss of classes in the RoI heads, for BalancedROIHeads and BalancedCascadeROIHeads:
    # "cross_entropy" (as in Detectron2), "weighted_cross_entropy", "focal", "weighted_focal",
    # "balanced_softmax", "seesaw" or any other entry of CLS_LOSSES.
    cfg.MODEL.ROI_BOX_HEAD.CLS_LOSS_TYPE = "cross_entropy"
    # For the weighted losses: numbers, one for each class in order and, if wished, one for the
    # background; or pairs of name and number, where classes without one have 1. Empty: weights by
    # the counts.
    cfg.MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS = []
    # Beta of the effective number, for weights by the counts: 0 for equal weights, 1 for the
    # inverse frequency. With the paper's 0.999, hardly less of a correction than that on small
    # data, a study (docs/imbalance.md) lost what this value gains.
    cfg.MODEL.ROI_BOX_HEAD.CLASS_WEIGHT_BETA = 0.99
    # For the focal losses: how much proposals that are classified well are down-weighted.
    cfg.MODEL.ROI_BOX_HEAD.FOCAL_GAMMA = 2.0
    # For "seesaw": the exponents of mitigation and compensation, the least score that compensation
    # divides by, and whether there is an objectness branch.
    cfg.MODEL.ROI_BOX_HEAD.SEESAW_P = 0.8
    cfg.MODEL.ROI_BOX_HEAD.SEESAW_Q = 2.0
    cfg.MODEL.ROI_BOX_HEAD.SEESAW_EPS = 0.01
    cfg.MODEL.ROI_BOX_HEAD.SEESAW_OBJECTNESS = True

    # The pyramid level that RoI heads pool a box from (Feature Pyramid Networks, equation 1): that
    # of a box of this size, in pixels, and its number. Detectron2's are made for images of 800
    # pixels; for smaller ones, a size in proportion makes use of all levels.
    cfg.MODEL.ROI_BOX_HEAD.CANONICAL_BOX_SIZE = 224
    cfg.MODEL.ROI_BOX_HEAD.CANONICAL_LEVEL = 4

    # Balanced L1, for BBOX_REG_LOSS_TYPE "balanced_l1" in MODEL.ROI_BOX_HEAD (with
    # BalancedROIHeads or BalancedCascadeROIHeads) and in MODEL.RETINANET (with BalancedRetinaNet).
    for node, beta in ((cfg.MODEL.ROI_BOX_HEAD, 1.0), (cfg.MODEL.RETINANET, 0.11)):
        # How much the gradient of inliers is raised: the smaller this is, the more.
        node.BALANCED_L1_ALPHA = 0.5
        # The gradient of outliers.
        node.BALANCED_L1_GAMMA = 1.5
        # Where outliers begin, in units of the (weighted) box deltas.
        node.BALANCED_L1_BETA = beta

    # Keys that Detectron2's samplers read, but that are missing from its defaults or those of 0.6.
    for node, key, value in (
        # The share of the images that RandomSubsetTrainingSampler uses.
        (cfg.DATALOADER, "RANDOM_SUBSET_RATIO", 1.0),
        # Whether repeat factors are square roots, as in LVIS.
        (cfg.DATALOADER, "REPEAT_SQRT", True),
        # How often WeightedTrainingSampler and WeightedCategoryTrainingSampler repeat the images of
        # each dataset in DATASETS.TRAIN: pairs of name and factor; 1 for datasets not in the list.
        (cfg.DATASETS, "TRAIN_REPEAT_FACTOR", []),
    ):
        if key not in node:
            node[key] = value

    # The value of gray images with more than 8 bits (16-bit, 32-bit, float) that is white. 0: the
    # next 2**n - 1 from the largest of the training images, or that of the weights.
    cfg.INPUT.GRAY_RANGE = 0.0

    # Whether training skips images that cannot be read, and how many at most.
    cfg.DATALOADER.SKIP_BAD_IMAGES = False
    cfg.DATALOADER.MAX_BAD_IMAGES = 100

    # "SGD" or "AdamW", whose learning rate is far lower; it learns much faster where much of the
    # model is new and iterations are few.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # The factor of the learning rate of the backbone below the pyramid.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 1.0

    # The number of parts in which a batch of IMS_PER_BATCH images is computed, one after the other,
    # so that it takes less memory. Nothing else changes: an iteration is still one whole batch and
    # one step of the optimizer.
    cfg.SOLVER.ACCUMULATE = 1

    # An exponential moving average of the weights, which is evaluated in their place and is in the
    # checkpoints, too, as model_ema. Programs that load such a checkpoint take the average where
    # ENABLED is True. DECAY is the share of the average that an iteration keeps; in the first ones
    # it is smaller.
    cfg.SOLVER.EMA = CN({"ENABLED": False, "DECAY": 0.999})

    # Ending training early, once a metric of the evaluations has not improved in PATIENCE of them
    # (0: never). METRIC is a name in metrics.json (with several test sets, it begins with one of
    # them), MODE "max" or "min" says which values are better, and MIN_CHANGE has to be exceeded.
    cfg.SOLVER.EARLY_STOPPING = CN(
        {"PATIENCE": 0, "METRIC": "bbox/AP", "MODE": "max", "MIN_CHANGE": 0.0}
    )

    # The metric whose best checkpoint is kept as model_best.pth, such as "bbox/AP"; empty: none is.
    # MODE as above. Programs take it with MODEL.WEIGHTS "best".
    cfg.TEST.BEST_CHECKPOINT = CN({"METRIC": "", "MODE": "max"})

    # Mixed precision in evaluation and detection; SOLVER.AMP is for training only. On CPUs both are
    # bfloat16.
    cfg.TEST.AMP = CN({"ENABLED": False})

    # How many images of each test dataset TensorBoard shows, with ground truth and detections, at
    # every evaluation during training; 0 for none.
    cfg.TEST.NUM_IMAGES_SHOWN = 4

    # Weights & Biases (needs `pip install wandb`): whether to send it what TensorBoard receives,
    # the project, and the name of the run (by default, Weights & Biases chooses one).
    cfg.WANDB = CN({"ENABLED": False, "PROJECT": "balanced_d2", "NAME": ""})

    # MLflow (needs `pip install mlflow`): whether it receives the config and all scalars, the
    # experiment, the name of the run (by default, MLflow chooses one), and where to (by default,
    # MLflow's own default). A resumed training continues its run.
    cfg.MLFLOW = CN({"ENABLED": False, "EXPERIMENT": "balanced_d2", "NAME": "", "URI": ""})

    # For BalancedRetinaNet: whether boxes are also clipped to the image before non-maximum
    # suppression, as in MMDetection.
    cfg.MODEL.RETINANET.CLIP_BEFORE_NMS = False
