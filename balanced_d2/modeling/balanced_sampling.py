"""Balanced sampling of proposals (Libra R-CNN, section 3.1) for Detectron2's RoI heads."""

from typing import TYPE_CHECKING, Any, Callable, Dict, List, Tuple

import torch
from detectron2.config import configurable
from detectron2.layers import nonzero_tuple
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
from detectron2.modeling.roi_heads import ROIHeads
from detectron2.structures import Instances, pairwise_iou
from detectron2.utils.events import get_event_storage

from balanced_d2.layers.sampling import (
    NEGATIVE_SAMPLERS,
    POSITIVE_SAMPLERS,
    Sampler,
    check_bins,
    iou_bins,
    members,
    sample_random,
)
from balanced_d2.utils.errors import UserError
from balanced_d2.utils.mix_in import check_order
from balanced_d2.utils.registry import name_of

# On a GPU, every how many iterations the counts are logged: as often as Detectron2 writes its log.
COUNT_PERIOD = 20


if TYPE_CHECKING:  # to type checkers, what a mixin uses is that of the class it is mixed into
    from detectron2.modeling.roi_heads import ROIHeads as _Mixin
else:
    _Mixin = object


class BalancedSamplingMixin(_Mixin):
    """Balanced sampling of proposals, for any class derived from Detectron2's ``ROIHeads``.

    Args:
        negative_sampler: what chooses negatives by their IoU, such as :class:`IoUBalancedSampler`;
            in configs an entry of ``NEGATIVE_SAMPLERS``. One that has ``needs_losses``, such as
            :class:`HardExampleSampler`, chooses positives and negatives together by their losses,
            which the heads compute without a gradient.
        positive_sampler: what chooses positives by their ground-truth instance, such as
            :func:`sample_instance_balanced`; in configs an entry of ``POSITIVE_SAMPLERS``.
        num_bins: number of IoU bins of the logged counts.
        **kwargs: for the class that this one is mixed into.

    Raises:
        UserError: on a sampler that is none, or ``num_bins`` below 1; on a negative sampler that
            needs losses if the heads do not offer them or there is a positive sampler, too.
        TypeError: when a class is defined that has it after the one that it is mixed into.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        check_order(cls, BalancedSamplingMixin, ROIHeads)

    @configurable
    def __init__(
        self,
        *,
        negative_sampler: Callable[..., torch.Tensor] = sample_random,
        positive_sampler: Sampler = sample_random,
        num_bins: int = 3,
        **kwargs,
    ):
        super().__init__(**kwargs)
        for sampler in (negative_sampler, positive_sampler):
            if not callable(sampler):
                raise UserError(
                    f"{sampler!r} is no sampler but perhaps the name of one: give the sampler "
                    "itself, such as IoUBalancedSampler() or sample_random"
                )
        self.num_bins = num_bins
        self.iou_range = negative_iou_range(self.proposal_matcher)
        check_bins(num_bins, self.iou_range)
        self._sample_negatives: Callable[..., torch.Tensor] = negative_sampler
        self._sample_positives = positive_sampler
        self.needs_losses = getattr(negative_sampler, "needs_losses", False)
        if self.needs_losses:
            check_together(positive_sampler is sample_random)
            if not self.offers_losses:
                raise UserError(
                    f"{type(self).__name__} does not offer the losses of its proposals, which the "
                    "negative sampler needs; BalancedROIHeads and BalancedCascadeROIHeads do, with "
                    "BalancedFastRCNNOutputLayers as box predictor"
                )

    @classmethod
    def from_config(cls, cfg, *args, **kwargs):
        arguments = super().from_config(cfg, *args, **kwargs)
        node = cfg.MODEL.ROI_HEADS
        matchers = arguments.get("proposal_matchers") or [arguments["proposal_matcher"]]
        iou_range = negative_iou_range(matchers[0])  # of a cascade's stages, the one that samples
        return {
            **arguments,
            "negative_sampler": NEGATIVE_SAMPLERS.build(
                node.NEGATIVE_SAMPLER, node, iou_range=iou_range
            ),
            "positive_sampler": POSITIVE_SAMPLERS.build(node.POSITIVE_SAMPLER, node),
            "num_bins": node.NUM_BINS,
        }

    @property
    def offers_losses(self) -> bool:
        """Whether there is :meth:`candidate_losses`."""
        return False

    def candidate_losses(
        self, features: Dict[str, torch.Tensor], candidates: List[Instances]
    ) -> List[torch.Tensor]:
        """The loss of each candidate by itself, without a gradient.

        Args:
            features: of the backbone.
            candidates: of each image, labelled as if all were sampled.

        Returns:
            Of each image, shape (M,).
        """
        raise NotImplementedError

    def forward(self, images, features, proposals, targets=None):
        """As Detectron2's; in training, samplers that need losses get them first."""
        if self.training and self.needs_losses:
            proposals = self._with_losses(features, proposals, targets)
        return super().forward(images, features, proposals, targets)

    @torch.no_grad()
    def _with_losses(
        self,
        features: Dict[str, torch.Tensor],
        proposals: List[Instances],
        targets: List[Instances],
    ) -> List[Instances]:
        """The proposals, the ground truth among them, with the field ``losses``."""
        if self.proposal_append_gt:
            proposals = add_ground_truth_to_proposals(targets, proposals)
        candidates = []
        for image_proposals, image_targets in zip(proposals, targets):
            _, matched, labels = self._match(image_proposals, image_targets)
            everything = torch.arange(len(labels), device=labels.device)
            # Without masks, of which a copy for each of all proposals would be large.
            boxes = Instances(image_targets.image_size, gt_boxes=image_targets.gt_boxes)
            boxes.gt_classes = image_targets.gt_classes
            candidates.append(self._labelled(image_proposals, boxes, everything, matched, labels))
        return [
            Instances(image.image_size, **image.get_fields(), losses=losses)
            for image, losses in zip(
                proposals, self.candidate_losses(features, candidates), strict=True
            )
        ]

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: List[Instances], targets: List[Instances]
    ) -> List[Instances]:
        """Match the proposals of each image with its ground truth and sample from them.

        Detectron2's own method does not hand the IoU to its sampler, so this one takes its place.
        The contract is the same: ``batch_size_per_image`` proposals of each image, at most
        ``positive_fraction`` of them foreground, with their ``gt_*`` fields set. With both
        samplers ``"random"`` it draws the same proposals from the same random state.

        Logged besides Detectron2's ``roi_head/num_{fg,bg}_samples``, as the mean over the batch's
        images, for each IoU bin k (0 is the lowest IoU, the easiest negatives):
        ``roi_head/num_neg_bin{k}``, the sampled negatives, and
        ``roi_head/num_neg_bin{k}_available``. On a GPU these come every 20 iterations.
        """
        if self.proposal_append_gt and not self.needs_losses:  # else it is among them already
            proposals = add_ground_truth_to_proposals(targets, proposals)
        sampled, bin_counts, num_fg, num_bg = [], [], 0, 0
        for image_proposals, image_targets in zip(proposals, targets):
            ious, matched, labels = self._match(image_proposals, image_targets)
            if self.needs_losses:
                chosen_fg, chosen_bg = self._sample_by_loss(image_proposals, labels)
            else:
                chosen_fg, chosen_bg = self._sample_by_matches(ious, matched, labels)
            in_bin = members(iou_bins(ious, self.num_bins, self.iou_range), self.num_bins)
            bin_counts += [in_bin[:, chosen_bg].sum(dim=1), (in_bin & (labels == 0)).sum(dim=1)]
            num_fg += len(chosen_fg)
            num_bg += len(chosen_bg)
            chosen = torch.cat([chosen_fg, chosen_bg])
            sampled.append(self._labelled(image_proposals, image_targets, chosen, matched, labels))

        self._log_sampling(bin_counts, num_fg, num_bg, num_images=len(sampled))
        return sampled

    def _sample_by_matches(
        self, ious: torch.Tensor, matched: torch.Tensor, labels: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Indices of the positives and of the negatives that are sampled of an image."""
        (fg,) = nonzero_tuple(labels == 1)
        (bg,) = nonzero_tuple(labels == 0)
        max_fg = int(self.batch_size_per_image * self.positive_fraction)
        chosen_fg = fg[_sample(self._sample_positives, matched[fg], num_samples=max_fg)]
        num_negatives = self.batch_size_per_image - len(chosen_fg)
        return chosen_fg, bg[_sample(self._sample_negatives, ious[bg], num_samples=num_negatives)]

    def _sample_by_loss(
        self, proposals: Instances, labels: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """The same for a sampler that chooses both together, of proposals with ``losses``."""
        (candidates,) = nonzero_tuple(labels >= 0)
        losses, boxes = proposals.losses[candidates], proposals.proposal_boxes.tensor[candidates]
        number = self.batch_size_per_image
        chosen = candidates[_sample(self._sample_negatives, losses, boxes, num_samples=number)]
        is_fg = labels[chosen] == 1
        return chosen[is_fg], chosen[~is_fg]

    def _labelled(
        self,
        proposals: Instances,
        targets: Instances,
        chosen: torch.Tensor,
        matched: torch.Tensor,
        labels: torch.Tensor,
    ) -> Instances:
        """The chosen proposals of an image with their ``gt_*`` fields."""
        sampled = proposals[chosen]
        if sampled.has("losses"):
            sampled.remove("losses")
        sampled.gt_classes = torch.full_like(chosen, self.num_classes)
        if len(targets) > 0:
            chosen_targets = targets[matched[chosen]]
            is_fg = labels[chosen] == 1
            sampled.gt_classes = torch.where(is_fg, chosen_targets.gt_classes, sampled.gt_classes)
            for name, value in chosen_targets.get_fields().items():
                if name.startswith("gt_") and not sampled.has(name):
                    sampled.set(name, value)
        return sampled

    def _match(
        self, proposals: Instances, targets: Instances
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Largest IoU, index of the ground truth and matcher's label of each proposal."""
        quality = pairwise_iou(targets.gt_boxes, proposals.proposal_boxes)
        matched, labels = self.proposal_matcher(quality)
        if len(targets) == 0:  # then everything is background, whatever the matcher's labels
            return quality.new_zeros(len(proposals)), matched, torch.zeros_like(labels)
        return quality.max(dim=0).values, matched, labels

    def _log_sampling(
        self, bin_counts: List[torch.Tensor], num_fg: int, num_bg: int, num_images: int
    ) -> None:
        storage = get_event_storage()
        storage.put_scalar("roi_head/num_fg_samples", num_fg / num_images)
        storage.put_scalar("roi_head/num_bg_samples", num_bg / num_images)
        # To read the counts, the host has to wait for the device: once for all of them, and on a
        # GPU only where Detectron2's writers are going to look.
        if bin_counts[0].is_cuda and (storage.iter + 1) % COUNT_PERIOD != 0:
            return
        means = torch.stack(bin_counts).view(num_images, 2, self.num_bins).float().mean(dim=0)
        for k, (num_sampled, num_available) in enumerate(means.t().tolist()):
            storage.put_scalar(f"roi_head/num_neg_bin{k}", num_sampled)
            storage.put_scalar(f"roi_head/num_neg_bin{k}_available", num_available)


def _sample(
    sampler: Callable[..., torch.Tensor], *candidates: torch.Tensor, num_samples: int
) -> torch.Tensor:
    """Indices of the candidates that a sampler chooses.

    Raises:
        UserError: if it returns something else, or more of them than it was asked for.
    """
    indices: Any = sampler(*candidates, num_samples)
    most = min(num_samples, len(candidates[0]))
    is_index = isinstance(indices, torch.Tensor) and indices.dtype == torch.long
    if not is_index or indices.dim() != 1 or len(indices) > most:
        got = type(indices).__name__
        if isinstance(indices, torch.Tensor):
            got = f"{indices.dtype} of shape {tuple(indices.shape)}"
        raise UserError(
            f"the sampler {name_of(sampler)} returned {got}; it has "
            f"to return indices, torch.int64 of one dimension, here at most {most}"
        )
    return indices


def negative_iou_range(matcher: Matcher) -> Tuple[float, float]:
    """The IoU, within [0, 1], of the proposals that a matcher labels 0 (negative).

    With Detectron2's default thresholds that is (0, 0.5), the paper's.
    """
    intervals = zip(matcher.thresholds[:-1], matcher.thresholds[1:], matcher.labels)
    negative = [(low, high) for low, high, label in intervals if label == 0]
    return max(0.0, min(low for low, _ in negative)), min(1.0, max(high for _, high in negative))


def check_together(positives_are_random: bool) -> None:
    """Raise :class:`UserError` if there is a positive sampler beside one that needs losses."""
    if not positives_are_random:
        raise UserError(
            "MODEL.ROI_HEADS.NEGATIVE_SAMPLER samples positives and negatives together by their "
            "losses; set MODEL.ROI_HEADS.POSITIVE_SAMPLER to random"
        )
