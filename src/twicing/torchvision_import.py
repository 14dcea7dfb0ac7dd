"""Make torchvision importable beside a torch that its compiled part was not built for; timm imports it in turn.

The wheel of the package registry is built for CUDA. Beside a CPU-only torch its operators stay unregistered, and then
its Python part fails with "operator torchvision::nms does not exist", although only detection models need them.
"""

import sys

import torch

# Torchvision attaches shape rules to these two without looking whether they exist; the others it guards itself.
_MISSING_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
# A definition lasts as long as its fragment.
_fragments: list[torch.library.Library] = []


def mend_torchvision_import() -> None:
    """Import torchvision, or, where just its operators are missing, declare them so that the next import works.

    Declared, not implemented: calling torchvision's nms still fails. Call it before `import timm`; repeating is free.
    Does nothing where torchvision is absent, or broken in another way: the import that needs it says so itself.
    """
    if "torchvision" in sys.modules:
        return
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            return
    else:
        return
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        # What the failed import left behind would not be imported again.
        del sys.modules[name]
    fragment = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _MISSING_OPERATORS:
        fragment.define(schema)
    _fragments.append(fragment)
