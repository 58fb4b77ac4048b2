"""What ``torch.export`` takes: a detector as a function of a batch to detections of fixed number.

Detectron2's own code decides in Python by what it has found: how much to pad, which boxes are
finite, how many are left. An exported program holds none of these decisions. Here each step has a
result for every slot of a fixed number, and a mask of the slots that are used. Only the costly
parts (RoIAlign and the heads) are computed for the slots in use alone.
"""

from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

import torch
from detectron2.modeling import Backbone, GeneralizedRCNN, RetinaNet
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.poolers import ROIPooler
from torch import nn
from torch.nn import functional as F

from balanced_d2.export.deployable import check_exportable, output_names, predicts
from balanced_d2.export.keypoints import find_keypoints
from balanced_d2.export.nms import MAX_MOVED, suppress
from balanced_d2.modeling import BalancedFastRCNNOutputLayers
from balanced_d2.utils.compat import has_sigmoid_scores
from balanced_d2.utils.errors import UserError

# Boxes (R, C, 4), scores (R, C) and an IoU to the boxes kept in each row, bool of shape (R, C).
Suppression = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


class Candidates(NamedTuple):
    """Boxes (N, C, 4), scores (N, C), -inf where a slot is not in use, and classes (N, C)."""

    boxes: torch.Tensor
    scores: torch.Tensor
    classes: torch.Tensor


