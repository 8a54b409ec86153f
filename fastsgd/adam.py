"""Adam and AdamW."""
import torch
from fastsgd._optimizer import FusedStep
class Adam(FusedStep, torch.optim.Adam):
    """."""
    _rule = "adam"
class AdamW(Adam, torch.optim.AdamW):
    """."""
