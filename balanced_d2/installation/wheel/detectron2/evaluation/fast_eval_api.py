"""COCO evaluation with pycocotools' figures in a fraction of its time, by faster-coco-eval.

Part of the pure-Python build of Detectron2 0.6, in the place of its compiled one.
"""

from faster_coco_eval.core.faster_eval_api import COCOeval_faster


class COCOeval_opt(COCOeval_faster):
    """pycocotools' ``COCOeval``: the same arguments, parameters, ``eval`` and ``stats``."""

    def __init__(self, cocoGt=None, cocoDt=None, iouType="segm"):
        # Not given to the base, which expects its own class of annotations, not pycocotools'.
        super().__init__(iouType=iouType, print_function=print)
        self.cocoGt, self.cocoDt = cocoGt, cocoDt
        if cocoGt is not None:
            self.params.imgIds = sorted(cocoGt.getImgIds())
            self.params.catIds = sorted(cocoGt.getCatIds())

    def _prepare(self):
        """As the base's, but what pycocotools asks of ground truths is not taken for 0 here.

        Raises:
            KeyError: with the name of the field that an annotation lacks.
        """
        params = self.params
        required = ("area", "num_keypoints" if params.iouType == "keypoints" else "iscrowd")
        categories = params.catIds if params.useCats else []
        evaluated = self.cocoGt.getAnnIds(imgIds=params.imgIds, catIds=categories)
        for annotation in self.cocoGt.loadAnns(evaluated):
            for field in required:
                annotation[field]
        super()._prepare()
