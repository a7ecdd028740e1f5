"""Settings of every test."""

import torch

# Small tensors on few cores: threads that wait for each other cost more than they save.
torch.set_num_threads(1)
