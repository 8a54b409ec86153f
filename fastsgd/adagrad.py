"""."""
import torch
from fastsgd._optimizer import FusedStep
class Adagrad(FusedStep, torch.optim.Adagrad):
    """."""
    _rule = "adagrad"
