"""."""
import torch
from fastsgd._optimizer import FusedStep
class RMSprop(FusedStep, torch.optim.RMSprop):
    """."""
    _rule = "rmsprop"
