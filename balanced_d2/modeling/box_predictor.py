"""Box predictor of Fast R-CNN heads with any registered classification and regression loss."""

from typing import List, Optional, Sequence, Tuple

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.layers import cat, ciou_loss, diou_loss, nonzero_tuple
from detectron2.modeling.roi_heads.fast_rcnn import (
    FastRCNNOutputLayers,
    _log_classification_stats,
)
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from fvcore.nn import giou_loss, smooth_l1_loss
from torch import nn
from torch.nn import functional as F

from balanced_d2.layers.box_losses import BoxRegLoss, box_reg_losses, build_box_reg_loss
from balanced_d2.layers.class_counts import GROUPS, class_groups
from balanced_d2.layers.class_losses import ClassLoss, build_class_loss, check_counts
from balanced_d2.utils.compat import has_sigmoid_scores
from balanced_d2.utils.errors import UserError

IOU_LOSSES = {"giou": giou_loss, "diou": diou_loss, "ciou": ciou_loss}
# On a GPU, every how many iterations figures of class groups are logged: as often as Detectron2
# writes its log.
LOG_PERIOD = 20


class BalancedFastRCNNOutputLayers(FastRCNNOutputLayers):
    """Detectron2's predictor, which takes its losses from outside.

    With the counts of the classes in the training data, it logs the groups of rare, common and
    frequent classes (:func:`balanced_d2.layers.class_groups`), of the foreground proposals that it
    is trained on: ``fast_rcnn/num_rare``, …, their number, as the mean over the images, and
    ``fast_rcnn/score_rare``, …, the mean probability of the right class. On a GPU these come every
    20 iterations.

    Args:
        input_shape, **kwargs: as for Detectron2's ``FastRCNNOutputLayers``.
        box_reg_loss: the loss of box deltas, such as :class:`BalancedL1`; None: Detectron2's own,
            by its ``box_reg_loss_type``.
        cls_loss: the loss of classes, such as :class:`SeesawLoss`; None: Detectron2's own.
        class_counts: the number of training objects of each class, if known.

    Raises:
        UserError: if ``cls_loss`` is no loss, or is given beside ``use_sigmoid_ce`` of Detectron2's
            main; or if there are counts for another number of classes.
    """

    cls_score: nn.Linear

    @configurable
    def __init__(
        self,
        input_shape,
        *,
        box_reg_loss: Optional[BoxRegLoss] = None,
        cls_loss: Optional[ClassLoss] = None,
        class_counts: Sequence[int] = (),
        **kwargs,
    ):
        super().__init__(input_shape, **kwargs)
        self.regression_loss = box_reg_loss
        self.classification_loss = cls_loss
        if cls_loss is not None:
            self._check(cls_loss)
            if cls_loss.num_logits != self.cls_score.out_features:
                self.cls_score = nn.Linear(self.cls_score.in_features, cls_loss.num_logits)
                nn.init.normal_(self.cls_score.weight, std=0.01)
                nn.init.zeros_(self.cls_score.bias)
        self.class_groups: Optional[torch.Tensor] = None
        if len(class_counts):
            check_counts(class_counts, self.num_classes)
            groups = class_groups(class_counts)
            if groups.max() >= 0:
                # The background, and classes without objects, are in a group of their own.
                groups = np.append(np.where(groups < 0, len(GROUPS), groups), len(GROUPS))
                del self.class_groups
                self.register_buffer("class_groups", torch.from_numpy(groups), persistent=False)

    @classmethod
    def from_config(cls, cfg, input_shape):
        node, counts = cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.CLASS_COUNTS
        return {
            **super().from_config(cfg, input_shape),
            "box_reg_loss": build_box_reg_loss(node),
            "cls_loss": build_class_loss(node, cfg.MODEL.ROI_HEADS.NUM_CLASSES, counts),
            "class_counts": counts,
        }

    def _check(self, cls_loss: ClassLoss) -> None:
        parts = ("num_logits", "loss", "probabilities")
        if isinstance(cls_loss, type) or not all(hasattr(cls_loss, part) for part in parts):
            raise UserError(
                f"{cls_loss!r} is no classification loss but perhaps the name of one: give the "
                f"loss itself, such as FocalLoss(num_classes={self.num_classes})"
            )
        # A loss that is no ClassLoss need not know it.
        num_classes = getattr(cls_loss, "num_classes", self.num_classes)
        if num_classes != self.num_classes:
            raise UserError(
                f"the classification loss is for {num_classes} classes, and the predictor for "
                f"{self.num_classes}"
            )
        if has_sigmoid_scores(self):
            raise UserError(
                "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE (and USE_FED_LOSS) is itself a classification "
                "loss; turn it off, or set MODEL.ROI_BOX_HEAD.CLS_LOSS_TYPE to cross_entropy"
            )

    def losses(self, predictions, proposals: List[Instances]):
        """
        Args:
            predictions: logits, shape (R, num_logits), and deltas, as :meth:`forward` returns them.
            proposals: with ``proposal_boxes``, ``gt_classes`` and, but for images without objects,
                ``gt_boxes``; R of them together.

        Returns:
            ``loss_cls`` and ``loss_box_reg``, each the sum over proposals divided by R.

        Raises:
            UserError: if ``cls_loss`` or ``box_reg_loss`` returns another shape than it has to.
        """
        scores, deltas = predictions
        if self.classification_loss is None:
            if self.class_groups is not None and len(proposals):
                _log_groups(self.class_groups, self.probabilities(scores.detach()), proposals)
            return super().losses(predictions, proposals)
        classes = cat([p.gt_classes for p in proposals])
        probabilities = self.probabilities(scores.detach())
        wanted = (len(classes), self.num_classes + 1)
        _check_shape("probabilities", self.classification_loss, probabilities, wanted)
        _log_classification_stats(probabilities, classes)
        if self.class_groups is not None:
            _log_groups(self.class_groups, probabilities, proposals)
        if hasattr(self.classification_loss, "count"):
            self.classification_loss.count(classes)
        proposal_boxes, gt_boxes = _boxes(proposals)
        losses = {
            "loss_cls": self._class_losses(scores, classes).sum() / max(len(classes), 1),
            "loss_box_reg": self.box_reg_loss(proposal_boxes, gt_boxes, deltas, classes),
        }
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    @torch.no_grad()
    def proposal_losses(self, predictions, proposals: List[Instances]) -> torch.Tensor:
        """The loss of each proposal by itself, without a gradient, for samplers.

        Args:
            predictions, proposals: as for :meth:`losses`.

        Returns:
            Shape (R,), float32: the losses of class and box as they are weighted in training.

        Raises:
            UserError: with ``use_sigmoid_ce`` of Detectron2's main.
        """
        scores, deltas = predictions
        if has_sigmoid_scores(self):
            raise UserError(
                "MODEL.ROI_HEADS.NEGATIVE_SAMPLER ohem does not work with "
                "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE (and USE_FED_LOSS): turn one of them off"
            )
        classes = cat([p.gt_classes for p in proposals])
        if self.classification_loss is None:
            losses = F.cross_entropy(scores.float(), classes, reduction="none")
        else:
            losses = self._class_losses(scores, classes).float()
        losses = losses * self.loss_weight.get("loss_cls", 1.0)
        proposal_boxes, gt_boxes = _boxes(proposals)
        foreground = nonzero_tuple((classes >= 0) & (classes < self.num_classes))[0]
        of_boxes = self._regression_losses(
            self._foreground_deltas(deltas.float(), foreground, classes),
            proposal_boxes[foreground],
            gt_boxes[foreground],
        )
        of_boxes = of_boxes.float() * self.loss_weight.get("loss_box_reg", 1.0)
        return losses.index_add(0, foreground, of_boxes)

    def _class_losses(self, scores: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        assert self.classification_loss is not None
        losses = self.classification_loss.loss(scores, classes)
        _check_shape("loss", self.classification_loss, losses, (len(classes),))
        return losses

    def _regression_losses(
        self, deltas: torch.Tensor, boxes: torch.Tensor, gt_boxes: torch.Tensor
    ) -> torch.Tensor:
        """The loss of each foreground box; all arguments have the shape (F, 4)."""
        if self.regression_loss is None and self.box_reg_loss_type in IOU_LOSSES:
            predicted = self.box2box_transform.apply_deltas(deltas, boxes)
            return IOU_LOSSES[self.box_reg_loss_type](predicted, gt_boxes, reduction="none")
        targets = self.box2box_transform.get_deltas(boxes, gt_boxes)
        if self.regression_loss is None:
            losses = smooth_l1_loss(deltas, targets, self.smooth_l1_beta, reduction="none")
        else:
            losses = box_reg_losses(self.regression_loss, deltas, targets)
        return losses.flatten(1).sum(dim=1) if losses.dim() > 1 else losses

    def _foreground_deltas(
        self, deltas: torch.Tensor, foreground: torch.Tensor, classes: torch.Tensor
    ) -> torch.Tensor:
        """The deltas of foreground proposals for their classes, (F, 4), of all, (R, 4) or
        (R, num_classes * 4)."""
        box_dim = len(self.box2box_transform.weights)
        # One box per class, or one for all classes.
        deltas = deltas.unflatten(1, (-1, box_dim))[foreground]
        if deltas.shape[1] > 1:
            deltas = deltas.gather(1, classes[foreground].view(-1, 1, 1).expand(-1, 1, box_dim))
        return deltas.squeeze(1)

    def probabilities(self, scores: torch.Tensor) -> torch.Tensor:
        """
        Args:
            scores: logits, shape (R, num_logits).

        Returns:
            Shape (R, num_classes + 1), the background last.
        """
        if self.classification_loss is not None:
            return self.classification_loss.probabilities(scores)
        return scores.sigmoid() if has_sigmoid_scores(self) else F.softmax(scores, dim=-1)

    def predict_probs(self, predictions, proposals: List[Instances]):
        """
        Returns:
            Of each image, shape (Ri, num_classes + 1), the background last.
        """
        if self.classification_loss is None:
            return super().predict_probs(predictions, proposals)
        probabilities = self.classification_loss.probabilities(predictions[0])
        # Not len(), which has to be a number, and a trace would keep it.
        return probabilities.split([p.__len__() for p in proposals], dim=0)

    def box_reg_loss(self, proposal_boxes, gt_boxes, pred_deltas, gt_classes):
        """
        Args:
            proposal_boxes, gt_boxes: shape (R, 4), absolute pixels.
            pred_deltas: shape (R, 4) or (R, num_classes * 4).
            gt_classes: shape (R,), class of each proposal, background is ``num_classes``.

        Returns:
            Scalar: the loss summed over the foreground proposals, divided by R.
        """
        if self.regression_loss is None:
            return super().box_reg_loss(proposal_boxes, gt_boxes, pred_deltas, gt_classes)
        foreground = nonzero_tuple((gt_classes >= 0) & (gt_classes < self.num_classes))[0]
        deltas = self._foreground_deltas(pred_deltas, foreground, gt_classes)
        target = self.box2box_transform.get_deltas(proposal_boxes[foreground], gt_boxes[foreground])
        loss = box_reg_losses(self.regression_loss, deltas, target).sum()
        return loss / max(gt_classes.numel(), 1)


def _check_shape(
    method: str, cls_loss: ClassLoss, result: torch.Tensor, wanted: Tuple[int, ...]
) -> None:
    if result.shape != wanted:
        raise UserError(
            f"{method}() of the classification loss {type(cls_loss).__name__} returned the shape "
            f"{tuple(result.shape)} for {wanted[0]} proposals; {wanted} is needed"
        )


def _boxes(proposals: List[Instances]):
    """The boxes of proposals, and their ground truth, (R, 4) each; for images without objects,
    whose ground truth nothing reads, the proposals themselves."""
    boxes = cat([p.proposal_boxes.tensor for p in proposals])
    gt = [(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals]
    return boxes, cat(gt)


def _log_groups(
    group_of_class: torch.Tensor, probabilities: torch.Tensor, proposals: List[Instances]
) -> None:
    """
    Args:
        group_of_class: shape (num_classes + 1,), the group of each class; 3 for none.
        probabilities: shape (R, num_classes + 1), without a gradient.
    """
    storage = get_event_storage()
    # To read the figures, the host has to wait for the device.
    if probabilities.is_cuda and (storage.iter + 1) % LOG_PERIOD != 0:
        return
    classes = cat([p.gt_classes for p in proposals])
    groups = group_of_class[classes]
    right = probabilities.gather(1, classes[:, None]).squeeze(1).float()
    values = torch.stack([torch.ones_like(right), right])
    sums = values.new_zeros(2, len(GROUPS) + 1).index_add_(1, groups, values)
    for name, number, total in zip(GROUPS, *sums.tolist()):
        storage.put_scalar(f"fast_rcnn/num_{name}", number / len(proposals))
        if number:
            storage.put_scalar(f"fast_rcnn/score_{name}", total / number)
