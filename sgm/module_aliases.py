"""Former names of modules, which configurations may still use."""

MODULE_ALIASES = {"ema_adam": "sgm.ema_adam"}
