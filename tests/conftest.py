"""What every test shares."""

import torch

# The models here are tiny: a second thread costs more than it brings, and much more where tests share the machine.
torch.set_num_threads(1)
