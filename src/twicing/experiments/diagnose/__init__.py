"""`twicing diagnose`: does this model collapse? By layer, against its own random initialisation, with a verdict."""
