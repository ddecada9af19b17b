"""The modules that configurations name."""

from sgm.modules.encoders.modules import GeneralConditioner

UNCONDITIONAL_CONFIG = {"target": "sgm.modules.GeneralConditioner", "params": {"emb_models": []}}
"""The conditioner of a model without conditions."""

__all__ = ["UNCONDITIONAL_CONFIG", "GeneralConditioner"]
