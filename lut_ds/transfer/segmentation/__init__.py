"""Semantic segmentation: UPerNet on the features of a pre-trained ViT, in the layout and protocol of ADE20K."""
