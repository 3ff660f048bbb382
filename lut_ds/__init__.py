"""lut_ds: masked-image pre-training of Vision Transformers with LUT and MAE on DeepSpeed, Triton and DALI."""

__version__ = "0.1.0"
