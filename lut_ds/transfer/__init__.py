"""What a pre-trained encoder is worth: loading, export to timm, and evaluations that take a model and data and give a dict."""
