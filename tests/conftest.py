"""Settings of all tests."""

import torch

# The tensors are small: waking other threads costs more than they save. Tests of threads set their own number.
torch.set_num_threads(1)
