"""Diffusion components of CogVideoX, built by name from YAML (`sgm.util.instantiate_from_config`)."""
