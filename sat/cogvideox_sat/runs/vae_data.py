"""The clips for VAE training: as in fine-tuning, without captions, of suitable lengths.

This module imports no PyTorch.
"""

from cogvideox_sat.configuration.argument_lists import VaeTrainingArguments
from cogvideox_sat.configuration.settings import DataSettings


def vae_data_settings(args: VaeTrainingArguments, time_factor: int) -> DataSettings:
    """Return the settings of the data.

    Args:
        time_factor: clips have `time_factor * k + 1` frames.
    """
    params = {"frame_multiple": time_factor, **(args.data_config.get("params") or {})}
    config = {**args.data_config, "params": params}
    return DataSettings.from_args(args, data_config=config, model_config=None, missing_label="ignore")
