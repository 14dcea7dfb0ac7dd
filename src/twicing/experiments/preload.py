"""Import what every job needs, once, in the server that jobs are forked from: seconds saved per job.

Nothing here may start a thread or draw a random number, as both would be inherited.
"""

import twicing.adapters.timm
import twicing.training.classification  # noqa: F401
