"""Classification losses of RoI heads, for classes of unequal frequency, chosen by name.

K foreground classes are numbered from 0, and K is the background.
"""

import math
from typing import Any, Dict, Optional, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from balanced_d2.layers.class_counts import weights_of_counts
from balanced_d2.utils.errors import UserError
from balanced_d2.utils.registry import Registry

# Detectron2's own, which it computes itself.
CROSS_ENTROPY = "cross_entropy"
# Those of this project that ``CLASS_WEIGHTS`` has no effect on.
WITHOUT_WEIGHTS = (CROSS_ENTROPY, "focal", "balanced_softmax", "seesaw")
CLS_LOSSES = Registry("CLS_LOSSES", "MODEL.ROI_BOX_HEAD.CLS_LOSS_TYPE", (CROSS_ENTROPY,))
"""Classification losses of the RoI heads, each a :class:`ClassLoss`."""


class ClassLoss(nn.Module):
    """A classification loss, and what the logits that it trains mean. Subclass it for others.

    Args:
        num_classes: K.

    Attributes:
        num_logits: how many the head predicts for each proposal; here K + 1. The first K are taken
            for those of the classes where weights begin with those of another detector.
    """

    needs_counts = False
    """Whether it cannot be computed without the counts of the classes in the training data."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        self.num_logits = num_classes + 1

    @classmethod
    def from_config(
        cls, node: Any, num_classes: int, class_counts: Sequence[int]
    ) -> Dict[str, Any]:
        """
        Args:
            node: ``MODEL.ROI_BOX_HEAD``.
            num_classes: K.
            class_counts: ``MODEL.CLASS_COUNTS``: the number of training objects of each class;
                empty if they are not known, as in an evaluation.
        """
        return {"num_classes": num_classes}

    def count(self, classes: torch.Tensor) -> None:
        """Called once for each batch of training, before its loss.

        Args:
            classes: shape (R,), of the proposals that are trained on.
        """

    def loss(self, logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """
        Args:
            logits: shape (R, num_logits).
            classes: shape (R,), integers in [0, K].

        Returns:
            The loss of each proposal, shape (R,), in float32 or, for such logits, float64. RoI
            heads take its mean.
        """
        raise NotImplementedError

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """
        Args:
            logits: shape (R, num_logits).

        Returns:
            Shape (R, K + 1): the probability of each class, the background last. Rows sum to 1.
        """
        return _unrounded(logits).softmax(dim=1)


def build_class_loss(
    node: Any, num_classes: int, class_counts: Sequence[int]
) -> Optional[ClassLoss]:
    """The loss that ``MODEL.ROI_BOX_HEAD`` asks for; None: Detectron2's own.

    Args:
        node, num_classes, class_counts: as for :meth:`ClassLoss.from_config`.

    Raises:
        UserError: if there is none of that name, or a parameter is wrong.
    """
    name = node.CLS_LOSS_TYPE
    CLS_LOSSES.check(name)
    if name == CROSS_ENTROPY:
        return None
    return CLS_LOSSES.build(name, node, num_classes=num_classes, class_counts=class_counts)


@CLS_LOSSES.register(name="focal")
class FocalLoss(ClassLoss):
    """Focal loss (Lin et al., ICCV 2017, equation 4) of a softmax: ``-(1 - p)**gamma log(p)``.

    ``p`` is the softmax probability of the right class. Scores are those of the softmax.

    Args:
        num_classes: K.
        gamma: how much well-classified proposals are down-weighted, at least 0; 0 is
            cross-entropy.

    Raises:
        UserError: if ``gamma`` is negative.
    """

    def __init__(self, num_classes: int, gamma: float = 2.0):
        super().__init__(num_classes)
        if not (gamma >= 0 and math.isfinite(gamma)):
            raise UserError(
                f"gamma of the focal loss (MODEL.ROI_BOX_HEAD.FOCAL_GAMMA) is {gamma}; it has to "
                "be a finite number, at least 0"
            )
        self.gamma = gamma

    @classmethod
    def from_config(cls, node, num_classes, class_counts):
        return {"num_classes": num_classes, "gamma": node.FOCAL_GAMMA}

    def loss(self, logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        cross_entropy = F.cross_entropy(_unrounded(logits), classes, reduction="none")
        # 1 - p without cancellation; not 0, where a power below 1 has no finite gradient.
        wrong = (-torch.expm1(-cross_entropy)).clamp(min=torch.finfo(cross_entropy.dtype).tiny)
        return wrong**self.gamma * cross_entropy


class _WeightedMixin(nn.Module):
    """Multiplies the loss of each proposal by the weight of its class."""

    weights: Optional[torch.Tensor]

    def _set_weights(self, num_classes: int, weights: Optional[Sequence[float]]) -> None:
        if weights is None:
            self.weights = None
            return
        if len(weights) not in (num_classes, num_classes + 1):
            raise UserError(
                f"there are {len(weights)} class weights (MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS); "
                f"{num_classes} are needed, one for each class, or {num_classes + 1} with that of "
                "the background last"
            )
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
            raise UserError(
                f"class weights (MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS) are {list(weights)}; all have "
                "to be finite numbers, at least 0"
            )
        # It follows from the config, so it is in no checkpoint.
        of_background = [] if len(weights) > num_classes else [1.0]
        tensor = torch.tensor([*weights, *of_background], dtype=torch.float32)
        self.register_buffer("weights", tensor, persistent=False)

    def _weighted(self, losses: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        if self.weights is None:
            raise counts_missing("class weights")
        return losses * self.weights.to(losses.dtype)[classes]


@CLS_LOSSES.register(name="weighted_cross_entropy")
class WeightedCrossEntropy(_WeightedMixin, ClassLoss):
    """Softmax cross-entropy, each proposal's multiplied by the weight of its class.

    The mean is over proposals, not over weights, so that equal weights of 1 are cross-entropy and
    a proposal's gradient does not depend on the others. Scores are those of the softmax, so they
    contain the weights.

    Args:
        num_classes: K.
        weights: K numbers, at least 0, or K + 1 with that of the background, otherwise 1, last.
            None: the loss cannot be computed, only :meth:`probabilities`.

    Raises:
        UserError: if the weights are of another number, negative or not finite.
    """

    needs_counts = True

    def __init__(self, num_classes: int, weights: Optional[Sequence[float]] = None):
        super().__init__(num_classes)
        self._set_weights(num_classes, weights)

    @classmethod
    def from_config(cls, node, num_classes, class_counts):
        weights = weights_of_config(node, num_classes, class_counts)
        return {"num_classes": num_classes, "weights": weights}

    def loss(self, logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        losses = F.cross_entropy(_unrounded(logits), classes, reduction="none")
        return self._weighted(losses, classes)


@CLS_LOSSES.register(name="weighted_focal")
class WeightedFocalLoss(_WeightedMixin, FocalLoss):
    """:class:`FocalLoss`, each proposal's multiplied by the weight of its class.

    With weights from the effective number of objects, the class-balanced focal loss (Cui et al.,
    CVPR 2019), but of a softmax.

    Args:
        num_classes, gamma: as for :class:`FocalLoss`.
        weights: as for :class:`WeightedCrossEntropy`.
    """

    needs_counts = True

    def __init__(
        self, num_classes: int, gamma: float = 2.0, weights: Optional[Sequence[float]] = None
    ):
        super().__init__(num_classes, gamma)
        self._set_weights(num_classes, weights)

    @classmethod
    def from_config(cls, node, num_classes, class_counts):
        return {
            **super().from_config(node, num_classes, class_counts),
            "weights": weights_of_config(node, num_classes, class_counts),
        }

    def loss(self, logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        return self._weighted(super().loss(logits, classes), classes)


@CLS_LOSSES.register(name="balanced_softmax")
class BalancedSoftmax(ClassLoss):
    """Balanced softmax (Ren et al., NeurIPS 2020, equation 4).

    In training, each logit is raised by the logarithm of its class's number of objects, which is
    what their frequency contributes; what the logits learn is then free of it. In inference the
    scores are the plain softmax, as in the paper: of data in which all classes are as frequent.

    The data do not say how many objects the background has. It is given the mean of the classes:
    together they have the same prior against it as before.

    Args:
        num_classes: K.
        class_counts: the number of training objects of each class; none counts as one. Empty: the
            loss cannot be computed, only :meth:`probabilities`.

    Raises:
        UserError: if the counts are of another number of classes, or negative.
    """

    needs_counts = True
    log_prior: Optional[torch.Tensor]

    def __init__(self, num_classes: int, class_counts: Sequence[int] = ()):
        super().__init__(num_classes)
        if len(class_counts) == 0:
            self.log_prior = None
            return
        check_counts(class_counts, num_classes)
        counts = torch.as_tensor(class_counts, dtype=torch.float64).clamp(min=1)
        log_prior = F.pad((counts / counts.mean()).log(), (0, 1)).float()
        # It follows from the config, so it is in no checkpoint.
        self.register_buffer("log_prior", log_prior, persistent=False)

    @classmethod
    def from_config(cls, node, num_classes, class_counts):
        return {"num_classes": num_classes, "class_counts": class_counts}

    def loss(self, logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        if self.log_prior is None:
            raise counts_missing("balanced softmax")
        raised = _unrounded(logits) + self.log_prior
        return F.cross_entropy(raised, classes, reduction="none")


@CLS_LOSSES.register(name="seesaw")
class SeesawLoss(ClassLoss):
    """Seesaw loss (Wang et al., CVPR 2021).

    Cross-entropy in which the logit of each other class j is changed by the logarithm of a factor
    for a proposal of class i (equations 3 to 6)::

        S_ij = min(1, (N_j / N_i)**p) * max(1, (s_j / s_i)**q)

    The first, mitigation, lessens what a class suffers as a negative from classes that have had
    more proposals, N, so far in the training. The second, compensation, raises it where the class's
    score s is above that of the right one. No gradient passes through the factors.

    With ``objectness``, there are K + 2 logits: the K classes, trained by Seesaw loss on foreground
    alone, then object and background, trained by cross-entropy on all proposals. The score of a
    class is its softmax over the K classes times that of being an object. Without it, the
    background is another class, by far the most frequent.

    Args:
        num_classes: K.
        p: exponent of mitigation, at least 0; 0 turns it off.
        q: exponent of compensation, at least 0; 0 turns it off.
        objectness: whether there is the objectness branch.
        eps: the least score that compensation divides by, as in the authors' code; 0 for none, as
            in the paper.

    Attributes:
        counts: int64 (K + 1,), the proposals of each class and the background so far, of all
            processes. A buffer, so it is in the checkpoint.

    Raises:
        UserError: if ``p``, ``q`` or ``eps`` is out of range.
    """

    counts: torch.Tensor

    def __init__(
        self,
        num_classes: int,
        p: float = 0.8,
        q: float = 2.0,
        objectness: bool = True,
        eps: float = 0.01,
    ):
        super().__init__(num_classes)
        for name, value in (("P", p), ("Q", q)):
            if not (value >= 0 and math.isfinite(value)):
                raise UserError(
                    f"{name.lower()} of Seesaw loss (MODEL.ROI_BOX_HEAD.SEESAW_{name}) is {value}; "
                    "it has to be a finite number, at least 0"
                )
        if not 0 <= eps < 1:
            raise UserError(
                f"eps of Seesaw loss (MODEL.ROI_BOX_HEAD.SEESAW_EPS) is {eps}; it has to be at "
                "least 0 and below 1"
            )
        self.p, self.q, self.objectness = p, q, objectness
        self.log_eps = math.log(eps) if eps else -math.inf
        if objectness:
            self.num_logits = num_classes + 2
        self.register_buffer("counts", torch.zeros(num_classes + 1, dtype=torch.long))

    @classmethod
    def from_config(cls, node, num_classes, class_counts):
        return {
            "num_classes": num_classes,
            "p": node.SEESAW_P,
            "q": node.SEESAW_Q,
            "objectness": node.SEESAW_OBJECTNESS,
            "eps": node.SEESAW_EPS,
        }

    @torch.no_grad()
    def count(self, classes: torch.Tensor) -> None:
        """Add the proposals of a batch, of all processes, to ``counts``. Each of them has to call
        this."""
        new = torch.zeros_like(self.counts)
        new.index_add_(0, classes, torch.ones_like(classes))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(new)
        self.counts += new

    def loss(self, logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        logits = _unrounded(logits)
        if not self.objectness:
            return self._seesaw(logits, classes)
        of_classes, of_object = logits.split([self.num_classes, 2], dim=1)
        is_object = classes < self.num_classes
        objectness = F.cross_entropy(of_object, (~is_object).long(), reduction="none")
        # A background proposal takes part with any class, and then with a loss of 0.
        seesaw = self._seesaw(of_classes, classes.clamp(max=self.num_classes - 1))
        return objectness + torch.where(is_object, seesaw, 0.0)

    def _seesaw(self, logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """
        Args:
            logits: shape (R, C), of the first C classes, which compete.
            classes: shape (R,), below C.
        """
        with torch.no_grad():
            log_counts = self.counts[: logits.shape[1]].clamp(min=1).to(logits.dtype).log()
            mitigation = (log_counts - log_counts[classes, None]).clamp(max=0)
            log_scores = logits.log_softmax(dim=1)
            own = log_scores.gather(1, classes[:, None]).clamp(min=self.log_eps)
            compensation = (log_scores - own).clamp(min=0)
            log_factors = self.p * mitigation + self.q * compensation
        return F.cross_entropy(logits + log_factors, classes, reduction="none")

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        if not self.objectness:
            return super().probabilities(logits)
        of_classes, of_object = _unrounded(logits).split([self.num_classes, 2], dim=1)
        is_object, is_background = of_object.softmax(dim=1).split(1, dim=1)
        return torch.cat([of_classes.softmax(dim=1) * is_object, is_background], dim=1)


def weights_of_config(
    node: Any, num_classes: int, class_counts: Sequence[int]
) -> Optional[Sequence[float]]:
    """The class weights that ``MODEL.ROI_BOX_HEAD`` asks for: its own, or those of the counts; None
    if these are not known.

    Raises:
        UserError: if they are still by name, or the counts are of another number of classes.
    """
    weights = node.CLASS_WEIGHTS
    if any(isinstance(weight, (list, tuple)) for weight in weights):
        raise UserError(
            f"MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS has names, {list(weights)}, which balanced-d2 "
            "train replaces by the order of the classes in the data; give the weights in that order"
        )
    if len(weights):
        return list(weights)
    if not len(class_counts):
        return None
    check_counts(class_counts, num_classes)
    return weights_of_counts(class_counts, node.CLASS_WEIGHT_BETA).tolist()


def check_counts(counts: Sequence[int], num_classes: int) -> None:
    """Raise :class:`UserError` if counts are not those of so many classes."""
    if len(counts) != num_classes or min(counts, default=0) < 0:
        raise UserError(
            f"MODEL.CLASS_COUNTS has {len(counts)} numbers, {list(counts)[:5]}…; {num_classes} are "
            "needed, at least 0, one for each class of the model"
        )


def counts_missing(what: str) -> UserError:
    """The error to raise if a loss cannot be computed without counts."""
    return UserError(
        f"{what} (MODEL.ROI_BOX_HEAD.CLS_LOSS_TYPE) needs the number of training objects of each "
        "class: balanced-d2 train finds it in the data; elsewhere set MODEL.CLASS_COUNTS, or give "
        "class_counts or weights"
    )


def _unrounded(logits: torch.Tensor) -> torch.Tensor:
    """Logits in float32 where mixed precision made them shorter."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
