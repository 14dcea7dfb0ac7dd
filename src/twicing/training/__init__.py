"""Recipes and their tasks; Lightning does the loop."""

from twicing.torchvision_import import mend_torchvision_import

# Lightning imports torchmetrics, which imports torchvision.
mend_torchvision_import()
