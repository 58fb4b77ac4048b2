"""COCO evaluation with pycocotools' results in a fraction of its time, with faster-coco-eval.

Part of the pure-Python build of Detectron2 0.6; replaces its compiled evaluation.
"""

from faster_coco_eval.core.faster_eval_api import COCOeval_faster


class COCOeval_opt(COCOeval_faster):
    """pycocotools' ``COCOeval``: the same arguments, parameters, ``eval`` and ``stats``."""

    def __init__(self, cocoGt=None, cocoDt=None, iouType="segm"):
        # Not passed to the base class, which expects its own class of annotations.
        super().__init__(iouType=iouType, print_function=print)
        self.cocoGt, self.cocoDt = cocoGt, cocoDt
        if cocoGt is not None:
            self.params.imgIds = sorted(cocoGt.getImgIds())
            self.params.catIds = sorted(cocoGt.getCatIds())

    def _prepare(self):
        """Like the base class, but fields that pycocotools requires do not default to 0.

        Raises:
            KeyError: with the name of the field that is missing from an annotation.
        """
        params = self.params
        required = ("area", "num_keypoints" if params.iouType == "keypoints" else "iscrowd")
        categories = params.catIds if params.useCats else []
        evaluated = self.cocoGt.getAnnIds(imgIds=params.imgIds, catIds=categories)
        for annotation in self.cocoGt.loadAnns(evaluated):
            for field in required:
                annotation[field]
        super()._prepare()
