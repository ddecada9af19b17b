"""List the released models by family.

Nothing here imports PyTorch.
"""

CONFIGS = {  # the file in configs/ that describes the model
    "2b": "cogvideox_2b",
    "5b": "cogvideox_5b",
    "5b_i2v": "cogvideox_5b_i2v",
    "1.5": "cogvideox1.5_5b",
    "1.5_i2v": "cogvideox1.5_5b_i2v",
}
TITLES = {
    "2b": "CogVideoX-2B",
    "5b": "CogVideoX-5B",
    "5b_i2v": "CogVideoX-5B-I2V",
    "1.5": "CogVideoX1.5-5B",
    "1.5_i2v": "CogVideoX1.5-5B-I2V",
}
