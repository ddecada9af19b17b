"""Names of modules that configurations may use although the modules have moved."""

MODULE_ALIASES = {"ema_adam": "sgm.ema_adam"}
