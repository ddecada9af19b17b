"""State that the open sessions of a process share."""

import torch
import torch.distributed as dist

from cogvideox_sat.parallel.process_groups import destroy_process_groups, initialize_process_groups


class SessionsOfProcess:
    """The number of open sessions of a process, and what they share.

    They share the process groups and PyTorch's switch for deterministic cuDNN, which is on so that a seed always gives
    the same video. When the last session ends, both are as they were before the first.
    """

    def __init__(self) -> None:
        self.count = 0

    def enter(self, model_parallel_size: int) -> None:
        """Count a session in.

        Raises:
            UserError: the processes cannot be divided into such groups, or are already divided into others.
        """
        if not self.count:
            self.makes_groups = not dist.is_initialized()
            self.was_deterministic = torch.backends.cudnn.deterministic
        initialize_process_groups(model_parallel_size)
        torch.backends.cudnn.deterministic = True
        self.count += 1

    def leave(self) -> None:
        """Count a session out."""
        self.count -= 1
        if not self.count:
            torch.backends.cudnn.deterministic = self.was_deterministic
            if self.makes_groups:
                destroy_process_groups()


sessions_of_process = SessionsOfProcess()
