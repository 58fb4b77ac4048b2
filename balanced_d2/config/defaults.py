"""Every config key of the project, with its reason."""

from detectron2.config import CfgNode as CN


def add_balanced_config(cfg: CN) -> None:
    """Add the keys of balanced_d2 to a Detectron2 config, with all balances off. No key that is
    there changes; ``configs/Balanced.yaml`` turns the balances on."""
    # Balanced feature pyramid, for the builders `build_balanced_*fpn_backbone`.
    cfg.MODEL.BALANCED_FPN = CN()
    # The backbone that `build_balanced_fpn_backbone` and `build_balanced_retinanet_fpn_backbone`
    # build the pyramid on: any name of Detectron2's BACKBONE_REGISTRY.
    cfg.MODEL.BALANCED_FPN.BOTTOM_UP = "build_resnet_backbone"
    # Whether the pyramid is balanced; if not, the same builders give Detectron2's plain FPN.
    cfg.MODEL.BALANCED_FPN.ENABLED = False
    # The level, counted from the finest, at whose resolution the levels are averaged and refined:
    # 2 for P2-P6, 1 for P3-P7 (stride 16 in both).
    cfg.MODEL.BALANCED_FPN.REFINE_LEVEL = 2
    # What refines the averaged features: "none", "conv" (3x3), "non_local" (the paper's) or
    # "non_local_pooled", the same with keys pooled by 2, which is cheaper.
    cfg.MODEL.BALANCED_FPN.REFINE_TYPE = "non_local"
    # Whether what is added to the levels is multiplied by a learnt factor for each channel that
    # starts at 0. A detector that starts from plain weights then starts as the plain one.
    cfg.MODEL.BALANCED_FPN.ZERO_INIT = False
    # Of P3-P7: whether there is a ReLU between P6 and P7 (in MMDetection there is none).
    cfg.MODEL.BALANCED_FPN.P7_RELU = True

    # Whether the model has its channels last in memory, which is faster on CPUs and, in mixed
    # precision, on GPUs: in training, evaluation and detection.
    cfg.MODEL.CHANNELS_LAST = False
    # Whether RoIAlign is computed by sparse products on CPUs, which is several times faster.
    cfg.MODEL.SPARSE_ROI_ALIGN = False

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
    # Negatives: "random" as in Detectron2, "iou_balanced", evenly over bins of IoU, or any other
    # entry of NEGATIVE_SAMPLERS.
    cfg.MODEL.ROI_HEADS.NEGATIVE_SAMPLER = "random"
    # Positives: "random" as in Detectron2, "instance_balanced", evenly over the ground truth, or
    # any other entry of POSITIVE_SAMPLERS.
    cfg.MODEL.ROI_HEADS.POSITIVE_SAMPLER = "random"
    # Into how many bins the IoU of negatives is split.
    cfg.MODEL.ROI_HEADS.NUM_BINS = 3

    # The pyramid level that RoI heads pool a box from (Feature Pyramid Networks, equation 1): that
    # of a box of this size, in pixels, and its number. Detectron2's are made for images of 800
    # pixels; for smaller ones, a size in proportion makes use of all levels.
    cfg.MODEL.ROI_BOX_HEAD.CANONICAL_BOX_SIZE = 224
    cfg.MODEL.ROI_BOX_HEAD.CANONICAL_LEVEL = 4

    # Of Balanced L1, for BBOX_REG_LOSS_TYPE "balanced_l1" of MODEL.ROI_BOX_HEAD (with
    # BalancedROIHeads or BalancedCascadeROIHeads) and of MODEL.RETINANET (with BalancedRetinaNet).
    for node, beta in ((cfg.MODEL.ROI_BOX_HEAD, 1.0), (cfg.MODEL.RETINANET, 0.11)):
        # How much the gradient of inliers rises: the smaller, the more.
        node.BALANCED_L1_ALPHA = 0.5
        # The gradient of outliers.
        node.BALANCED_L1_GAMMA = 1.5
        # Where outliers begin, in units of the (weighted) box deltas.
        node.BALANCED_L1_BETA = beta

    # What Detectron2's samplers read, but its defaults, or those of 0.6, lack.
    for node, key, value in (
        # The share of the images that RandomSubsetTrainingSampler takes.
        (cfg.DATALOADER, "RANDOM_SUBSET_RATIO", 1.0),
        # Whether repeat factors are square roots, as LVIS has them.
        (cfg.DATALOADER, "REPEAT_SQRT", True),
        # How often WeightedTrainingSampler and WeightedCategoryTrainingSampler take the images of a
        # data set of DATASETS.TRAIN: pairs of name and factor, 1 for those not in the list.
        (cfg.DATASETS, "TRAIN_REPEAT_FACTOR", []),
    ):
        if key not in node:
            node[key] = value

    # Whether training goes on without images that cannot be read, and without how many at most.
    cfg.DATALOADER.SKIP_BAD_IMAGES = False
    cfg.DATALOADER.MAX_BAD_IMAGES = 100

    # Mixed precision in evaluation and detection; SOLVER.AMP is for training only. On CPUs both are
    # bfloat16.
    cfg.TEST.AMP = CN({"ENABLED": False})

    # How many images of each test data set TensorBoard shows with ground truth and detections,
    # every time a training evaluates; 0: none.
    cfg.TEST.NUM_IMAGES_SHOWN = 4

    # Weights & Biases, which has to be installed (`pip install wandb`): whether what TensorBoard
    # gets is sent there too, to which project and under which name (by default one that it gives).
    cfg.WANDB = CN({"ENABLED": False, "PROJECT": "balanced_d2", "NAME": ""})

    # Of BalancedRetinaNet: whether boxes are clipped to the image before non-maximum suppression
    # too, as in MMDetection.
    cfg.MODEL.RETINANET.CLIP_BEFORE_NMS = False
