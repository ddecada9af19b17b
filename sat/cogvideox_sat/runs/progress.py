"""Show the values of a step: as a line and as a progress bar."""

from collections.abc import Mapping

from tqdm import tqdm

# Formats of the values that are shown, in this order; other values are only written to files.
FORMATS = {
    "loss": "loss {:.4f}",
    "lr": "lr {:.2e}",
    "grad_norm": "grad norm {:.3f}",
    "samples_per_second": "{:.2f} samples/s",
    "data_wait_share": "{:.0%} waiting for data",
    "peak_memory_gib": "{:.1f} GiB",
}


def format_values(values: Mapping[str, float], formats: Mapping[str, str] = FORMATS) -> str:
    """Return the shown values as `loss 0.1234, lr 1.00e-04, ...`, without missing ones."""
    return ", ".join(text.format(values[name]) for name, text in formats.items() if name in values)


class ProgressBar(tqdm):
    """A bar over optimizer steps that shows the newest values."""

    def show(self, values: Mapping[str, float]) -> None:
        """Show `values` from the next time that the bar is drawn."""
        self.set_postfix_str(format_values(values), refresh=False)


def progress_bar(total: int, initial: int = 0, disabled: bool = False) -> ProgressBar:
    """Return a bar over `total` steps, of which `initial` are done.

    Call `update()` after each step.
    """
    return ProgressBar(total=total, initial=initial, disable=disabled, unit="step", dynamic_ncols=True)