class BatchDeployable(nn.Module):
    """A detector that takes a batch of images and returns a fixed number of detections of each.

    Args:
        model: as for :func:`check_exportable`, in evaluation mode. It is not copied.
        suppression: non-maximum suppression, by default :func:`suppress`.

    Attributes:
        outputs: the names of what it returns.

    Raises:
        UserError: if the model is in training mode or of a kind that cannot be exported so.
    """

    def __init__(self, model: GeneralizedRCNN | RetinaNet, suppression: Suppression = suppress):
        super().__init__()
        check_exportable(model, "pt2")
        self.model = model
        self.suppression = suppression
        self.outputs = output_names(**predicts(model), is_batch=True)
        self.eval()

    def forward(self, images: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        """
        Args:
            images: shape (N, 3, H, W), float32 in the range [0, 255], channels in the order of
                the config's ``INPUT.FORMAT``.

        Returns:
            (num_detections, boxes, scores, classes): the number of detections of each image, int64
            of shape (N,), and in D slots, of which the first ``num_detections`` are in use, from
            the highest score down: boxes of shape (N, D, 4), x1, y1, x2, y2 in pixels of
            ``images``; scores of shape (N, D), in [0, 1]; classes of shape (N, D), int64. Slots not
            in use have zeros, and class -1. D is the limit of detections of the config.

            If the model predicts masks, they follow, of shape (N, D, M, M): the probability that a
            point of the box is of the object, not pasted into the image yet; and if it predicts
            keypoints, these, of shape (N, D, K, 3): x and y in pixels of ``images``, and a score.
        """
        height, width = (
            torch.full((images.shape[0],), length, dtype=torch.float32, device=images.device)
            for length in images.shape[2:]
        )
        features = self.model.backbone(self._pad(self._normalise(images)))
        return self._detect(features, height, width)

    def _detect(
        self, features: Dict[str, torch.Tensor], height: torch.Tensor, width: torch.Tensor
    ) -> Tuple[torch.Tensor, ...]:
        """What :meth:`forward` returns, of features and the images' sizes (N,)."""
        limits = torch.stack([width, height, width, height], dim=1)
        if isinstance(self.model, RetinaNet):
            found = self._detect_densely(features, limits)
            found = found._replace(boxes=_clip(found.boxes, limits[:, None]))
        else:
            found = self._detect_in_regions(features, *self._propose(features, limits), limits)
        boxes, scores, classes = _without_empty(found)
        valid = scores > -torch.inf
        outputs = [
            valid.sum(dim=1),
            torch.where(valid[:, :, None], boxes, 0),
            torch.where(valid, scores, 0),
            torch.where(valid, classes, -1),
        ]
        if "masks" in self.outputs:
            outputs.append(self._masks(features, boxes, classes, valid))
        if "keypoints" in self.outputs:
            outputs.append(self._keypoints(features, boxes, valid))
        return tuple(outputs)

    def _normalise(self, images: torch.Tensor) -> torch.Tensor:
        return (images - self.model.pixel_mean) / self.model.pixel_std

    def _pad(self, x: torch.Tensor) -> torch.Tensor:
        side, multiple = _padding(self.model.backbone)
        if side > 0:
            height = width = side
        elif multiple > 1:
            height, width = (_round_up(length, multiple) for length in x.shape[-2:])
        else:
            return x
        return F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))

    def _propose(
        self, features: Dict[str, torch.Tensor], limits: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """``find_top_rpn_proposals`` of Detectron2: boxes (N, R, 4) and which are there, (N, R)."""
        rpn = self.model.proposal_generator
        levels = [features[name] for name in rpn.in_features]
        number, most = rpn.pre_nms_topk[False], rpn.post_nms_topk[False]
        all_boxes, all_scores = [], []
        for anchors, logits, deltas in zip(
            _anchors(rpn.anchor_generator, levels), *rpn.rpn_head(levels)
        ):
            scores, index = _best(_by_anchor(logits, 1)[:, :, 0], number)
            deltas = _by_anchor(deltas, 4)
            all_boxes.append(_decode(rpn.box2box_transform, anchors, deltas, index))
            all_scores.append(scores)
        boxes, scores = torch.stack(all_boxes, dim=1), torch.stack(all_scores, dim=1)
        scores = torch.where(boxes.isfinite().all(dim=3) & scores.isfinite(), scores, -torch.inf)
        boxes = _clip(boxes, limits[:, None, None])
        scores = torch.where(_nonempty(boxes, rpn.min_box_size), scores, -torch.inf)
        boxes = torch.where((scores > -torch.inf)[..., None], boxes, 0)

        level = torch.arange(len(levels), device=boxes.device)[:, None].expand(-1, number)
        flat_boxes, flat_scores = boxes.flatten(1, 2), scores.flatten(1)
        moved, _ = _move_apart(flat_boxes, flat_scores, level.reshape(1, -1))
        kept = self.suppression(
            moved.unflatten(1, (len(levels), number)).flatten(0, 1),
            scores.flatten(0, 1),
            rpn.nms_thresh,
        )
        flat_scores = torch.where(kept.view(flat_scores.shape), flat_scores, -torch.inf)
        best, index = _highest(flat_scores, min(most, len(levels) * number))
        return _take(flat_boxes, index), best > -torch.inf

    def _detect_in_regions(
        self,
        features: Dict[str, torch.Tensor],
        proposals: torch.Tensor,
        valid: torch.Tensor,
        limits: torch.Tensor,
    ) -> Candidates:
        """The box heads, one or a cascade, and ``fast_rcnn_inference`` of Detectron2."""
        heads = self.model.roi_heads
        levels = [features[name] for name in heads.box_in_features]
        slots, images = _slots(valid)
        boxes = proposals.flatten(0, 1)[slots]
        predictors = heads.box_predictor
        stages = (
            list(zip(heads.box_head, predictors))
            if isinstance(predictors, nn.ModuleList)
            else [(heads.box_head, predictors)]
        )
        stage_scores = []
        for stage, (head, predictor) in enumerate(stages):
            if stage > 0:
                boxes = _clip(boxes, limits[images])
            pooled = _pool(heads.box_pooler, levels, *_one_more(boxes, images))
            logits, deltas = (x.narrow(0, 0, slots.shape[0]) for x in predictor(head(pooled)))
            stage_scores.append(_probabilities(predictor, logits))
            boxes = predictor.box2box_transform.apply_deltas(deltas, boxes)
        scores = stage_scores[0]
        if len(stages) > 1:
            scores = sum(stage_scores[1:], scores) * (1.0 / len(stages))
        finite = boxes.isfinite().all(dim=1) & scores.isfinite().all(dim=1)
        scores = scores[:, :-1]
        is_candidate = finite[:, None] & (scores > predictor.test_score_thresh)
        scores = torch.where(is_candidate, scores, -torch.inf)
        boxes = torch.where(finite[:, None, None], boxes.unflatten(1, (-1, 4)), 0)
        boxes = _clip(boxes, limits[images, None])

        # Back to slots, (N, R, K) and (N, R, K, 4), or (N, R, 1, 4) if all classes share a box.
        scores = _spread(scores, slots, valid, -torch.inf)
        boxes = _spread(boxes, slots, valid, 0)
        num_boxes, num_classes = scores.shape[1:]
        boxes = boxes.expand(-1, -1, num_classes, -1).flatten(1, 2)
        classes = torch.arange(num_classes, device=boxes.device).repeat(num_boxes)[None]
        flat_scores = scores.flatten(1)
        moved, _ = _move_apart(boxes, flat_scores, classes)
        by_class = moved.unflatten(1, (num_boxes, num_classes)).transpose(1, 2)
        kept = self.suppression(
            by_class.flatten(0, 1),
            scores.transpose(1, 2).flatten(0, 1),
            predictor.test_nms_thresh,
        )
        kept = kept.unflatten(0, (-1, num_classes)).transpose(1, 2).flatten(1)
        return _top(boxes, flat_scores, classes, kept, predictor.test_topk_per_image)

    def _detect_densely(
        self, features: Dict[str, torch.Tensor], limits: torch.Tensor
    ) -> Candidates:
        """``inference_single_image`` of Detectron2's RetinaNet, for all images."""
        model = self.model
        levels = [features[name] for name in model.head_in_features]
        number, num_classes = model.test_topk_candidates, model.num_classes
        found = []
        for anchors, logits, deltas in zip(
            _anchors(model.anchor_generator, levels), *model.head(levels)
        ):
            scores = _by_anchor(logits, num_classes).flatten(1).sigmoid()
            scores = torch.where(scores > model.test_score_thresh, scores, -torch.inf)
            scores, index = _best(scores, number)
            label = index % num_classes
            anchor = (index - label).div(num_classes, rounding_mode="floor")
            boxes = _decode(model.box2box_transform, anchors, _by_anchor(deltas, 4), anchor)
            found.append(Candidates(boxes, scores, label))
        boxes, scores, classes = (torch.cat(parts, dim=1) for parts in zip(*found))
        if getattr(model, "clip_before_nms", False):
            boxes = _clip(boxes, limits[:, None])
            scores = torch.where(_nonempty(boxes), scores, -torch.inf)
        boxes = torch.where((scores > -torch.inf)[..., None], boxes, 0)

        moved, is_moved = _move_apart(boxes, scores, classes)
        # Boxes outside the image may overlap others' even when moved, as they do in torchvision.
        groups = torch.where(is_moved[:, None], 0, classes)
        numbers = torch.arange(num_classes, device=boxes.device)[None, :, None]
        in_group = torch.where(groups[:, None] == numbers, scores[:, None], -torch.inf)
        kept = self.suppression(
            moved[:, None].expand(-1, num_classes, -1, -1).flatten(0, 1),
            in_group.flatten(0, 1),
            model.test_nms_thresh,
        )
        kept = kept.unflatten(0, (-1, num_classes)).any(dim=1)
        return _top(boxes, scores, classes, kept, model.max_detections_per_image)

    def _masks(self, features, boxes, classes, valid) -> torch.Tensor:
        heads = self.model.roi_heads
        slots, images = _slots(valid)
        levels = [features[name] for name in heads.mask_in_features]
        pooled = _pool(heads.mask_pooler, levels, *_one_more(boxes.flatten(0, 1)[slots], images))
        logits = heads.mask_head.layers(pooled).narrow(0, 0, slots.shape[0])
        if logits.shape[1] > 1:
            label = classes.flatten()[slots][:, None, None, None]
            logits = logits.gather(1, label.expand(-1, 1, *logits.shape[2:]))
        return _spread(logits[:, 0].sigmoid(), slots, valid, 0)

    def _keypoints(self, features, boxes, valid) -> torch.Tensor:
        heads = self.model.roi_heads
        slots, images = _slots(valid)
        levels = [features[name] for name in heads.keypoint_in_features]
        chosen = boxes.flatten(0, 1)[slots]
        pooled = _pool(heads.keypoint_pooler, levels, *_one_more(chosen, images))
        maps = heads.keypoint_head.layers(pooled).narrow(0, 0, slots.shape[0])
        return _spread(find_keypoints(maps, chosen), slots, valid, 0)


class PaddedDeployable(BatchDeployable):
    """The same for images that are padded already, which may be of different sizes.

    Args:
        model: as for :class:`BatchDeployable`.

    Attributes:
        multiple: what height and width of the padded images are multiples of.
    """

    def __init__(self, model: GeneralizedRCNN | RetinaNet):
        super().__init__(model)
        self.multiple = size_divisibility(model)

    def forward(  # type: ignore[override]
        self, images: torch.Tensor, image_sizes: torch.Tensor
    ) -> Tuple[torch.Tensor, ...]:
        """
        Args:
            images: shape (N, 3, H, W), as for :class:`BatchDeployable`, each at the top left; what
                is right of it and below is not looked at. H and W are multiples of ``multiple``.
            image_sizes: height and width of each in it, int64 of shape (N, 2).

        Returns:
            As :class:`BatchDeployable`, with boxes within the image sizes.
        """
        # Sizes written as multiples, from which those of all levels follow as multiples, too.
        sides = (length // self.multiple * self.multiple for length in images.shape[2:])
        images = images.view(*images.shape[:2], *sides)
        height, width = image_sizes[:, 0], image_sizes[:, 1]
        rows, columns = (torch.arange(n, device=images.device) for n in images.shape[2:])
        is_inside = (rows < height[:, None])[:, :, None] & (columns < width[:, None])[:, None]
        x = torch.where(is_inside[:, None], self._normalise(images), 0)
        features = self.model.backbone(x)
        return self._detect(features, height.float(), width.float())


def size_divisibility(model: GeneralizedRCNN | RetinaNet) -> int:
    """What height and width of padded images are multiples of, at least 1.

    Raises:
        UserError: if they are of one size.
    """
    side, multiple = _padding(model.backbone)
    if side > 0:
        raise UserError(
            "a model that pads all images to one size cannot be exported with --format aoti; use "
            "--format pt2"
        )
    return multiple


def _padding(backbone: Backbone) -> Tuple[int, int]:
    """The side of the square that images are padded to, 0 if there is none; and what their sides
    are padded to multiples of, at least 1."""
    constraints = getattr(backbone, "padding_constraints", {})  # not in Detectron2 0.6
    multiple = constraints.get("size_divisibility", backbone.size_divisibility)
    return constraints.get("square_size", 0), max(1, multiple)


def _round_up(length: int, multiple: int) -> int:
    """The next multiple of a length, as a symbol of its own.

    An expression of the length would have to be proven to fit wherever two levels of the pyramid
    meet. Divided as floats, exactly: OpenVINO rounds the division of integers.
    """
    length_and_more = torch.full((), length + multiple - 1, dtype=torch.float32)
    number: Any = length_and_more.div(multiple).floor().long().item()
    torch._check(number >= 1)
    torch._check(number * multiple >= length)
    return number * multiple


def _clip(boxes: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    """Boxes in images of which the largest x1, y1, x2, y2 are given, with as many dimensions."""
    return torch.minimum(boxes.clamp(min=0), limits)


def _nonempty(boxes: torch.Tensor, threshold: float = 0.0) -> torch.Tensor:
    size = boxes[..., 2:] - boxes[..., :2]
    return (size > threshold).all(dim=-1)


def _anchors(
    generator: DefaultAnchorGenerator, levels: Sequence[torch.Tensor]
) -> List[torch.Tensor]:
    """Detectron2's anchors of each level, (H * W * A, 4)."""
    if type(generator)._grid_anchors is not DefaultAnchorGenerator._grid_anchors:
        return generator._grid_anchors([level.shape[2:] for level in levels])
    anchors = []
    for level, stride, cell in zip(levels, generator.strides, generator.cell_anchors):
        y, x = (
            (torch.arange(length, dtype=torch.float32, device=cell.device) + generator.offset)
            * stride
            for length in level.shape[2:]
        )
        y, x = torch.meshgrid(y, x, indexing="ij")
        shifts = torch.stack([x, y, x, y], dim=2).reshape(-1, 4)
        # Not broadcast along the positions: a program would ask for more than one of them.
        of_cells = torch.cat([shifts + base for base in cell], dim=1)
        anchors.append(of_cells.reshape(-1, 4))
    return anchors


def _by_anchor(x: torch.Tensor, number: int) -> torch.Tensor:
    """Predictions (N, A * K, H, W) of K = ``number`` as (N, H * W * A, K)."""
    x = x.unflatten(1, (-1, number)).permute(0, 3, 4, 1, 2)
    # A copy in any case: a program would ask for more than one position, which needs one.
    return x.clone(memory_format=torch.contiguous_format).flatten(1, 3)


def _best(scores: torch.Tensor, number: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """The highest ``number`` of scores (N, C) and where they are; -inf and 0 where there are less.

    Scores that are there are never exceeded by those put behind them, so that ties are resolved as
    in a search among the scores alone.
    """
    # Always by so many, because by how many there are less is an expression of the image's size.
    best, index = F.pad(scores, (0, number), value=-torch.inf).topk(number, dim=1)
    return best, torch.where(best > -torch.inf, index, 0)


def _decode(
    transform: Box2BoxTransform, anchors: torch.Tensor, deltas: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """Boxes (N, C, 4) of the anchors (B, 4) and deltas (N, B, 4) at an index (N, C)."""
    chosen = _take(deltas, index).flatten(0, 1)
    boxes = transform.apply_deltas(chosen, anchors[index.flatten()])
    return boxes.view(*index.shape, 4)


def _take(boxes: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return boxes.gather(1, index[:, :, None].expand(-1, -1, boxes.shape[2]))


def _move_apart(
    boxes: torch.Tensor, scores: torch.Tensor, groups: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Boxes as torchvision's ``batched_nms`` compares them, and whether it moves them, (N,).

    Up to ``MAX_MOVED`` boxes are moved apart by group, which rounds them, and so is part of the
    result; above, they are left as they are.

    Args:
        boxes, scores: as in :class:`Candidates`.
        groups: shape (N or 1, C).
    """
    valid = scores > -torch.inf
    is_moved = valid.sum(dim=1) <= MAX_MOVED
    largest = torch.where(valid[..., None], boxes, 0).flatten(1).amax(dim=1)
    offsets = groups * (largest + 1)[:, None] * is_moved[:, None]
    return boxes + offsets[..., None], is_moved


def _top(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    classes: torch.Tensor,
    kept: torch.Tensor,
    limit: int,
) -> Candidates:
    """The best of the candidates kept, from the highest score down."""
    scores = torch.where(kept, scores, -torch.inf)
    number = scores.shape[1] if limit < 0 else min(limit, scores.shape[1])
    best, index = _highest(scores, number)
    return Candidates(_take(boxes, index), best, classes.expand(scores.shape).gather(1, index))


def _highest(scores: torch.Tensor, number: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """``topk``, in which equal scores have the order of their places, as after a suppression."""
    index = scores.topk(number, dim=1).indices.sort(dim=1).values
    best, order = scores.gather(1, index).sort(dim=1, descending=True, stable=True)
    return best, index.gather(1, order)


def _without_empty(found: Candidates) -> Candidates:
    """Boxes without area removed, and those behind them moved up."""
    scores = torch.where(_nonempty(found.boxes), found.scores, -torch.inf)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return Candidates(_take(found.boxes, order), scores, found.classes.gather(1, order))


def _slots(valid: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Of slots (N, R), the numbers of those in use, from 0 to N * R - 1, and their images."""
    numbers = torch.arange(valid.shape[0], device=valid.device)[:, None].expand(valid.shape)
    slots = valid.flatten().nonzero()[:, 0]
    return slots, numbers.flatten()[slots]


def _one_more(boxes: torch.Tensor, images: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Boxes (S, 4) and their images (S,) with one more, so that there is always one, for which
    Detectron2's convolutions ask."""
    return F.pad(boxes, (0, 0, 0, 1)), F.pad(images, (0, 1))


def _spread(
    values: torch.Tensor, slots: torch.Tensor, valid: torch.Tensor, default: float
) -> torch.Tensor:
    """Values (S, ...) of slots in use as (N, R, ...), with a default in the others."""
    spread = values.new_full((valid.numel(), *values.shape[1:]), default)
    return spread.index_put((slots,), values).unflatten(0, valid.shape)


def _probabilities(predictor: nn.Module, logits: torch.Tensor) -> torch.Tensor:
    if isinstance(predictor, BalancedFastRCNNOutputLayers):
        return predictor.probabilities(logits)
    return logits.sigmoid() if has_sigmoid_scores(predictor) else logits.softmax(dim=1)


def _pool(
    pooler: ROIPooler,
    levels: Sequence[torch.Tensor],
    boxes: torch.Tensor,
    images: torch.Tensor,
) -> torch.Tensor:
    """Detectron2's ``ROIPooler`` of boxes (S, 4), each in one of the images (S,)."""
    rois = torch.cat([images[:, None].to(boxes.dtype), boxes], dim=1)
    if len(pooler.level_poolers) == 1:
        return pooler.level_poolers[0](levels[0], rois)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    size = area.sqrt() / pooler.canonical_box_size
    level = (pooler.canonical_level + torch.log2(size + 1e-8)).floor()
    level = level.clamp(min=pooler.min_level, max=pooler.max_level)
    pooled = boxes.new_zeros(boxes.shape[0], levels[0].shape[1], *pooler.output_size)
    for number, (features, align) in enumerate(zip(levels, pooler.level_poolers)):
        index = (level == pooler.min_level + number).nonzero()[:, 0]
        pooled = pooled.index_put((index,), align(features, rois[index]))
    return pooled
